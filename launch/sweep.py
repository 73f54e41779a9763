"""Runs a config at many sweep points: one process of launch/main.py per point, and a table at the end.

  python launch/sweep.py --config=configs/axpo_tiny.py --workdir=runs/sweep --parallel=2 \
    --sweep config.seed=0,1,2 --sweep config.rl.recipe=grpo,axpo -- --config.rl.steps=10

Several --sweep flags give all combinations. For other sets of points, or values with commas, write a Python file
with a function `points()` that returns a list of {"config.seed": 0, ...}: --points=my_sweep.py. Such a point may
also have a "name", which becomes its folder's name, and "after", the name of a point that must be done first.
"{workdir}" in a value is the sweep's folder, so that a point can start from another's result:

  {"name": "rl-0", "after": "sft-0", "config.model.checkpoint": "{workdir}/sft-0/sft/policy", ...}

Flags after `--` go to every point.

The same command run again continues the sweep: finished points are skipped, others resume from their
checkpoints. A point that fails does not stop the others; its log is in its folder. --only selects points by name,
so that several machines can share a sweep. --print runs nothing and prints one command per point, for a
cluster's scheduler. --parallel=0 prints the table of the finished points. Points that differ only in config.seed
share a line of the table: mean and 95 % interval.
"""

import collections
import concurrent.futures
import dataclasses
import fnmatch
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from absl import app, flags
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax import markdown, paths
from axpo_jax.config_checks import validate
from axpo_jax.errors import ConfigError
from axpo_jax.eval import statistics
from axpo_jax.stages import summary
from axpo_jax.stages.metrics import read_metrics
from launch import command

_CONFIG = flags.DEFINE_string("config", None, "Config file of all points.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder with one folder per point.")
_SWEEP = flags.DEFINE_multi_string("sweep", [], "config.<field>=<value>,<value>,...")
_POINTS = flags.DEFINE_string("points", None, "Python file with points(), instead of --sweep.")
_ONLY = flags.DEFINE_list("only", ["*"], "Points whose names match one of these patterns (*, ?).")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Points that run at once; 0: print only the table.", lower_bound=0)
_PRINT = flags.DEFINE_bool("print", False, "Print one command per point and stop.")
_METRICS = flags.DEFINE_list(
  "metrics", ["eval/pass_at_1", "eval/pass_at_4", "eval/tool_attempt_rate"],
  "Columns of the table: the last value of each.")
flags.mark_flags_as_required(["config", "workdir"])

MAIN = pathlib.Path(__file__).resolve().parent / "main.py"
_SEED = "config.seed"
_NAME, _AFTER = "name", "after"
# Folder of compiled programs, shared by the points of a sweep: compiling is most of a short run.
_COMPILED = "compiled"
# Written to a point's folder when it has succeeded; holds its command.
_DONE = "sweep_done.json"
# The code that first ran a point, and its machine; for reports.
_MADE_BY = "made_by.json"
_LONGEST_NAME = 120


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of the sweep.

  Attributes:
    after: folder of the point that must be done first; None: no other.
  """

  overrides: Mapping[str, str]
  folder: epath.Path
  command: tuple[str, ...]
  after: epath.Path | None = None

  @property
  def ready(self) -> bool:
    return self.after is None or (self.after / _DONE).exists()

  @property
  def done(self) -> bool:
    file = self.folder / _DONE
    return file.exists() and json.loads(file.read_text()) == list(self.command)

  def run(self) -> str:
    """Runs the point to its end; returns the error, or an empty text."""
    self.folder.mkdir(parents=True, exist_ok=True)
    log, made_by = self.folder / "log.txt", self.folder / _MADE_BY
    if not made_by.exists():
      made_by.write_text(json.dumps(_made_by()))
    with open(log, "a") as file:
      code = subprocess.run(self.command, stdout=file, stderr=subprocess.STDOUT,
                            env=_environment(self.folder.parent / _COMPILED)).returncode
    if code:
      lines = log.read_bytes().decode(errors="replace").strip().splitlines()
      return f"exit code {code}, {log}: {lines[-1] if lines else ''}"
    (self.folder / _DONE).write_text(json.dumps(self.command))
    return ""


def _made_by() -> dict[str, str]:
  """The commit (empty outside of a git checkout) and the machine."""
  git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=MAIN.parent, text=True,
                       capture_output=True)
  return {"commit": git.stdout.strip(),
          "machine": f"{os.cpu_count()} x {platform.machine()}, {platform.system()}"}


def _environment(compiled: pathlib.Path) -> dict[str, str]:
  """This process's environment, with a folder for compiled programs unless it has one already."""
  return {"JAX_COMPILATION_CACHE_DIR": str(compiled.resolve()),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5", **os.environ}


def main(argv: list[str]) -> None:
  points = make_points(argv[1:])
  check(points, wholly=not _PRINT.value and bool(_PARALLEL.value))
  if _PRINT.value:
    print("\n".join(shlex.join(point.command) for point in points))
    return
  if paths.is_remote(points[0].folder):
    raise app.UsageError(f"--workdir={_WORKDIR.value}: a sweep keeps its logs in a local folder; give one, or "
                         "--print and start the points yourself")
  failures = _run(points, _PARALLEL.value) if _PARALLEL.value else {}
  print(f"\n{table(points, _METRICS.value)}")
  for name, error in failures.items():
    print(f"FAILED {name}: {error}", file=sys.stderr)
  sys.exit(bool(failures))


def make_points(common: Sequence[str]) -> list[Point]:
  """The points of the flags; `common` goes to each.

  Raises:
    app.UsageError: flags that make no sweep.
  """
  if bool(_POINTS.value) == bool(_SWEEP.value):
    raise app.UsageError("give --sweep config.<field>=<value>,<value> (once or more) or --points=<file>")
  if stray := [text for text in common if not text.startswith("--")]:
    raise app.UsageError(f"Unexpected arguments {stray}: overrides for all points are "
                         "-- --config.<field>=<value>")
  points = [_point(overrides, common) for overrides in
            (_from_file(_POINTS.value) if _POINTS.value else _product(_SWEEP.value))]
  names = collections.Counter(point.folder.name for point in points)
  if twice := [name for name, count in names.items() if count > 1]:
    raise app.UsageError(f"points that are there twice: {twice}")
  if unknown := {p.after.name for p in points if p.after} - names.keys():
    raise app.UsageError(f"points that others are after, and that are not there: {sorted(unknown)}")
  chosen = [point for point in points
            if any(fnmatch.fnmatch(point.folder.name, pattern) for pattern in _ONLY.value)]
  if not chosen:
    raise app.UsageError(f"--only={','.join(_ONLY.value)} matches none of {sorted(names)}")
  return chosen


def check(points: Sequence[Point], *, wholly: bool) -> None:
  """Reads the config of every point before the first one runs.

  Args:
    wholly: also validate it, except for points that start from results that are not there yet.

  Raises:
    ConfigError: the error of the first invalid point.
  """
  for point in points:
    arguments = [flag for flag in point.command[2:] if re.match(r"--config[.=]", flag)]
    try:
      command.check_config_flags(arguments)
      config = command.read_config(arguments)
      if wholly and point.ready and not point.done:
        validate(config)
    except (flags.Error, ConfigError, ValueError, TypeError) as error:
      raise ConfigError(f"point {point.folder.name}: {error}") from error


def _product(axes: Sequence[str]) -> list[dict[str, str]]:
  parsed = []
  for axis in axes:
    name, equals, values = axis.partition("=")
    if not (name.startswith("config.") and equals and values):
      raise app.UsageError(f"--sweep {axis!r}: write config.<field>=<value>,<value>")
    parsed.append([(name, value) for value in values.split(",")])
  return [dict(combination) for combination in itertools.product(*parsed)]


def _from_file(path: str) -> list[dict[str, str]]:
  if not pathlib.Path(path).is_file():
    raise app.UsageError(f"--points={path}: there is no such file")
  found = runpy.run_path(path)
  if "points" not in found:
    raise app.UsageError(f"--points={path} has no function points()")
  points = found["points"]()
  if stray := {name for point in points for name in point
               if not name.startswith("config.")} - {_NAME, _AFTER}:
    raise app.UsageError(f"{path}: points may have config.<field>, {_NAME!r} and {_AFTER!r}, not "
                         f"{sorted(stray)}")
  return [{name: str(value) for name, value in point.items()} for point in points]


def _point(given: Mapping[str, str], common: Sequence[str]) -> Point:
  root = paths.parse(_WORKDIR.value, "--workdir")
  overrides = {name: value.replace("{workdir}", str(root)) for name, value in given.items()
               if name not in (_NAME, _AFTER)}
  folder = root / (given.get(_NAME) or _name(overrides))
  command = [sys.executable, str(MAIN), f"--config={_CONFIG.value}", f"--workdir={folder}", *common,
             *(f"--{name}={value}" for name, value in overrides.items())]
  after = given.get(_AFTER)
  return Point(overrides, folder, tuple(command), root / after if after else None)


def _name(overrides: Mapping[str, str]) -> str:
  """A folder name from the point's overrides."""
  name = ",".join(f"{key.removeprefix('config.')}={value}" for key, value in overrides.items())
  name = name.replace("/", "_")
  if len(name) <= _LONGEST_NAME:
    return name
  return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _run(points: Sequence[Point], parallel: int) -> dict[str, str]:
  """Runs the points that are not done, each after the point it names in "after"; returns name -> error."""
  failures: dict[str, str] = {}
  running: dict[concurrent.futures.Future, Point] = {}
  waiting = [point for point in points if not point.done]
  print(f"{len(points)} points, {len(points) - len(waiting)} of them done before", flush=True)
  start, to_do, ended_now = time.monotonic(), len(waiting), 0
  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    while waiting or running:
      ready = [point for point in waiting if point.ready][:parallel - len(running)]
      running |= {pool.submit(point.run): point for point in ready}
      waiting = [point for point in waiting if point not in ready]
      if not running:
        break
      ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
      for job in ended:
        name, error = running.pop(job).folder.name, job.result()
        ended_now += 1
        # Running points count as not started, so the estimate is rather too long.
        left = (time.monotonic() - start) / ended_now * (to_do - ended_now)
        more = f"; {ended_now} of {to_do}, about {summary.duration(left)} left" if ended_now < to_do else ""
        print(f"{name}: {'FAILED' if error else 'done'}{more}", flush=True)
        failures |= {name: error} if error else {}
  return failures | {point.folder.name: f"{point.after.name} is not done, which comes before it"
                     for point in waiting}


def table(points: Sequence[Point], metrics: Sequence[str]) -> str:
  """Markdown: a line for every setting, averaged over its seeds."""
  groups: dict[tuple, list[Point]] = collections.defaultdict(list)
  for point in points:
    groups[tuple((k, v) for k, v in point.overrides.items() if k != _SEED)].append(point)
  rows = [["point", "finished", *metrics]]
  for setting, members in groups.items():
    finished = [point for point in members if point.done]
    name = ", ".join(f"{key.removeprefix('config.')}={value}" for key, value in setting) or "all"
    lines = [read_metrics(point.folder) for point in finished]
    rows.append([name, f"{len(finished)} of {len(members)}",
                 *(_cell([_last(run, metric) for run in lines]) for metric in metrics)])
  return markdown.table(rows)


def _last(lines: Sequence[Mapping[str, float]], metric: str) -> float | None:
  return next((line[metric] for line in reversed(lines) if line.get(metric) is not None), None)


def _cell(values: Sequence[float | None]) -> str:
  """Mean and half the width of its 95 % interval."""
  found = statistics.over_seeds([value for value in values if value is not None])
  if found is None:
    return "-"
  return f"{found.mean:.4f}" + ("" if math.isnan(found.low) else f" ± {found.high - found.mean:.4f}")


if __name__ == "__main__":
  command.run(main)
