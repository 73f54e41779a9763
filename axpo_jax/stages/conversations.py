"""Trajectories in foreign formats for SFT: OpenAI chat, ATIF, ShareGPT, and the others that diagnose reads.

In: a file of records (JSON lines, or one JSON list), with images beside it. Out: a sequence of Rollouts, each made
on access. The parts of a conversation become

  system, tools, first message(s) of the user   the prompt, in the policy's own chat template
  each turn of the agent                        sampled tokens: thinking, text, calls; all of them carry loss
  results of calls, later messages of the user  given tokens

ATIF may hold the token ids of its turns. They are used if they decode to the step's own text, so that what
`stages.export` wrote comes back token for token; other text is tokenised. A conversation with calls in an unknown
notation (`events.Walk.unread`) is left out, since it would teach not to act.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from axpo_jax.agent import transcript as transcript_lib
from axpo_jax.agent.parse import SpecialIds
from axpo_jax.agent.rollout import ANSWER, Rollout
from axpo_jax.agent.transcript import EpisodeImage, Transcript
from axpo_jax.data import files, image_sources
from axpo_jax.data.question import IMAGE_MARK, ImageSource, load_image
from axpo_jax.diagnose import envelopes, notations
from axpo_jax.diagnose.events import AGENT, Walk
from axpo_jax.diagnose.notations import CALL, RESULT, SAY, SYSTEM, THINK, USER, Event
from axpo_jax.diagnose.traces import Fields, TraceError
from axpo_jax.errors import ConfigError
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor

_TRIED = 100  # first records, of which one must be readable
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What is needed to turn a conversation into a rollout of the policy.

  Attributes:
    chat: template and tokenizer.
    processor: makes the images' patches.
    question_limits, tool_limits: least and most pixels of images of questions and of tools.
    system, tools: for conversations without their own.
    max_images: most images of a conversation.
    vocab_size: the model's ids are below it.
  """

  chat: Chat
  processor: ImageProcessor
  question_limits: ImageLimits
  tool_limits: ImageLimits
  system: str
  tools: Sequence[dict[str, Any]]
  max_images: int
  vocab_size: int


class Conversations(Sequence[Rollout]):
  """The trajectories of a file, or of all files in a folder.

  A record that cannot be read is a failed rollout with the reason in `error`: SFT counts it and continues.

  Raises:
    ConfigError: a file cannot be read, or none of its first records can.
  """

  def __init__(self, path: str | os.PathLike, prompts: Prompts):
    self._prompts = prompts
    self._records: list[tuple[epath.Path, int, Any]] = []  # file; of JSON lines the byte; else the record
    try:
      found = files.expand(path)
      for file in found:
        self._records += _records(file)
    except (files.ReaderError, OSError) as error:
      raise ConfigError(f"config.sft.path={str(path)!r}: {error}") from error
    if not self._records:
      raise ConfigError(f"config.sft.path={str(path)!r} holds no record")
    first = self[0]
    if first.failed and all(self[i].failed for i in range(1, min(_TRIED, len(self)))):
      raise ConfigError(f"config.sft.path={str(path)!r}: none of the first {min(_TRIED, len(self))} records can "
                        f"be read as a trajectory; the first: {first.error}")

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Rollout:
    path, start, record = self._records[index]
    place = f"{path}, record {index}"
    try:
      if record is None:
        record = json.loads(files.line_at(path, start))
      return _rollout(record, path, place, self._prompts)
    except Exception as error:  # untrusted files: one record must not stop the others
      logging.log_first_n(logging.WARNING, "%s is left out: %s", 5, place, str(error)[:500])
      empty = Transcript(SpecialIds.from_chat(self._prompts.chat))
      return Rollout.broken(place, empty, 0, error)


def _records(path: epath.Path) -> list[tuple[epath.Path, int, Any]]:
  """The positions of a file's records; for JSON that is not in lines, the records themselves."""
  if path.suffix != ".jsonl":
    return [(path, row, record) for row, record in files.records(path, lambda names: names)]
  return [(path, start, None) for start in files.line_starts(path)]


def _rollout(record: Any, path: epath.Path, place: str, prompts: Prompts) -> Rollout:
  if isinstance(record, Exception):
    raise record
  if not isinstance(record, Mapping):
    raise TraceError("not a JSON object")
  _, found = envelopes.conversations(record, path, None)
  if len(found) != 1:
    raise TraceError(f"{len(found)} conversations in one record: write one a record")
  conversation = found[0]
  facts = Fields().common(conversation.record, conversation.facts)
  made = _Maker(conversation, path.parent, prompts).transcript()
  reward = facts["reward"]
  # Without a reward the maker of the file has selected good trajectories.
  return Rollout(str(facts.get("question", place)), made, 1.0 if reward is None else reward, None, ANSWER, [], 0, 0, 0)


class _Maker:
  """Makes the transcript of one conversation."""

  def __init__(self, conversation: envelopes.Conversation, folder: epath.Path, prompts: Prompts):
    self._conversation, self._folder, self._prompts = conversation, folder, prompts
    self._chat = prompts.chat
    images = conversation.record.get("images") or conversation.record.get("image") or ()
    # Images beside the messages, which have a mark <image> for each (LLaMA-Factory, ms-swift) or a part
    # {"type": "image"} (TRL).
    self._listed = list(images) if isinstance(images, list | tuple) else [images]
    messages = map(_marked, conversation.messages) if self._listed else conversation.messages
    self._walk = Walk(list(messages), named_images=True)
    if (words := self._walk.unread()) is not None:
      raise TraceError(f"words of calls that no notation explains: {words}")
    if not self._walk.spoke:
      raise TraceError("there is no turn of the agent in it")
    if any(notations.images_of(m.get("content"), True) for m in conversation.messages
           if str(m.get("role") or m.get("from")) in ("assistant", "gpt")) or (
             self._listed and self._marks(*AGENT)):
      raise TraceError("a turn of the agent holds an image, which the policy cannot sample")
    # A mark without its image, or an image without its mark, would give other messages the wrong images.
    if self._listed and self._marks(USER, RESULT) not in (0, len(self._listed)):
      raise TraceError(f"{self._marks(USER, RESULT)} marks {IMAGE_MARK} for {len(self._listed)} images")
    self._count = 0

  def _marks(self, *kinds: str) -> int:
    return sum(event.text.count(IMAGE_MARK) for event in self._walk.events if event.kind in kinds)

  def transcript(self) -> Transcript:
    parts = [(kind, list(events)) for kind, events in itertools.groupby(self._walk.events, _part)]
    while parts and parts[-1][0] != "agent":  # what follows the last turn of the agent carries no loss
      parts.pop()
    at = next(i for i, (kind, _) in enumerate(parts) if kind == "agent")
    before = [event for _, events in parts[:at] for event in events]
    prompt_images = self._prompt_images(before)
    given = [self._given(events) if kind != "agent" else None for kind, events in parts[at:]]
    exact = self._exact(prompt_images + [image for one in given if one for image in one[1]])
    if exact is not None:
      return exact
    made = Transcript(SpecialIds.from_chat(self._chat))
    system, tools = self._system(before)
    asked = "\n\n".join(event.text for event in before if event.kind == USER)
    if not asked.strip() and not prompt_images:
      raise TraceError("no message of the user precedes the agent's first turn")
    made.append_prompt(self._chat.prompt_ids(system, tools, asked, len(prompt_images)), prompt_images)
    for (_, events), observed in zip(parts[at:], given):
      if observed is None:
        ids = self._turn(events)
        made.append_sampled(ids, [0.0] * len(ids), 0)
      else:
        made.append_observation(*observed)
    return made

  def _system(self, before: Sequence[Event]) -> tuple[str, Sequence[dict]]:
    """The conversation's own system prompt and tools, and the run's where it has none."""
    system = "\n\n".join(event.text for event in before if event.kind == SYSTEM)
    tools = self._conversation.tools
    tools = notations.parsed(tools) if isinstance(tools, str) else tools
    system, written = notations.split_tools(system)
    tools = tools or written
    tools = [tool if "function" in tool else {"type": "function", "function": tool}
             for tool in tools or () if isinstance(tool, Mapping)]
    # The template trusts the system prompt, and would turn such text into special tokens.
    if self._chat.encode(system) != self._chat.encode_plain(system):
      raise TraceError("the system prompt holds the text of a special token")
    return system or self._prompts.system, tools or self._prompts.tools

  def _turn(self, events: Sequence[Event]) -> list[int]:
    def joined(kind: str) -> str:
      return "\n\n".join(event.text.strip() for event in events if event.kind == kind)
    return self._chat.turn_ids(joined(THINK), joined(SAY), [_call(event) for event in events if event.kind == CALL])

  def _given(self, events: Sequence[Event]) -> tuple[list[int], list[EpisodeImage]]:
    """What comes between two turns of the agent."""
    if events[0].kind == RESULT:
      images = [self._images(event, "tool") for event in events]
      ids = self._chat.observation_ids([(event.text.replace(IMAGE_MARK, "").strip(), len(own))
                                        for event, own in zip(events, images)])
      return ids, [image for own in images for image in own]
    text = "\n\n".join(event.text for event in events if event.kind == USER)
    images = [image for event in events for image in self._images(event, "question")]
    return self._chat.follow_up_ids(text, len(images)), images

  # ---- images ----

  def _prompt_images(self, before: Sequence[Event]) -> list[EpisodeImage]:
    found = [image for event in before if event.kind == USER for image in self._images(event, "question")]
    if self._listed and not found and not self._marks(USER, RESULT):  # listed without marks: the question's
      found = [self._image(value, "question") for value in self._listed]
      self._listed = []
    return found

  def _images(self, event: Event, origin: str) -> list[EpisodeImage]:
    named: list[Any] = list(event.images)
    if not named:
      marks = event.text.count(IMAGE_MARK) if self._listed else 0
      named, self._listed = self._listed[:marks], self._listed[marks:]
    return [self._image(value, origin) for value in named]

  def _image(self, value: Any, origin: str) -> EpisodeImage:
    self._count += 1
    if self._count > self._prompts.max_images:
      raise TraceError(f"more images than config.agent.max_images={self._prompts.max_images}")
    if isinstance(value, str) and value.startswith(("http://", "https://")):
      raise TraceError(f"image {value[:200]} is on the network: download it and name the file")
    source: ImageSource = image_sources.named(
      value.removeprefix("file://") if isinstance(value, str) else value, self._folder)
    limits = self._prompts.question_limits if origin == "question" else self._prompts.tool_limits
    shown = self._prompts.processor(load_image(source), limits)
    return EpisodeImage(None, shown, origin)

  # ---- token ids ----

  def _exact(self, images: Sequence[EpisodeImage]) -> Transcript | None:
    """The transcript from the token ids in an ATIF record; None if there are none, or if they are not of this
    tokenizer."""
    steps = [step for step in self._conversation.record.get("steps") or ()
             if isinstance(step, Mapping) and step.get("source") == "agent" and not step.get("is_copied_context")]
    made, used = Transcript(SpecialIds.from_chat(self._chat)), 0
    for step in steps:
      metrics = step.get("metrics")
      before, sampled = ((metrics.get(name) for name in ("prompt_token_ids", "completion_token_ids"))
                         if isinstance(metrics, Mapping) else (None, None))
      if (not self._are_ids(before) or not self._are_ids(sampled) or before[:len(made)] != made.ids
          or not self._says(sampled, step)):
        return None
      between = before[len(made):]
      pads = between.count(made.special.image_pad)
      own, used = images[used:used + pads], used + pads
      try:
        append = made.append_observation if len(made) else made.append_prompt
        append(between, own)
        made.append_sampled(sampled, [0.0] * len(sampled), 0)
      except transcript_lib.TranscriptError:
        return None
    return made if steps and used == len(images) else None

  def _are_ids(self, value: Any) -> bool:
    return (isinstance(value, list) and bool(value)
            and all(type(i) is int and 0 <= i < self._prompts.vocab_size for i in value))

  def _says(self, ids: Sequence[int], step: Mapping[str, Any]) -> bool:
    """Whether the ids decode to the text of the step."""
    decoded = _SPACE.sub("", self._chat.decode(ids))
    texts = [step.get("reasoning_content"), step.get("message"),
             *(call.get("function_name") for call in step.get("tool_calls") or ())]
    return all(_SPACE.sub("", text) in decoded for text in texts if isinstance(text, str))


def _part(event: Event) -> str:
  """The kind of turn that an event belongs to: the agent's, one of results, or the user's."""
  return "agent" if event.kind in AGENT else event.kind if event.kind == RESULT else USER


def _marked(message: Any) -> Any:
  """The message with a mark <image> in the place of every part that says "image" and names none."""
  def names_none(part: Any) -> bool:
    return (isinstance(part, Mapping) and part.get("type") == "image"
            and not notations.images_of([part], named=True))

  content = message.get("content") if isinstance(message, Mapping) else None
  if not isinstance(content, list) or not any(map(names_none, content)):
    return message
  if notations.images_of(content, named=True):
    raise TraceError("a message names some of its images, and others are listed beside the messages")
  return {**message, "content": "".join(IMAGE_MARK if names_none(part) else notations.text_of([part])
                                        for part in content)}


def _call(event: Event) -> tuple[str, Any] | str:
  arguments = notations.parsed(event.text) if event.text.strip() else {}
  return (event.name, arguments) if event.name and isinstance(arguments, dict) else event.text

