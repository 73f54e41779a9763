"""The command: `python -m axpo_jax.report RUN [RUN ...]`; see docs/report.md."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from axpo_jax.report.runs import ReportError, load_runs


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status."""
  arguments = _parser().parse_args(argv)
  try:
    runs = load_runs(arguments.runs)
  except ReportError as error:
    print(f"report: {error}", file=sys.stderr)
    return 2
  try:
    from axpo_jax.report.page import render
  except ModuleNotFoundError as error:
    if error.name != "plotly":
      raise
    print("report: needs plotly: pip install 'axpo_jax[report]'", file=sys.stderr)
    return 2
  page = render(runs, limit=arguments.trajectories, side=arguments.image_side,
                title=arguments.title)
  out = pathlib.Path(arguments.out or runs[0].folder / "report.html")
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(page, encoding="utf-8", errors="replace")
  print(f"{out}  ({out.stat().st_size / 1e6:.1f} MB)")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m axpo_jax.report",
    description="One HTML page about a run, or several runs against the first.")
  parser.add_argument("runs", nargs="+", metavar="RUN",
                      help="a run's --workdir, or logs of any maker that diagnose reads")
  parser.add_argument("--out", help="the page (default: report.html in the first run)")
  parser.add_argument("--title", default="", help="by default the names of the runs")
  parser.add_argument("--trajectories", type=int, default=10_000, metavar="N",
                      help="at most so many trajectories (default 10,000)")
  parser.add_argument("--image-side", type=int, default=640, metavar="PIXELS",
                      help="longest side of images (default 640)")
  return parser


if __name__ == "__main__":
  sys.exit(main())
