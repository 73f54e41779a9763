"""The paper's nine benchmarks, and those of others: how each is read and scored.

In: the name of a benchmark, and the files of its public release. Out: `Question`s that carry what the
official scoring needs, `Score`s of answers to them, and the numbers a benchmark reports beyond
Pass@k. Sampling is the same for all (`config.eval`), and so are the tools.

  benchmark = BENCHMARKS["hrbench_4k"]
  questions = list(benchmark.read("hr_bench_4k.parquet"))     # or a folder, or several files
  score = await benchmark.score(question, answer, judge, response)  # answer: Rollout.answer, may be None
  clusters = [benchmarks.group(question) for question in questions]     # for eval.passk
  more = benchmark.details([(question, scores), ...], prefix="eval/hrbench_4k")

`Score.value` is what Pass@k averages. `judge` (an `agent.judge.Judge`, or None) is asked only by
benchmarks with `judged`, and only where the rules find no match; a judge that fails is counted in
`details` and never fatal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from axpo_jax.agent.judge import Judge, JudgeError
from axpo_jax.data import adapters, files
from axpo_jax.data.question import Question
from axpo_jax.data.readers import Layout, ReaderConfig, ReadReport, read_questions
from axpo_jax.eval import scoring
from axpo_jax.eval.scoring import Score

# Metric names of what variants of one question share.
ALL_CYCLES = "all_cycles_right"
WORST_CASE = "worst_case"


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark.

  Attributes:
    name: its key in BENCHMARKS, in metric names and of its folder.
    title: as the paper's tables head its column.
    category: "reasoning", "perception" or "search", as the paper groups them.
    size: records of the public release, all variants counted; another number deserves a warning. 0: not
      known.
    judged: a judge may decide where no rule matches.
    judge_sees: it gets the question's images too, as in the official scoring.
    reports_f1: token F1 is part of its official scoring; without a judge it is the value.
    variants: metric name of "right in all variants of a question"; "" where there are none.
    layout: of its files; None takes the one of its name in `data.adapters`.
  """

  name: str
  title: str
  category: str
  size: int = 0
  judged: bool = False
  judge_sees: bool = False
  reports_f1: bool = False
  variants: str = ""
  layout: Layout | None = None

  def read(self, paths: str | Path | Iterable[str | Path], config: ReaderConfig | None = None,
           report: ReadReport | None = None) -> Iterator[Question]:
    """Streams its questions; see `data.adapters.read`."""
    if self.layout is None:
      return adapters.read(self.name, paths, config, report)
    return read_questions(paths, config, report, self.layout, files.TYPES)

  async def score(self, question: Question, answer: str | None, judge: Judge | None = None,
                  response: str = "") -> Score:
    """Scores one answer.

    Args:
      question: with what its layout keeps for the scoring.
      answer: the text inside \\boxed{}; None where a response gave none.
      judge: asked where no rule matches, if the benchmark has judges.
      response: all that the policy and its tools said; graded where the question has a rubric.
    """
    f1 = None
    if self.reports_f1:
      f1 = scoring.token_f1(answer, question.answers) if scoring.is_scorable(answer) else 0.0
    judge = judge if self.judged else None
    rubric = question.meta.get("rubric") if judge else None
    scorable = scoring.is_scorable(answer)
    if scorable and await asyncio.to_thread(scoring.right_by_rule, question, answer):
      return Score(1.0, scoring.RULE, f1, process=1.0 if rubric else None)
    try:
      if rubric:
        grade = await judge.grade(question.text, question.answers, response or answer or "", rubric)
        right = scorable and grade.right
        return Score(float(right), scoring.JUDGE if scorable else scoring.NO_ANSWER, f1,
                     1.0 if right else scoring.WRONG_PROCESS * grade.share)
      if not scorable:
        return Score(0.0, scoring.NO_ANSWER, f1)
      if judge is None:
        return Score(f1, scoring.F1, f1) if self.reports_f1 else Score(0.0, scoring.RULE)
      images = question.images if self.judge_sees else ()
      return Score(float(await judge(question.text, question.answers, answer, images)), scoring.JUDGE, f1)
    except JudgeError:
      return Score(0.0, scoring.JUDGE_FAILED, f1)

  def details(self, results: Iterable[tuple[Question, Sequence[Score]]], *,
              prefix: str) -> dict[str, float]:
    """What the benchmark reports beyond Pass@k.

    Args:
      results: every question with the scores of its rollouts; questions without any are left out.
      prefix: first part of the names.

    Returns:
      {prefix}/{category}/pass_at_1 by the benchmark's own categories; {prefix}/all_cycles_right or
      worst_case: share of questions that are right in all variants; {prefix}/f1;
      {prefix}/process_score: mean of what a judge graded by a rubric;
      {prefix}/judged_share and {prefix}/judge_failed (a count) where a judge was asked.
    """
    results = [(question, scores) for question, scores in results if scores]
    out = {f"{prefix}/{_slug(category)}/pass_at_1": value
           for category, value in _by_category(results).items()}
    every = [score for _, scores in results for score in scores]
    if self.variants and results:
      out[f"{prefix}/{self.variants}"] = _all_variants(results)
    if self.reports_f1 and every:
      out[f"{prefix}/f1"] = math.fsum(score.f1 or 0.0 for score in every) / len(every)
    if graded := [score.process for score in every if score.process is not None]:
      out[f"{prefix}/process_score"] = math.fsum(graded) / len(graded)
    if self.judged and every:
      asked = [score.how for score in every if score.how in (scoring.JUDGE, scoring.JUDGE_FAILED)]
      out[f"{prefix}/judged_share"] = len(asked) / len(every)
      out[f"{prefix}/judge_failed"] = float(asked.count(scoring.JUDGE_FAILED))
    return out


def named(name: str) -> Benchmark:
  """The benchmark of a config: one of BENCHMARKS, or "module:name", which is imported.

  Raises:
    ValueError: there is none, or what is there is no Benchmark.
  """
  module, colon, attribute = name.partition(":")
  if not colon:
    if name not in BENCHMARKS:
      raise ValueError(f"there is no benchmark {name!r}; there are {sorted(BENCHMARKS)}, and your own as 'module:name'")
    return BENCHMARKS[name]
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f"{name!r} cannot be imported: {error}") from error
  if not isinstance(found, Benchmark):
    raise ValueError(f"{name!r} is a {type(found).__name__}, not an axpo_jax.eval.benchmarks.Benchmark")
  return found


def group(question: Question) -> Hashable:
  """What variants of one question share (option cycles, DynaMath's seeds); else its own id."""
  return question.meta.get("group") or question.id


def _by_category(results: Sequence[tuple[Question, Sequence[Score]]]) -> dict[str, float]:
  rates = defaultdict(list)
  for question, scores in results:
    if question.category:
      rates[question.category].append(_rate(scores))
  return {category: math.fsum(values) / len(values) for category, values in sorted(rates.items())}


def _all_variants(results: Sequence[tuple[Question, Sequence[Score]]]) -> float:
  rates = defaultdict(list)
  for question, scores in results:
    rates[group(question)].append(_rate(scores))
  return scoring.all_variants_right(rates)


def _rate(scores: Sequence[Score]) -> float:
  return math.fsum(score.value for score in scores) / len(scores)


def _slug(category: str) -> str:
  return re.sub(r"\W+", "_", category.strip().lower()).strip("_")


BENCHMARKS = {benchmark.name: benchmark for benchmark in (
    Benchmark("mathvision", "MathVision", "reasoning", 304),
    Benchmark("dynamath", "DynaMath", "reasoning", 5010, variants=WORST_CASE),
    Benchmark("mathvr", "Math-VR", "reasoning", 2500, judged=True),
    Benchmark("vstar", "V*", "perception", 191),
    Benchmark("visualprobe_bench", "VisualProbe", "perception", 106, judged=True),
    Benchmark("hrbench_4k", "HR-Bench 4K", "perception", 800, variants=ALL_CYCLES),
    Benchmark("hrbench_8k", "HR-Bench 8K", "perception", 800, variants=ALL_CYCLES),
    Benchmark("hr_mmsearch", "HR-MMSearch", "search", 305, judged=True, judge_sees=True),
    Benchmark("mmsearch", "MMSearch", "search", 300, judged=True, reports_f1=True),
)}
