"""The append-only transcript of one episode.

A transcript is token ids exactly as they went into and came out of the sampler. Nothing sampled is
ever rendered or tokenised again (re-rendering drops reasoning and trims white space); each step
appends, and `cut` copies a beginning. Two forms:

- collapsed: one image pad per image. What the engine is sent and what is stored.
- expanded: every image pad repeated once per merged token. What the trainer computes on. `expand()`
  returns it together with the exact map between the two.

Kinds of tokens. Sampled (these alone carry loss, log-probability and weight version):
  THINK    everything up to and including the last `</think>` of its turn;
  CALL     after it, from `<tool_call>` to `</tool_call>`, both included;
  ANSWER   after it, all the rest, including the white space between calls and the stop token.
Not sampled: PROMPT; OBSERVATION, the user turn with the tools' results, from `<|im_start|>` to
`<|im_end|>`; INSERTED, what the chat template needs around it (the newline after a sampled
`<|im_end|>`, and the next generation prompt).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image

from axpo_jax.agent import parse
from axpo_jax.agent.parse import SpecialIds
from axpo_jax.data.question import ImageSource, open_image

if TYPE_CHECKING:  # their imports take a second, and only the types are needed
  from axpo_jax.model.images import ProcessedImage


class TranscriptError(ValueError):
  """Something was appended, cut or loaded that no transcript can hold."""


class Kind(enum.IntEnum):
  """What a token is; see the module docstring. The numbers are part of the file format."""

  PROMPT = 0
  THINK = 1
  CALL = 2
  OBSERVATION = 3
  ANSWER = 4
  INSERTED = 5


SAMPLED_KINDS = frozenset({Kind.THINK, Kind.CALL, Kind.ANSWER})


@dataclasses.dataclass(frozen=True, eq=False)
class EpisodeImage:
  """One image of an episode.

  Attributes:
    source: where the image comes from, in full resolution. None: what is shown is all there is.
    shown: what the policy sees.
    origin: "question" or the name of the tool that made it.
  """

  source: ImageSource | None
  shown: ProcessedImage
  origin: str

  @classmethod
  def of(cls, source: ImageSource, shown: ProcessedImage, origin: str) -> EpisodeImage:
    """Without the pixels of `source` if they are those that are shown."""
    same = isinstance(source, PIL.Image.Image) and source.mode == "RGB" and source.size == shown.size
    return cls(None if same else source, shown, origin)

  @property
  def original(self) -> PIL.Image.Image:
    """Full resolution, for tools. Decoded when it is asked for, and then kept for a while.

    Raises:
      axpo_jax.data.question.ImageError: the file is gone.
    """
    return self.shown.picture() if self.source is None else open_image(self.source)


class Originals(Sequence[PIL.Image.Image]):
  """The images of an episode in full resolution, each decoded only when it is read."""

  def __init__(self, images: Sequence[EpisodeImage]):
    self._images = list(images)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [image.original for image in self._images[index]]
    return self._images[index].original

  def extend(self, images: Sequence[EpisodeImage]) -> None:
    self._images.extend(images)


class Turn(NamedTuple):
  """Sampled tokens [start, stop) of one assistant turn, as collapsed indices."""

  start: int
  stop: int


class Outcome(NamedTuple):
  """How a call went whose observation is in a transcript: all that a tool with a state needs to
  know to do it again.

  Attributes:
    error: kind of its error, None when it worked.
    images: how many images the episode had when it ran.
  """

  error: str | None
  images: int


@dataclasses.dataclass(frozen=True, eq=False)
class Expanded:
  """The expanded form and its map. T = expanded tokens, C = collapsed tokens. All int32.

  Attributes:
    ids_T: token ids with every image pad repeated `num_tokens` times.
    source_T: collapsed index of each expanded token.
    image_T: number of the image a pad belongs to, -1 for ordinary tokens.
    image_offset_T: which of the image's merged tokens a pad stands for; 0 for ordinary tokens.
    start_C1: [C + 1]; collapsed token c is at expanded [start_C1[c], start_C1[c + 1]).
  """

  ids_T: np.ndarray
  source_T: np.ndarray
  image_T: np.ndarray
  image_offset_T: np.ndarray
  start_C1: np.ndarray

  def collapse(self) -> np.ndarray:
    """The collapsed ids again: the first token of every group."""
    return self.ids_T[self.start_C1[:-1]]


class Transcript:
  """Token ids, what each of them is, and the images between them. See the module docstring.

  Attributes (one entry per collapsed token; read them, never write them):
    ids: token ids.
    kinds: Kind of each.
    logprobs: behaviour log-probability; nan where the token was not sampled.
    versions: version of the weights that sampled the token; -1 where it was not sampled.
    images: EpisodeImage per image pad, in order.
    outcomes: for every observation, the Outcome of each call it answers.
    rewards: of the turns, by the environment; one for each turn that it has stepped.
    states: copies of the environment's state behind every observation, where it keeps any; not dumped.
    special: the tag ids this transcript knows.
  """

  def __init__(self, special: SpecialIds):
    self.special = special
    self.ids: list[int] = []
    self.kinds: list[Kind] = []
    self.logprobs: list[float] = []
    self.versions: list[int] = []
    self.images: list[EpisodeImage] = []
    self.outcomes: list[tuple[Outcome, ...]] = []
    self.rewards: list[float] = []
    self.states: list[Any] = []

  def __len__(self) -> int:
    return len(self.ids)

  # ---- append ----

  def append_prompt(self, ids: Sequence[int], images: Sequence[EpisodeImage] = ()) -> None:
    """Appends prompt tokens; they must hold one image pad per image."""
    if any(kind != Kind.PROMPT for kind in self.kinds):
      raise TranscriptError("the prompt can only be appended before anything else")
    self._check_pads(ids, images)
    self._append_given(ids, [Kind.PROMPT] * len(ids), images)

  def append_sampled(self, ids: Sequence[int], logprobs: Sequence[float], version: int) -> None:
    """Appends sampled tokens to the open turn, or begins a turn with them.

    Raises:
      TranscriptError: lengths differ, the turn is already closed by a stop token, or the policy
        sampled an image or video pad (the engine must ban both).
    """
    if len(ids) != len(logprobs):
      raise TranscriptError(f"{len(ids)} sampled ids but {len(logprobs)} log-probabilities")
    if not self.ids:
      raise TranscriptError("sampled tokens need a prompt before them")
    if self.turn_is_closed:
      raise TranscriptError("the last turn ended with a stop token; append an observation first")
    for banned in (self.special.image_pad, self.special.video_pad):
      if banned in ids:
        raise TranscriptError(
            f"the policy sampled the image or video pad {banned}; add it to banned_ids")
    start = self.turns[-1].start if self.turn_is_open else len(self.ids)
    self.ids.extend(int(i) for i in ids)
    self.logprobs.extend(float(x) for x in logprobs)
    self.versions.extend([int(version)] * len(ids))
    # The whole turn is labelled again: a later </think> turns what came before it into thinking.
    self.kinds[start:] = label_turn(self.ids[start:], self.special)

  def append_observation(self, ids: Sequence[int], images: Sequence[EpisodeImage] = (),
                         outcomes: Sequence[Outcome] = ()) -> None:
    """Appends the rendered user turn with the tools' results and the next generation prompt.

    Args:
      ids: newline, `<|im_start|>user` ... `<|im_end|>`, newline, generation prompt.
      images: one per image pad in `ids`.
      outcomes: one per call of the turn; without them a tool with a state takes the calls to have
        worked when it does them again.

    Raises:
      TranscriptError: the last turn is not closed with `<|im_end|>`, or pads and images differ.
    """
    if not (self.turn_is_closed and self.ids[-1] == self.special.im_end):
      raise TranscriptError("an observation can only follow a turn that ended with <|im_end|>")
    self._check_pads(ids, images)
    self._append_given(ids, _label_observation(ids, self.special), images)
    self.outcomes.append(tuple(outcomes))

  def _append_given(self, ids, kinds, images) -> None:
    self.ids.extend(int(i) for i in ids)
    self.kinds.extend(kinds)
    self.logprobs.extend([math.nan] * len(ids))
    self.versions.extend([-1] * len(ids))
    self.images.extend(images)

  def _check_pads(self, ids, images) -> None:
    pads = sum(i == self.special.image_pad for i in ids)
    if pads != len(images):
      raise TranscriptError(f"{pads} image pads but {len(images)} images: send one pad per image")

  # ---- read ----

  @property
  def turns(self) -> list[Turn]:
    """The assistant turns so far; the last one may be open."""
    turns, at = [], 0
    for sampled, run in itertools.groupby(self.kinds, SAMPLED_KINDS.__contains__):
      length = sum(1 for _ in run)
      if sampled:
        turns.append(Turn(at, at + length))
      at += length
    return turns

  @property
  def last_turn(self) -> list[int]:
    """The ids of the last assistant turn, which may be open."""
    start, stop = self.turns[-1]
    return self.ids[start:stop]

  @property
  def turn_is_closed(self) -> bool:
    """True when the last token is a sampled stop token."""
    return (bool(self.ids) and self.kinds[-1] in SAMPLED_KINDS
            and self.ids[-1] in self.special.stop_ids)

  @property
  def turn_is_open(self) -> bool:
    """True when the last token was sampled and its turn has not ended: it can be continued."""
    return bool(self.ids) and self.kinds[-1] in SAMPLED_KINDS and not self.turn_is_closed

  @property
  def prompt_length(self) -> int:
    """Number of collapsed prompt tokens."""
    return sum(kind == Kind.PROMPT for kind in self.kinds)

  @property
  def expanded_length(self) -> int:
    """Number of tokens of the expanded form."""
    return len(self.ids) + sum(image.shown.num_tokens - 1 for image in self.images)

  @property
  def sampled(self) -> np.ndarray:
    """bool [C]: True where the token was sampled, that is, where it may carry loss."""
    return np.array([kind in SAMPLED_KINDS for kind in self.kinds], bool)

  def first_call_span(self) -> tuple[int, int] | None:
    """Collapsed [start, stop) of the first tool call, tags included; None without a call."""
    for turn in self.turns:
      spans = parse.call_spans(self.ids[turn.start:turn.stop], self.special)
      if spans:
        return turn.start + spans[0].start, turn.start + spans[0].stop
    return None

  def prefix_end(self) -> int | None:
    """Length of the AXPO prefix: everything up to and including the first `<tool_call>`.

    arXiv 2605.28774, section 4: whatever is decoded after it is a tool call by construction.
    """
    span = self.first_call_span()
    return None if span is None else span[0] + 1

  def expand(self) -> Expanded:
    """The expanded form with its map; see Expanded."""
    ids_C = np.asarray(self.ids, np.int32)
    is_pad_C = ids_C == self.special.image_pad
    count_C = np.ones(len(ids_C), np.int32)
    count_C[is_pad_C] = [image.shown.num_tokens for image in self.images]
    image_C = np.where(is_pad_C, np.cumsum(is_pad_C) - 1, -1)
    start_C1 = np.concatenate([[0], np.cumsum(count_C)]).astype(np.int32)
    source_T = np.repeat(np.arange(len(ids_C), dtype=np.int32), count_C)
    offset_T = np.arange(len(source_T), dtype=np.int32) - start_C1[source_T]
    return Expanded(ids_C[source_T], source_T, image_C[source_T].astype(np.int32),
                    offset_T, start_C1)

  # ---- copy ----

  def cut(self, length: int) -> Transcript:
    """A copy of the first `length` collapsed tokens with exactly the images inside them.

    A cut inside a turn leaves that turn open, to be continued. Kinds are as they were: a cut never
    changes what a token is.
    """
    if not 0 <= length <= len(self.ids):
      raise TranscriptError(f"cannot cut at {length}: the transcript has {len(self.ids)} tokens")
    result = Transcript(self.special)
    result.ids = self.ids[:length]
    result.kinds = self.kinds[:length]
    result.logprobs = self.logprobs[:length]
    result.versions = self.versions[:length]
    result.images = self.images[:result.ids.count(self.special.image_pad)]
    answered = sum(kind == Kind.OBSERVATION for kind, _ in itertools.groupby(result.kinds))
    result.outcomes = self.outcomes[:answered]
    result.rewards, result.states = self.rewards[:answered], self.states[:answered]
    return result

  def copy(self) -> Transcript:
    """An independent copy; images are shared, as they never change."""
    return self.cut(len(self.ids))


def label_turn(ids: Sequence[int], special: SpecialIds) -> list[Kind]:
  """Kinds of the sampled tokens of one turn, in the rules of the module docstring."""
  thinking = parse.think_stop(ids, special)
  kinds = [Kind.THINK] * thinking + [Kind.ANSWER] * (len(ids) - thinking)
  for span in parse.call_spans(ids, special):
    kinds[span.start:span.stop] = [Kind.CALL] * (span.stop - span.start)
  return kinds


def _label_observation(ids: Sequence[int], special: SpecialIds) -> list[Kind]:
  """OBSERVATION from the first <|im_start|> to the first <|im_end|> after it, INSERTED around."""
  ids = list(ids)
  if special.im_start not in ids or special.im_end not in ids:
    raise TranscriptError("an observation must be a user turn <|im_start|> ... <|im_end|>")
  start, stop = ids.index(special.im_start), ids.index(special.im_end) + 1
  return ([Kind.INSERTED] * start + [Kind.OBSERVATION] * (stop - start)
          + [Kind.INSERTED] * (len(ids) - stop))
