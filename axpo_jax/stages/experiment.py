"""A whole run: the stages that a config names, one after the other, each resumable.

A stage takes a policy folder (Hugging Face layout) and returns one for the next stage. A stage whose policy
folder exists is skipped. Stages that only sample ("teach", "screen", "eval") return the policy that they were
given; later stages read their shards.
"""

import dataclasses
import json

import jax
from etils import epath
from ml_collections import ConfigDict

from axpo_jax import paths, processes
from axpo_jax.config_queries import apply_recipe
from axpo_jax.errors import ConfigError
from axpo_jax.model import programs
from axpo_jax.stages import (
  claim,
  devices,
  distributed,
  machine,
  preflight,
  rl,
  sampling,
  sft,
  summary,
  toolbox,
  trackers,
)
from axpo_jax.stages.context import RunContext, run_context
from axpo_jax.stages.metrics import read_metrics
from axpo_jax.train import preemption

_STAGES = {"teach": sampling.teach, "sft": sft.run, "screen": sampling.screen, "rl": rl.run,
           "eval": sampling.evaluation}


@processes.ending_together()
def run(config: ConfigDict, workdir: str) -> None:
  """Runs or resumes every stage, then prints the tables and draws the curves.

  Raises:
    ConfigError: an invalid field, or `workdir` belongs to a run with another config.
  """
  apply_recipe(config)
  root = paths.workdir(workdir)
  machine.check_processes(config, jax.process_count())
  _check_folders(config, root)
  distributed.on_main(claim.check, root, config)
  programs.use_cache(config.compilation_cache)
  context = run_context(config, root)
  # A failure before `claim.take` leaves the folder unchanged.
  distributed.on_main(preflight.check_files, config, context)
  distributed.on_main(devices.check, config, context)
  distributed.on_main(preflight.start_tools, config, context)
  distributed.on_main(claim.take, root, config)
  distributed.on_main(claim.reopen, root, config)
  context = dataclasses.replace(
    context, trackers=trackers.start(config, root) if distributed.is_main() else ())
  try:
    _run_stages(config, context, root)
  finally:
    toolbox.flush()
    for tracker in context.trackers:
      tracker.close()
  distributed.on_main(report, root)


def _run_stages(config: ConfigDict, context: RunContext, root: epath.Path) -> None:
  policy, first_step = config.model.checkpoint, 0
  for stage in config.stages:
    distributed.on_main(preemption.check)
    folder = root / stage / "policy"
    if distributed.on_main((folder / "config.json").exists):
      _say(f"{stage}: already done, its policy is {folder}")
      policy = folder
    else:
      policy = _STAGES[stage](config, context, str(policy), root, first_step)
    first_step += config[stage].get("steps", 0)


def _say(text: str) -> None:
  if distributed.is_main():
    print(text)


def _check_folders(config: ConfigDict, root: epath.Path) -> None:
  """Refuses folders that SGLang servers cannot read: object stores, and folders that only this machine sees."""
  section = config.rollout.sglang
  for name in ("push_folder", "image_folder"):
    if section[name] and paths.is_remote(paths.parse(section[name], f"config.rollout.sglang.{name}")):
      raise ConfigError(f"config.rollout.sglang.{name}={section[name]!r} must be a folder that trainer "
                        "and servers both see, such as NFS or a mounted bucket")
  elsewhere = config.rollout.urls or jax.process_count() > 1
  if (config.rollout.engine == "sglang" and paths.is_remote(root) and elsewhere
      and not section.push_folder):
    raise ConfigError(f"--workdir={str(root)!r} cannot hold the weights on their way to the servers: set "
                      "config.rollout.sglang.push_folder to a folder that trainer and servers both see")


def report(root: epath.Path) -> None:
  """Writes the tables to the terminal and summary.md, and the curves to curves.png."""
  lines, parts, files = read_metrics(root), [], []
  if lines:
    parts.append(summary.table(lines))
    summary.plot(lines, root / "curves.png", title=root.name)
    files += [f"metrics: {root / 'metrics.jsonl'}", f"curves:  {root / 'curves.png'}"]
  results = root / "eval" / sampling.RESULTS_FILE
  if results.exists():
    parts.append(summary.results_table(json.loads(results.read_text())))
    files.append(f"results: {results}")
  if parts:
    paths.write_text(root / "summary.md", "\n\n".join(parts) + "\n")
  print("\n" + "\n\n".join([*parts, "\n".join(files)]))
