"""The command: packs runs, and makes a results page's tables and figures from what was packed.

  python -m experiments.evidence pack runs/evidence --into docs/results/raw
  python -m experiments.evidence page docs/results.md

`page` reads the folder raw/ in the folder that has the page's name (docs/results/raw), draws the figures
that the page asks for beside it, and writes every table and figure between its marks in the page, `<!-- table: main -->` or
`<!-- figure: curves -->` and `<!-- end -->`. The text around them is left alone. Runs that repeat
those, wherever they were made, are packed into repeat/, beside raw/: a table tells whether they agree.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from experiments.evidence import figures, horizon, store, tables
from experiments.evidence.tables import Comparison

TABLES = tables.TABLES | horizon.TABLES
FIGURES = figures.FIGURES | horizon.FIGURES

MARKS = re.compile(r"(<!-- (table|figure): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status."""
  arguments = _parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except (store.StoreError, OSError) as error:
    print(f"results: {error}", file=sys.stderr)
    return 2


def _pack(arguments: argparse.Namespace) -> int:
  unfinished = []
  folders = sorted(path.parent for path in arguments.sweep.glob("*/config.json"))
  if not folders:
    raise store.StoreError(f"{arguments.sweep} holds no runs (folders with a config.json): name the "
                           "--workdir of a sweep")
  for folder in folders:
    if folder.name.endswith(store.FULL):
      continue  # packed with its run
    run = store.pack(folder)
    if run is None:
      unfinished.append(folder.name)
      continue
    path = store.write(run, arguments.into)
    print(f"{path}  ({path.stat().st_size / 1e3:.0f} kB)")
  if unfinished:
    print(f"not evaluated, so left out: {', '.join(unfinished)}")
  return 0


def _page(arguments: argparse.Namespace) -> int:
  page: pathlib.Path = arguments.page
  if not page.is_file():
    raise store.StoreError(f"{page} is not a file: name the page, such as docs/results.md")
  folder = page.with_suffix("")
  comparison = packed(folder)
  text = filled(page.read_text(encoding="utf-8"), comparison, folder.name)
  page.write_text(text, encoding="utf-8")
  print(page)
  for name in dict.fromkeys(name for _, kind, name, _ in MARKS.findall(text) if kind == "figure"):
    print(figures.draw(FIGURES[name][1](comparison), folder / f"{name}.png"))
  return 0


def packed(folder: pathlib.Path) -> Comparison:
  """The runs of a page's folder.

  Raises:
    StoreError: there are none, or a file is damaged.
  """
  again = folder / "repeat"
  return Comparison(store.load(folder / "raw"),
                    again=Comparison(store.load(again)) if again.exists() else None)


def filled(text: str, comparison: Comparison, folder: str) -> str:
  """The page with its tables made anew, and its figures linked to in `folder`.

  Raises:
    StoreError: a mark names no table or figure.
  """
  def content(match: re.Match) -> str:
    opening, kind, name, closing = match.groups()
    known = TABLES if kind == "table" else FIGURES
    if name not in known:
      raise store.StoreError(f"the page asks for a {kind} {name!r}; there are {sorted(known)}")
    inside = (TABLES[name](comparison) if kind == "table"
              else f"![{FIGURES[name][0]}]({folder}/{name}.png)")
    return f"{opening}{inside}\n{closing}"
  return MARKS.sub(content, text)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m experiments.evidence",
                                   description="Packs the runs of a sweep; makes a results page.")
  commands = parser.add_subparsers(required=True)
  pack = commands.add_parser("pack", help="finished runs as small files")
  pack.add_argument("sweep", type=pathlib.Path, help="the sweep's --workdir")
  pack.add_argument("--into", type=pathlib.Path, required=True, metavar="FOLDER")
  pack.set_defaults(run=_pack)
  page = commands.add_parser("page", help="tables and figures of a page, from packed runs")
  page.add_argument("page", type=pathlib.Path, help="such as docs/results.md")
  page.set_defaults(run=_page)
  return parser


if __name__ == "__main__":
  sys.exit(main())
