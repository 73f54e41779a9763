"""The mixture of experts against transformers' Qwen3-VL-MoE on random weights, and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axpo_jax.engine.embedded.kv_pool import engine_rules
from axpo_jax.engine.sglang.server import sizing
from axpo_jax.engine.sglang.weight_push import server_name
from axpo_jax.model import experts, experts_gpu, flops, hf, sharding
from axpo_jax.model.cache import KVCache
from axpo_jax.model.config import ExpertsConfig, LoraConfig, ModelConfig, UnsupportedConfig
from axpo_jax.model.presets import PRESETS
from tests import weights
from tests.model.conftest import CONFIG, make_reference
from tests.model.test_hf import tensors_of, write
from tests.model.test_parity import (
  GRADIENT_TOLERANCE,
  GRIDS,
  LOGITS_TOLERANCE,
  relative,
  torch_gradients,
)

ROOT = "model.language_model.layers"
EXPERTS = ExpertsConfig(count=8, per_token=3, intermediate_size=20)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
  config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, experts=EXPERTS))
  return make_reference(config, tmp_path_factory.mktemp("routed"))


@pytest.mark.parametrize("name", ["text only", "several aspect ratios"])
def test_logits(routed, make_case, name):
  import torch

  case = make_case(GRIDS[name], seed=len(name))
  with torch.no_grad():
    want = routed.torch(**case.torch_kwargs()).logits[0].numpy()
  got = jax.jit(lambda p: case.logits(routed.model(p)))(routed.params)
  assert max(relative(g, w) for g, w in zip(got, want, strict=True)) < LOGITS_TOLERANCE


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_gradient_of_every_parameter_with_the_balance_loss(routed, make_case, remat):
  case = make_case(GRIDS["several aspect ratios"], seed=3)
  targets = np.roll(case.ids_T, -1)[:-1]
  coef = 0.1
  wanted = torch_gradients(routed.torch, case, targets, aux=coef)
  graphdef = nnx.graphdef(routed.configured(remat=remat))

  def loss(params):
    loads, model = [], nnx.merge(graphdef, params)
    logits = case.logits(model, loads=loads)[:-1]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1).mean()
    return nll + coef * experts.balance_loss(loads[0], EXPERTS.per_token)

  got = weights.by_name(jax.jit(jax.grad(loss))(routed.params), routed.config)
  assert got.keys() == wanted.keys()
  errors = {name: relative(_as_torch(name, got[name]), wanted[name]) for name in wanted}
  assert not {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE}


def _as_torch(name, tensor):
  """transformers keeps experts [out, in] in memory, and [in, out] in released files."""
  return tensor.transpose(0, 2, 1) if ".experts." in name else tensor


def test_padding_changes_nothing(routed, make_case):
  """Not the numbers of the tokens, and not what is counted of the routers."""
  case = make_case()
  length = len(case.ids_T)

  def run(pad):
    loads, ids = [], np.pad(case.ids_T, (0, pad), constant_values=9)[None]
    positions = np.pad(case.positions_Tx3, ((0, pad), (0, 0)))[None]
    ends = np.where(np.arange(length + pad) < length, length, 0)[None]
    hidden, _ = routed.model()(ids, positions, ends, loads=loads)
    return hidden[0, :length], loads[0]

  (want, load), (got, padded) = run(0), run(7)
  assert relative(got, want) < 1e-6
  assert load.copies_E.shape == (CONFIG.text.num_layers, EXPERTS.count)
  np.testing.assert_array_equal(load.copies_E.sum(-1), length * EXPERTS.per_token)
  np.testing.assert_array_equal(padded.copies_E, load.copies_E)
  np.testing.assert_allclose(padded.probs_E, load.probs_E, rtol=1e-5)


@pytest.fixture(scope="module")
def layer():
  """A layer of experts in float32, and tokens for it of which some are padding."""
  text = dataclasses.replace(CONFIG.text, experts=EXPERTS)
  model = experts.Experts(text, experts.Maker(nnx.Rngs(0), "float32"))
  x_BxTxD = np.random.default_rng(0).normal(size=(8, 16, text.hidden_size)).astype(np.float32)
  real_BxT = np.random.default_rng(1).random((8, 16)) < 0.8
  return nnx.split(model), x_BxTxD, real_BxT


def _run(layer, mesh, take):
  """A layer's result and the gradients of tokens and parameters, on a mesh."""
  (graphdef, params), x_BxTxD, real_BxT = layer

  def loss(params, x_BxTxD):
    with sharding.use(mesh):
      y_BxTxD, load = nnx.merge(graphdef, params)(x_BxTxD, real_BxT[take])
      return (y_BxTxD**2).sum() + experts.balance_loss(jax.tree.map(lambda n: n[None], load), 3), y_BxTxD

  if mesh is not None:
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
  (_, y_BxTxD), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x_BxTxD[take])
  return y_BxTxD, grads


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("axes", [
  {"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 4, "context": 2}, marks=pytest.mark.slow)])
def test_on_a_mesh(layer, axes, stay, monkeypatch):
  """Experts collected where the tokens are, and (as in decoding) tokens brought to the experts."""
  monkeypatch.setattr(sharding, "stays", lambda kernel, x: stay)
  want = _run(layer, None, np.s_[:])
  got = _run(layer, sharding.make_mesh(axes), np.s_[:])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert relative(a, b) < 1e-5


@pytest.mark.parametrize("sizes", [(100, 0, 156), (256, 0, 0), (1, 130, 60)])
def test_kernels_for_gpus(sizes):
  """Simulated, against a product for each group; groups may be empty, and rows may be left over."""
  rng, rows = np.random.default_rng(0), 256
  x, w, g = (rng.normal(size=size).astype(np.float32) for size in ((rows, 48), (3, 48, 32), (rows, 32)))
  group_R = np.repeat(np.arange(3), sizes)
  used = np.arange(rows)[:, None] < len(group_R)

  def total(product, x, w):
    return jnp.sum(jnp.where(used, product(x, w), 0) * g)

  def ours(x, w):
    return experts_gpu.grouped(x, w, jnp.asarray(sizes), interpret=True)

  def plain(x, w):
    one = jnp.einsum("rk,rkn->rn", x[:len(group_R)], w[group_R])
    return jnp.pad(one, ((0, rows - len(one)), (0, 0)))

  got, want = (jax.grad(functools.partial(total, f), argnums=(0, 1))(x, w) for f in (ours, plain))
  assert relative(np.where(used, ours(x, w), 0), plain(x, w)) < 1e-6
  assert relative(np.where(used, got[0], 0), want[0]) < 1e-6
  assert relative(got[1], want[1]) < 1e-6


def test_flops_count_active_experts(layer):
  (graphdef, params), x_BxTxD, real_BxT = layer
  jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x, real_BxT)[0])(params, x_BxTxD)
  D, F = CONFIG.text.hidden_size, EXPERTS.intermediate_size
  token = 2 * D * (3 * EXPERTS.per_token * F + EXPERTS.count + EXPERTS.per_token)  # the last: weighted sum
  assert flops.count(jaxpr) == real_BxT.size * token


def test_released_layout_is_written_and_transformers_loads_it(routed, make_case, tmp_path):
  import torch
  from transformers import Qwen3VLMoeForConditionalGeneration

  hf.save_checkpoint_hf(tmp_path / "ours", routed.params, routed.config)
  name, D, F = f"{ROOT}.0.mlp.experts.gate_up_proj", CONFIG.text.hidden_size, EXPERTS.intermediate_size
  tensors = tensors_of(tmp_path / "ours")
  assert tensors[name].shape == (EXPERTS.count, D, 2 * F)
  theirs, report = Qwen3VLMoeForConditionalGeneration.from_pretrained(
    tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, value in routed.torch.state_dict().items():
    assert torch.equal(theirs.state_dict()[name], value), name
  assert ModelConfig.from_hf(tmp_path / "ours", dtype="float32") == routed.config


def test_all_layouts_are_read_alike(routed, tmp_path):
  """On a mesh too, whose devices keep their own experts."""
  hf.save_checkpoint_hf(tmp_path / "released", routed.params, routed.config)
  released = tensors_of(tmp_path / "released")
  transposed, single = dict(released), dict(released)
  F = EXPERTS.intermediate_size
  for name in [name for name in released if ".experts." in name]:
    transposed[name] = np.ascontiguousarray(released[name].transpose(0, 2, 1))
    whole, root = single.pop(name), name.rpartition(".")[0]
    parts = {"gate_proj": whole[:, :, :F], "up_proj": whole[:, :, F:]} if "gate" in name else {"down_proj": whole}
    single |= {f"{root}.{e}.{part}.weight": np.ascontiguousarray(x[e].T)
               for part, x in parts.items() for e in range(EXPERTS.count)}
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  for number, tensors in enumerate((released, transposed, single)):
    write(tmp_path / str(number), tensors, routed.config)
    loaded = hf.load_params(tmp_path / str(number), routed.config, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, routed.params)
  experts_of = loaded["text"]["layers"]["experts"]["gate_up"].get_value()
  assert experts_of.addressable_shards[0].data.shape == (5, EXPERTS.count // 4, 72, 2, F // 2)
  single.popitem()
  write(tmp_path / "cut", single, routed.config)
  with pytest.raises(hf.CheckpointMismatch, match="missing"):
    hf.load_params(tmp_path / "cut", routed.config)


@pytest.mark.parametrize("axes", [
  None, pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)])
def test_prefill_and_decode_equal_one_forward(routed, make_case, axes):
  """With the embedded engine's rules; rows are as many as devices that share none."""
  case, rows = make_case(), 4
  length = len(case.ids_T)
  tokens = np.random.default_rng(0).integers(0, 130, (rows, length))
  positions, ends = np.broadcast_to(case.positions_Tx3, (rows, length, 3)), np.full((rows, length), length)
  mesh = axes and sharding.make_mesh(axes)

  def step(params, cut, cache):
    with sharding.use(mesh, engine_rules() if mesh else None):
      model = routed.model(params)
      hidden, cache = model(tokens[:, cut], positions[:, cut], ends[:, cut], cache=cache)
      return model.logits(hidden), cache

  params = routed.params
  if mesh:
    params = jax.device_put(params, sharding.param_shardings(params, mesh, engine_rules()))
  cache, got = KVCache.empty(routed.config, rows, length), []
  for cut in (np.s_[:-2], np.s_[-2:-1], np.s_[-1:]):
    logits, cache = jax.jit(functools.partial(step, cut=cut))(params, cache=cache)
    got.append(logits)
  hidden, _ = routed.model()(tokens, positions, ends)
  assert relative(np.concatenate(got, 1), routed.model().logits(hidden)) < 1e-5


def test_what_is_missing_is_refused():
  text = dataclasses.replace(CONFIG.text, experts=EXPERTS)
  with pytest.raises(UnsupportedConfig, match="experts have no adapters; leave down, gate, up out"):
    dataclasses.replace(CONFIG, text=text, lora=LoraConfig(4))
  dataclasses.replace(CONFIG, text=text, lora=LoraConfig(4, targets=("q", "k", "v", "o")))
  with pytest.raises(UnsupportedConfig, match="num_experts_per_tok=9"):
    ExpertsConfig(8, 9, 20)
  with pytest.raises(UnsupportedConfig, match="hidden_size=72 and moe_intermediate_size=36"):
    dataclasses.replace(text, experts=ExpertsConfig(8, 2, 36))
  raw = PRESETS["30b_a3b"].to_hf()
  for field, value in (("mlp_only_layers", [0]), ("decoder_sparse_step", 2), ("norm_topk_prob", False)):
    with pytest.raises(UnsupportedConfig, match=f"text_config.{field}="):
      ModelConfig.from_hf({**raw, "text_config": {**raw["text_config"], field: value}})


def test_names_on_servers(routed):
  """Those of SGLang's Qwen3VLMoeForConditionalGeneration, which transposes what it reads."""
  root = f"{ROOT}.0.mlp"
  assert server_name(f"{root}.experts.gate_up_proj") == "model.layers.0.mlp.experts.w13_weight"
  assert server_name(f"{root}.experts.down_proj") == "model.layers.0.mlp.experts.w2_weight"
  assert server_name(f"{root}.gate.weight") == "model.layers.0.mlp.gate.weight"


def test_parameters_of_the_30b():
  """30.5 billion of the text and 0.6 of the tower; 3.3 of the text are used for a token."""
  config = PRESETS["30b_a3b"]
  leaves = jax.tree.leaves(hf.abstract_params(config))
  total = sum(leaf.size for leaf in leaves)
  assert sizing.parameters(config) == total and 31.0e9 < total < 31.2e9
  one = flops.needed(config, tokens=1, targets=1, patches=0, seen=0, seen_patches=0) / 2
  assert 3.0e9 < one < 3.1e9  # with the head, without the embedding table
