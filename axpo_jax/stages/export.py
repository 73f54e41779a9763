"""Exports a run's trajectories, for SFT or other trainers: `python -m axpo_jax.stages.export RUN OUT`.

In: rollout dumps (`step_*.jsonl`, `rollouts_*.jsonl`) below a folder, except those of the stage "eval": held-out
questions and benchmarks are not for training. Out: OUT/trajectories.jsonl with the right rollouts, and OUT/images. By default each line is a trajectory in ATIF 1.8, with the token ids and log-probabilities
of its turns, so that `config.sft.source="conversations"` trains on exactly the sampled tokens. `--format=chat`
writes OpenAI messages, which most trainers read; their text is tokenised again.

Dumps of runs hold the text of their tokens, so that no tokenizer is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from axpo_jax.agent.lines import to_line
from axpo_jax.agent.parse import ToolCall, parse_call
from axpo_jax.agent.rollout import FAILED_STOPS
from axpo_jax.agent.transcript import SAMPLED_KINDS, Kind
from axpo_jax.diagnose import dumps, notations
from axpo_jax.rl.advantages import RIGHT

VERSION = "ATIF-v1.8"
_PAD, _VISION = "<|image_pad|>", ("<|vision_start|>", "<|vision_end|>")


@dataclasses.dataclass
class Part:
  """Text with the images in it, in the order of its tokens: strings, and names of image files as tuples."""

  items: list[str | tuple[str]] = dataclasses.field(default_factory=list)

  def add(self, text: str) -> None:
    if self.items and isinstance(self.items[-1], str):
      self.items[-1] += text
    elif text:
      self.items.append(text)

  @property
  def text(self) -> str:
    return "".join(item for item in self.items if isinstance(item, str)).strip()

  def content(self, image: Callable[[str], dict]) -> str | list[dict]:
    """The text alone; with images, a list of parts."""
    if all(isinstance(item, str) for item in self.items):
      return self.text
    kept = [item.strip() if isinstance(item, str) else item for item in self.items]
    return [{"type": "text", "text": item} if isinstance(item, str) else image(item[0])
            for item in kept if item]


@dataclasses.dataclass
class Turn:
  """A turn of the agent and what came back; `start` and `stop` are its tokens."""

  start: int
  stop: int
  thinking: str = ""
  text: str = ""
  calls: list[ToolCall | str] = dataclasses.field(default_factory=list)  # a text if it cannot be parsed
  results: list[Part] = dataclasses.field(default_factory=list)  # of the calls
  reply: Part | None = None  # of the environment, as a message of the user


@dataclasses.dataclass
class Episode:
  """One rollout of a dump, by turns."""

  system: str
  tools: list[dict]
  question: Part
  turns: list[Turn]


def episode(record: Mapping[str, Any], pieces: Sequence[str]) -> Episode:
  """Splits a rollout of a dump into turns.

  Args:
    record: a line of a dump.
    pieces: the text of each of its tokens.

  Raises:
    KeyError, ValueError: the record is incomplete.
  """
  kinds, images = dumps.kinds_of(record["transcript"]), iter(record["transcript"]["images"])
  if len(pieces) != len(kinds):
    raise ValueError(f"{len(pieces)} texts of {len(kinds)} tokens")
  names = [f"images/{next(images)['shown']}.png" if piece == _PAD else "" for piece in pieces]
  start = next((i for i, kind in enumerate(kinds) if kind != Kind.PROMPT), len(kinds))
  blocks = _blocks(pieces[:start], names[:start])
  system, tools = notations.split_tools(next((part.text for role, part in blocks if role == "system"), ""))
  found = Episode(system, tools, next(part for role, part in reversed(blocks) if role == "user"), [])
  while start < len(kinds):
    sampled = kinds[start] in SAMPLED_KINDS
    stop = next((i for i in range(start, len(kinds)) if (kinds[i] in SAMPLED_KINDS) != sampled), len(kinds))
    if sampled:
      found.turns.append(_turn(pieces, kinds, start, stop))
    elif found.turns:
      turn, given, images_given = found.turns[-1], pieces[start:stop], names[start:stop]
      turn.results = _results(given, images_given)
      if not turn.results:
        turn.reply = next((part for role, part in _blocks(given, images_given) if role == "user"), None)
    start = stop
  return found


def _turn(pieces: Sequence[str], kinds: Sequence[int], start: int, stop: int) -> Turn:
  def text(kind: Kind) -> str:
    return "".join(piece for piece, own in zip(pieces[start:stop], kinds[start:stop]) if own == kind)
  turn = Turn(start, stop, text(Kind.THINK).strip().removesuffix("</think>").strip(),
              text(Kind.ANSWER).strip().removesuffix("<|im_end|>").removesuffix("<|endoftext|>").strip())
  for written in text(Kind.CALL).split("<tool_call>")[1:]:
    closed, inside = "</tool_call>" in written, written.partition("</tool_call>")[0].strip()
    call = parse_call(inside) if closed else None
    turn.calls.append(call if isinstance(call, ToolCall) else inside)
  return turn


def _blocks(pieces: Sequence[str], names: Sequence[str]) -> list[tuple[str, Part]]:
  """(role, content) of every message in a part of a transcript. The template's marks are whole tokens, which text
  cannot hold."""
  out: list[tuple[str, Part]] = []
  for piece, name in zip(pieces, names):
    if piece == "<|im_start|>":
      out.append(("", Part()))
    elif out and piece not in (*_VISION, "<|im_end|>"):
      role, part = out[-1]
      if name:
        part.items.append((name,))
      elif role:
        part.add(piece)
      else:  # the role may take several tokens, up to the newline
        part.add(piece)
        head, newline, rest = part.items[0].partition("\n")
        if newline:
          out[-1] = head, Part([rest] if rest else [])
  return out


def _results(pieces: Sequence[str], names: Sequence[str]) -> list[Part]:
  out, inside = [], False
  for piece, name in zip(pieces, names):
    if piece == "<tool_response>":
      out.append(Part())
    inside = piece == "<tool_response>" or (inside and piece != "</tool_response>")
    if inside and piece not in ("<tool_response>", *_VISION):
      if name:
        out[-1].items.append((name,))
      else:
        out[-1].add(piece)
  return out


# ---- formats ----


def to_atif(record: Mapping[str, Any], found: Episode, name: str) -> dict[str, Any]:
  """A trajectory of ATIF 1.8 (PyPI: atif)."""
  def image(path: str) -> dict:
    return {"type": "image", "source": {"media_type": "image/png", "path": path}}
  ids, logprobs = record["transcript"]["ids"], record["transcript"]["logprobs"]
  steps: list[dict[str, Any]] = [{"source": "system", "message": found.system}] if found.system else []
  steps.append({"source": "user", "message": found.question.content(image)})
  for t, turn in enumerate(found.turns):
    own = logprobs[turn.start:turn.stop]
    steps.append({
      "source": "agent", "message": _unread_calls(turn), "reasoning_content": turn.thinking,
      "metrics": {"prompt_token_ids": ids[:turn.start], "completion_token_ids": ids[turn.start:turn.stop],
                  **({"logprobs": own} if all(isinstance(x, float | int) for x in own) else {})}})
    if calls := [(i, call) for i, call in enumerate(turn.calls) if isinstance(call, ToolCall)]:
      steps[-1]["tool_calls"] = [{"tool_call_id": f"call_{t}_{i}", "function_name": call.name,
                                  "arguments": call.arguments} for i, call in calls]
    if turn.results:
      steps[-1]["observation"] = {"results": [
        {"content": result.content(image), **({"source_call_id": f"call_{t}_{i}"} if i in dict(calls) else {})}
        for i, result in enumerate(turn.results)]}
    if turn.reply is not None:
      steps.append({"source": "user", "message": turn.reply.content(image)})
  agent = {"name": "axpo_jax", "version": "1", **({"tool_definitions": found.tools} if found.tools else {})}
  return {"schema_version": VERSION, "trajectory_id": name, "agent": agent, "extra": _facts(record),
          "steps": [{"step_id": i, **step} for i, step in enumerate(steps, 1)]}


def to_chat(record: Mapping[str, Any], found: Episode, name: str) -> dict[str, Any]:
  """OpenAI's messages, with the thinking as `reasoning_content`."""
  def image(path: str) -> dict:
    return {"type": "image_url", "image_url": {"url": path}}
  messages: list[dict[str, Any]] = [{"role": "system", "content": found.system}] if found.system else []
  messages.append({"role": "user", "content": found.question.content(image)})
  for t, turn in enumerate(found.turns):
    message = {"role": "assistant", "content": _unread_calls(turn), "reasoning_content": turn.thinking}
    if calls := [{"id": f"call_{t}_{i}", "type": "function", "function": {
        "name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
        for i, call in enumerate(turn.calls) if isinstance(call, ToolCall)]:
      message["tool_calls"] = calls
    messages.append(message)
    messages += [{"role": "tool", "tool_call_id": f"call_{t}_{i}", "content": result.content(image)}
                 for i, result in enumerate(turn.results)]
    if turn.reply is not None:
      messages.append({"role": "user", "content": turn.reply.content(image)})
  return {"id": name, "messages": messages, "tools": found.tools, **_facts(record)}


FORMATS = {"atif": to_atif, "chat": to_chat}


def _unread_calls(turn: Turn) -> str:
  """The turn's text, followed by the calls that could not be parsed, as written."""
  return "\n".join([turn.text, *(f"<tool_call>\n{call}\n</tool_call>" for call in turn.calls
                                 if isinstance(call, str))]).strip()


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
  extra = record.get("extra") or {}
  return {"question_id": record["question_id"], "reward": record["reward"], "answer": record["answer"],
          "gold": extra.get("gold") or [], "category": extra.get("category") or ""}


# ---- the command ----


def chosen(folder: pathlib.Path, everything: bool) -> Iterator[tuple[pathlib.Path, int, dict[str, Any]]]:
  """(file, line, record) of the trajectories below a folder: the right ones, or all that did not fail.

  Raises:
    ValueError: a line is damaged.
  """
  found = (file for pattern in ("step_*.jsonl", "rollouts_*.jsonl") for file in folder.rglob(pattern))
  for path in sorted(file for file in found if "eval" not in file.relative_to(folder).parts[:-1]):
    with path.open(encoding="utf-8") as lines:
      for number, line in enumerate(lines, 1):
        try:
          record = json.loads(line)
          reward = record["reward"]
          good = isinstance(reward, int | float) and math.isfinite(reward) and reward > RIGHT
          if record["stop"] not in FAILED_STOPS and (good or everything):
            yield path, number, record
        except (ValueError, KeyError, TypeError, RecursionError) as error:
          raise ValueError(f"{path}, line {number} is damaged: {error!r}") from error


def export(run: pathlib.Path, out: pathlib.Path, form: str = "atif", everything: bool = False) -> int:
  """Writes OUT/trajectories.jsonl and its images; returns the number of trajectories.

  Raises:
    ValueError: a damaged line, or a dump without texts whose tokenizer is not found.
    OSError: an image is missing.
  """
  (out / "images").mkdir(parents=True, exist_ok=True)
  count, known, decoders = 0, {}, {}
  partial = out / "trajectories.jsonl.partial"  # a damaged line leaves no set that looks whole
  with partial.open("w", encoding="utf-8") as file:
    for path, line, record in chosen(run, everything):
      try:
        if path.parent not in decoders and "pieces" not in record["transcript"]:
          decoders[path.parent] = dumps.find_decode(path)
        pieces = dumps.pieces_of(record, decoders.get(path.parent), known)
        if pieces is None:
          raise ValueError("it has no texts of tokens, and the run's tokenizer was not found")
        name = f"{path.relative_to(run).with_suffix('').as_posix()}:{line}"
        written = FORMATS[form](record, episode(record, pieces), name)
        for key in {image["shown"] for image in record["transcript"]["images"]}:
          _copy(path.parent / "images", out / "images", f"{key}.png")
      except (KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
        raise ValueError(f"{path}, line {line}: {error!r}") from error
      file.write(to_line(written) + "\n")
      count += 1
  partial.replace(out / "trajectories.jsonl")
  return count


def _copy(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
  if pathlib.Path(name).name != name:
    raise ValueError(f"an image is called {name!r}")
  if not (target / name).exists():
    shutil.copyfile(source / name, target / name)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m axpo_jax.stages.export",
    description="Writes the right trajectories of a run as a training set for SFT or other trainers.")
  parser.add_argument("run", type=pathlib.Path, help="a run's --workdir, or a folder of dumps")
  parser.add_argument("out", type=pathlib.Path, help="folder to write trajectories.jsonl and images/ to")
  parser.add_argument("--format", choices=FORMATS, default="atif",
                      help="atif keeps the token ids; chat is OpenAI's messages (default %(default)s)")
  parser.add_argument("--all", action="store_true", help="also write wrong trajectories")
  arguments = parser.parse_args(argv)
  if not arguments.run.is_dir():
    print(f"error: {arguments.run} is not a folder", file=sys.stderr)
    return 2
  try:
    count = export(arguments.run, arguments.out, arguments.format, arguments.all)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if not count:
    print(f"error: {arguments.run} holds no {'' if arguments.all else 'right '}trajectory", file=sys.stderr)
    return 2
  print(f"{count} trajectories: {arguments.out / 'trajectories.jsonl'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
