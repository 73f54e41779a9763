"""The paper's nine benchmarks for any Qwen3-VL checkpoint, with the paper's sampling.

  python launch/main.py --config=configs/eval_8b.py --workdir=runs/eval_8b \
    --config.model.checkpoint=runs/axpo_8b/rl/policy --config.eval.folder=/data/benchmarks

The folder holds one folder a benchmark (docs/data.md says which files go into it); leave some out
with --config.eval.benchmarks="('vstar','mathvision')". Four rollouts a question with up to five turns
and all three tools; answers that no rule can match go to a judge, if there is one
(--config.eval.judge.url=http://localhost:8000/v1 --config.eval.judge.model=...). Every rollout is kept
in eval/<benchmark>/; the same command resumes where it was stopped. What to expect, from the paper's
Table 1 (8B, mean Pass@1 / Pass@4): 54.4 / 69.6 as released, 58.5 / 72.2 after SFT, 60.5 / 74.0 after
GRPO, 62.3 / 75.8 after AXPO.
"""

from ml_collections import ConfigDict

from axpo_jax.config import BENCHMARKS
from configs.axpo_8b import get_config as axpo_8b


def get_config() -> ConfigDict:
  c = axpo_8b()
  c.stages = ("eval",)
  c.eval.benchmarks = BENCHMARKS
  return c
