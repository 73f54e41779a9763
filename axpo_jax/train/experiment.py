"""A whole run: the stages a config names, one after the other, each resumable.

A stage begins with a policy folder and ends with one (Hugging Face layout), which is the next
stage's beginning. A stage whose folder is there is done.
"""

import asyncio
import pathlib

from ml_collections import ConfigDict

from axpo_jax.config import ConfigError
from axpo_jax.eval import evaluate, summary
from axpo_jax.train import build, distributed, rl, sft
from axpo_jax.train.metrics import METRICS_FILE, read_metrics


def _evaluate(config: ConfigDict, bench: build.Workbench, policy: str, root: pathlib.Path,
              first_step: int) -> str:
  """The stage "eval": measures the policy and leaves it as it is."""
  if distributed.on_main(lambda: evaluate.measured(read_metrics(root), first_step)):
    _say(f"eval: done before, see {root / METRICS_FILE}")
    return policy
  params = build.load_params(bench, policy, config.seed)
  with (build.servers(config, policy, root / "eval") as urls, asyncio.Runner() as runner,
        distributed.metrics_writer(root, resume_step=first_step,
                                   tensorboard=config.log.tensorboard) as writer):
    engine = build.engine(config, bench, params, urls, root / "eval")
    try:
      runner.run(engine.update_weights(params, 0))
      writer.write(first_step, runner.run(distributed.on_main_async(
        lambda: evaluate.run(config, bench, engine))))
    finally:
      runner.run(engine.close())
  return policy


_STAGES = {"sft": sft.run, "rl": rl.run, "eval": _evaluate}


def run(config: ConfigDict, workdir: str) -> None:
  """Runs or resumes every stage, then prints the table and draws the curves.

  Raises:
    ConfigError: a field cannot work, or `workdir` belongs to a run with another config.
  """
  root = pathlib.Path(workdir)
  distributed.on_main(_claim, root, config)
  bench = build.workbench(config, root)
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


def _claim(root: pathlib.Path, config: ConfigDict) -> None:
  """Writes the config, or checks that the folder's run has the same."""
  path, text = root / "config.json", config.to_json_best_effort(indent=2, sort_keys=True)
  if path.exists() and path.read_text() != text:
    raise ConfigError(f"{root} holds a run with another configuration (see {path}): resume it with "
                      "its own, or choose another --workdir")
  root.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def report(root: pathlib.Path) -> None:
  """The table on the terminal and in summary.md, the curves in curves.png."""
  lines = read_metrics(root)
  text = summary.table(lines)
  (root / "summary.md").write_text(text + "\n")
  summary.plot(lines, root / "curves.png", title=root.name)
  print(f"\n{text}\n\nmetrics: {root / 'metrics.jsonl'}\ncurves:  {root / 'curves.png'}")
