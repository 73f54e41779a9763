"""The reward functions that ship: see `reward_functions` for what one is.

`exact` is the default: 1 for a right answer by the rules of `rewards`, else 0.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from axpo_jax.agent import mathematics, rewards
from axpo_jax.agent.judge import Judge
from axpo_jax.agent.rollout import ANSWER

if TYPE_CHECKING:
  from axpo_jax.agent.reward_functions import Finished

_FORM = re.compile(r"\s*<answer>\s*\\boxed\{.+\}\s*</answer>\s*", re.DOTALL)


async def exact(rollout: Finished) -> rewards.Verdict:
  """1 if the answer is right by any gold answer of the question, else 0."""
  if rollout.answer is None:
    return rewards.Verdict(0.0)
  return await rewards.judge_soon(rollout.question, rollout.answer)


async def math_verify(rollout: Finished) -> rewards.Verdict:
  """1 if math-verify alone finds the answer equal to a gold answer, else 0."""
  if rollout.answer is None:
    return rewards.Verdict(0.0)
  found = [await mathematics.same_soon(rollout.answer, gold) for gold in rollout.question.answers]
  return rewards.Verdict(float(any(found)), not any(found) and None in found)


# Each comparison has a limit of CPU time, and a burst of them may queue for longer than any one may take.
exact.time_limit = math_verify.time_limit = None


async def answer_format(rollout: Finished) -> float:
  """1 if the last turn ends with one answer in the system prompt's form, `<answer>\\boxed{...}</answer>`; else 0."""
  if rollout.stop != ANSWER or not rollout.turns:
    return 0.0
  said = rollout.turns[-1].rpartition("</think>")[2]
  before, marked, inside = said.removesuffix("<|im_end|>").partition("<answer>")
  return float(bool(marked) and "\\boxed" not in before and _FORM.fullmatch(marked + inside) is not None
               and inside.count("\\boxed") == 1)


async def length(rollout: Finished) -> float:
  """Sampled tokens as a share of the most that a response may have; give it a negative weight."""
  return float(rollout.transcript.sampled.sum()) / rollout.max_response_tokens


async def environment(rollout: Finished) -> float:
  """The sum of the environment's rewards for the turns."""
  return float(sum(rollout.turn_rewards))


def judged(make_judge: Callable[[], Judge]) -> Callable[[Finished], Awaitable[float]]:
  """The reward "judge": 1 if the rules, or else an LLM judge, find the answer right; else 0.

  A judge without a verdict raises JudgeError, so that the rollout's reward has failed.

  Args:
    make_judge: makes one for an event loop, to which its connections belong.
  """
  judges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Judge] = weakref.WeakKeyDictionary()

  async def by_judge(rollout: Finished) -> float:
    if rollout.answer is None or len(rollout.answer) >= rewards.MAX_ANSWER:
      return 0.0
    if (await rewards.judge_soon(rollout.question, rollout.answer)).reward:
      return 1.0
    loop = asyncio.get_running_loop()
    judge = judges.get(loop) or judges.setdefault(loop, make_judge())
    return float(await judge(rollout.question.text, rollout.question.answers, rollout.answer))

  by_judge.time_limit = None  # the endpoint's attempts have limits of their own
  return by_judge


TERMS: Mapping[str, Callable[[Any], Awaitable[Any]]] = {
  "exact": exact, "math_verify": math_verify, "format": answer_format, "length": length,
  "environment": environment}
