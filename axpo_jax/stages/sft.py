"""The SFT loop: the policy learns to imitate trajectories whose answer is right.

In: a policy folder (or random parameters) and a stream of trajectories. Out: a trained policy folder.
Loss falls on what the teacher sampled and on nothing else.
"""

import functools
import time

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from axpo_jax.model import programs
from axpo_jax.stages import build, distributed, selection
from axpo_jax.train import preemption
from axpo_jax.train.batch import packing_metrics, targets
from axpo_jax.train.checkpoint import Checkpoints
from axpo_jax.train.step import Learner, supervised_objective


def run(config: ConfigDict, bench: build.Workbench, policy: str, root: epath.Path,
        first_step: int) -> epath.Path:
  """Fine-tunes the policy in folder `policy` ("" = random) and returns the result's folder.

  Args:
    root: the run's folder: metrics.jsonl, and sft/ with checkpoints and the trained policy.
    first_step: metrics of SFT step s are written as step first_step + s.
  """
  sft, workdir = config.sft, root / "sft"
  learner = Learner(
    bench.trained_config, build.optimizer(sft.optimizer, sft.steps, sft.freeze_vision, bench.lora),
    supervised_objective(), bench.mesh, bench.rules, banned_ids=bench.chat.banned_ids,
    chunk=config.batch.logprob_chunk, frozen_dtype=build.frozen_dtype(bench, policy))
  data = build.sft_batches(config, bench)
  distributed.on_main(selection.tell, data.tally, workdir)
  with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
    params = functools.partial(build.trained_params, bench, policy, config.seed)
    if checkpoints.latest() is None:
      state = learner.init(params(), config.seed)
    else:
      stored = checkpoints.restore(learner.stored(learner.abstract_state()), iterator=data.stream)
      state = learner.restored(stored.state, params)
    before = int(state.step)
    with (preemption.held(), distributed.metrics_writer(root, resume_step=first_step + before,
                                     tensorboard=config.log.tensorboard) as writer,
          tqdm(total=sft.steps, initial=before, desc="sft",
               disable=not distributed.is_main()) as bar):
      for done in range(before + 1, sft.steps + 1):
        start = time.perf_counter()
        examples, counts = next(data)
        batches = build.pack_examples(config, bench, examples)
        loaded = time.perf_counter()
        state, result = learner.update(state, batches, targets(batches))
        metrics = learner.metrics(result, batches, workdir / "nonfinite")
        metrics |= packing_metrics(batches, examples) | counts | programs.metrics()
        metrics |= {"time/load_s": loaded - start, "time/update_s": time.perf_counter() - loaded}
        writer.write(first_step + done, {
          name.replace("train/", "sft/"): value for name, value in metrics.items()})
        stopping = distributed.on_main(preemption.told)
        if stopping or done % config.checkpoint.every == 0 or done == sft.steps:
          checkpoints.save(done, learner.stored(state), host={"stage": "sft"}, iterator=data.stream)
        bar.set_postfix(nll=f"{metrics['train/nll']:.3f}")
        bar.update()
        if stopping:
          raise preemption.Stopped
      checkpoints.wait()
  return build.export(state.params, config, bench, policy, workdir / "policy")
