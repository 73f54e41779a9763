"""Checkpoints of a run that are not what was saved: the newest good one is used, and a line says so."""

import json
import pathlib
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axpo_jax.engine.sglang.server.spec import free_port
from axpo_jax.model import sharding
from axpo_jax.train.checkpoint import CheckpointError, Checkpoints
from axpo_jax.train.checksums import checksums
from tests import children

STEPS = (1, 2, 3)


def tree(step: int, mesh=None):
  mesh = mesh or sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
  rng = np.random.default_rng(step)
  values = {"kernel": rng.standard_normal((8, 300)).astype(np.float32), "step": np.int32(step),
            "moment": rng.standard_normal((8, 6)).astype(jnp.bfloat16)}
  split = {"kernel": PartitionSpec("fsdp"), "moment": PartitionSpec("fsdp"), "step": PartitionSpec()}
  return {"opt": {name: jax.device_put(x, NamedSharding(mesh, split[name])) for name, x in values.items()}}


def iterator():
  return iter(grain.MapDataset.range(50).shuffle(seed=3).to_iter_dataset())


def saved(folder) -> pathlib.Path:
  live = iterator()
  with Checkpoints(folder, keep=3) as checkpoints:
    for step in STEPS:
      next(live)
      checkpoints.save(step, tree(step), host={"seen": step}, iterator=live)
  return folder


def same(x, want) -> bool:
  return np.asarray(x).tobytes() == np.asarray(want).tobytes()


def restore(folder, **options):
  place = iterator()
  with Checkpoints(folder, keep=3) as checkpoints:
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0))
    restored = checkpoints.restore(target, iterator=place, **options)
  assert restored.host == {"seen": restored.step} and restored.state["opt"]["step"] == restored.step
  for x, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(tree(restored.step)), strict=True):
    assert same(x, want)
  assert place.get_state() == after(restored.step).get_state()
  return restored


def after(count: int):
  live = iterator()
  for _ in range(count):
    next(live)
  return live


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Those with the arrays, the largest first."""
  found = [path for path in (folder / "state").rglob("*") if path.is_file() and "d" in path.parts]
  return sorted(found, key=lambda path: -path.stat().st_size)


def flip_a_byte(root):
  for path in data_files(root / "3"):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_the_state(root):
  shutil.rmtree(root / "3" / "state")
  shutil.copytree(root / "2" / "state", root / "3" / "state")


def swap_the_iterator(root):
  shutil.rmtree(root / "3" / "iterator")
  shutil.copytree(root / "2" / "iterator", root / "3" / "iterator")


def rename_a_step(root):
  shutil.rmtree(root / "3")
  shutil.copytree(root / "1", root / "3")


def cut_files(root):
  for path in data_files(root / "3"):
    path.write_bytes(path.read_bytes()[:10])


def remove_files(root):
  for path in data_files(root / "3"):
    path.unlink()


def empty_the_folder(root):
  shutil.rmtree(root / "3")
  (root / "3").mkdir()


def change_a_number(root):
  path = root / "3" / "host" / "value.json"
  text = path.read_text()
  assert '"seen": 3' in text
  path.write_text(text.replace('"seen": 3', '"seen": 8'))


def change_a_checksum(root):
  path = root / "3" / "host" / "value.json"
  held = json.loads(path.read_text())
  held["value"]["checksums"]["opt/kernel"] ^= 4
  path.write_text(json.dumps(held))


def brackets(root):
  (root / "3" / "host" / "value.json").write_text("[" * 100_000)


def no_json(root):
  (root / "3" / "iterator" / "value.json").write_bytes(b"\xff\xfe")


DAMAGES = {
  flip_a_byte: "", swap_the_state: "arrays are not those that were saved .opt/",
  swap_the_iterator: "data iterator is another checkpoint's", rename_a_step: "it is that of step 1, renamed",
  cut_files: "", remove_files: "", empty_the_folder: "", change_a_number: "not what was saved",
  change_a_checksum: "not what was saved", brackets: "RecursionError", no_json: "JSONDecodeError"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  return saved(tmp_path_factory.mktemp("run") / "checkpoints")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_newest_good_one_is_used_and_said_so(good, tmp_path, damage, caplog):
  root = shutil.copytree(good, tmp_path / "checkpoints")
  damage(root)
  with caplog.at_level("WARNING", "absl"):
    assert restore(root).step == 2
  (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
  assert "resuming from checkpoint 2; newer ones are damaged: 3: " in line and "\n" not in line
  assert DAMAGES[damage].partition(" .")[0] in line


def test_the_step_can_be_saved_again(good, tmp_path):
  root = shutil.copytree(good, tmp_path / "checkpoints")
  swap_the_state(root)
  live = after(2)
  with Checkpoints(root, keep=3) as checkpoints:
    assert checkpoints.restore(tree(0), iterator=iterator()).step == 2
    next(live)
    checkpoints.save(3, tree(3), host={"seen": 3}, iterator=live)
    assert checkpoints.steps() == [1, 2, 3]
  assert restore(root).step == 3


def test_none_that_is_good(good, tmp_path):
  root = shutil.copytree(good, tmp_path / "checkpoints")
  for step in STEPS:
    shutil.rmtree(root / str(step) / "state")
  with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: 3: .*; 2: .*; 1: ") as error:
    restore(root)
  assert "\n" not in str(error.value)
  with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: 2: "):
    restore(root, step=2)
  assert sorted(path.name for path in root.iterdir()) == ["1", "2", "3"]  # nothing is thrown away


def test_one_from_before_there_were_checksums(good, tmp_path, caplog):
  root = shutil.copytree(good, tmp_path / "checkpoints")
  for part in ("host", "iterator"):
    path = root / "3" / part / "value.json"
    value = json.loads(path.read_text())["value"]
    for name in ("step", "checksums", "iterator") if part == "host" else ():
      del value[name]
    path.write_text(json.dumps(value))
  with caplog.at_level("WARNING", "absl"):
    assert restore(root).step == 3
  assert "written without checksums" in caplog.text


# Two processes hold half of the state each. Only the second one's half is damaged.
PAIR = """
import pathlib, sys
import jax
port, rank, repo, folder = sys.argv[1:]
sys.path.insert(0, repo)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank), shutdown_timeout_seconds=20)
import logging
from axpo_jax import processes
from tests.hostile import test_checkpoints as case
from axpo_jax.model import sharding
case.tree.__defaults__ = (sharding.make_mesh({"fsdp": 2}, jax.devices()),)
case.same = lambda x, want: all((a.data == b.data).all() for a, b in zip(x.addressable_shards, want.addressable_shards))
case.saved(pathlib.Path(folder))
processes.barrier()
if rank == "0":
  case.swap_the_second_half(pathlib.Path(folder))
processes.barrier()
print("restored", case.restore(pathlib.Path(folder)).step)
"""


def swap_the_second_half(root):
  for path in data_files(root / "3"):
    if "ocdbt.process_1" in str(path):
      path.write_bytes(b"")


def test_two_processes_agree_when_one_of_them_meets_damage(tmp_path):
  port = str(free_port("127.0.0.1"))
  pair = [subprocess.Popen([sys.executable, "-c", PAIR, port, str(rank), str(children.REPO), str(tmp_path / "c")],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=children.environment(1)) for rank in range(2)]
  outputs = [process.communicate(timeout=200)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], outputs
  assert all("restored 2" in output for output in outputs)
  assert "resuming from checkpoint 2" in outputs[0] and "resuming" not in outputs[1]


def test_checksums_know_every_value_and_its_place_but_no_split():
  """Against NumPy, by 64-bit integers."""
  rng = np.random.default_rng(0)
  arrays = {"f": rng.standard_normal((4, 6, 10)).astype(np.float32),
            "b": rng.standard_normal((8, 3)).astype(jnp.bfloat16), "i": rng.integers(-9, 9, 16).astype(np.int32),
            "n": np.array([True, False, True, True]), "s": np.float32(-0.0)}

  def plain(x):
    bits = np.frombuffer(x.tobytes(), f"u{x.dtype.itemsize}").astype(np.uint64)
    return int(((2 * np.arange(bits.size, dtype=np.uint64) + 1) * bits).sum() % 2**32)

  wanted = {name: plain(x) for name, x in arrays.items()}
  assert checksums({name: jnp.asarray(x) for name, x in arrays.items()}) == wanted
  mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
  split = {name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*["fsdp"][:x.ndim])))
           for name, x in arrays.items()}
  assert checksums(split) == wanted
  assert checksums({}) == {}
