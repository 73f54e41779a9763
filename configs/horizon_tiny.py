"""One run of the longer comparison: `evidence_tiny.py` for 120 steps.

  python launch/sweep.py --config=configs/horizon_tiny.py --points=configs/sweeps/horizon.py \
    --workdir=runs/horizon --parallel=2
  python launch/main.py --config=configs/horizon_tiny.py --workdir=runs/horizon_one   # one run alone

World, teacher and updates are those of `evidence_tiny.py`. Every 10 steps it is evaluated on 128 held-out questions,
two rollouts each; the sweep evaluates each trained policy once more, on more questions and with calls
forced. experiments/evidence/plan.md, written before the first run, says what is compared and how.
"""

from ml_collections import ConfigDict

from configs.evidence_tiny import get_config as evidence_tiny


def get_config() -> ConfigDict:
  c = evidence_tiny()
  c.stages = ("rl",)
  c.rl.steps = 120
  c.eval.update(questions=128, rollouts=2, every=10, forced=False)
  return c
