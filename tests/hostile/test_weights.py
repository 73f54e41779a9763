"""Checkpoints of strangers: what their files say may not load silently as something else."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import axpo_jax
from axpo_jax.config import base_config
from axpo_jax.errors import ConfigError
from axpo_jax.model import hf, hf_names
from axpo_jax.model.config import ModelConfig, UnsupportedConfig
from axpo_jax.model.presets import PRESETS
from axpo_jax.stages.context import run_context
from tests.hostile import corpus

TINY = PRESETS["tiny"]
CONFIG = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, num_layers=3, vocab_size=64))
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NORM = "model.language_model.norm.weight"


def spoil_dtype(tensors, dtype):
  tensors[NORM] = tensors[NORM].astype(dtype)


def spoil_value(tensors, dtype, value):
  tensors[NORM] = tensors[NORM].astype(dtype)
  tensors[NORM][-1] = value


def add_head(tensors):
  tensors[HEAD] = tensors[EMBEDDING] + 1


SPOILT = {
  "int8 weights": (lambda t: spoil_dtype(t, np.int8), "not of F32, BF16, F16 .* is of I8"),
  "bool weights": (lambda t: spoil_dtype(t, bool), "is of BOOL"),
  "float64 weights": (lambda t: spoil_dtype(t, np.float64), "is of F64"),
  "NaN": (lambda t: spoil_value(t, np.float32, np.nan), f"{NORM} holds NaN or infinity"),
  "negative infinity": (lambda t: spoil_value(t, np.float32, -np.inf), "NaN or infinity"),
  "NaN in bfloat16": (lambda t: spoil_value(t, ml_dtypes.bfloat16, np.nan), "NaN or infinity"),
  "infinity in float16": (lambda t: spoil_value(t, np.float16, np.inf), "NaN or infinity"),
  "a head that is tied and differs": (add_head, f"{HEAD} differs from {EMBEDDING}"),
}


def write(folder, spoil=lambda tensors: None):
  folder.mkdir()
  tensors = {e.name: np.ones(e.shape, np.float32) for e in hf_names.name_table(CONFIG)}
  spoil(tensors)
  save_file(tensors, folder / hf.SINGLE_FILE)
  return folder


@pytest.mark.parametrize("case", SPOILT)
def test_weights_that_are_none(tmp_path, case):
  """Refused in one line, whatever the config's own dtype would make of them."""
  spoil, reason = SPOILT[case]
  hf.load_params(write(tmp_path / "good"), CONFIG)
  with corpus.bounds(seconds=10), pytest.raises(hf.CheckpointError, match=reason) as error:
    hf.load_params(write(tmp_path / "bad", spoil), CONFIG)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_an_index_may_not_leave_the_folder(tmp_path, name):
  write(tmp_path / "model")
  save_file({"x": np.ones(2, np.float32)}, tmp_path / "outside.safetensors")
  (tmp_path / "model" / "a").mkdir()
  (tmp_path / "model" / hf.INDEX_FILE).write_text(json.dumps({"weight_map": {"x": name}}))
  with pytest.raises(hf.CheckpointError, match="leaves the folder"):
    hf.check_checkpoint(tmp_path / "model", CONFIG)


def test_an_index_of_brackets(tmp_path):
  folder = write(tmp_path / "model")
  (folder / hf.INDEX_FILE).write_text("[" * 200_000)
  with pytest.raises(hf.CheckpointError, match="no index"):
    hf.check_checkpoint(folder, CONFIG)
  (folder / "config.json").write_text('{"a":' * 200_000)
  with pytest.raises(UnsupportedConfig, match="not JSON"):
    ModelConfig.from_hf(folder)


@pytest.mark.parametrize("field", ["image_token_id", "video_token_id", "vision_start_token_id",
                                   "vision_end_token_id"])
def test_special_ids_lie_in_the_vocabulary(field):
  for wrong in (CONFIG.text.vocab_size, -1):
    with pytest.raises(UnsupportedConfig, match=f"{field}={wrong} is outside the vocabulary of 64"):
      ModelConfig.from_hf(CONFIG.to_hf() | {field: wrong})


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
  """An id beyond the embedding would act as its last one."""
  (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
  config = base_config()
  config.model.checkpoint = str(tmp_path)
  config.model.tokenizer = f"{axpo_jax.__path__[0]}/assets/tiny_tokenizer"
  with pytest.raises(ConfigError, match=r"config\.model\.tokenizer: its tokenizer has \d+ ids, the model 64"):
    run_context(config)
