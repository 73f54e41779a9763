"""Low-rank adapters: what they compute, what is trained of them, and whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from axpo_jax.errors import ConfigError
from axpo_jax.model import lora, sharding
from axpo_jax.model.config import TEXT_TARGETS, VISION_TARGETS, LoraConfig
from axpo_jax.model.layers import Linear, Maker
from axpo_jax.model.lora import Adapter
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.stages import engines, experiment, sections
from axpo_jax.stages.metrics import MetricsWriter, read_metrics
from axpo_jax.train.batch import targets
from axpo_jax.train.checkpoint import Checkpoints
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import pack
from axpo_jax.train.state import make_optimizer, with_adapters
from axpo_jax.train.step import Learner, supervised_objective
from tests.stages import rigged
from tests.stages.micro_config import get_config

EVERYWHERE = LoraConfig(rank=4, alpha=12.0, targets=(*TEXT_TARGETS, *VISION_TARGETS))
ADAPTED = {*(f"text/layers/{name}" for name in TEXT_TARGETS),
           *(f"vision/blocks/{name}" for name in VISION_TARGETS),
           *(f"vision/{merger}/{name}" for merger in ("merger", "deepstack") for name in ("fc1", "fc2"))}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def _learner(config, mesh, **optimizer):
  options = OptimizerConfig(1e-2, total_steps=4, **optimizer)
  return Learner(config, make_optimizer(options), supervised_objective(), mesh, chunk=16)


@pytest.fixture(scope="module")
def plain(config, mesh):
  return _learner(config, mesh)


@pytest.fixture(scope="module")
def learner(config, mesh):
  return _learner(dataclasses.replace(config, lora=EVERYWHERE), mesh, adapters=True)


@pytest.fixture
def base(host_params, mesh):
  return jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), host_params,
                      sharding.param_shardings(host_params, mesh))


@pytest.fixture
def adapted(base, config, mesh):
  return with_adapters(base, dataclasses.replace(config, lora=EVERYWHERE), 5, mesh)


@pytest.fixture
def noisy(adapted):
  """As if trained: no b is zero."""
  def fill(path, x):
    noise = np.random.default_rng(1).normal(size=x.shape, scale=0.1)
    return jax.device_put(noise.astype(x.dtype), x.sharding) if "/b/" in _name(path) else x
  return jax.tree_util.tree_map_with_path(fill, adapted)


@pytest.fixture(scope="module")
def batches(config, make_example, make_image):
  examples = [make_example(0, 9, [make_image(0)]), *(make_example(i, 8) for i in range(1, 6))]
  return pack(examples, rows=4, length=16, block=4, vision_config=config.vision, rows_multiple_of=4,
              image_rows_multiple_of=4, patch_buckets=(16,), row_buckets=(4,))


def _name(path) -> str:
  return sharding.path_name(path)


def _arrays(tree):
  return {_name(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _assert_same_bits(got, want):
  got, want = _arrays(got), _arrays(want)
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].tobytes() == value.tobytes(), name


def test_a_new_adapter_changes_no_bit(config, host_params, batches):
  """Operation by operation; a compiled program of another text may round otherwise."""
  adapted_config = dataclasses.replace(config, lora=EVERYWHERE)
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  base = jax.tree.map(jnp.array, host_params)
  new, batch = with_adapters(base, adapted_config, 5, mesh), batches[0]

  def hidden(config, params):
    graphdef = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))[0]
    with jax.disable_jit():
      return nnx.merge(graphdef, params)(
        *map(jnp.asarray, (batch.tokens_BxT, batch.positions_BxTx3, batch.ends_BxT)),
        vision=batch.vision, image_index_BxT=jnp.asarray(batch.image_index_BxT))[0]

  _assert_same_bits(hidden(adapted_config, new), hidden(config, base))


def test_adapters_stand_at_their_targets_and_are_split_with_them(adapted, mesh):
  found = {_name(path).partition("/adapter/")[0]: x
           for path, x in jax.tree_util.tree_flatten_with_path(adapted)[0] if "adapter" in _name(path)}
  assert found.keys() == ADAPTED
  layer = adapted["text"]["layers"]["q"]
  for name, axes in (("a", ("layers", "embed", "rank")), ("b", ("layers", "rank", "heads", "head_dim"))):
    kernel = layer["adapter"][name]["kernel"].get_value()
    assert kernel.sharding.spec == sharding.spec(axes) and kernel.dtype == np.float32
  a = np.asarray(layer["adapter"]["a"]["kernel"].get_value())
  assert a.shape == (2, 32, 4) and a.std() == pytest.approx(32**-0.5, rel=0.15)
  assert not np.array_equal(a[0], a[1])  # every layer draws its own


def test_merged_is_what_the_adapters_compute(plain, learner, base, noisy, batches):
  merged = lora.merge(noisy, EVERYWHERE)
  assert _arrays(merged).keys() == _arrays(base).keys()
  logp, _ = learner.score(noisy, batches[0])
  same, _ = plain.score(merged, batches[0])
  without, _ = plain.score(base, batches[0])
  real = np.asarray(batches[0].weights_BxG) > 0
  np.testing.assert_allclose(np.asarray(same)[real], np.asarray(logp)[real], atol=2e-5)
  assert np.abs(np.asarray(without)[real] - np.asarray(logp)[real]).max() > 0.05
  # In another dtype: the same sums, rounded once.
  narrow = lora.merge(noisy, EVERYWHERE, "bfloat16")["text"]["layers"]["gate"]["kernel"].get_value()
  wide = merged["text"]["layers"]["gate"]["kernel"].get_value()
  assert narrow.dtype == "bfloat16" and wide.dtype == "float32"
  np.testing.assert_array_equal(narrow, wide.astype("bfloat16"))
  # By hand, for a kernel whose input is two axes wide; and what has no adapter is the same array.
  a, b = (np.asarray(noisy["text"]["layers"]["o"]["adapter"][name]["kernel"].get_value(), np.float64)
          for name in "ab")
  kernel = np.asarray(base["text"]["layers"]["o"]["kernel"].get_value())
  np.testing.assert_allclose(merged["text"]["layers"]["o"]["kernel"].get_value(),
                             kernel + 3.0 * np.einsum("lhdr,lrm->lhdm", a, b), atol=1e-6)
  assert merged["text"]["embedding"].get_value() is noisy["text"]["embedding"].get_value()


def test_the_reference_is_the_policy_without_its_adapters(plain, learner, base, noisy, batches):
  off, _ = learner.score(lora.switched_off(noisy), batches[0])
  alone, _ = plain.score(base, batches[0])
  np.testing.assert_allclose(off, alone, atol=2e-5)  # two programs, which round differently


def test_gradients_are_the_chain_rule_on_that_of_the_kernel():
  """Of a layer whose input is two axes wide."""
  rngs, draw = nnx.Rngs(0), np.random.default_rng(0)
  layer = Linear(Maker(rngs, "float32"), (3, 5, 7), ("heads", "head_dim", "embed"), fan_in=2)
  layer.adapter = nnx.data(Adapter(layer, EVERYWHERE, rngs))
  layer.adapter.b.kernel[...] = jnp.asarray(draw.normal(size=(4, 7)), jnp.float32)
  graphdef, params = nnx.split(layer)
  x, weight = (draw.normal(size=size).astype(np.float32) for size in ((11, 3, 5), (11, 7)))
  grads = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) * weight))(params)
  whole = np.asarray(grads["kernel"].get_value()).reshape(15, 7)
  a, b = (np.asarray(params["adapter"][name]["kernel"].get_value()) for name in "ab")
  got = {name: np.asarray(grads["adapter"][name]["kernel"].get_value()) for name in "ab"}
  np.testing.assert_allclose(got["a"].reshape(15, 4), 3.0 * whole @ b.T, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got["b"], 3.0 * a.reshape(15, 4).T @ whole, rtol=1e-4, atol=1e-5)


def test_only_adapters_are_trained_and_a_resume_repeats_the_run(learner, adapted, batches, tmp_path):
  base = jax.tree.map(np.asarray, lora.merge(adapted, EVERYWHERE))  # new: the base itself
  start = _arrays(adapted)
  state = learner.init(adapted)
  moments = [name for name in _arrays(state.opt_state) if "/mu/" in name or "/nu/" in name]
  trained = {name for name in start if "/adapter/" in name}
  assert len(moments) == 2 * len(trained) == 4 * len(ADAPTED)
  assert all("/adapter/" in name for name in moments)
  state, _ = learner.update(state, batches, targets(batches))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, learner.stored(state), host={})
    assert set(_arrays(learner.stored(state).params)) == trained
    for _ in range(2):
      state, result = learner.update(state, batches, targets(batches))
    stored = checkpoints.restore(learner.stored(learner.abstract_state())).state
  again = learner.restored(stored, lambda: jax.device_put(
    _tree_of(state.params, start), jax.tree.map(lambda x: x.sharding, state.params)))
  for _ in range(2):
    again, repeated = learner.update(again, batches, targets(batches))
  _assert_same_bits(again, state)
  assert learner.metrics(repeated, batches, tmp_path) == learner.metrics(result, batches, tmp_path)
  end = _arrays(state.params)
  for name, value in start.items():
    assert np.array_equal(end[name], value) == (name not in trained), name
  _assert_same_bits(lora.merge(lora.switched_off(state.params), EVERYWHERE), base)


def _tree_of(like, flat):
  """Arrays by name in the tree of `like`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], like)


def _config(policy, questions):
  config = get_config()
  config.mesh.fsdp = 2
  config.model.checkpoint = str(policy)
  config.data.path = config.data.eval_path = str(questions)
  config.lora.update(rank=4, alpha=8.0)
  config.sft.optimizer.learning_rate = config.optimizer.learning_rate = 1e-3
  config.sft.steps = config.rl.steps = 2
  config.checkpoint.every = 1
  config.eval.every = 0
  config.model.export_dtype = "float32"
  return config


@pytest.fixture
def two_devices(monkeypatch):
  """Runs see two of the eight devices."""
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(
    sharding.make_mesh, devices=jax.devices()[:2]))


@pytest.mark.slow
def test_a_run_with_adapters(two_devices, tmp_path, monkeypatch):
  """SFT, then AXPO; the same again, broken off in AXPO, gives the same policy."""
  from transformers import Qwen3VLForConditionalGeneration

  policy = rigged.write_policy(tmp_path / "base")
  (tmp_path / "data").mkdir()
  questions = rigged.write_questions(tmp_path / "data")
  config = _config(policy, questions)
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  experiment.run(config, whole)
  *_, first, second = read_metrics(whole)
  assert first["train/kl"] < 1e-9 < second["train/kl"]  # the reference is the policy that RL began with
  for line in (first, second):
    assert line["train/logp_gap_abs_max"] < 1e-4  # merged for the sampler, adapters in the trainer
  loaded, info = Qwen3VLForConditionalGeneration.from_pretrained(
    whole / "rl" / "policy", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  del loaded
  before, after = (load_file(folder / "model.safetensors") for folder in (policy, whole / "rl" / "policy"))
  changed = {name for name in after if not np.array_equal(before[name], after[name])}
  assert changed == {name for name in after if "language_model.layers" in name and "_proj." in name}

  write = MetricsWriter.write

  def dying(self, step, values):
    write(self, step, values)
    if step == 4:  # the second of RL
      raise InterruptedError("the machine is gone")

  monkeypatch.setattr(MetricsWriter, "write", dying)
  with pytest.raises(InterruptedError):
    experiment.run(config, broken)
  monkeypatch.setattr(MetricsWriter, "write", write)
  experiment.run(config, broken)
  assert rigged.untimed(read_metrics(broken)) == rigged.untimed(read_metrics(whole))
  for stage in ("sft", "rl"):
    file = f"{stage}/policy/model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("changes, message", [
  ({"targets": ("q", "query")}, r"config\.lora\.targets.*'query'"),
  ({"targets": ()}, r"config\.lora\.targets"),
  ({"alpha": 0.0}, r"config\.lora\.rank=4 and lora\.alpha=0\.0"),
  ({"targets": ("q", "qkv")}, r"config\.sft\.freeze_vision to False"),
])
def test_adapters_that_cannot_work_are_refused(changes, message):
  config = get_config()
  config.lora.update(rank=4)
  config.lora.update(**changes)
  config.stages, config.sft.freeze_vision = ("sft",), True
  with pytest.raises(ConfigError, match=message):
    sections.lora(config)
  config.lora.rank = 0
  assert sections.lora(config) is None


def test_the_vision_tower_is_pushed_where_it_has_adapters():
  """Servers begin with the tower that they are not sent."""
  config = get_config()
  config.model.freeze_vision, config.stages = False, ("rl",)
  for names, expected in ((("q", "v"), True), (("q", "fc1"), False)):
    config.lora.update(rank=4, targets=names)
    assert engines.vision_is_frozen(config, sections.lora(config)) == expected
  assert not engines.vision_is_frozen(config, None)
  config.model.freeze_vision = True
  assert engines.vision_is_frozen(config, None)
