"""Transcripts and rollouts on disk: one JSON object a line, and each distinct image once, by key.

Layout of `dump_rollouts("run/rollouts/step_10.jsonl", ...)`:
  run/rollouts/step_10.jsonl    one rollout a line; reading it back gives the same bits
  run/rollouts/step_10.txt      the same for people, where a chat is given
  run/rollouts/images/<key>.png every distinct image once, shared by all dumps of the folder
Files are written whole or not at all, on an object store too. Patches are not stored: the processor makes them
again from the picture that the policy saw.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import PIL.Image
from etils import epath

from axpo_jax import paths
from axpo_jax.agent.lines import to_line
from axpo_jax.agent.parse import SpecialIds
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.token_texts import token_texts
from axpo_jax.agent.transcript import EpisodeImage, Kind, Outcome, Transcript, TranscriptError
from axpo_jax.data.question import ImageError, ImageSource, load_image
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor, ProcessedImage, image_key
from axpo_jax.rl.credit import Credit
from axpo_jax.rollouts.groups import Group

FORMAT = 1


class ImageStore:
  """A folder of PNG files named by the key of their pixels."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = epath.Path(folder)
    self._keys: dict[int, tuple[ImageSource, str]] = {}  # by identity; holds the source, so it stays

  def path(self, key: str) -> epath.Path:
    """Where the image with this key lies."""
    return self.folder / f"{key}.png"

  def put(self, image: PIL.Image.Image, key: str | None = None) -> str:
    """Writes an image unless it is there already; returns its key."""
    key = key or image_key(image)
    path = self.path(key)
    if not path.exists():
      paths.make(self.folder)
      encoded = io.BytesIO()
      image.save(encoded, format="PNG", compress_level=1)
      paths.write_bytes(path, encoded.getvalue())
    return key

  def put_shown(self, image: ProcessedImage) -> str:
    """`put` for what the policy saw, which knows its key."""
    return image.key if self.path(image.key).exists() else self.put(image.picture(), image.key)

  def put_original(self, image: EpisodeImage) -> str:
    """`put` for the full resolution; of a source that was put before, the key is known."""
    if image.source is None:
      return self.put_shown(image.shown)
    known = id(image.source)
    if known not in self._keys:
      self._keys[known] = image.source, self.put(image.original)
    return self._keys[known][1]

  def existing(self, key: str) -> epath.Path:
    """Where the image with this key lies.

    Raises:
      TranscriptError: the file is missing, or the key, which a file may have named, leaves the folder.
    """
    try:
      path = paths.within(self.folder, f"{key}.png")
    except ValueError as error:
      raise TranscriptError(f"image key {error}") from error
    if not path.exists():
      raise TranscriptError(f"image {path} is missing; copy the dump's image folder too")
    return path

  def get(self, key: str) -> PIL.Image.Image:
    """Reads an image.

    Raises:
      TranscriptError: the file is missing or its pixels are not those of the key.
    """
    path = self.existing(key)
    try:
      image = load_image(path)
    except ImageError as error:
      raise TranscriptError(str(error)) from error
    if image_key(image) != key:
      raise TranscriptError(f"image {path} does not hold the pixels it was stored with")
    return image


def transcript_to_json(transcript: Transcript, store: ImageStore, *,
                       originals: bool = True) -> dict[str, Any]:
  """A transcript as JSON values; its images go into `store`.

  Args:
    transcript: what to write.
    store: receives what the policy saw and, with `originals`, the full-resolution images.
    originals: without them the transcript can be trained on, but not continued exactly: tools then read the
      picture that the policy saw.
  """
  images = [{"origin": image.origin, "shown": store.put_shown(image.shown),
             "original": store.put_original(image) if originals else None}
            for image in transcript.images]
  return {
      "format": FORMAT,
      "special": vars(transcript.special),
      "ids": list(transcript.ids),
      # Runs of equal values: [[value, how many], ...].
      "kinds": _runs([int(kind) for kind in transcript.kinds]),
      "versions": _runs(transcript.versions),
      "logprobs": [_float_to_json(x) for x in transcript.logprobs],
      "images": images,
      "outcomes": transcript.outcomes,
      **({"rewards": transcript.rewards} if any(transcript.rewards) else {}),
  }


def transcript_from_json(record: dict[str, Any], store: ImageStore,
                         processor: ImageProcessor) -> Transcript:
  """The inverse of `transcript_to_json`, bit for bit.

  Raises:
    TranscriptError: another format, lengths that differ, or an image that is missing or changed.
  """
  if record.get("format") != FORMAT:
    raise TranscriptError(f"transcript format {record.get('format')!r}; this code reads {FORMAT}")
  transcript = Transcript(SpecialIds(**record["special"]))
  transcript.ids = list(record["ids"])
  transcript.kinds = [Kind(value) for value in _from_runs(record["kinds"], len(transcript.ids))]
  transcript.versions = _from_runs(record["versions"], len(transcript.ids))
  transcript.logprobs = [_float_from_json(x) for x in record["logprobs"]]
  transcript.images = [_load_image(entry, store, processor) for entry in record["images"]]
  observations = sum(kind == Kind.OBSERVATION for kind, _ in itertools.groupby(transcript.kinds))
  transcript.outcomes = [tuple(Outcome(*outcome) for outcome in outcomes)
                         for outcomes in record.get("outcomes", [()] * observations)]
  transcript.rewards = list(record.get("rewards", []))
  lengths = {len(transcript.ids), len(transcript.kinds), len(transcript.versions),
             len(transcript.logprobs)}
  pads = transcript.ids.count(transcript.special.image_pad)
  if len(lengths) > 1 or pads != len(transcript.images):
    raise TranscriptError(f"damaged transcript: lengths {sorted(lengths)}, {pads} image pads, "
                          f"{len(transcript.images)} images")
  return transcript


def dump_rollouts(path: str | os.PathLike, rollouts: Sequence[Rollout], *,
                  chat: Chat | None = None, extra: Sequence[dict[str, Any]] | None = None,
                  originals: bool = True) -> None:
  """Writes rollouts; see the module docstring.

  Args:
    path: of the .jsonl file; an existing one is replaced.
    rollouts: in the order to write.
    chat: if given, a readable .txt is written too, and every transcript gets "pieces", the text of each of its
      tokens, so that the dump can be read without a tokenizer.
    extra: one JSON-able dict per rollout (group, branch, advantage, ...), kept under "extra".
    originals: see `transcript_to_json`.
  """
  path = epath.Path(path)
  if paths.is_remote(path):  # images by the hundred: sent together, and the .jsonl after them
    with tempfile.TemporaryDirectory() as folder:
      dump_rollouts(pathlib.Path(folder) / path.name, rollouts, chat=chat, extra=extra,
                    originals=originals)
      paths.upload(pathlib.Path(folder), path.parent, last=path.name)
    return
  paths.make(path.parent)
  store = ImageStore(path.parent / "images")
  lines, pages, known = [], [], {}
  for rollout, more in zip(rollouts, extra or itertools.repeat({}, len(rollouts)), strict=True):
    record = rollout.to_json() | {
        "extra": more, "transcript": transcript_to_json(rollout.transcript, store,
                                                        originals=originals)}
    if chat is not None:
      record["transcript"]["pieces"] = token_texts(rollout.transcript.ids, chat.decode, known)
      pages.append(_page(rollout, more, chat))
    lines.append(to_line(record))
  paths.write_text(path, "".join(f"{line}\n" for line in lines))
  if chat is not None:
    text = "\n".join(pages).encode("utf-8", "backslashreplace")  # halves of characters too
    paths.write_bytes(path.with_suffix(".txt"), text)


def dump_groups(path: str | os.PathLike, groups: Sequence[Group], credits: Sequence[Credit], chat: Chat
                ) -> tuple[list[Rollout], list[dict[str, Any]]]:
  """Dumps all rollouts of a step; returns them and what the dump says of each.

  Args:
    credits: one a rollout, in the order of `algorithm.assign_credit`.
  """
  rollouts, notes = [], []
  for number, group in enumerate(groups):
    question = {"group": number, "category": group.question.category,
                "acting": group.question.acting, "gold": list(group.question.answers)}
    for i, rollout in enumerate(group.rollouts):
      rollouts.append(rollout)
      notes.append({**question, "rollout": i})
    for b, branch in enumerate(group.branches):
      for k, rollout in enumerate(branch.rollouts):
        rollouts.append(rollout)
        notes.append({**question, "branch": b, "source": branch.source,
                      "prefix_end": branch.prefix_end, "continuation": k})
  for note, credit in zip(notes, credits, strict=True):
    note |= {"region": credit.region, "advantage": credit.advantage}
  dump_rollouts(path, rollouts, extra=notes, chat=chat)
  return rollouts, notes


def load_rollouts(path: str | os.PathLike, processor: ImageProcessor) -> Iterator[Rollout]:
  """Reads the rollouts of a dump in order, one at a time.

  Raises:
    TranscriptError: a line is damaged; the message names the line.
  """
  path = epath.Path(path)
  store = ImageStore(path.parent / "images")
  with path.open() as lines:
    for number, line in enumerate(lines, 1):
      yield rollout_from_line(line, store, processor, f"{path}, line {number}")


def responses(path: str | os.PathLike, chat: Chat) -> list[str]:
  """What follows the prompt in each rollout of a dump, as text. Its pictures are not opened."""
  found = []
  with epath.Path(path).open() as lines:
    for line in lines:
      transcript = json.loads(line)["transcript"]
      prompt = sum(count for kind, count in transcript["kinds"] if kind == Kind.PROMPT)
      found.append(chat.decode(transcript["ids"][prompt:]))
  return found


def rollout_from_line(line: str | bytes, store: ImageStore, processor: ImageProcessor,
                      place: str) -> Rollout:
  """One rollout of a dump.

  Args:
    place: file and line, for the message.

  Raises:
    TranscriptError: the line is damaged.
  """
  try:
    record = json.loads(line)
    if not isinstance(record, dict):
      raise ValueError(f"a rollout is a JSON object, not {type(record).__name__}")
    record.pop("extra", None)
    transcript = transcript_from_json(record.pop("transcript"), store, processor)
    return Rollout.from_json(record, transcript)
  except KeyError as error:
    raise TranscriptError(f"{place}: there is no {error}") from error
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise TranscriptError(f"{place}: {error}") from error


def readable(transcript: Transcript, chat: Chat,
             image_path: Callable[[EpisodeImage], str] | None = None) -> str:
  """A transcript for people: one block per run of tokens of a kind, images by file name.

  Args:
    transcript: what to show.
    chat: decodes the ids.
    image_path: names the file of an image; by default images/<key>.png.
  """
  name = image_path or (lambda image: f"images/{image.shown.key}.png")
  blocks, at, images, turn = [], 0, iter(enumerate(transcript.images)), -1
  turn_starts = {turn.start for turn in transcript.turns}
  for kind, run in itertools.groupby(transcript.kinds):
    length = sum(1 for _ in run)
    turn += at in turn_starts
    text = _text_with_images(transcript.ids[at:at + length], transcript.special, chat, images, name)
    where = "" if kind in (Kind.PROMPT, Kind.OBSERVATION, Kind.INSERTED) else f" turn {turn}"
    if kind != Kind.INSERTED:  # only the template's glue
      blocks.append(f"--- {kind.name}{where} ({length} tokens) ---\n{text.strip()}")
    at += length
  return "\n".join(blocks) + "\n"


def _text_with_images(ids, special, chat, images, name) -> str:
  parts, begin = [], 0
  for i, token in enumerate(ids):
    if token == special.image_pad:
      number, image = next(images)
      width, height = image.shown.size
      parts += [chat.decode(ids[begin:i]),
                f"[image {number}: {name(image)}, {width}x{height}, from {image.origin}]"]
      begin = i + 1
  parts.append(chat.decode(ids[begin:]))
  return "".join(parts)


def _page(rollout: Rollout, extra: dict[str, Any], chat: Chat) -> str:
  confidence = rollout.confidence()
  head = {"question": rollout.question_id, "reward": rollout.reward, "answer": rollout.answer,
          "stop": rollout.stop, "seed": rollout.seed, "turns": rollout.num_turns,
          "sampled": rollout.response_tokens, **extra}
  if confidence is not None:
    head["confidence"] = round(confidence, 4)
  calls = [f"  call in turn {call.turn}: {call.name or '(unreadable)'} {call.error or 'ok'}"
           for call in rollout.calls]
  title = "  ".join(f"{key}={value}" for key, value in head.items())
  return "\n".join(["=" * 100, title, *calls, readable(rollout.transcript, chat)])


def _load_image(entry: dict[str, Any], store: ImageStore,
                processor: ImageProcessor) -> EpisodeImage:
  picture = store.get(entry["shown"])
  # Limits equal to its own pixel count leave a legal picture as it is.
  pixels = picture.width * picture.height
  shown = processor(picture, ImageLimits(pixels, pixels))
  if shown.key != entry["shown"]:
    raise TranscriptError(f"image {entry['shown']} of {picture.width} x {picture.height} pixels "
                          "does not fit this processor; was the dump made with another model?")
  separate = entry["original"] not in (None, entry["shown"])
  return EpisodeImage(store.existing(entry["original"]) if separate else None, shown, entry["origin"])


def _runs(values: Sequence[int]) -> list[list[int]]:
  return [[value, sum(1 for _ in run)] for value, run in itertools.groupby(values)]


def _from_runs(runs: Sequence[Sequence[int]], length: int) -> list[int]:
  # Checked before a list of that size is made: a file may name any.
  if sum(count for _, count in runs) != length or any(count < 0 for _, count in runs):
    raise TranscriptError(f"damaged transcript: runs of another length than its {length} ids")
  return [value for value, count in runs for _ in range(count)]


def _float_to_json(value: float) -> float | str | None:
  """JSON has no nan and no infinity; finite floats survive as they are."""
  return value if math.isfinite(value) else None if math.isnan(value) else str(value)


def _float_from_json(value: float | str | None) -> float:
  return math.nan if value is None else float(value)

