"""Evaluation with the call forced: how good are the policy's calls where it does not choose to call?

In: sampled shards of an evaluation, and the actor that answered. Out: an actor that repeats those rollouts:
each begins with the recorded thinking and an opening <tool_call>, and the policy decodes the rest and uses
tools as usual. So every rollout is a tool rollout, and its success rate does not depend on how often, or on
which questions, the policy calls. If that rate stays and the tool-attempt rate rises, calls became more
frequent and not better.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from axpo_jax import paths, seeds
from axpo_jax.agent.parse import think_stop
from axpo_jax.agent.rollout import ENGINE_ERROR, FAILED_STOPS, Rollout
from axpo_jax.agent.transcript import SAMPLED_KINDS, Transcript
from axpo_jax.data.question import Question
from axpo_jax.rollouts import census, collect

# Text between the thinking and a call in the chat format of Qwen3-VL.
_BEFORE_CALL = "\n\n"
# Name of a metric -> the census's name of it, over the forced rollouts.
_NAMES = {
  "forced_opened_rate": "tool_attempt_rate",
  "forced_success_rate": "tool_success_rate",
  "forced_all_wrong_rate_at_2": "tool_all_wrong_rate_at_2",
  "forced_all_wrong_rate_at_4": "tool_all_wrong_rate_at_4",
  "forced_tool_error_rate": "tool_error_rate",
}


@dataclasses.dataclass(frozen=True)
class Thought:
  """The first turn of a rollout, as sampled. Only its thinking is used.

  Attributes:
    ids: tokens of the turn.
    logprobs: of each.
  """

  ids: Sequence[int]
  logprobs: Sequence[float]


# Question id and seed of a rollout -> its thinking.
Thoughts = Mapping[tuple[str, int], Thought]


def read_thoughts(folder: str | os.PathLike) -> dict[tuple[str, int], Thought]:
  """The first turns of the rollouts in a folder of shards (`rollouts.shards`), without failed ones."""
  lines = (line for path in paths.glob(epath.Path(folder), "rollouts_*.jsonl")
           for line in path.read_text().splitlines())
  records = (json.loads(line) for line in lines)
  return {(record["question_id"], record["seed"]): _first_turn(record["transcript"])
          for record in records if record["stop"] not in FAILED_STOPS}


def _first_turn(transcript: Mapping) -> Thought:
  kinds = [kind for kind, count in transcript["kinds"] for _ in range(count)]
  start = next((i for i, kind in enumerate(kinds) if kind in SAMPLED_KINDS), len(kinds))
  stop = next((i for i in range(start, len(kinds)) if kinds[i] not in SAMPLED_KINDS), len(kinds))
  logprobs = transcript["logprobs"][start:stop]
  return Thought(transcript["ids"][start:stop], [float("nan" if x is None else x) for x in logprobs])


@dataclasses.dataclass(frozen=True)
class Opener(collect.Actor):
  """An actor that opens a tool call wherever the recorded thinking ends.

  Attributes:
    thoughts: of the rollouts to repeat, by question and seed.
  """

  thoughts: Thoughts = dataclasses.field(default_factory=dict)

  async def roll(self, transcript: Transcript, question: Question, seed: int) -> Rollout:
    """The rollout with this seed, from its opened call on; one that failed stays failed."""
    thought = self.thoughts.get((question.id, seed))
    if thought is None:
      return Rollout(question.id, transcript, 0.0, None, ENGINE_ERROR, [], seed, 0, 0,
                     error="the rollout whose call is to be forced had failed")
    return await super().roll(self._opened(transcript, thought), question,
                              seeds.derive(seed, "forced"))

  def _opened(self, prompt: Transcript, thought: Thought) -> Transcript:
    """The prompt, the thinking and an opening tag; no tag if the thinking was cut off."""
    opened, stop = prompt.copy(), think_stop(thought.ids, prompt.special)
    opened.append_sampled(thought.ids[:stop], thought.logprobs[:stop], 0)
    if stop and thought.ids[stop - 1] == prompt.special.think_end:
      tag = [*self.chat.encode(_BEFORE_CALL), prompt.special.tool_call]
      opened.append_sampled(tag, [0.0] * len(tag), 0)  # log-probability 0: the tag is given
    return opened


def opener(actor: collect.Actor, thoughts: Thoughts) -> Opener:
  """`actor` as an Opener with `thoughts`."""
  fields = {field.name: getattr(actor, field.name) for field in dataclasses.fields(collect.Actor)}
  return Opener(**fields, thoughts=thoughts)


def rates(groups: Iterable[census.GroupStats]) -> dict[str, float]:
  """Rates over forced rollouts.

  Returns:
    forced_success_rate: share of the rollouts with a call that are right.
    forced_all_wrong_rate_at_m: chance that m rollouts of a question with a call are all wrong (unbiased).
    forced_tool_error_rate: share of failed calls.
    forced_opened_rate: share of rollouts whose thinking ended, so that a call could be opened.
  """
  found = census.census(list(groups), prefix="forced")
  return {name: found[f"forced/{source}"] for name, source in _NAMES.items()
          if f"forced/{source}" in found}


def metrics(groups: Sequence[census.GroupStats], *, prefix: str = "eval") -> dict[str, float]:
  """`rates` over all questions and by family, under the names of docs/metrics.md."""
  out = {f"{prefix}/{name}": value for name, value in rates(groups).items()}
  for family, members in census.families(groups).items():
    out |= {f"{prefix}/{family}/{name}": value for name, value in rates(members).items()}
  return out
