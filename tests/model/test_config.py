"""Sizes of the released models, and Hugging Face configs in both spellings."""

import dataclasses
import json

import pytest

from axpo_jax.model.config import ModelConfig, UnsupportedConfig
from axpo_jax.model.presets import PRESETS

# hidden, layers, heads, kv, mlp, tied | depth, hidden, mlp, DeepStack: the published configs.
RELEASED = {
  "2b": (2048, 28, 16, 8, 6144, True, 24, 1024, 4096, (5, 11, 17)),
  "4b": (2560, 36, 32, 8, 9728, True, 24, 1024, 4096, (5, 11, 17)),
  "8b": (4096, 36, 32, 8, 12288, False, 27, 1152, 4304, (8, 16, 24)),
  "32b": (5120, 64, 64, 8, 25600, False, 27, 1152, 4304, (8, 16, 24)),
  "30b_a3b": (2048, 48, 32, 4, 6144, False, 27, 1152, 4304, (8, 16, 24)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_presets(name):
  config = PRESETS[name]
  t, v = config.text, config.vision
  assert (
    t.hidden_size, t.num_layers, t.num_heads, t.num_kv_heads, t.intermediate_size,
    t.tie_word_embeddings, v.depth, v.hidden_size, v.intermediate_size, v.deepstack_layers,
  ) == RELEASED[name]  # fmt: skip
  assert (t.vocab_size, t.head_dim, t.rope_theta, t.max_positions) == (151936, 128, 5e6, 262144)
  assert (t.mrope_section, t.rms_norm_eps, v.grid_side) == ((24, 20, 20), 1e-6, 48)
  assert (v.patch_size, v.temporal_patch_size, v.spatial_merge_size) == (16, 2, 2)
  assert (v.num_heads, v.patch_dim, v.out_hidden_size) == (16, 1536, t.hidden_size)
  assert (config.image_token_id, config.video_token_id) == (151655, 151656)
  assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)


@pytest.mark.parametrize("name", PRESETS)
def test_hf_round_trip_through_transformers(name, tmp_path):
  """Ours -> the released files' spelling -> transformers' own spelling -> ours."""
  from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

  config = PRESETS[name]
  options = {"dtype": config.dtype}
  assert ModelConfig.from_hf(config.to_hf(), **options) == config
  theirs = (Qwen3VLMoeConfig if config.text.experts else Qwen3VLConfig)(**config.to_hf())
  theirs.save_pretrained(tmp_path)
  assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())["text_config"]
  assert ModelConfig.from_hf(tmp_path, **options) == config
  assert ModelConfig.from_hf(tmp_path / "config.json", **options) == config


@pytest.mark.parametrize(
  ("where", "change", "message"),
  [
    ((), {"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
    ((), {"model_type": "qwen3_vl_moe"}, "text_config.num_experts=None is not a number"),
    (("text_config",), {"hidden_act": "gelu"}, "text_config.hidden_act='gelu'"),
    (("text_config",), {"attention_bias": True}, "attention_bias"),
    (("text_config",), {"rope_theta": None}, "rope_theta"),
    (("text_config", "rope_scaling"), {"rope_type": "yarn"}, "yarn"),
    (("text_config", "rope_scaling"), {"mrope_interleaved": False}, "interleaved"),
    (("text_config", "rope_scaling"), {"mrope_section": [16, 24, 23]}, "sum to"),
    (("text_config",), {"num_key_value_heads": 3}, "num_kv_heads=3"),
    (("vision_config",), {"hidden_act": "gelu"}, "vision_config.hidden_act='gelu'"),
    (("vision_config",), {"out_hidden_size": 100}, "out_hidden_size=100"),
    (("vision_config",), {"num_position_embeddings": 2300}, "square"),
    (("vision_config",), {"deepstack_visual_indexes": [5, 40]}, "below depth"),
    (("vision_config",), {"deepstack_visual_indexes": None}, "deepstack_visual_indexes=None"),
    (("vision_config",), {"depth": "many"}, "vision_config.depth='many' is not a number"),
    (("vision_config",), {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "only rope_type 'axial'"),
    (("vision_config",), {"rope_parameters": {"rope_theta": -1.0}}, "positive rope_theta"),
    ((), {"image_token_id": 151936}, "image_token_id=151936 is outside the vocabulary of 151936"),
    ((), {"text_config": None}, "text_config is missing"),
    ((), {"vision_config": []}, "vision_config is missing"),
  ],
)
def test_what_is_not_implemented_is_refused(where, change, message):
  raw = PRESETS["2b"].to_hf()
  target = raw
  for key in where:
    target = target[key]
  target |= change
  with pytest.raises(UnsupportedConfig, match=message):
    ModelConfig.from_hf(raw)


@pytest.mark.parametrize("change, message", [
  ({"remat": "some"}, "choose one of"), ({"dtype": "float16"}, "choose one of"),
  ({"param_dtype": "f32"}, "choose one of"), ({"attention_chunk": -1}, "attention_chunk=-1 must be 0")])
def test_wrong_options_are_refused(change, message):
  with pytest.raises(UnsupportedConfig, match=message):
    dataclasses.replace(PRESETS["tiny"], **change)


@pytest.mark.parametrize("inside", [True, False, None])
@pytest.mark.parametrize("top", [True, False, None])
def test_tying_is_what_transformers_makes_of_it(top, inside):
  """The top level decides, whatever text_config says."""
  from transformers import Qwen3VLConfig

  raw = PRESETS["tiny"].to_hf()
  for target, value in ((raw, top), (raw["text_config"], inside)):
    del target["tie_word_embeddings"]
    if value is not None:
      target["tie_word_embeddings"] = value
  assert ModelConfig.from_hf(raw).text.tie_word_embeddings == Qwen3VLConfig(**raw).tie_word_embeddings


@pytest.mark.parametrize("change", [{"rope_parameters": {"rope_theta": 500.0}}, {"rope_theta": 500.0},
                                    {"rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}])
def test_rotary_settings_of_the_tower_are_read_as_transformers_reads_them(change):
  from transformers import Qwen3VLConfig

  raw = PRESETS["tiny"].to_hf()
  raw["vision_config"] |= change
  theirs = Qwen3VLConfig(**raw)
  config = ModelConfig.from_hf(raw)
  assert config.vision.rope_theta == theirs.vision_config.rope_parameters["rope_theta"] == 500.0
  assert Qwen3VLConfig(**config.to_hf()).vision_config.rope_parameters["rope_theta"] == 500.0
  assert "rope_parameters" not in PRESETS["tiny"].to_hf()["vision_config"]  # as in the released files


def test_head_size_that_is_left_out_is_that_of_transformers():
  from transformers import Qwen3VLConfig

  raw = PRESETS["2b"].to_hf()
  del raw["text_config"]["head_dim"]
  assert ModelConfig.from_hf(raw).text.head_dim == Qwen3VLConfig(**raw).text_config.head_dim == 128


def test_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
    ModelConfig.from_hf(tmp_path / "config.json")
  for content, said in (("{", "not JSON"), ("[]", "not a JSON object but list"), ("{}", "model_type=None")):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedConfig, match=rf"{tmp_path}/config.json: .*{said}"):
      ModelConfig.from_hf(tmp_path)


def test_config_is_hashable():
  assert hash(PRESETS["2b"]) == hash(dataclasses.replace(PRESETS["2b"]))
