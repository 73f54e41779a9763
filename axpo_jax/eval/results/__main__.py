"""The command: packs runs, and makes a results page's tables and figures from what was packed.

  python -m axpo_jax.eval.results pack runs/evidence --into docs/results/raw
  python -m axpo_jax.eval.results page docs/results.md

`page` reads the folder raw/ in the page's own folder of its name (docs/results/raw), draws the figures
beside it, and writes every table between its marks in the page, `<!-- table: main -->` and
`<!-- end -->`. The text around them is left alone.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

from axpo_jax.eval.results import figures, store
from axpo_jax.eval.results.tables import TABLES, Comparison

_MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status."""
  arguments = _parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except store.StoreError as error:
    print(f"results: {error}", file=sys.stderr)
    return 2


def _pack(arguments: argparse.Namespace) -> int:
  commit, unfinished = _commit(), []
  for folder in sorted(path.parent for path in arguments.sweep.glob("*/config.json")):
    run = store.pack(folder, commit)
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
  folder = page.with_suffix("")
  comparison = Comparison(store.load(folder / "raw"))
  page.write_text(filled(page.read_text(encoding="utf-8"), comparison), encoding="utf-8")
  for path in (page, *figures.draw(comparison, folder)):
    print(path)
  return 0


def filled(text: str, comparison: Comparison) -> str:
  """The page with its tables made anew.

  Raises:
    StoreError: a mark names no table.
  """
  def table(match: re.Match) -> str:
    if match[2] not in TABLES:
      raise store.StoreError(f"the page asks for a table {match[2]!r}; there are {sorted(TABLES)}")
    return f"{match[1]}{TABLES[match[2]](comparison)}\n{match[3]}"
  return _MARKS.sub(table, text)


def _commit() -> str:
  """Of the code that runs here; "" outside of a checkout."""
  done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], text=True, capture_output=True,
                        cwd=pathlib.Path(__file__).parent)
  return done.stdout.strip() if done.returncode == 0 else ""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m axpo_jax.eval.results",
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
