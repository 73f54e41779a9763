"""A whole run: the stages a config names, one after the other, each resumable.

A stage begins with a policy folder and ends with one (Hugging Face layout), which is the next
stage's beginning. A stage whose folder is there is done. Stages that only sample ("teach", "screen",
"eval") end with the policy that they began with; later stages read their shards.
"""

import json
import pathlib

import jax
from ml_collections import ConfigDict

from axpo_jax import processes
from axpo_jax.eval import sampling, summary
from axpo_jax.model import programs
from axpo_jax.train import build, claim, devices, distributed, machine, preflight, rl, sft
from axpo_jax.train.metrics import read_metrics

_STAGES = {"teach": sampling.teach, "sft": sft.run, "screen": sampling.screen, "rl": rl.run,
           "eval": sampling.evaluation}


@processes.ending_together()
def run(config: ConfigDict, workdir: str) -> None:
  """Runs or resumes every stage, then prints the tables and draws the curves.

  Raises:
    ConfigError: a field cannot work, or `workdir` belongs to a run with another config.
  """
  root = pathlib.Path(workdir)
  machine.check_processes(config, jax.process_count())
  distributed.on_main(claim.check, root, config)
  programs.use_cache(config.compilation_cache)
  bench = build.workbench(config, root)
  # What fails up to `take` leaves the folder as it was.
  distributed.on_main(preflight.check_files, config, bench)
  distributed.on_main(devices.check, config, bench)
  distributed.on_main(preflight.start_tools, config, bench)
  distributed.on_main(claim.take, root, config)
  distributed.on_main(claim.reopen, root, config)
  policy, first_step = config.model.checkpoint, 0
  for stage in config.stages:
    folder = root / stage / "policy"
    if distributed.on_main((folder / "config.json").exists):
      _say(f"{stage}: done before, its policy is {folder}")
      policy = folder
    else:
      policy = _STAGES[stage](config, bench, str(policy), root, first_step)
    first_step += config[stage].get("steps", 0)
  distributed.on_main(report, root)


def _say(text: str) -> None:
  if distributed.is_main():
    print(text)


def report(root: pathlib.Path) -> None:
  """The tables on the terminal and in summary.md, the curves in curves.png."""
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
    (root / "summary.md").write_text("\n\n".join(parts) + "\n")
  print("\n" + "\n\n".join([*parts, "\n".join(files)]))
