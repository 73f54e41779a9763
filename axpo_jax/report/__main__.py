"""The command: `python -m axpo_jax.report RUN [RUN ...]`; see docs/report.md."""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

from axpo_jax.report import watch
from axpo_jax.report.runs import ReportError, load_runs


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status."""
  arguments = _parser().parse_args(argv)
  try:
    runs = load_runs(arguments.runs) if not arguments.watch else ()
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
  make = functools.partial(render, limit=arguments.trajectories, side=arguments.image_side, title=arguments.title)
  if arguments.watch:
    return _watch(arguments, functools.partial(make, live=True))
  page = make(runs)
  out = pathlib.Path(arguments.out or runs[0].folder / "report.html")
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(page, encoding="utf-8", errors="replace")
  print(f"{out}  ({out.stat().st_size / 1e6:.1f} MB)")
  return 0


def _watch(arguments: argparse.Namespace, render: Callable[..., str]) -> int:
  try:
    serving = watch.server(watch.Watched(arguments.runs, render), arguments.port)
  except OSError as error:
    print(f"report: --port={arguments.port}: {error.strerror}", file=sys.stderr)
    return 2
  print(f"http://127.0.0.1:{serving.server_port}  (Ctrl-C ends it; from elsewhere: ssh -L)", flush=True)
  with serving, contextlib.suppress(KeyboardInterrupt):
    serving.serve_forever()
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m axpo_jax.report",
    description="One HTML page about a run, or several runs against the first.")
  parser.add_argument("runs", nargs="+", metavar="RUN",
                      help="a run's --workdir, or logs of any maker that diagnose reads")
  parser.add_argument("--watch", action="store_true",
                      help="serve the page to this machine's browser, and follow runs that are going on")
  parser.add_argument("--port", type=int, default=8300, help="of --watch; 0 takes a free one (default 8300)")
  parser.add_argument("--out", help="the page (default: report.html in the first run)")
  parser.add_argument("--title", default="", help="by default the names of the runs")
  parser.add_argument("--trajectories", type=int, default=10_000, metavar="N",
                      help="at most so many trajectories (default 10,000)")
  parser.add_argument("--image-side", type=int, default=640, metavar="PIXELS",
                      help="longest side of images (default 640)")
  return parser


if __name__ == "__main__":
  sys.exit(main())
