"""Layouts of the search benchmarks: MMSearch and HR-MMSearch.

In: records as they are published. Out: records of the project's own columns. An answer is right if it
is any of the gold answers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from axpo_jax.data.adapters import parts
from axpo_jax.data.readers import Layout

Record = Mapping[str, Any]


def _mmsearch(record: Record, path: pathlib.Path) -> Record:
  answers = [parts.answer(record, "gt_answer"), *parts.items(record.get("alternative_gt_answers"))]
  return {"id": record.get("sample_id"), "question": parts.text(record, "query"),
          "answer": list(dict.fromkeys(answers)), "kind": "text", "images": record.get("query_image"),
          "category": record.get("area"), "subfield": record.get("subfield")}


def _hr_mmsearch(record: Record, path: pathlib.Path) -> Record:
  answers = parts.items(parts.answer(record, "ground_truth"))
  return {"id": record.get("sample_id"), "question": parts.text(record, "query"),
          "answer": answers, "kind": "text", "images": record.get("query_image"),
          "category": record.get("category"), "difficulty": record.get("difficulty")}


LAYOUTS = {
    "mmsearch": Layout(
        adapt=_mmsearch, needed=("query", "gt_answer"),
        optional=("sample_id", "query_image", "alternative_gt_answers", "area", "subfield"),
        meta=("subfield",)),
    "hr_mmsearch": Layout(
        adapt=_hr_mmsearch, needed=("query", "query_image", "ground_truth"),
        optional=("sample_id", "category", "difficulty"), meta=("difficulty",)),
}
