"""Against transformers' PyTorch Qwen3-VL on random weights, float32 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axpo_jax.model.vision_inputs import bilinear_corners, grid_positions, mrope_positions
from tests import weights

GRIDS = {
  "text only": [],
  "one image": [(6, 4)],
  "smallest image": [(2, 2)],
  "several aspect ratios": [(2, 14), (8, 8), (12, 2)],
  # 10 x 6 over a 7 x 7 grid, in rows that the images do not fill, and a text of uneven length.
  "left-over odd sizes": [(10, 6), (2, 6), (6, 2), (14, 4)],
}
# float32 rounding leaves 7e-7 and 2e-6 here; test_traps.py shows what they catch.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def relative(a, b) -> float:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", GRIDS)
def test_logits(reference, make_case, name):
  import torch

  case = make_case(GRIDS[name], seed=len(name))
  with torch.no_grad():
    want = reference.torch(**case.torch_kwargs()).logits[0].numpy()
  got = jax.jit(lambda p: case.logits(reference.model(p)))(reference.params)
  assert got.dtype == jnp.float32
  assert relative(got, want) < LOGITS_TOLERANCE
  assert max(relative(g, w) for g, w in zip(got, want, strict=True)) < LOGITS_TOLERANCE


def test_intermediates(untied, make_case):
  """Every block, merger, DeepStack feature and layer, so that a failure has an address."""
  case = make_case(GRIDS["several aspect ratios"], patch_buckets=(256,))
  wanted = _torch_intermediates(untied.torch, case)
  got = jax.jit(lambda p: case.run(untied.model(p), "intermediates"))(untied.params)
  real = np.asarray(case.vision.segments_RxP[0]) > 0
  merged = real[::4]
  order = np.concatenate([np.flatnonzero(case.vision.segments_RxP[0] == s) for s in (2, 1, 3)])
  assert real.sum() == len(order)
  for i in range(untied.config.vision.depth):
    assert relative(got["vision.blocks"][i, 0, order], wanted[f"block {i}"]) < 1e-5, i
  order = order[::4] // 4
  assert merged.sum() == len(order)
  assert relative(got["vision.merged"][order], wanted["merger"]) < 1e-5
  for i in range(3):
    assert relative(got["vision.deepstack"][i, order], wanted[f"deepstack {i}"]) < 1e-5, i
  # A torch hook on layer i sees it before its DeepStack feature; layer i + 1's input is after.
  for i in range(untied.config.text.num_layers - 1):
    assert relative(got["text.layers"][i, 0], wanted[f"into layer {i + 1}"]) < 1e-5, i
  assert relative(got["text.norm"][0], wanted["norm"]) < 1e-5


def _torch_intermediates(model, case) -> dict[str, np.ndarray]:
  import torch

  seen = {}

  def out_of(name):
    return lambda _module, _args, out: seen.__setitem__(name, out.squeeze(0).numpy())

  def into(name):
    return lambda _module, args: seen.__setitem__(name, args[0].squeeze(0).numpy())

  visual, text = model.model.visual, model.model.language_model
  hooks = [b.register_forward_hook(out_of(f"block {i}")) for i, b in enumerate(visual.blocks)]
  hooks += [
    m.register_forward_hook(out_of(f"deepstack {i}"))
    for i, m in enumerate(visual.deepstack_merger_list)
  ]
  hooks += [
    layer.register_forward_pre_hook(into(f"into layer {i}")) for i, layer in enumerate(text.layers)
  ]
  hooks.append(visual.merger.register_forward_hook(out_of("merger")))
  hooks.append(text.norm.register_forward_hook(out_of("norm")))
  with torch.no_grad():
    model(**case.torch_kwargs())
  for hook in hooks:
    hook.remove()
  return seen


@pytest.mark.parametrize(("head", "remat"), [("untied", "none"), ("untied", "dots"), ("tied", "full")])
def test_gradient_of_every_parameter(request, make_case, head, remat):
  reference = request.getfixturevalue(head)
  case = make_case(GRIDS["several aspect ratios"], seed=3)
  targets = np.roll(case.ids_T, -1)[:-1]
  wanted = torch_gradients(reference.torch, case, targets)
  graphdef = nnx.graphdef(reference.configured(remat=remat))

  def loss(params):
    logits = case.logits(nnx.merge(graphdef, params))[:-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1).mean()

  got = weights.by_name(jax.jit(jax.grad(loss))(reference.params), reference.config)
  assert got.keys() == wanted.keys()
  errors = {name: relative(got[name], wanted[name]) for name in wanted}
  bad = {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE}
  assert not bad


def torch_gradients(model, case, targets, aux: float = 0.0) -> dict[str, np.ndarray]:
  """Of the cross-entropy, and `aux` times a mixture of experts' load-balancing loss."""
  import torch

  model.zero_grad()
  out = model(**case.torch_kwargs(), **({"output_router_logits": True} if aux else {}))
  loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(targets.astype(np.int64)))
  (loss + aux * out.aux_loss if aux else loss).backward()
  return {n: p.grad.numpy().copy() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", GRIDS)
def test_positions(untied, make_case, name):
  case = make_case(GRIDS[name], seed=len(name))
  kwargs = case.torch_kwargs()
  if case.grids is None:
    want = np.tile(np.arange(len(case.ids_T))[:, None], 3)
  else:
    want, _ = untied.torch.model.get_rope_index(
      kwargs["input_ids"], kwargs["mm_token_type_ids"], image_grid_thw=kwargs["image_grid_thw"]
    )
    want = want[:, 0].T.numpy()
  merged = [(h // 2, w // 2) for h, w in GRIDS[name]]
  got = mrope_positions(case.ids_T, merged, untied.config.image_token_id)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("grid_hw", [(2, 2), (6, 10), (48, 48), (64, 2), (94, 50)])
def test_bilinear_corners_bit_for_bit(grid_hw):
  import torch
  from transformers.vision_utils import get_vision_interpolation_indices_and_weights

  index, weight = bilinear_corners(grid_positions(grid_hw, 2), grid_hw, 48)
  want_index, want_weight = get_vision_interpolation_indices_and_weights(
    torch.tensor([[1, *grid_hw]]), 48, mode="bilinear", align_corners=True, spatial_merge_size=2
  )
  np.testing.assert_array_equal(index, want_index.numpy())
  np.testing.assert_array_equal(weight, want_weight.numpy())


def test_bfloat16_is_near_float32(untied, make_case):
  """The compute dtype must reach the whole model, and cost no more than bfloat16's 8 bits."""
  case = make_case([(6, 4)])
  graphdef = nnx.graphdef(untied.configured(dtype="bfloat16"))

  @jax.jit
  def forward(params):
    model = nnx.merge(graphdef, params)
    hidden, _ = case.run(model)
    return hidden, model.logits(hidden)[0]

  hidden, logits = forward(untied.params)
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  want = jax.jit(lambda p: case.logits(untied.model(p)))(untied.params)
  assert 1e-4 < relative(logits, want) < 0.05
