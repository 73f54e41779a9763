"""Trajectories for the browser of the page: what is listed, and what is shown of each.

In: the dumps of runs. Out: an index with a row for every trajectory, and its questions ("groups")
with all their rollouts, cut into chunks that the page unpacks when one is opened. A group stays in
one chunk, so a frozen prefix and its continuations are there together.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from axpo_jax.agent.rollout import FAILED_STOPS
from axpo_jax.eval.diagnose import dumps
from axpo_jax.eval.report.pictures import Pictures
from axpo_jax.eval.report.runs import Run

PROMPT, SAMPLED = 0, (1, 2, 4)  # kinds; see agent.transcript.Kind
IMAGE = "\ufffc"  # stands for an image in a text: the object replacement character
_VISION = re.compile(r"<\|vision_(?:start|end)\|>")
_USER = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_SYSTEM = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", re.DOTALL)
_GROUPS_IN_CHUNK = 32
_BOXES = ("bbox_2d", "bbox")
_INDICES = ("img_idx", "image_index")


@dataclasses.dataclass
class Collection:
  """Everything the browser needs.

  Attributes:
    index: {"groups": [...], "rows": [...]}; see `_row`.
    chunks: lists of groups.
    total: trajectories in the dumps; more than the rows where they were limited.
  """

  index: dict[str, list]
  chunks: list[list[dict]]
  total: int


def collect(runs: Sequence[Run], pictures: Pictures, limit: int) -> Collection:
  """Takes up to `limit` trajectories out of the runs' dumps, whole questions, as many of each dump
  as of any other."""
  files = [(r, path) for r, run in enumerate(runs) for path in run.dumps]
  sizes = [_count_lines(path) for _, path in files]
  share = _fair(sizes, limit)
  groups, texts = [], _Texts()
  for (r, path), most in zip(files, share):
    groups += _read(r, runs[r], path, most, pictures, texts)
  chunks = [groups[i:i + _GROUPS_IN_CHUNK] for i in range(0, len(groups), _GROUPS_IN_CHUNK)]
  rows = [_row(g, i, rollout) for g, group in enumerate(groups)
          for i, rollout in enumerate(group["rollouts"])]
  listed = [{name: group[name] for name in ("run", "at", "id", "category", "question")}
            for group in groups]
  return Collection({"groups": listed, "rows": rows, "systems": texts.systems,
                     "chunk": _GROUPS_IN_CHUNK}, chunks, sum(sizes))


class _Texts:
  """What is shared between trajectories: decoders by file, system prompts by text."""

  def __init__(self):
    self.systems: list[str] = []
    self._decoders: dict[pathlib.Path, dumps.Decode | None] = {}
    self._known: dict[pathlib.Path, dict[int, str]] = {}

  def pieces(self, record: Mapping[str, Any], path: pathlib.Path) -> Sequence[str]:
    folder = path.parent
    if "pieces" not in record["transcript"] and folder not in self._decoders:
      self._decoders[folder] = dumps.find_decode(path)
    found = dumps.pieces_of(record, self._decoders.get(folder), self._known.setdefault(folder, {}))
    return [f"⟨{i}⟩" for i in record["transcript"]["ids"]] if found is None else found

  def system(self, text: str) -> int:
    if text not in self.systems:
      self.systems.append(text)
    return self.systems.index(text)


def _read(r: int, run: Run, path: pathlib.Path, most: int, pictures: Pictures, texts: _Texts
          ) -> list[dict]:
  groups, taken = [], 0
  for members in _grouped(path):
    if taken and taken + len(members) > most:
      break
    taken += len(members)
    groups.append(_group(r, run, path, members, pictures, texts))
  return groups


def _grouped(path: pathlib.Path) -> Iterator[list[dict]]:
  """Records of a dump, question by question; those that the machine ended are left out."""
  def key(record):
    return record.get("extra", {}).get("group"), record["question_id"]

  with path.open(encoding="utf-8") as lines:
    records = (record for line in lines if (record := _parsed(line)) is not None)
    for _, members in itertools.groupby(records, key):
      yield list(members)


def _parsed(line: str) -> dict | None:
  try:
    record = json.loads(line)
    return None if record["stop"] in FAILED_STOPS else record
  except (ValueError, KeyError, TypeError):  # a damaged line costs one trajectory, not the page
    return None


def _group(r: int, run: Run, path: pathlib.Path, members: Sequence[dict], pictures: Pictures,
           texts: _Texts) -> dict:
  first = members[0]
  extra, transcript = first.get("extra") or {}, first["transcript"]
  pieces, kinds = texts.pieces(first, path), dumps.kinds_of(transcript)
  pads = [i == transcript["special"]["image_pad"] for i in transcript["ids"]]
  prompt = "".join(IMAGE if pad else piece
                   for piece, pad, kind in zip(pieces, pads, kinds) if kind == PROMPT)
  asked, system = _USER.findall(prompt), _SYSTEM.search(prompt)
  shown = sum(pad for pad, kind in zip(pads, kinds) if kind == PROMPT)
  rollouts = [_rollout(record, path, shown, pictures, texts) for record in members]
  for rollout in rollouts:
    if "branch" in rollout:  # its source's tokens before this are the frozen prefix
      rollouts[rollout["source"]]["frozen"] = rollout["start"]
  step = dumps.step_in_name(path)
  return {
    "run": r, "at": f"step {step}" if step is not None else _place(run, path),
    "id": first["question_id"], "category": extra.get("category") or "",
    "gold": extra.get("gold") or [], "acting": extra.get("acting") or "",
    "question": _VISION.sub("", asked[-1]).replace(IMAGE, " ").strip()
                if asked else first["question_id"],
    "system": texts.system(system[1].strip()) if system else -1,
    "images": [_image(path, image, pictures) for image in transcript["images"][:shown]],
    "rollouts": rollouts,
  }


def _rollout(record: Mapping[str, Any], path: pathlib.Path, shown: int, pictures: Pictures,
             texts: _Texts) -> dict:
  """One rollout, or of a continuation what comes behind its frozen prefix."""
  extra, transcript = record.get("extra") or {}, record["transcript"]
  kinds = dumps.kinds_of(transcript)
  pieces, pad = texts.pieces(record, path), transcript["special"]["image_pad"]
  images = [{**_image(path, image, pictures), "at": number}
            for number, image in enumerate(transcript["images"]) if number >= shown]
  start = extra["prefix_end"] if "branch" in extra else kinds.count(PROMPT)
  out = {
    "reward": record["reward"], "answer": record["answer"], "stop": record["stop"],
    "images": images, "start": start,
    "calls": [{"name": call["name"], "arguments": call["arguments"], "error": call["error"],
               "box": _box(call["arguments"])} for call in record["calls"]],
    "segments": _segments(transcript["ids"], kinds, pieces, transcript["logprobs"], start, pad),
  }
  for name in ("advantage", "region", "branch", "source", "continuation"):
    if extra.get(name) is not None:
      out[name] = extra[name]
  return out


def _segments(ids, kinds, pieces, logprobs, start: int, pad: int) -> list[dict]:
  """Runs of tokens of a kind: texts, and of sampled tokens their probability in thousandths."""
  out, at = [], start
  for kind, run in itertools.groupby(kinds[start:]):
    stop = at + sum(1 for _ in run)
    segment = {"kind": kind, "at": at,
               "tokens": [IMAGE if i == pad else piece
                          for i, piece in zip(ids[at:stop], pieces[at:stop])]}
    if kind in SAMPLED:
      segment["p"] = [_thousandths(logprob) for logprob in logprobs[at:stop]]
    out.append(segment)
    at = stop
  return out


def _thousandths(logprob: float | str | None) -> int | None:
  return None if logprob is None else round(1000 * math.exp(float(logprob)))


def _image(path: pathlib.Path, image: Mapping[str, Any], pictures: Pictures) -> dict:
  key = image["original"] or image["shown"]
  return {"key": pictures.add(path.parent / "images", key), "origin": image["origin"]}


def _box(arguments: Mapping[str, Any]) -> dict | None:
  """Where a call looks: corners in thousandths of the image, and which image."""
  box = next((arguments[name] for name in _BOXES if name in arguments), None)
  index = next((arguments[name] for name in _INDICES if name in arguments), 0)
  if (not isinstance(box, list) or len(box) != 4 or not isinstance(index, int | float)
      or not all(isinstance(x, int | float) for x in box)):
    return None
  return {"image": int(index), "corners": box}


def _row(group: int, position: int, rollout: Mapping[str, Any]) -> list:
  """A line of the list: group, place in it, reward, calls, errors, kind (0 rollout, 1 source of a
  frozen prefix, 2 continuation), answer, stop."""
  kind = 2 if "branch" in rollout else 1 if "frozen" in rollout else 0
  errors = sum(call["error"] is not None for call in rollout["calls"])
  calls = max(len(rollout["calls"]), any(s["kind"] == 2 for s in rollout["segments"]))
  return [group, position, rollout["reward"], int(calls), errors, kind,
          (rollout["answer"] or "")[:80], rollout["stop"]]


def _place(run: Run, path: pathlib.Path) -> str:
  folder = path.parent.relative_to(run.folder)
  return str(folder) if folder.parts else "evaluation"


def _count_lines(path: pathlib.Path) -> int:
  with path.open("rb") as file:
    return sum(1 for _ in file)


def _fair(sizes: Iterable[int], limit: int) -> list[int]:
  """How many to take of each so that none takes more than another while there is more to take."""
  sizes = list(sizes)
  out, left = [0] * len(sizes), limit
  for count, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
    out[i] = min(sizes[i], left // (len(sizes) - count))
    left -= out[i]
  return out
