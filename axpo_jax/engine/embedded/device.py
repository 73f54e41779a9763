"""The engine's device side: KV rows in one donated pool, and the jitted functions that use it.

  encode   images -> features, once a wave
  pick     features of a wave -> those of one prefill's tokens
  copy     rows -> rows, for sequences whose whole prompt is cached
  prefill  rows + the tokens that are not cached -> rows
  decode   up to `block` tokens for a set of rows, sampled on the device

Every array shape comes from a bucket, so the number of compiled programs is bounded and does not
depend on the data (`call_sizes`). A row number equal to the number of rows marks padding: a read of it is
clamped, a write to it is dropped.

Legend: L layers, R rows of the pool, S slots, K kv heads, H head size; B rows of one call, T tokens,
V vocabulary, G ids generated before, M merged image tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from axpo_jax.engine.embedded import sampling
from axpo_jax.engine.embedded.kv_pool import ROWS, Pool, PoolRows, engine_rules
from axpo_jax.model import programs, sharding
from axpo_jax.model.cache import DecodeCache
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.text import gather_image
from axpo_jax.model.vision import VisionFeatures
from axpo_jax.model.vision_inputs import VisionInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillInputs:
  """Prompt tokens that are not cached. image_index is None where a batch has no images."""

  source_B: Any  # row whose first start_B tokens are taken
  row_B: Any  # row that receives them and the new ones
  start_B: Any
  tokens_BxT: Any
  positions_BxTx3: Any
  real_BxT: Any  # int32, 1 for real tokens: a prefix of each row
  image_index_BxT: Any | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeInputs:
  """State of the decoded sequences. generated is None where no row has a presence penalty."""

  row_B: Any
  length_B: Any  # valid tokens in the row; the pending token comes next
  pending_B: Any  # the token drawn last (or the prompt's last), not yet fed
  position_B: Any  # its rotary position
  drawn_B: Any  # tokens drawn so far: the counter of the random stream
  limit_B: Any  # most tokens to draw now; 0 for padding rows
  sampling: sampling.RowParams
  generated_BxG: Any | None  # ids drawn so far, padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutputs:
  """What one block drew: the first count_B of T tokens of each row are real."""

  tokens_TxB: jax.Array
  logprobs_TxB: jax.Array
  count_B: jax.Array


class Device:
  """Owns the pool and the engine's copy of the parameters.

  Args:
    graphdef: of the Qwen3VL that `params` belong to.
    rows: of the pool, rounded up to a multiple of `shards`.
    dtype: of the pool and of the parameters' copy.

  Attributes:
    shards: parts into which the pool's rows are split, and those of every call.
  """

  def __init__(
    self,
    config: ModelConfig,
    graphdef: nnx.GraphDef,
    *,
    rows: int,
    length: int,
    dtype: str,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules | None = None,
  ):
    self._config, self._dtype = config, jnp.dtype(dtype)
    self._length, self._mesh = length, mesh
    self._rules = None if mesh is None else engine_rules(rules)
    self.shards = 1 if mesh is None else sharding.parts("batch", mesh, self._rules)
    self.rows = -(-rows // self.shards) * self.shards
    self._params: Any = None
    self._pool: Pool | None = None
    self._compiled = programs.Compiled()
    options = programs.compiler_options(mesh, dtype, config.dtype)
    self._run = _programs(graphdef, mesh, self._rules and tuple(self._rules.items()),
                          options and tuple(options.items()))

  @property
  def compilations(self) -> int:
    """Distinct programs met so far."""
    return len(self._compiled)

  def install(self, params: Any) -> None:
    """Takes a private copy of `params`: a trainer donates its buffers on its next step.

    Matrices are cast to the engine's dtype, as the model would cast them on use; norms are
    computed in float32 and keep it.

    Raises:
      ValueError: shapes or names differ from those of the parameters before.
    """
    if self._params is not None:
      _check_same_shapes(self._params, params)
      self._params = None  # freed first: two copies may not fit
    self._params = jax.tree.map(
      self._own, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )

  def _own(self, leaf: Any) -> Any:
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    copy = jnp.array(value, dtype=self._dtype_of(leaf, value), copy=True)
    return leaf.replace(copy) if isinstance(leaf, nnx.Variable) else copy

  def _dtype_of(self, leaf: Any, value: Any) -> Any:
    names = sharding.names_of(leaf) if isinstance(leaf, nnx.Variable) else None
    if not jnp.issubdtype(value.dtype, jnp.floating):
      return value.dtype
    return jnp.dtype(jnp.float32) if (names or ())[-1:] == ("norm",) else self._dtype

  def reset_pool(self) -> None:
    """Allocates the pool anew (its content is lost): at the start, and after a failed call."""
    self._pool = None
    self._pool = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
                              self.abstract_pool())

  def abstract_pool(self) -> Pool:
    """Shapes and shardings of the pool."""
    text = self._config.text
    heads = (text.num_layers, self.rows, text.num_kv_heads)

    def of(*shape):
      placed = None
      if self._mesh is not None:
        placed = sharding.sharding_for(
          ROWS, (*heads, *shape), self._mesh, self._rules, label="rollout KV pool")
      return jax.ShapeDtypeStruct((*heads, *shape), self._dtype, sharding=placed)

    return Pool(of(text.head_dim, self._length), of(self._length, text.head_dim))

  def abstract_params(self, params: nnx.State) -> nnx.State:
    """Shapes and shardings of the engine's copy of (abstract) parameters."""
    def own(leaf, placed):
      value = leaf.get_value()
      return leaf.replace(jax.ShapeDtypeStruct(value.shape, self._dtype_of(leaf, value),
                                               sharding=placed.get_value()))

    return jax.tree.map(own, params, sharding.param_shardings(params, self._mesh, self._rules),
                        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

  @property
  def pool_lost(self) -> bool:
    """Whether a failed call has taken the pool with it, since it was donated."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._pool))

  def free(self) -> None:
    """Drops the parameters and the pool."""
    self._params = self._pool = None

  def encode(self, vision: VisionInputs) -> VisionFeatures:
    """Features of packed images, to be passed to `prefill`."""
    vision = self._placed(vision)
    return self._call("encode", vision, self._params, vision)

  def copy(self, source_B: np.ndarray, row_B: np.ndarray, slots: int) -> None:
    """Copies the first `slots` slots of rows to rows, whatever devices they are on."""
    self._pool = self._call("copy", source_B, self._pool, source_B, row_B, slots=slots)

  def prefill(self, inputs: PrefillInputs, features: VisionFeatures | None, slots: int) -> None:
    """Computes prompt tokens. `slots` holds every row's start and new tokens.

    Each device's part of the call's rows must come from and go to rows of that device.
    """
    if features is not None:
      features, inputs = self._picked(features, inputs)
    inputs = self._placed(inputs)
    self._pool = self._call("prefill", (inputs, features), self._params, self._pool, inputs, features,
                            slots=slots)

  def _picked(self, features: VisionFeatures, inputs: PrefillInputs
              ) -> tuple[VisionFeatures, PrefillInputs]:
    """The features of this call's tokens, one a token. The large program of `prefill` would otherwise be
    compiled again for every number of features that a wave can have."""
    index_BxT = inputs.image_index_BxT
    index_N = self._placed(index_BxT.reshape(-1))
    picked = self._call("pick", (features, index_N), features, index_N)
    own_BxT = np.where(index_BxT < 0, -1, np.arange(index_BxT.size, dtype=np.int32).reshape(index_BxT.shape))
    return picked, dataclasses.replace(inputs, image_index_BxT=own_BxT)

  def decode(self, inputs: DecodeInputs, *, slots: int, block: int) -> DecodeOutputs:
    """Draws up to `block` tokens a row; waits for them and returns NumPy arrays. The rows are arranged
    by devices, as for `prefill`."""
    inputs = self._placed(inputs)
    self._pool, out = self._call("decode", inputs, self._params, self._pool, inputs, slots=slots,
                                 block=block)
    return jax.device_get(out)

  def trace(self, params: nnx.State, prompts: PrefillInputs, running: DecodeInputs, block: int
            ) -> dict[str, jax.stages.Traced]:
    """`prefill` and `decode` at full length over abstract parameters, to compile ahead of time.

    prompts, running: arrays of the sizes of a call; their values do not matter.
    """
    params, pool, length = self.abstract_params(params), self.abstract_pool(), self._length
    prompts, running = (jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._row_sharding(x)), inputs)
      for inputs in (prompts, running))
    return {"prefill": self._run.prefill.trace(params, pool, prompts, None, slots=length),
            "decode": self._run.decode.trace(params, pool, running, slots=length, block=block)}

  def _placed(self, inputs: Any) -> Any:
    """Arrays whose first axis is a call's rows, each device's part on it."""
    if self.shards == 1:
      return inputs
    return jax.tree.map(lambda x: jax.device_put(x, self._row_sharding(x)), inputs)

  def _row_sharding(self, x: Any) -> jax.sharding.NamedSharding | None:
    return self._mesh and sharding.sharding_for(
      ("batch", *(None,) * (np.ndim(x) - 1)), np.shape(x), self._mesh, self._rules)

  def _call(self, name: str, varying: Any, *args: Any, **sizes: int) -> Any:
    """One of `_Programs`; which one is compiled is decided by the shapes of `varying` and `sizes`."""
    return self._compiled(name, _shape_of(varying, sizes), getattr(self._run, name), *args, **sizes)


@dataclasses.dataclass(frozen=True)
class _Programs:
  """The jitted functions. The pool is donated: it is updated in place."""

  encode: Callable[..., VisionFeatures]
  pick: Callable[..., VisionFeatures]
  copy: Callable[..., Pool]
  prefill: Callable[..., Pool]
  decode: Callable[..., tuple[Pool, DecodeOutputs]]


@functools.lru_cache(maxsize=4)
def _programs(
  graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh | None, rules: tuple | None,
  options: tuple | None = None,
) -> _Programs:
  """One set per model and mesh, so that a second engine in the process compiles nothing anew."""
  rules = None if rules is None else dict(rules)
  jit = functools.partial(jax.jit, compiler_options=options and dict(options))

  def merged(params):
    model = nnx.merge(graphdef, params)
    if model.config.unrolls(model.config.text.num_layers):
      model.text.unstack()
    return model

  def encode(params, vision):
    with sharding.use(mesh, rules):
      return nnx.merge(graphdef, params).encode_images(vision)

  def pick(features, index_N):
    with sharding.use(mesh, rules):
      embeds_NxD, *deepstack = [
        gather_image(level_MxD, index_N[:, None], 0)[:, 0]
        for level_MxD in (features.embeds_MxD, *features.deepstack_NxMxD)]
      none = features.deepstack_NxMxD[:, :0]
      return VisionFeatures(embeds_NxD, jnp.stack(deepstack) if deepstack else none)

  def copy(pool, source_B, row_B, *, slots):
    with sharding.use(mesh, rules):
      return pool.copy(source_B, row_B, slots)

  def prefill(params, pool, inputs, features, *, slots):
    with sharding.use(mesh, rules):
      _, cache = merged(params)(
        inputs.tokens_BxT,
        inputs.positions_BxTx3,
        inputs.real_BxT,
        vision=features,
        image_index_BxT=inputs.image_index_BxT,
        cache=pool.read(inputs.source_B, inputs.start_B, slots),
      )
      return pool.write(inputs.row_B, cache)

  def decode(params, pool, inputs, *, slots, block):
    with sharding.use(mesh, rules):
      model, past = merged(params), PoolRows(pool, inputs.row_B, inputs.length_B, slots)
      if model.text.unstacked:
        past = past.held()
      cache, out = _decode_block(model, DecodeCache.after(past, block), inputs, block)
      return pool.write_recent(inputs.row_B, cache, out.count_B), out

  return _Programs(
    encode=jit(encode),
    pick=jit(pick),
    copy=jit(copy, static_argnames="slots", donate_argnums=0),
    prefill=jit(prefill, static_argnames="slots", donate_argnums=1),
    decode=jit(decode, static_argnames=("slots", "block"), donate_argnums=1),
  )


def _decode_block(model, cache, inputs, block):
  """Steps until `block` tokens are drawn or every row has stopped.

  A row that has stopped still takes part in every step; what it draws is neither counted nor kept.
  """
  vocab = model.config.text.vocab_size
  params, batch = inputs.sampling, len(inputs.row_B)
  banned_BxV = sampling.id_mask(params.banned_BxN, vocab)
  generated = inputs.generated_BxG
  seen_BxV = None if generated is None else sampling.id_mask(generated, vocab)
  noise_TxBxN = sampling.noise(params.seed_Bx2, inputs.drawn_B, block, vocab)

  def step(state):
    t, cache, token_B, running_B, seen_BxV, out = state
    positions_BxTx3 = jnp.broadcast_to((inputs.position_B + t)[:, None, None], (batch, 1, 3))
    hidden_BxTxD, cache = model(
      token_B[:, None], positions_BxTx3, running_B[:, None].astype(jnp.int32), cache=cache
    )
    logits_BxV = model.logits(hidden_BxTxD[:, 0])
    token_B, logprob_B = sampling.sample(
      logits_BxV, params, banned_BxV, noise_TxBxN[t], seen_BxV
    )
    if seen_BxV is not None:
      seen_BxV = seen_BxV.at[jnp.arange(batch), token_B].set(True)
    out = DecodeOutputs(
      out.tokens_TxB.at[t].set(token_B),
      out.logprobs_TxB.at[t].set(logprob_B),
      out.count_B + running_B,
    )
    stopped_B = jnp.any(token_B[:, None] == params.stop_BxN, axis=1) | (t + 1 >= inputs.limit_B)
    return t + 1, cache, token_B, running_B & ~stopped_B, seen_BxV, out

  empty = DecodeOutputs(
    jnp.zeros((block, batch), jnp.int32),
    jnp.zeros((block, batch), jnp.float32),
    jnp.zeros(batch, jnp.int32),
  )
  start = (0, cache, inputs.pending_B, inputs.limit_B > 0, seen_BxV, empty)
  state = jax.lax.while_loop(lambda s: (s[0] < block) & jnp.any(s[3]), step, start)
  return state[1], state[-1]


def _shape_of(tree: Any, sizes: dict[str, int]) -> str:
  shapes = [f"{sharding.path_name(path)} {'x'.join(map(str, leaf.shape))}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  return ", ".join([*shapes, *(f"{size} {name}" for name, size in sizes.items())])


def _check_same_shapes(old: Any, new: Any) -> None:
  before, after = _shapes(old), _shapes(new)
  wrong = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
  if wrong:
    listed = ", ".join(f"{n}: {before.get(n)} -> {after.get(n)}" for n in wrong[:5])
    raise ValueError(
      f"the new parameters are not of the engine's model; {len(wrong)} differ ({listed})"
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path): leaf.shape for path, leaf in leaves}
