"""Puts the page together: HTML that shows at once, and behind it compressed data that scripts unpack
when they are needed.

In: runs. Out: one HTML file without a link to anywhere.
"""

from __future__ import annotations

import base64
import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from axpo_jax.diagnose.figures import diagnose
from axpo_jax.diagnose.output import unread_warnings
from axpo_jax.diagnose.reading import read
from axpo_jax.report import charts, seeds, tables, trajectories
from axpo_jax.report.pictures import Pictures
from axpo_jax.report.runs import Run
from axpo_jax.report.seeds import Method
from axpo_jax.rollouts.shards import FORCED
from axpo_jax.stages.summary import duration

_ASSETS = pathlib.Path(__file__).parent / "assets"
_SCRIPTS = ("data.js", "charts.js", "tokens.js", "trajectory.js", "browser.js")


def render(runs: Sequence[Run], *, limit: int = 10_000, side: int = 640, title: str = "", live: bool = False) -> str:
  """The page.

  Args:
    runs: one, or several to compare with the first.
    limit: how many trajectories to put in.
    side: longest side of an image in pixels.
    title: of the page; by default the names of the runs, or of the methods that they are seeds of.
    live: it is served by `watch`, and asks for newer ones.
  """
  methods = seeds.methods(runs)
  over_seeds = len(methods) < len(runs)
  pictures = Pictures(side)
  collection = trajectories.collect(runs, pictures, limit)
  figures = charts.charts(methods)
  # Ids of the data blocks that the scripts read; all but images are compressed.
  blocks = {"index": pack(collection.index),
            "charts": pack([figure.figure for figure in figures]),
            **{f"chunk-{i}": pack(chunk) for i, chunk in enumerate(collection.chunks)},
            "plotly": pack(get_plotlyjs()) if figures else ""}
  environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True,
                                   trim_blocks=True, lstrip_blocks=True)
  return environment.get_template("page.html.j2").render(
    title=title or " · ".join(method.name for method in methods), runs=runs, methods=methods,
    over_seeds=over_seeds, warnings=[(method, _warnings(method)) for method in methods],
    glance=seeds.glance(methods) if over_seeds else tables.glance(runs),
    benchmarks=seeds.benchmark_table(methods) if over_seeds else tables.benchmark_table(runs),
    figures=figures, collection=collection, count=len(collection.index["rows"]),
    facts=_facts(runs, methods, collection, live), live=live,
    blocks=blocks, images=pictures.found,
    style=_asset("report.css"), scripts=[_asset(name) for name in (*_SCRIPTS, *(("live.js",) if live else ()))])


def pack(value: Any) -> str:
  """JSON (a string as it is), gzip, base64: what `data.js` unpacks."""
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False,
                                                         separators=(",", ":"))
  # mtime: the same run makes the same page.
  return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def _asset(name: str) -> str:
  return (_ASSETS / name).read_text(encoding="utf-8")


def _warnings(method: Method) -> list[tuple[str, str]]:
  """(run, warning), of what the policy did in training; of a run that did not train, in all that it
  chose to do."""
  found = []
  for run in method.runs.values():
    if run.logs is not None:
      texts = unread_warnings(run.logs) + diagnose(run.logs.traces)["warnings"]
      found += [(run.name, warning["text"]) for warning in texts]
    paths = run.training_dumps or [path for path in run.dumps if path.parent.name != FORCED]
    found += [(run.name, warning["text"]) for warning in (diagnose(read(paths).traces)["warnings"]
                                                          if paths else ())]
  return found


def _facts(runs: Sequence[Run], methods: Sequence[Method],
           collection: trajectories.Collection, live: bool) -> list[str]:
  """What the page is about, in a few words each."""
  left = [run.metrics[-1]["time/left_s"] for run in runs if run.metrics and run.metrics[-1].get("time/left_s")]
  steps = [run.metrics[-1]["step"] for run in runs if run.metrics]
  facts = [f"{len(methods)} methods" if 1 < len(methods) < len(runs) else "",
           f"{len(runs)} runs" if len(runs) > 1 else "", f"{max(steps)} steps" if steps else "",
           f"about {duration(max(left))} left" if live and left else "",
           f"{len(collection.index['rows']):,} of {collection.total:,} dumped trajectories"
           if collection.total else "",
           f"damaged lines left out: {collection.damaged:,}" if collection.damaged else "",
           *(f"records not readable: {len(run.logs.problems):,}" for run in runs
             if run.logs and run.logs.problems)]
  return [fact for fact in facts if fact]
