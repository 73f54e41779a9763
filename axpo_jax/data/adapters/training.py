"""Layouts of the six training sets.

In: records as ViRL39K, FVQA, PyVision-Image-RL, MMFineReason, DeepEyes-47k and VisualProbe publish
them. Out: records of the project's own columns.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from axpo_jax.data.adapters import parts
from axpo_jax.data.files import RecordError
from axpo_jax.data.readers import Columns, Layout

Record = Mapping[str, Any]

# FVQA says of each question whether its authors' model needed a search.
_ACTING = {"search_required": "act", "search_free": "decline"}
# Where DeepEyes bakes its instructions into the user's message, they come after the question.
_BAKED = re.compile(r"\n\s*(?:Think (?:first|in the mind)|Reason step by step|Please reason|"
                    r"Format strictly as|Output strictly|Answer with)\b.*", re.DOTALL | re.IGNORECASE)


def _virl39k(record: Record, path: pathlib.Path) -> Record:
  gold = parts.answer(record, "answer")
  inside = re.fullmatch(r"\\boxed\{(.*)\}", gold, re.DOTALL)
  question = parts.text(record, "question")
  return {"id": record.get("qid"), "question": question, "answer": gold,
          "images": record.get("image"), "category": record.get("category"),
          "source": record.get("source"), **parts.choice_of(question, inside[1] if inside else gold),
          "PassRate_32BTrained": record.get("PassRate_32BTrained"),
          "PassRate_7BBase": record.get("PassRate_7BBase")}


def _fvqa(record: Record, path: pathlib.Path) -> Record:
  model = record.get("reward_model")
  if not isinstance(model, Mapping):
    raise RecordError("'reward_model' is not an object")
  # The gold answer is given once more among the candidates of some records.
  answers = dict.fromkeys([parts.answer(model, "ground_truth"),
                           *parts.items(model.get("candidate_answers"))])
  need = str(record.get("category") or "")
  # The id is what the image-search cache is keyed by.
  return {"id": parts.text(record, "data_id"), "question": parts.last_user_text(record.get("prompt")),
          "answer": list(answers), "kind": "text", "images": record.get("images"), "category": "search",
          "source": record.get("data_source"), "acting": _ACTING.get(need), "need": need}


def _pyvision(record: Record, path: pathlib.Path) -> Record:
  question, gold = parts.text(record, "question"), parts.answer(record, "answer")
  return {"id": record.get("id"), "question": question, "answer": gold,
          "images": record.get("image_path"), "category": record.get("ability"),
          "source": record.get("data_source"), **parts.choice_of(question, gold)}


def _deepeyes(record: Record, path: pathlib.Path) -> Record:
  model, extra = (_object(record, name) for name in ("reward_model", "extra_info"))
  question = extra.get("question")
  if not isinstance(question, str) or not question.strip():
    question = _BAKED.sub("", parts.last_user_text(record.get("prompt")))
  index = extra.get("index")
  return {"id": None if index is None else f"{path.stem}-{extra.get('split', '')}{index}",
          "question": _fit_marks(question, record.get("images")),
          "answer": parts.answer(model, "ground_truth"), "images": record.get("images"),
          "category": record.get("ability"), "source": record.get("data_source"),
          "env_name": record.get("env_name")}


def _object(record: Record, name: str) -> Record:
  """A field that is an object, or JSON text of one."""
  value = record.get(name)
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError as error:
      raise RecordError(f"{name!r} is not JSON: {error}") from error
  if not isinstance(value, Mapping):
    raise RecordError(f"{name!r} is not an object")
  return value


def _fit_marks(question: str, images: Any) -> str:
  """The question without marks where it has more of them than there are images."""
  count = len(images) if isinstance(images, list) else int(images is not None)
  return question if question.count("<image>") <= count else question.replace("<image>", "").strip()


LAYOUTS = {
    "virl39k": Layout(
        adapt=_virl39k, needed=("question", "answer", "image"),
        optional=("qid", "category", "source", "PassRate_32BTrained", "PassRate_7BBase"),
        meta=("PassRate_32BTrained", "PassRate_7BBase")),
    "fvqa": Layout(
        adapt=_fvqa, needed=("prompt", "images", "reward_model", "data_id"),
        optional=("data_source", "category"), meta=("need",)),
    "pyvision": Layout(
        adapt=_pyvision, needed=("question", "answer", "image_path"),
        optional=("id", "ability", "data_source"), relocate=True),
    # Its releases name their columns differently: they may be mapped in the config.
    "mmfinereason": Layout(
        columns=Columns(images="image"), meta=("pass_rate", "is_consistent"), ids_within_source=True),
    "deepeyes": Layout(
        adapt=_deepeyes, needed=("prompt", "images", "reward_model", "extra_info"),
        optional=("env_name", "ability", "data_source"), meta=("env_name",)),
    "visualprobe": Layout(
        columns=Columns(id="doc_id", text="problem", answers="solution", source="data_source"),
        relocate=True),
}
