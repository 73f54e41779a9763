"""Layouts of the perception benchmarks: V*, VisualProbe's test sets, HR-Bench 4K and 8K.

In: records as they are published. Out: records of the project's own columns; `group` in the meta is
what the four option cycles of one HR-Bench question share.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import re
from collections.abc import Mapping
from typing import Any

from axpo_jax.data.adapters import parts
from axpo_jax.data.files import RecordError
from axpo_jax.data.readers import Layout

Record = Mapping[str, Any]

_IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
_LEVEL = re.compile(r"easy|medium|hard", re.IGNORECASE)
_INSTRUCTION = re.compile(r"\n\s*Answer with the option's letter.*", re.DOTALL)


def _vstar(record: Record, path: pathlib.Path) -> Record:
  """Either one JSON file an image, or one list of questions with the options in the text."""
  if "options" in record:
    return _vstar_original(record, path)
  question = _INSTRUCTION.sub("", parts.text(record, "text"))
  options = parts.options_in(question)
  return {"id": record.get("question_id"), "question": question, "kind": "choice",
          "answer": parts.letter(parts.answer(record, "label"), options), "options": list(options),
          "images": record.get("image"), "category": record.get("category")}


def _vstar_original(record: Record, path: pathlib.Path) -> Record:
  """The right option comes first, so the options are shuffled: always in the same way."""
  options = parts.items(record["options"])
  if len(set(options)) < 2:
    raise RecordError("'options' holds fewer than two different options")
  name = f"{path.parent.name}/{path.stem}"
  order = random.Random(f"vstar {name}").sample(options, len(options))
  images = [path.with_suffix(suffix).name for suffix in _IMAGE_TYPES
            if path.with_suffix(suffix).exists()]
  if not images:
    raise RecordError(f"there is no image {path.stem} beside it")
  return {"id": name, "question": parts.with_options(parts.text(record, "question"), order),
          "answer": parts.LETTERS[order.index(options[0])], "options": order, "kind": "choice",
          "images": images[0], "category": path.parent.name}


def _visualprobe(record: Record, path: pathlib.Path) -> Record:
  source = str(record.get("data_source") or "")
  level = _LEVEL.search(source) or _LEVEL.search(path.parent.name) or _LEVEL.search(path.stem)
  level = level[0].lower() if level else ""
  document = parts.answer(record, "doc_id")
  return {"id": f"{level}-{document}" if level else document,
          "question": parts.text(record, "problem"), "answer": parts.answer(record, "solution"),
          "images": record.get("images"), "category": level, "source": source or None}


def _hrbench(record: Record, path: pathlib.Path) -> Record:
  options = [parts.answer(record, name) for name in "ABCD"]
  question, image = parts.text(record, "question"), record.get("image")
  return {"id": record.get("index"), "question": parts.with_options(question, options),
          "answer": parts.letter(parts.answer(record, "answer"), options), "options": options,
          "kind": "choice", "images": image, "category": record.get("category"),
          "cycle": record.get("cycle_category"), "group": _cycle_group(question, options, image)}


def _cycle_group(question: str, options: list[str], image: Any) -> str:
  """Cycles turn the options of one question about one image; nothing else of it changes."""
  pixels = image.get("bytes") if isinstance(image, Mapping) else image
  pixels = pixels if isinstance(pixels, bytes) else str(pixels).encode()
  rest = json.dumps([question, sorted(options)]).encode()
  return hashlib.sha256(hashlib.sha256(pixels).digest() + rest).hexdigest()[:16]


_HRBENCH = Layout(
    adapt=_hrbench, needed=("index", "question", "answer", "A", "B", "C", "D", "image"),
    optional=("category", "cycle_category"), meta=("cycle", "group"))

LAYOUTS = {
    "vstar": Layout(adapt=_vstar, needed=("text", "label", "image"),
                    optional=("category", "question_id")),
    "visualprobe_bench": Layout(
        adapt=_visualprobe, needed=("doc_id", "problem", "solution", "images"),
        optional=("data_source",), relocate=True),
    "hrbench_4k": _HRBENCH,
    "hrbench_8k": _HRBENCH,
}
