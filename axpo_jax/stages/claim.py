"""Which config a run's folder belongs to, and whether another one may continue the run.

In: the run's folder and a config. Out: config.json in it, or a ConfigError that lists the differences. A
config may differ in fields that do not change the run's numbers: where it logs, how often it saves, which
devices and servers do the work, and the number of steps where the learning rate does not depend on it. If
the folder's config lacks a field because an older version wrote it, the field counts as its default.
"""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.config import base_config
from axpo_jax.errors import ConfigError

_FILE = "config.json"
_SHOWN = 8  # differences in a message
# Patterns of the fields that may change when a run continues.
_FREE = (
  # A recipe's name: the fields that it sets are compared themselves.
  "rl.recipe", "log.*", "checkpoint.*", "compilation_cache", "eval.every", "rl.max_lost_steps", "rl.reference_offload",
  # Devices and servers: the numbers are the same up to rounding.
  "mesh.*", "batch.*", "model.remat", "model.attention", "model.attention_chunk",
  "rollout.urls", "rollout.sidecar.*", "rollout.sglang.*", "rollout.embedded.*",
  # Paths, and how fast requests are sent.
  "data.image_folder", "data.image_anywhere", "data.image_cache", "data.max_bad_share", "agent.audit",
  "agent.overlap_tools", "agent.reward_time_limit",
  "agent.judge.max_requests", "eval.judge.max_requests", "agent.run_limits.*", "agent.python.warm", "agent.python.max_concurrent",
  "agent.python.url", "agent.search.per_minute", "agent.search.max_concurrent",
  *(f"{endpoint}.{name}" for endpoint in ("teach", "eval.judge", "agent.judge")
    for name in ("url", "max_concurrent", "attempts", "timeout_s")),
)
# Exceptions: these change more than rounding.
_NOT_FREE = ("rollout.sglang.push_dtype", "rollout.embedded.dtype", "rollout.sidecar.device")
# Sections whose entries a config chooses.
_OPEN = ("sft.kinds.", "sft.teacher.", "data.miniworld.kinds.", "data.miniworld.families.")
# The stages that read a section. A change of it does not matter to the others.
_READERS = {"teach": {"teach"}, "sft": {"sft", "teach"}, "screen": {"screen"}, "rl": {"rl"},
            "optimizer": {"rl"}, "eval": {"rl", "eval"}}
_SCHEDULES = {"sft": "sft.optimizer", "rl": "optimizer"}


def check(root: epath.Path, config: ConfigDict) -> None:
  """Checks that this config may start or continue a run in a folder. Writes nothing.

  Raises:
    ConfigError: the folder cannot be written, or holds a run whose numbers another config defined.
  """
  _check_writable(root)
  path = root / _FILE
  if not path.exists():
    return
  try:
    there = dict(_flat(json.loads(path.read_text())))
  except (ValueError, AttributeError) as error:
    raise ConfigError(f"{path} is damaged ({error}): restore it, or choose another --workdir") from error
  if found := differences(there, dict(_flat(_json(config))), root):
    more = f" and {len(found) - _SHOWN} more fields" if len(found) > _SHOWN else ""
    raise ConfigError(
      f"{root} holds a run with another configuration: {'; '.join(found[:_SHOWN])}{more}. Resume it with "
      "its own, or choose another --workdir")


def take(root: epath.Path, config: ConfigDict) -> None:
  """Writes the config into the folder. Raises ConfigError where that cannot be."""
  try:
    paths.make(root)
    paths.write_text(root / _FILE, json.dumps(_json(config), indent=2, sort_keys=True))
  except OSError as error:
    raise ConfigError(f"--workdir={str(root)!r} cannot be written: {error}") from error


def reopen(root: epath.Path, config: ConfigDict) -> None:
  """Renames the policy of a finished stage if the config now asks for more steps, so that the stage continues."""
  for stage in _SCHEDULES:
    policy, done = root / stage / "policy", steps_done(root, stage)
    if stage in config.stages and done and done < config[stage].steps and policy.exists():
      print(f"{stage}: continues from step {done}; its policy of that step is now policy_{done}")
      paths.move(policy, root / stage / f"policy_{done}", first=_FILE)


def steps_done(root: epath.Path, stage: str) -> int:
  """The newest checkpoint of a stage; 0 where there is none."""
  folder = root / stage / "checkpoints"
  steps = [path.name for path in folder.iterdir()] if folder.exists() else []
  return max((int(name) for name in steps if name.isdigit()), default=0)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], root: epath.Path) -> list[str]:
  """The fields that differ and define the run's numbers, one line each: "rl.num_rollouts: 8 there, 16 here".

  Args:
    there, here: dotted names -> values, of the folder's config and of the current one.
    root: the run's folder, which shows the steps that each stage has done.
  """
  default = dict(_flat(_json(base_config())))
  ran = set(there.get("stages") or here["stages"])  # a stage that is added has not begun
  out = []
  for name in sorted({*here, *there}):
    if name not in here and not name.startswith(_OPEN):
      continue  # a field that this version has no more
    before = there.get(name, None if name.startswith(_OPEN) else default.get(name))
    now = here.get(name)
    readers = _READERS.get(name.partition(".")[0], ran)
    if before == now or not ran & readers or _may_change(name, before, now):
      continue
    reason = ""
    if name in ("sft.steps", "rl.steps"):
      reason = _why_not(name.partition(".")[0], here, root)
      if not reason:
        continue
    out.append(f"{name}: {_said(before)} there, {_said(now)} here{reason}")
  return out


def _may_change(name: str, before: Any, now: Any) -> bool:
  if name == "stages":  # stages may be appended
    return isinstance(before, list) and now[:len(before)] == before
  return (name not in _NOT_FREE
          and any(fnmatch.fnmatchcase(name, pattern) for pattern in _FREE))


def _why_not(stage: str, here: Mapping[str, Any], root: epath.Path) -> str:
  """Why a stage's number of steps cannot change; empty if it can."""
  section = _SCHEDULES[stage]
  if here[f"{section}.schedule"] != "constant" or here[f"{section}.warmup"]:
    return f" (its learning rate depends on them: config.{section}.schedule, .warmup)"
  later = here["stages"][here["stages"].index(stage) + 1:] if stage in here["stages"] else []
  if begun := [name for name in later if (root / name).exists()]:
    return f" (stage {begun[0]!r} has started from its policy)"
  if here[f"{stage}.steps"] < (done := steps_done(root, stage)):
    return f" (it has done {done})"
  if "://" in os.fspath(root) and (root / stage / "policy").exists():
    return " (it is finished, and an object store cannot set its policy aside: copy the run to a folder)"
  return ""


def _said(value: Any) -> str:
  return "none" if value is None else json.dumps(value)


def _json(config: ConfigDict) -> Any:
  return json.loads(config.to_json_best_effort())


def _flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in section.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{path}{name}.")
    else:
      yield path + name, value


def _check_writable(root: epath.Path) -> None:
  """Checks that the folder exists or can be made; on an object store, that the store can be reached."""
  if paths.is_remote(root):
    paths.check_store(root)
    return
  nearest = pathlib.Path(os.path.abspath(root))
  while not nearest.exists():
    nearest = nearest.parent
  if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
    raise ConfigError(f"--workdir={str(root)!r} cannot be written: {nearest} is "
                      f"{'read-only for this user' if nearest.is_dir() else 'not a folder'}")
