"""From questions to a table in one run: teacher, filter, SFT, difficulty filter, AXPO, evaluation.

  python launch/main.py --config=configs/chain_tiny.py --workdir=runs/chain_tiny

Stages, each restartable (docs/chain.md): the scripted teacher samples 1,200 training questions 4
times; SFT learns from what is right; the SFT policy answers 320 of the questions 4 times, and what it
always solves, or the teacher never did, is left out; AXPO trains on the rest; 128 held-out questions
are answered 4 times.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("teach", "sft", "screen", "rl", "eval")
  c.teach.update(engine="scripted", questions=1200, rollouts=4)
  c.sft.source = "shards"
  c.screen.update(questions=320, rollouts=4)
  return c
