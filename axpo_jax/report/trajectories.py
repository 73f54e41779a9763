"""Trajectories for the browser of the page: what is listed, and what is shown of each.

In: the dumps of runs, or logs of other makers. Out: an index with a row for every trajectory, and its questions ("groups")
with all their rollouts, cut into chunks that the page unpacks when one is opened. A group stays in
one chunk, so a frozen prefix and its continuations are there together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from axpo_jax.agent.rollout import FAILED_STOPS
from axpo_jax.agent.transcript import SAMPLED_KINDS, Kind
from axpo_jax.diagnose import dumps
from axpo_jax.report import foreign
from axpo_jax.report.pictures import IMAGE, Pictures
from axpo_jax.report.runs import Run

_VISION = re.compile(r"<\|vision_(?:start|end)\|>")
_USER = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_SYSTEM = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", re.DOTALL)
_GROUPS_IN_CHUNK = 32
_LISTED = 2000  # characters of a question in the list, where it can be searched
_BOXES = ("bbox_2d", "bbox")
_INDICES = ("img_idx", "image_index")

# How many rollouts a group has, and what makes it: pictures of a group that is not taken stay away.
Build = tuple[int, Callable[[], dict | None]]


@dataclasses.dataclass
class Collection:
  """Everything the browser needs.

  Attributes:
    index: {"groups": [...], "rows": [...]}; see `_row`.
    chunks: lists of groups.
    total: trajectories in the dumps; more than the rows where they were limited.
    damaged: lines that could not be read; they cost one trajectory each.
  """

  index: dict[str, list]
  chunks: list[list[dict]]
  total: int
  damaged: int = 0


def collect(runs: Sequence[Run], pictures: Pictures, limit: int) -> Collection:
  """Takes up to `limit` trajectories out of the runs' dumps and logs, whole questions, as many of
  each file as of any other."""
  texts = _Texts()
  sources = [(_count_lines(path), _read(r, run, path, pictures, texts))
             for r, run in enumerate(runs) for path in run.dumps]
  logs = [[*run.logs.traces, *run.logs.uncounted] if run.logs else [] for run in runs]
  sources += [(len(traces), foreign.groups(r, traces, pictures)) for r, traces in enumerate(logs) if traces]
  groups, sizes = [], [size for size, _ in sources]
  for (_, found), most in zip(sources, _fair(sizes, limit)):
    groups += _taken(found, most, texts)
  for group in groups:
    group["system"] = texts.system(group["system"]) if group["system"] else -1
  chunks = [groups[i:i + _GROUPS_IN_CHUNK] for i in range(0, len(groups), _GROUPS_IN_CHUNK)]
  rows = [_row(g, i, rollout) for g, group in enumerate(groups)
          for i, rollout in enumerate(group["rollouts"])]
  listed = [{name: group[name] for name in ("run", "at", "id", "category")}
            | {"question": group["question"][:_LISTED]} for group in groups]
  return Collection({"groups": listed, "rows": rows, "systems": texts.systems,
                     "chunk": _GROUPS_IN_CHUNK}, chunks, sum(sizes), texts.damaged)


class _Texts:
  """What is shared between trajectories: decoders by file, system prompts by text; and the count of
  damaged lines."""

  def __init__(self):
    self.systems: list[str] = []
    self.damaged = 0
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


def _taken(groups: Iterator[Build], most: int, texts: _Texts) -> list[dict]:
  """Whole groups, up to `most` rollouts; at least one group."""
  out, taken = [], 0
  for rollouts, build in groups:
    if taken and taken + rollouts > most:
      break
    taken += rollouts
    try:
      if group := build():
        out.append(group)
    except Exception:  # records that do not fit together
      texts.damaged += rollouts
  return out


def _read(r: int, run: Run, path: pathlib.Path, pictures: Pictures, texts: _Texts) -> Iterator[Build]:
  """Groups of a dump; rollouts that the machine ended are left out, damaged ones are counted."""
  def key(record):
    return record["extra"].get("group"), record["question_id"]

  with path.open(encoding="utf-8", errors="replace") as lines:
    parsed = (_parsed(line, texts) for line in lines)
    kept = (record for record in parsed if record and record["stop"] not in FAILED_STOPS)
    for _, found in itertools.groupby(kept, key):
      members = list(found)
      yield len(members), functools.partial(_group, r, run, path, members, pictures, texts)


def _parsed(line: str, texts: _Texts) -> dict | None:
  """A record with all that a rollout needs; None of a damaged line."""
  try:
    record = json.loads(line)
    record["extra"] = record.get("extra") or {}
    transcript = record["transcript"]
    sizes = {len(transcript["ids"]), len(dumps.kinds_of(transcript)), len(transcript["logprobs"])}
    if (len(sizes) > 1 or not isinstance(record["reward"], int | float | None)
        or not isinstance(record["answer"], str | None) or not isinstance(record["extra"], dict)
        or not all(isinstance(record[name], str) for name in ("stop", "question_id"))):
      raise ValueError("damaged")
    return record
  except Exception:  # whatever is wrong with it: it costs one trajectory, not the page
    texts.damaged += 1
    return None


def _group(r: int, run: Run, path: pathlib.Path, members: Sequence[dict], pictures: Pictures,
           texts: _Texts) -> dict | None:
  """The group; None if none of its rollouts can be shown."""
  rollouts, whole = [], []
  for record in members:
    try:
      rollouts.append(_rollout(record, path, pictures, texts))
      whole.append(record)
    except Exception:
      texts.damaged += 1
  if not whole:
    return None
  _join(rollouts, whole)
  first = whole[0]
  extra, transcript = first["extra"], first["transcript"]
  pieces, kinds = texts.pieces(first, path), dumps.kinds_of(transcript)
  pads = [i == transcript["special"]["image_pad"] for i in transcript["ids"]]
  prompt = "".join(IMAGE if pad else piece
                   for piece, pad, kind in zip(pieces, pads, kinds) if kind == Kind.PROMPT)
  asked, system = _USER.findall(prompt), _SYSTEM.search(prompt)
  step = dumps.step_in_name(path)
  return {
    "run": r, "at": f"step {step}" if step is not None else _place(run, path),
    "id": first["question_id"], "category": str(extra.get("category") or ""),
    "gold": [str(gold) for gold in extra.get("gold") or ()], "acting": extra.get("acting") or "",
    "question": _VISION.sub("", asked[-1]).replace(IMAGE, " ").strip()
                if asked else first["question_id"],
    "system": system[1].strip() if system else "",
    "images": [_image(path, image, pictures)
               for image in transcript["images"][:_shown(transcript, kinds)]],
    "rollouts": rollouts,
  }


def _shown(transcript: Mapping[str, Any], kinds: Sequence[int]) -> int:
  """How many images the prompt has."""
  pad = transcript["special"]["image_pad"]
  return sum(i == pad for i, kind in zip(transcript["ids"], kinds) if kind == Kind.PROMPT)


def _join(rollouts: list[dict], records: Sequence[Mapping[str, Any]]) -> None:
  """Marks where each source's prefix was frozen. A source is known by its place in the group; where
  lines are missing, by the tokens that it shares with its continuation."""
  for rollout, record in zip(rollouts, records):
    if "branch" not in rollout:
      continue
    end, ids = rollout["start"], record["transcript"]["ids"]
    order = sorted(range(len(records)), key=lambda i: i != rollout["source"])
    source = next((i for i in order if "branch" not in rollouts[i]
                   and records[i]["transcript"]["ids"][:end] == ids[:end]), None)
    if source is None:  # its line is damaged: shown without what it came from
      del rollout["branch"], rollout["source"]
    else:
      rollout["source"] = source
      rollouts[source]["frozen"] = end


def _rollout(record: Mapping[str, Any], path: pathlib.Path, pictures: Pictures, texts: _Texts) -> dict:
  """One rollout, or of a continuation what comes behind its frozen prefix."""
  extra, transcript = record["extra"], record["transcript"]
  kinds = dumps.kinds_of(transcript)
  shown = _shown(transcript, kinds)
  pieces, pad = texts.pieces(record, path), transcript["special"]["image_pad"]
  images = [{**_image(path, image, pictures), "at": number}
            for number, image in enumerate(transcript["images"]) if number >= shown]
  start = extra["prefix_end"] if "branch" in extra else kinds.count(Kind.PROMPT)
  out = {
    "reward": _finite(record["reward"]), "answer": record["answer"], "stop": record["stop"],
    "images": images, "start": start,
    "calls": [{"name": call["name"], "error": call["error"], "box": _box(call["arguments"])}
              for call in record["calls"]],
    "segments": _segments(transcript["ids"], kinds, pieces, transcript["logprobs"], start, pad),
  }
  for name in ("advantage", "region", "branch", "source", "continuation"):
    if extra.get(name) is not None:
      out[name] = extra[name]
  json.dumps(out, allow_nan=False)  # the page reads it as JSON, which has no NaN
  return out


def _finite(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _segments(ids, kinds, pieces, logprobs, start: int, pad: int) -> list[dict]:
  """Runs of tokens of a kind: texts, and of sampled tokens their probability in thousandths."""
  out, at = [], start
  for kind, run in itertools.groupby(kinds[start:]):
    stop = at + sum(1 for _ in run)
    segment = {"kind": kind, "at": at,
               "tokens": [IMAGE if i == pad else piece
                          for i, piece in zip(ids[at:stop], pieces[at:stop])]}
    if kind in SAMPLED_KINDS:
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
  """The region that a call names: corners in thousandths of the image, and which image."""
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
  calls = max(len(rollout["calls"]), any(s["kind"] == Kind.CALL for s in rollout["segments"]))
  return [group, position, rollout["reward"], int(calls), errors, kind,
          str(rollout["answer"] or "")[:80], rollout["stop"]]


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
