"""A public benchmark of your own: ChartQA, right within 5 % where the answer is a number.

    hf download HuggingFaceM4/ChartQA --repo-type dataset --local-dir bench/chartqa --include "*test*"
    PYTHONPATH=examples axpo-train --config=configs/axpo_tiny.py --workdir=runs/chartqa \
      --config.stages="('eval',)" --config.eval.folder=bench --config.eval.benchmarks="('own_benchmark:CHARTQA',)"

The miniature's policy runs anywhere and cannot read charts. For one that can: --config=configs/eval_8b.py
--config.model.checkpoint=Qwen/Qwen3-VL-8B-Thinking in the place of the first line's config and the stages.

The files are in a folder of the benchmark's name below `eval.folder`. The layout says which column is what; a
function `adapt` in its place makes records from other forms (axpo_jax/data/adapters has nine).
"""

import dataclasses

from axpo_jax.agent.rewards import parse_number
from axpo_jax.data.readers import Columns, Layout
from axpo_jax.eval.benchmarks import Benchmark
from axpo_jax.eval.scoring import RULE, Score

TOLERANCE = 0.05  # of the gold number


@dataclasses.dataclass(frozen=True)
class Relaxed(Benchmark):
  """Numbers within 5 %; all else as `Benchmark` compares it."""

  async def score(self, question, answer, judge=None, response="") -> Score:
    score = await super().score(question, answer, judge, response)
    given, golds = parse_number(answer or ""), [parse_number(gold) for gold in question.answers]
    near = given is not None and any(
      gold is not None and abs(given - gold) <= TOLERANCE * abs(gold) for gold in golds)
    return Score(1.0, RULE) if near else score


CHARTQA = Relaxed(
  name="chartqa", title="ChartQA", category="perception", size=2500,
  layout=Layout(columns=Columns(id="", text="query", images="image", answers="label",
                                category="human_or_machine")))
