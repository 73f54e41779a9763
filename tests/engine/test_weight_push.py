"""Pushes on disk: what is written, what is left out, and who writes it."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from axpo_jax.engine.settings import PushConfig
from axpo_jax.engine.sglang.server.spec import free_port
from axpo_jax.engine.sglang.weight_push import PushFolder, WrongParameters, server_name
from axpo_jax.model import hf, sharding
from tests import children, weights

LAST = ("text", "layers", "down", "kernel")  # a stacked parameter: one tensor a layer


def tensors(folder) -> dict[str, np.ndarray]:
  """Of all files in the folder."""
  out = {}
  for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
    with safe_open(file, framework="numpy") as handle:
      out |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
  return out


def after(pushes) -> dict[str, np.ndarray]:
  """What a server holds that loaded these pushes in this order."""
  held = {}
  for push in pushes:
    read = tensors(push.folder)
    for name, values in read.items():
      whole, _, part = name.partition(":")
      if not part:
        held[whole] = values
      elif part == "values":
        held[whole] = held[whole].copy()
        held[whole].flat[np.cumsum(read[f"{whole}:gaps"].astype(np.int64))] = values
  return held


def expected(params, model_config, dtype) -> dict[str, np.ndarray]:
  return {name: tensor.astype(dtype) for name, tensor in weights.by_name(params, model_config).items()}


def assert_equal(found, wanted):
  assert found.keys() == wanted.keys()
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def changed(params, path, change):
  """`params` with one parameter changed."""
  target = hf.by_path(params)[path]
  return jax.tree.map(lambda leaf: change(leaf) if leaf is target else leaf, params)


@pytest.fixture
def folder(tmp_path, model_config):
  """folder(**PushConfig fields): a PushFolder in a fresh place."""
  def make(**fields) -> PushFolder:
    fields = {"dtype": "float32", "shard_bytes": 30_000, "writers": 2, **fields}
    return PushFolder(PushConfig(str(tmp_path / "pushed"), **fields), model_config)

  return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_push_holds_every_tensor_under_its_name(folder, reference, model_config, dtype):
  push = folder(dtype=dtype).write(reference.params, 4)
  wanted = expected(reference.params, model_config, np.dtype(dtype))
  assert_equal(tensors(push.folder), wanted)
  assert push.version == 4 and push.changed is None and push.tag.startswith("4-")
  assert push.bytes_written == sum(tensor.nbytes for tensor in wanted.values())
  files = sorted(push.folder.glob("*.safetensors"))
  assert len(files) > 3 and not list(push.folder.parent.glob("*.partial"))
  biggest = max(tensor.nbytes for tensor in wanted.values())
  assert max(file.stat().st_size for file in files) < max(30_000, biggest) + 10_000


def test_sharded_parameters_are_written_whole(folder, reference, model_config):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = sharding.param_shardings(
    hf.abstract_params(model_config), mesh, sharding.DEFAULT_RULES)
  spread = jax.device_put(reference.params, shardings)
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(spread))
  push = folder().write(spread, 0)
  assert_equal(tensors(push.folder), expected(reference.params, model_config, np.float32))


def test_a_push_names_what_changed_since_the_one_before(folder, reference, model_config):
  pushes = folder()
  first = pushes.write(reference.params, 0)
  params = changed(reference.params, LAST, lambda x: x.at[1, :5, 0].add(1.0))
  second = pushes.write(params, 1)
  assert first.changed is None
  assert second.changed == {"model.language_model.layers.1.mlp.down_proj.weight"}
  assert_equal(after([first, second]), expected(params, model_config, np.float32))
  assert second.bytes_written == 5 * (2 + 4)  # a gap and a value each
  third = pushes.write(reference.params, 2)
  assert third.changed == second.changed
  assert pushes.write(reference.params, 3).changed == frozenset()
  pushes.remove_old()
  assert sorted(path.name.split("-")[1] for path in second.folder.parent.iterdir()) == list("0123")


def test_what_a_server_must_load(folder, reference, other_params):
  """By what it holds; and a push is whole again once deltas are half as long as a whole one."""
  pushes = folder()
  made = [pushes.write(params, version)
          for version, params in enumerate((reference.params, other_params, reference.params))]
  assert [push.previous for push in made] == [None, made[0], None]  # nearly everything changed
  small = pushes.write(changed(reference.params, LAST, lambda x: x.at[0, 0, 0].add(1.0)), 3)
  assert small.after(None) == small.after(made[1].tag) == small.after("unknown") == [made[2], small]
  assert small.after(made[2].tag) == [small] and small.after(small.tag) == []
  pushes.remove_old()
  assert set(small.folder.parent.iterdir()) == {made[2].folder, small.folder}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.0015, 0.3, 1.0])
def test_deltas_give_the_same_weights(folder, reference, model_config, dtype, share):
  """Over three steps in which this share of the values change."""
  rng, params, pushes = np.random.default_rng(0), reference.params, folder(dtype=dtype)
  made = [pushes.write(params, 0)]
  for version in range(1, 4):
    params = jax.tree.map(
      lambda x: jnp.where(rng.random(x.shape) < share, x + rng.normal(size=x.shape), x).astype(x.dtype), params)
    made.append(pushes.write(params, version))
    assert_equal(after(made[-1].after(None)), expected(params, model_config, np.dtype(dtype)))
    assert_equal(after([*made[:-1], *made[-1].after(made[-2].tag)]), expected(params, model_config, np.dtype(dtype)))
  if share < 0.01:
    assert made[-1].bytes_written <= 0.01 * made[0].bytes_written


def test_after_a_push_that_failed_the_next_one_is_whole(folder, reference, other_params, model_config, monkeypatch):
  pushes = folder()
  pushes.write(reference.params, 0)
  with monkeypatch.context() as patch:
    patch.setattr("axpo_jax.engine.sglang.weight_push.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      pushes.write(other_params, 1)
  push = pushes.write(other_params, 2)
  assert push.previous is None
  assert_equal(tensors(push.folder), expected(other_params, model_config, np.float32))


def test_without_deltas_every_push_is_whole(folder, reference, model_config):
  pushes = folder(delta=False)
  pushes.write(reference.params, 0)
  push = pushes.write(changed(reference.params, LAST, lambda x: x.at[0, 0, 0].add(1.0)), 1)
  assert push.previous is None and not pushes._pushed
  assert len(tensors(push.folder)) == len(expected(reference.params, model_config, np.float32))


def test_the_version_that_was_written_last_is_not_written_again(folder, reference):
  """An evaluation and the step behind it ask for the same weights."""
  pushes = folder()
  assert pushes.write(reference.params, 0) is pushes.write(reference.params, 0)
  assert pushes.write(reference.params, 1).tag.startswith("1-")


def test_a_frozen_tower_is_left_out(folder, reference):
  names = tensors(folder(skip_vision=True).write(reference.params, 0).folder).keys()
  assert names and not [name for name in names if "visual" in name]


def test_what_an_earlier_run_left_is_removed(folder, reference):
  old = folder().write(reference.params, 0)
  (old.folder.parent / "weights-9-dead.partial").mkdir()
  new = folder()
  push = new.write(reference.params, 0)
  assert list(old.folder.parent.iterdir()) == [push.folder] and push.tag != old.tag
  new.remove_all()
  assert not list(old.folder.parent.iterdir())


def test_parameters_of_another_model_are_refused(folder, reference):
  params = changed(reference.params, LAST, lambda x: x[:, :, 1:])
  with pytest.raises(WrongParameters, match=r"text\.layers\.down\.kernel: \(3, 48, 31\)"):
    folder().write(params, 0)


@pytest.mark.parametrize("wrong", [{"folder": ""}, {"dtype": "float16"}, {"writers": 0}], ids=str)
def test_configs_that_cannot_work(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    PushConfig(**{"folder": "x", **wrong})


def test_names_on_the_server():
  """As a running server listed them."""
  for name, theirs in {
    "model.language_model.layers.2.self_attn.k_proj.weight": "model.layers.2.self_attn.qkv_proj.weight",
    "model.language_model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.gate_up_proj.weight",
    "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.visual.blocks.1.attn.qkv.bias": "visual.blocks.1.attn.qkv_proj.bias",
    "model.visual.deepstack_merger_list.0.norm.weight": "visual.deepstack_merger_list.0.norm.weight",
    "lm_head.weight": "lm_head.weight",
  }.items():
    assert server_name(name) == theirs


PROCESS = """
import os
import sys
import jax
port, rank, out, repo = sys.argv[1:]
sys.path.insert(0, repo)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import jax.numpy as jnp
from axpo_jax import processes
from axpo_jax.model import hf, sharding
from axpo_jax.engine.sglang import weight_push
from axpo_jax.engine.sglang.weight_push import PushConfig, PushFolder
from tests.engine.conftest import CONFIG
mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 1})
params = hf.load_params(out + "/saved", CONFIG, mesh=mesh, rules=sharding.DEFAULT_RULES)
assert any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
pushes = PushFolder(PushConfig(out + "/pushed", dtype="float32", shard_bytes=30_000), CONFIG)
push = pushes.write(params, 3)
again = pushes.write(jax.tree.map(lambda x: x + 1, params), 4)
pushes.remove_old()
print("TAG", push.tag, again.tag, len(again.changed), push.bytes_written)
# One process cannot write its part.
def full(*_, **__):
  raise OSError(28, "disk full")
save, weight_push.save_file = weight_push.save_file, full if rank == "1" else weight_push.save_file
try:
  pushes.write(params, 5)
except OSError as error:
  print("BOTH", error)
weight_push.save_file = save
assert pushes.write(params, 6).tag != again.tag
# Each has a folder of its own under this name, as on two hosts.
weight_push._APPEARS_S = 0.3
apart = PushFolder(PushConfig(out + "/" + rank, dtype="float32", shard_bytes=30_000), CONFIG)
try:
  apart.write(params, 0)
except OSError as error:
  print("APART", str(error).partition(" lacks ")[2])
# Of what the main process has made, in pieces.
processes._PIECE = 1000
data = processes.share((os.urandom(4567), None) if rank == "0" else None)
print("SHARED", len(data), data.hex())
# And of it a part for each, of unequal size.
part = processes.deal(lambda: [b"mine", bytes(range(256)) * 9])
print("DEALT", rank, part.hex())
print("DEALT", rank, processes.deal(lambda: [b"mine", b""]).hex())
try:
  processes.deal(lambda: [][0])
except IndexError as error:
  print("DEALT", rank, error)
"""


def test_two_processes_write_each_shard_once_and_fail_together(reference, model_config, tmp_path):
  hf.save_checkpoint_hf(tmp_path / "saved", reference.params, model_config)
  repo = pathlib.Path(__file__).parents[2]
  port = str(free_port("127.0.0.1"))
  processes = [subprocess.Popen(
    [sys.executable, "-c", PROCESS, port, str(rank), str(tmp_path), str(repo)], text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    env=children.environment(2))
    for rank in range(2)]
  outputs = [process.communicate(timeout=240)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

  def both(word):
    (line,) = {line for out in outputs for line in out.splitlines() if line.startswith(word)}
    return line

  assert "push_folder must be one folder that all hosts" in both("APART")
  assert "disk full" in both("BOTH") and both("SHARED").split()[1] == "4567"
  for rank, parts in enumerate(([b"mine", b"mine"], [bytes(range(256)) * 9, b""])):
    assert [line.split(" ", 2)[2:] for line in outputs[rank].splitlines() if line.startswith("DEALT")] == [
      *([part.hex()] for part in parts), ["list index out of range"]]
  said = both("TAG")
  tag, names = said.split()[2], int(said.split()[3])
  grown = jax.tree.map(lambda x: jnp.asarray(x) + 1, reference.params)
  wanted = expected(grown, model_config, np.float32)
  assert_equal(tensors(tmp_path / "pushed" / f"weights-{tag}"), wanted)
  assert names == len(wanted)
  assert int(said.split()[4]) == sum(tensor.nbytes for tensor in wanted.values())
