"""How long the report's page takes to show: at least 10,000 synthetic rollouts, in headless Chromium.

  python benchmarks/report.py [--rollouts=10000] [--folder=/tmp/report_benchmark]

Prints the size of the page, the time to make it, the browser's own time to first paint and to the
filled list of trajectories. Needs the extras `report` and `test`, and Chromium.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax.report.__main__ import main as make_report
from tests.report.report_run import open_page, write_run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rollouts", type=int, default=10_000)
  parser.add_argument("--folder", default="/tmp/report_benchmark")
  arguments = parser.parse_args()
  folder = pathlib.Path(arguments.folder)
  # Whole steps: their continuations come on top.
  write_run(folder, steps=math.ceil(arguments.rollouts / 192), questions=16, rollouts=12)
  start = time.perf_counter()
  make_report([str(folder), "--trajectories", str(10 * arguments.rollouts)])  # all of them
  print(f"made in {time.perf_counter() - start:.1f} s")
  with open_page(folder / "report.html") as page:
    page.wait_for_selector("#list[data-ready]")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    ready = page.evaluate("performance.now()")
    print(f"first paint {paint / 1000:.2f} s, list filled within {ready / 1000:.2f} s, "
          f"{page.inner_text('#count')} trajectories")


if __name__ == "__main__":
  main()
