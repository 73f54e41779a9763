"""One run of the comparison in docs/results_40_steps.md: RL in the miniature from a given SFT policy.

  python launch/main.py --config=configs/evidence_tiny.py --workdir=runs/one \
    --config.model.checkpoint=runs/evidence/sft-0/sft/policy

The comparison itself is a sweep, which makes the SFT policies too and can be stopped and repeated:

  python launch/sweep.py --config=configs/evidence_tiny.py --points=configs/sweeps/evidence.py \
    --workdir=runs/evidence --parallel=2

A run differs from `axpo_tiny.py` in this: a world in which acting does not pay at once; two updates a step,
since with one the ratio is 1 and no recipe that bounds it (CISPO, the clip itself) differs from any
other; more steps; and the evaluation after training only, on more questions and a second time with calls
forced. What it starts from is evaluated once, by the point that made it.

In the world of `axpo_tiny.py` calls are better than guesses from the start, and GRPO finds out by itself. Here
they are at first a little worse, better where it is hard, and can be learnt: the teacher nearly always
stops after the first of two searches, which is worth no more than a guess; and it computes the easy
sums, which are most, as often as the hard ones. docs/results_40_steps.md says what was tried.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("rl", "eval")
  c.data.miniworld.easy_share = 0.7
  c.sft.teacher.update(p_stop_short=0.95, p_python_hard=0.15, p_python_easy=0.15)
  c.rl.update(steps=40, updates=2)
  c.eval.update(questions=256, forced=True, every=-1)
  c.agent.audit = False
  c.checkpoint.update(every=10, keep=1)
  c.log.update(dump_every=0, tensorboard=False)
  return c
