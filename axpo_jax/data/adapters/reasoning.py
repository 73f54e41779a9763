"""Layouts of the reasoning benchmarks: MathVision, DynaMath, Math-VR.

In: records as they are published. Out: records of the project's own columns; `group` in the meta is
what the variants of one question share.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from axpo_jax.data.adapters import parts
from axpo_jax.data.files import RecordError
from axpo_jax.data.readers import Layout

Record = Mapping[str, Any]

# A few numbers are called "int" or "single answer", -15.7 among them.
_DYNAMATH_KINDS = {"multiple choice": "choice", "float": "number", "int": "number",
                   "single answer": "number", "text": "text"}
_TOLERANCE = 0.001  # of DynaMath's numbers, absolute
_DECIMALS = 2  # MathVision compares numbers so rounded


def _mathvision(record: Record, path: pathlib.Path) -> Record:
  options = parts.items(record.get("options"))
  gold = parts.answer(record, "answer")
  question = parts.number_images(parts.text(record, "question"), 1)
  out = {"id": record.get("id"), "images": record.get("decoded_image") or record.get("image"),
         "category": record.get("subject"), "level": record.get("level"), "decimals": _DECIMALS}
  if not options:
    return {**out, "question": question, "answer": gold, "kind": "math"}
  if options != list(parts.LETTERS[:len(options)]):  # bare letters: the options are in the picture
    question = parts.with_options(question, [parts.number_images(option, 0) for option in options])
  return {**out, "question": question, "answer": parts.letter(gold, options), "kind": "choice",
          "options": options}


def _dynamath(record: Record, path: pathlib.Path) -> Record:
  kind = _DYNAMATH_KINDS.get(str(record.get("answer_type")))
  if kind is None:
    raise RecordError(f"answer_type {record.get('answer_type')!r} is not one of "
                      f"{sorted(_DYNAMATH_KINDS)}")
  seed, question = parts.answer(record, "id"), parts.text(record, "question")
  # A file holds one variant of every seed and does not repeat its number in the records.
  variant = re.search(r"\d+", path.stem)
  out = {"id": f"{seed}-{variant[0] if variant else path.stem}", "question": question,
         "answer": parts.answer(record, "ground_truth"), "kind": kind,
         "images": record.get("decoded_image") or record.get("image"),
         "category": record.get("subject"), "level": record.get("knowledge_level"),
         "group": f"dynamath-{seed}"}
  if kind == "number":
    out["tolerance"] = _TOLERANCE
  if kind == "choice":
    out["options"] = list(parts.options_in(question))
  if kind == "text":
    out["contained"] = True
  return out


def _mathvr(record: Record, path: pathlib.Path) -> Record:
  question = parts.text(record, "question")
  numbers = parts.numbered(question)
  missing = [number for number in numbers if record.get(f"image{number}") is None]
  if missing:
    raise RecordError(f"the question shows <image{missing[0]}>, but column image{missing[0]} is empty")
  answers = parts.items(record.get("answers")) or [parts.answer(record, "answer")]
  out = {"id": record.get("id"), "question": parts.number_images(question, len(numbers)),
         "answer": "; ".join(answers), "category": record.get("category"),  # one text for all sub-questions
         "images": [record[f"image{number}"] for number in numbers]}
  try:
    most = float(record["total_score"])
  except (KeyError, TypeError, ValueError):
    return out
  if record.get("scoring_points") and 0 < most < math.inf:
    out["rubric"] = {"max_score": most, "scoring_points": record["scoring_points"],
                     "point_values": record.get("scores")}
  return out


LAYOUTS = {
    "mathvision": Layout(
        adapt=_mathvision, needed=("question", "answer"),
        optional=("id", "options", "decoded_image", "image", "subject", "level"),
        meta=("level", "decimals")),
    "dynamath": Layout(
        adapt=_dynamath, needed=("id", "question", "ground_truth", "answer_type"),
        optional=("decoded_image", "image", "subject", "knowledge_level"),
        meta=("level", "group", "tolerance", "contained")),
    "mathvr": Layout(
        adapt=_mathvr, needed=("question",),
        optional=("id", "answers", "answer", "category", "total_score", "scoring_points", "scores",
                  *(f"image{number}" for number in range(1, 9))),
        meta=("rubric",)),
}
