"""One run of the comparison in docs/results.md: RL in the miniature from a given SFT policy.

  python launch/main.py --config=configs/evidence_tiny.py --workdir=runs/one \
    --config.model.checkpoint=runs/evidence/sft-0/sft/policy

The comparison itself is a sweep, which makes the SFT policies too and can be stopped and repeated:

  python launch/sweep.py --config=configs/evidence_tiny.py --points=configs/sweeps/evidence.py \
    --workdir=runs/evidence --parallel=2

A run differs from `axpo_tiny.py` in this: two updates a step, since with one the ratio is 1 and
no recipe that bounds it (CISPO, the clip itself) differs from any other; more steps; and the evaluation
after training only, on more questions and a second time with calls forced. What it starts from is
evaluated once, by the point that made it.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("rl", "eval")
  c.rl.update(steps=40, updates=2)
  c.eval.update(questions=256, forced=True, every=-1)
  c.agent.audit = False
  c.checkpoint.update(every=10, keep=1)
  c.log.update(dump_every=0, tensorboard=False)
  return c
