"""One finished episode: its transcript, how it ended, and its reward."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from axpo_jax.agent import transcript as transcript_lib

# How an episode ends.
DONE = "done"  # the environment says that it is over
ANSWER = "answer"  # the last turn made no call and gives an answer
NO_ANSWER = "no_answer"  # the last turn made no call and gives none
TURN_LIMIT = "turn_limit"  # the last allowed turn still called a tool (the call is not run)
TOKEN_LIMIT = "token_limit"  # the response or the whole sequence has no room left
LENGTH = "length"  # one turn reached max_new_tokens_per_turn
IMAGE_LIMIT = "image_limit"  # the question alone has more images than allowed; nothing is sampled
DEADLINE = "deadline"  # the episode took too long
ENGINE_ERROR = "engine_error"  # the sampler failed or broke its contract
EPISODE_ERROR = "episode_error"  # the episode itself failed (a tool, a reward), or cannot be trained on

STOPS = (DONE, ANSWER, NO_ANSWER, TURN_LIMIT, TOKEN_LIMIT, LENGTH, IMAGE_LIMIT, DEADLINE, ENGINE_ERROR,
         EPISODE_ERROR)
# The machine's fault and not the policy's: such a rollout says nothing about the policy.
FAILED_STOPS = frozenset({DEADLINE, ENGINE_ERROR, EPISODE_ERROR})


@dataclasses.dataclass(frozen=True)
class CallRecord:
  """One tool call of an episode.

  Attributes:
    turn: number of the assistant turn, from 0.
    name: the tool's name as called; "" when the call could not be read.
    arguments: as given; empty when the call could not be read.
    error: None when it worked, else the kind of the error (see agent.tools.base), or "image_limit"
      when its images did not fit the budget, or "not_run" when the episode ended before it ran.
    seconds: time it took.
  """

  turn: int
  name: str
  arguments: dict[str, Any]
  error: str | None
  seconds: float


@dataclasses.dataclass
class Rollout:
  """One finished episode.

  Attributes:
    question_id: which question it answers.
    transcript: all tokens and images.
    reward: on which the policy is trained: 0 or 1 by the default reward; 0 when the episode failed.
    answer: the answer found in the last turn; None without one.
    stop: one of STOPS.
    calls: the calls made by this episode (a continued prefix keeps its own in its own rollout).
    seed: the episode's seed.
    prompt_tokens: expanded prompt tokens sent to the engine, summed over turns.
    cached_tokens: those of them the engine served from its prefix cache.
    first_prompt_tokens: those of the first request alone: for a resample, its frozen prefix.
    first_cached_tokens: and how many of them came from the cache.
    start: collapsed length of the transcript that was continued; own tokens begin there.
    reward_timed_out: the answer is wrong because comparing it took too much time or memory.
    error: what the engine said when stop is "engine_error", or what failed at "episode_error".
    reward_parts: of which the reward is the weighted sum, by name; empty where it is one plain number.
    reward_error: why the reward failed, where it counts as 0.
    turn_metadata: what the environment says of the turns, one record each; empty if it says nothing.
  """

  question_id: str
  transcript: transcript_lib.Transcript
  reward: float
  answer: str | None
  stop: str
  calls: list[CallRecord]
  seed: int
  prompt_tokens: int
  cached_tokens: int
  first_prompt_tokens: int = 0
  first_cached_tokens: int = 0
  start: int = 0
  reward_timed_out: bool = False
  error: str | None = None
  reward_parts: dict[str, float] = dataclasses.field(default_factory=dict)
  reward_error: str | None = None
  turn_metadata: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  @property
  def used_tool(self) -> bool:
    """True when at least one tool call was opened after a turn's thinking."""
    return self.transcript.first_call_span() is not None

  @property
  def failed(self) -> bool:
    """True when the machine and not the policy ended the episode: do not train on it."""
    return self.stop in FAILED_STOPS

  @classmethod
  def broken(cls, question_id: str, transcript: transcript_lib.Transcript, seed: int,
             error: Exception) -> Rollout:
    """An episode that an exception ended."""
    return cls(question_id, transcript, 0.0, None, EPISODE_ERROR, [], seed, 0, 0,
               start=len(transcript), error=f"{type(error).__name__}: {error}")

  @property
  def num_turns(self) -> int:
    """Assistant turns, the last one perhaps unfinished."""
    return len(self.transcript.turns)

  @property
  def response_tokens(self) -> int:
    """Tokens that were sampled."""
    return int(self.transcript.sampled.sum())

  def confidence(self) -> float | None:
    """Mean probability the sampling policy gave the first call's tokens, tags included.

    The arithmetic mean of probabilities, arXiv 2605.28774, section 4; None without a call. Lower
    is less certain. nan when the engine reported no log-probability.
    """
    span = self.transcript.first_call_span()
    if span is None:
      return None
    return float(np.mean(np.exp(np.asarray(self.transcript.logprobs[slice(*span)], np.float64))))

  def to_json(self) -> dict[str, Any]:
    """All fields but the transcript, as JSON values; see rollouts.dump for the transcript."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
              if field.name != "transcript"}
    # Not asdict: it copies arguments level by level, and they may have many.
    fields["calls"] = [vars(call) for call in self.calls]
    if isinstance(self.reward, float) and not math.isfinite(self.reward):
      fields["reward"] = None
    return fields

  @classmethod
  def from_json(cls, record: dict[str, Any], transcript: transcript_lib.Transcript) -> Rollout:
    """The inverse of `to_json`."""
    fields = dict(record)
    fields["calls"] = [CallRecord(**call) for call in fields["calls"]]
    if fields["reward"] is None:
      fields["reward"] = math.nan
    return cls(transcript=transcript, **fields)
