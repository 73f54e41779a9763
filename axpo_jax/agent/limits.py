"""What one episode may use up, and how much of it its transcript has left."""

from __future__ import annotations

import dataclasses

from axpo_jax.agent import rollout as rollout_lib
from axpo_jax.agent.transcript import Transcript


@dataclasses.dataclass(frozen=True)
class EpisodeLimits:
  """Budgets of one episode; the defaults are those of training.

  Attributes:
    max_turns: assistant turns (paper: 3 in training, 5 in evaluation).
    max_new_tokens_per_turn: sampled tokens of one turn.
    max_response_tokens: expanded tokens after the prompt, sampled and observed together.
    max_total_tokens: expanded tokens of the whole transcript.
    max_images: images of the episode, the question's included.
    max_image_pixels: of an image that a tool brings; larger ones are shrunk before they are shown.
    deadline: seconds the episode may take; None = no limit.
  """

  max_turns: int = 3
  max_new_tokens_per_turn: int = 4096
  max_response_tokens: int = 16_384
  max_total_tokens: int = 24_576
  max_images: int = 12
  max_image_pixels: int = 12_845_056
  deadline: float | None = None


class Budget:
  """The room that an episode's limits leave in its transcript, which grows."""

  def __init__(self, limits: EpisodeLimits, transcript: Transcript):
    self.limits, self._transcript = limits, transcript
    self._prompt_tokens = transcript.cut(transcript.prompt_length).expanded_length

  def tokens(self) -> int:
    """Expanded tokens that still fit the response and the total budget."""
    length = self._transcript.expanded_length
    return min(self.limits.max_response_tokens - (length - self._prompt_tokens),
               self.limits.max_total_tokens - length)

  def next_sample(self) -> tuple[int, str | None]:
    """Tokens that may be sampled now, and the stop reason if there are none."""
    transcript = self._transcript
    if not transcript.turn_is_open and len(transcript.turns) >= self.limits.max_turns:
      return 0, rollout_lib.TURN_LIMIT
    turn, total = self.limits.max_new_tokens_per_turn - self._open_turn(), self.tokens()
    if total < 1:
      return 0, rollout_lib.TOKEN_LIMIT
    return min(turn, total), rollout_lib.LENGTH if turn < 1 else None

  def cut_by(self) -> str:
    """The stop reason of a sample that was cut by its length."""
    return (rollout_lib.LENGTH if self._open_turn() >= self.limits.max_new_tokens_per_turn
            else rollout_lib.TOKEN_LIMIT)

  def _open_turn(self) -> int:
    """Tokens already sampled in the open turn."""
    return len(self._transcript.last_turn) if self._transcript.turn_is_open else 0
