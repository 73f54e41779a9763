"""Hugging Face checkpoints: bit-identical both ways, readable by transformers, clear errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from axpo_jax.model import hf, hf_names, sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.qwen3_vl import Qwen3VL


def tensors_of(folder) -> dict[str, np.ndarray]:
  out = {}
  for file in sorted(folder.glob("*.safetensors")):
    out |= load_file(file)
  return out


def assert_same_bits(a: dict, b: dict) -> None:
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture
def bf16_folder(reference, tmp_path):
  """transformers' own bfloat16 checkpoint in several shards with an index."""
  import torch
  from transformers import Qwen3VLForConditionalGeneration

  folder = tmp_path / "bf16"
  model = Qwen3VLForConditionalGeneration(reference.torch.config).to(torch.bfloat16)
  model.load_state_dict(reference.torch.state_dict())
  model.save_pretrained(folder, max_shard_size="200KB")
  assert len(list(folder.glob("*.safetensors"))) > 2
  return folder


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_identical(bf16_folder, tmp_path, param_dtype):
  config = ModelConfig.from_hf(bf16_folder, param_dtype=param_dtype)
  params = hf.load_params(bf16_folder, config)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
  hf.save_checkpoint_hf(
    tmp_path / "ours", params, config, dtype="bfloat16", max_shard_bytes=150_000
  )
  assert_same_bits(tensors_of(tmp_path / "ours"), tensors_of(bf16_folder))
  assert hf.stored_dtype(tmp_path / "ours") == hf.stored_dtype(bf16_folder) == "bfloat16"
  index = json.loads((tmp_path / "ours" / hf.INDEX_FILE).read_text())
  assert index["weight_map"].keys() == tensors_of(bf16_folder).keys()
  files = {f.name for f in (tmp_path / "ours").glob("*.safetensors")}
  assert set(index["weight_map"].values()) == files and len(files) > 2
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(bf16_folder).values())
  for name, file in index["weight_map"].items():
    with safe_open(tmp_path / "ours" / file, "np") as handle:
      assert name in handle.keys()  # noqa: SIM118 (a safetensors handle is no mapping)


def test_every_bit_pattern_of_bfloat16_survives(tied, tmp_path):
  """Subnormals, infinities and negative zero too, through float32 parameters."""
  name = "model.language_model.embed_tokens.weight"
  tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors_of(tied.folder).items()}
  bits = np.arange(tensors[name].size, dtype=np.uint32) * 61 % 65536
  values = bits.astype(np.uint16).view(ml_dtypes.bfloat16)
  values[np.isnan(values.astype(np.float32))] = 0  # a NaN's payload may change, its meaning not
  tensors[name] = values.reshape(tensors[name].shape)
  write(tmp_path / "in", tensors, tied.config)
  params = hf.load_params(tmp_path / "in", tied.config)
  hf.save_checkpoint_hf(tmp_path / "out", params, tied.config, dtype="bfloat16")
  assert_same_bits(tensors_of(tmp_path / "out"), tensors)


def write(folder, tensors, config) -> None:
  folder.mkdir()
  save_file(tensors, folder / hf.SINGLE_FILE, metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config.to_hf()))


def test_transformers_loads_what_we_save(reference, make_case, tmp_path):
  """Weights of our own making: transformers gives our logits."""
  import torch
  from transformers import Qwen3VLForConditionalGeneration

  config = reference.config
  model = Qwen3VL(config, rngs=nnx.Rngs(3))
  hf.save_checkpoint_hf(tmp_path / "ours", model, config)
  theirs, report = Qwen3VLForConditionalGeneration.from_pretrained(
    tmp_path / "ours", output_loading_info=True, dtype=torch.float32
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  case = make_case([(4, 6), (2, 2)])
  with torch.no_grad():
    want = theirs(**case.torch_kwargs()).logits[0].numpy()
  graphdef, params = nnx.split(model)
  got = jax.jit(lambda p: case.logits(nnx.merge(graphdef, p)))(params)
  assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
  assert ModelConfig.from_hf(tmp_path / "ours", dtype="float32") == config


def test_all_problems_in_one_error(untied, tmp_path):
  tensors = tensors_of(untied.folder)
  wrong = "model.visual.blocks.3.attn.qkv.bias"
  del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
  del tensors["lm_head.weight"]
  tensors["model.language_model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
  tensors["model.language_model.layers.99.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
  tensors[wrong] = tensors[wrong][:-1]
  write(tmp_path / "bad", tensors, untied.config)
  with pytest.raises(hf.CheckpointMismatch) as error:
    hf.load_params(tmp_path / "bad", untied.config)
  lines = str(error.value).splitlines()
  assert lines[0].startswith("5 tensors")
  assert lines[1:] == [
    "  missing: lm_head.weight [140, 72]",
    "  missing: model.language_model.layers.1.mlp.up_proj.weight [90, 72]",
    "  unknown: model.language_model.layers.0.self_attn.q_proj.bias [3]",
    "  unknown: model.language_model.layers.99.mlp.up_proj.weight [2, 2]",
    f"  misshapen: {wrong} is [143], the config needs [144]",
  ]


def test_a_second_copy_of_the_tied_head_is_ignored(tied, untied, tmp_path):
  tensors = tensors_of(tied.folder)
  tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
  write(tmp_path / "twice", tensors, tied.config)
  hf.load_params(tmp_path / "twice", tied.config)
  assert hf.stored_dtype(tmp_path / "twice") is None  # they are float32
  # Untied, it is a parameter; and a tied checkpoint lacks it.
  with pytest.raises(hf.CheckpointMismatch, match=r"missing: lm_head\.weight"):
    hf.load_params(tied.folder, untied.config)


def test_missing_files_are_named(untied, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
    hf.load_params(tmp_path, untied.config)
  index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
  (tmp_path / hf.INDEX_FILE).write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match=r"one\.safetensors.*two\.safetensors"):
    hf.load_params(tmp_path, untied.config)


def test_sharded_load_equals_plain_load(untied, tmp_path):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  params = hf.load_params(untied.folder, untied.config, mesh=mesh)
  wanted = sharding.param_shardings(hf.abstract_params(untied.config), mesh)
  jax.tree.map(lambda a, s: a.sharding == s or pytest.fail(f"{a.sharding} is not {s}"), params, wanted)
  kernel = params["text"]["layers"]["gate"]["kernel"].get_value()
  assert kernel.addressable_shards[0].data.shape == (5, 36, 45)
  jax.tree.map(np.testing.assert_array_equal, params, untied.params)
  hf.save_checkpoint_hf(tmp_path / "ours", params, untied.config)
  assert_same_bits(tensors_of(tmp_path / "ours"), tensors_of(untied.folder))


def test_layers_over_the_mesh(untied):
  """Rules that split the stack of layers: each device reads its own layers only."""
  config = dataclasses.replace(
    untied.config, text=dataclasses.replace(untied.config.text, num_layers=4)
  )
  abstract = hf.abstract_params(config)["text"]["layers"]["gate"]["kernel"]
  mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
  target = sharding.sharding_for(("layers", None, None), abstract.shape, mesh, {"layers": "fsdp"})
  tensors, reads = tensors_of(untied.folder), []
  entries = [e for e in hf_names.name_table(config) if e.path == ("text", "layers", "gate", "kernel")]
  read = lambda name: reads.append(name) or tensors[name]  # noqa: E731
  array = hf._load_leaf(read, entries, abstract, target)
  np.testing.assert_array_equal(array, untied.params["text"]["layers"]["gate"]["kernel"][:4])
  assert len(reads) == 4
  assert array.addressable_shards[0].data.shape == (1, 72, 90)


def test_save_is_all_or_nothing(untied, tmp_path, monkeypatch):
  def fail(*_args, **_kwargs):
    raise OSError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(hf, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
      hf.save_checkpoint_hf(tmp_path / "ours", untied.params, untied.config)
  assert not (tmp_path / "ours").exists()
  hf.save_checkpoint_hf(tmp_path / "ours", untied.params, untied.config)
  assert [p.name for p in tmp_path.iterdir()] == ["ours"]
  with pytest.raises(FileExistsError, match="not empty"):
    hf.save_checkpoint_hf(tmp_path / "ours", untied.params, untied.config)


def test_companions_are_copied(untied, tmp_path):
  source = tmp_path / "tokenizer"
  source.mkdir()
  (source / "tokenizer.json").write_text("{}")
  (source / "chat_template.jinja").write_text("hi")
  (source / "model.safetensors").write_text("not a companion")
  hf.save_checkpoint_hf(tmp_path / "o", untied.params, untied.config, tokenizer_from=source)
  assert (tmp_path / "o" / "chat_template.jinja").read_text() == "hi"
  assert {p.name for p in (tmp_path / "o").iterdir()} == {
    "tokenizer.json", "chat_template.jinja", "model.safetensors", "config.json",
  }  # fmt: skip


@pytest.mark.parametrize("preset", ["2b", "4b", "8b", "32b", "30b_a3b", "tiny"])
def test_name_table_covers_every_parameter_once(preset):
  """Shapes too, at full size, without making a parameter."""
  config: ModelConfig = PRESETS[preset]
  table = hf_names.name_table(config)
  assert len({e.name for e in table}) == len(table)
  values = {}
  for entry in table:
    values[entry.path] = values.get(entry.path, 0) + int(np.prod(entry.shape))
  flat = jax.tree_util.tree_flatten_with_path(hf.abstract_params(config))[0]
  assert values == {hf._names(path): leaf.size for path, leaf in flat}
