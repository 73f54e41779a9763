"""The learner's step: gradients added up over micro-batches, then one optimizer update.

In: host Batches of one static shape and a TrainState. Out: the next TrainState and metrics. SFT and
RL differ only in their Objective. Losses and gradients are *sums* over targets; the update
divides once, by a number that the host gives (`rl.weights`), so the split into micro-batches and rows
changes nothing.

  learner = Learner(model_config, make_optimizer(...), policy_objective(LossConfig()), mesh,
                    banned_ids=chat.banned_ids)
  state = learner.init(params)
  state, result = learner.update(state, batches, divisor)  # dispatched; the host does not wait
  metrics = learner.metrics(result, batches, folder)  # waits; raises NonFiniteError

Legend: B rows, T tokens of a row, D model, G targets of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from axpo_jax.errors import RunStopped
from axpo_jax.model import programs, sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.experts import Load
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.rl import losses
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.train import balance
from axpo_jax.train.batch import Batch, batch_shards, place, save_batch, shape_of
from axpo_jax.train.logprobs import token_logprobs
from axpo_jax.train.state import (
  Optimizer,
  TrainState,
  abstract_state,
  copy_params,
  init_state,
  state_shardings,
)

# Micro-batches in flight: one is computed, one is copied to the devices.
_IN_FLIGHT = 2


class NonFiniteError(RunStopped, FloatingPointError):
  """A loss or gradient that is not finite.

  Attributes:
    micro_batches: which of the step's micro-batches it was; all of them if only their sum overflowed.
    paths: where they were saved.
  """

  def __init__(self, message: str, micro_batches: Sequence[int], paths: Sequence[epath.Path]):
    super().__init__(message)
    self.micro_batches, self.paths = tuple(micro_batches), tuple(paths)


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised.

  Attributes:
    loss: (logp_BxG, entropy_BxG, batch) -> summed loss, metric sums (names ending in _max are
      maxima). Traced.
    summarise: (metric sums of the whole step, divisor) -> logged metrics. On the host.
    by_sequence: the loss reads `Batch.example_BxG`.
    balance_coef: of a mixture of experts' load-balancing loss (`train.balance`).
  """

  loss: Callable[[jax.Array, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
  summarise: Callable[[Mapping[str, float], float], dict[str, float]]
  by_sequence: bool = False
  balance_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepResult:
  """Results of an update, still on the devices.

  Attributes:
    sums: metric sums of every micro-batch.
    applied: grad_norm, learning_rate, finite, step.
    divisor: what the sums were divided by.
  """

  sums: list[dict[str, jax.Array]]
  applied: dict[str, jax.Array]
  divisor: float


def supervised_objective(balance_coef: float = 0.0) -> Objective:
  """Cross-entropy of the targets."""

  def loss(logp_BxG, entropy_BxG, batch):
    mask_BxG = batch.weights_BxG != 0

    def total(x_BxG):
      return jnp.sum(jnp.where(mask_BxG, x_BxG, 0.0), dtype=jnp.float32)

    nll = -total(logp_BxG * batch.weights_BxG)
    sums = {"tokens": total(1.0), "nll": -total(logp_BxG), "entropy": total(entropy_BxG)}
    return nll, jax.lax.stop_gradient(sums)

  def summarise(sums, _divisor):
    tokens = max(sums["tokens"], 1.0)
    return {"train/loss_tokens": sums["tokens"], "train/nll": sums["nll"] / tokens,
            "train/entropy": sums["entropy"] / tokens}

  return Objective(loss, summarise, balance_coef=balance_coef)


def policy_objective(config: LossConfig, max_lag: int = 0) -> Objective:
  """The clipped policy loss (`rl.losses.policy_loss`); the batch carries old and reference logp.

  max_lag: above 0, the gap to the sampler is also logged for each lag up to this.
  """

  def loss(logp_BxG, entropy_BxG, batch):
    if not config.entropy_coef:
      entropy_BxG = jax.lax.stop_gradient(entropy_BxG)  # only logged: no backward through it
    return losses.policy_loss(
      logp_BxG, batch.old_logp_BxG, batch.ref_logp_BxG, batch.behaviour_logp_BxG,
      batch.advantages_BxG, batch.weights_BxG, config, entropy_BxG,
      sequence=batch.example_BxG, lag=batch.lag_BxG, max_lag=max_lag)

  return Objective(loss, losses.summarise, config.variant in losses.BY_SEQUENCE, config.balance_coef)


class Learner:
  """The jitted functions of training, bound to a model, an optimizer, an objective and a mesh.

  Args:
    config: of the model.
    banned_ids: ids that the sampler cannot draw; left out of the softmax.
    temperature: the sampler's.
    chunk: tokens per device whose logits are in memory at once.
    frozen_dtype: of the parameters that are not trained; default the config's param_dtype. The checkpoint's
      own dtype loses nothing.
  """

  def __init__(self, config: ModelConfig, optimizer: Optimizer, objective: Objective,
               mesh: jax.sharding.Mesh, rules: sharding.Rules | None = None, *,
               banned_ids: Sequence[int] = (), temperature: float = 1.0, chunk: int = 2048,
               frozen_dtype: str | None = None):
    self.optimizer, self.objective, self.mesh, self.rules = optimizer, objective, mesh, rules
    self._logprobs = functools.partial(
      token_logprobs, banned_ids=tuple(banned_ids), temperature=temperature,
      chunk=chunk * batch_shards(mesh, rules))
    self._experts = config.text.experts
    model = nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0)))
    self._graphdef, params = nnx.split(model)
    self._abstract_params = optimizer.with_frozen_dtype(params, frozen_dtype or config.param_dtype)
    self._compiled = programs.Compiled()
    self._compile(programs.compiler_options(mesh, config.dtype, config.param_dtype, frozen_dtype))

  def _compile(self, options: dict[str, str] | None) -> None:
    """Batches come placed (`place`), so their shardings are taken from the arguments."""
    state = state_shardings(self._abstract_params, self.optimizer, self.mesh, self.rules)
    grads = self.optimizer.split(state.params)[0]
    self._zeros = jax.jit(self._zeros_fn, out_shardings=grads)
    self._accumulate = jax.jit(
      self._accumulate_fn, in_shardings=(state.params, grads, None), out_shardings=(grads, None),
      donate_argnums=1, compiler_options=options)
    self._apply = jax.jit(
      self._apply_fn, in_shardings=(state, grads, None), out_shardings=(state, None),
      donate_argnums=0)
    self._score = jax.jit(self._forward, in_shardings=(state.params, None),
                          compiler_options=options)

  def init(self, params: nnx.State) -> TrainState:
    """A state at step 0. It owns `params`: the first update donates their buffers. Those of another
    dtype than the state's are cast."""
    params = jax.tree.map(lambda x, as_: x.astype(as_.dtype), params, self._abstract_params)
    return init_state(params, self.optimizer, self.mesh, self.rules)

  def own_copy(self, params: nnx.State) -> nnx.State:
    """A copy of parameters, for `init`, in the dtypes of the state."""
    return copy_params(params, self._abstract_params)

  def abstract_state(self) -> TrainState:
    """Shapes and shardings of the state."""
    return abstract_state(self._abstract_params, self.optimizer, self.mesh, self.rules)

  def stored(self, state: TrainState) -> TrainState:
    """The part of a state to store in a checkpoint: all of it, or only the adapters if there are any, since the
    policy below them has a folder already."""
    if not self.optimizer.config.adapters:
      return state
    return dataclasses.replace(state, params=self.optimizer.split(state.params)[0])

  def restored(self, stored: TrainState, params: Callable[[], nnx.State]) -> TrainState:
    """The whole state, from the part that a checkpoint holds.

    Args:
      params: makes the parameters that are not stored; not called if all are.
    """
    if not self.optimizer.config.adapters:
      return stored
    frozen = self.optimizer.split(params())[1]
    return dataclasses.replace(stored, params=nnx.merge_state(frozen, stored.params))

  def update(self, state: TrainState, batches: Sequence[Batch], divisor: float
             ) -> tuple[TrainState, StepResult]:
    """One optimizer step over host micro-batches. Donates `state`.

    The host runs at most two micro-batches ahead, so that patches do not pile up on the devices,
    and does not wait for the end. A step leaves the state as it was if its loss or gradient is not
    finite, or if no target has a weight.

    Args:
      divisor: of the summed loss, > 0; see `rl.weights.sequence_weights`.

    Raises:
      ValueError: no micro-batches, or a divisor that is not positive.
    """
    if not batches:
      raise ValueError("an update needs examples; there are no micro-batches")
    if not divisor > 0:
      raise ValueError(f"the divisor of an update must be positive, got {divisor}")
    grads, sums = self.zeros(), []
    for batch in batches:
      grads, sums_of_batch = self.accumulate(state.params, grads, batch)
      sums.append(sums_of_batch)
      if len(sums) > _IN_FLIGHT:
        jax.block_until_ready(sums[-_IN_FLIGHT - 1])
    scored = any(np.any(batch.weights_BxG) for batch in batches)
    state, applied = self.apply(state, grads, divisor if scored else np.inf)
    return state, StepResult(sums, applied, divisor)

  def trace(self, batch: Batch, scored_dtype: str | None = None) -> dict[str, jax.stages.Traced]:
    """The functions of a step, traced over abstract arguments, to inspect or to compile ahead of time.

    Args:
      batch: of ShapeDtypeStructs with shardings.
      scored_dtype: of the parameters that `score` takes, such as the reference's; None: the state's.
    """
    state = self.abstract_state()
    scored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(scored_dtype or x.dtype), sharding=x.sharding), state.params)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
                         self.optimizer.split(state.params)[0])
    return {
      "score": self._score.trace(scored, _unscored(batch)),
      "accumulate": self._accumulate.trace(state.params, grads, batch),
      "apply": self._apply.trace(state, grads, jax.ShapeDtypeStruct((), jnp.float32)),
    }

  def zeros(self) -> nnx.State:
    """Gradient sums to start from: float32, one for every trained parameter."""
    return self._zeros()

  def accumulate(self, params: nnx.State, grads: nnx.State, batch: Batch
                 ) -> tuple[nnx.State, dict[str, jax.Array]]:
    """Adds one micro-batch's gradient sums to `grads` (donated); also its metric sums."""
    return self._compiled("accumulate", shape_of(batch), self._accumulate, params, grads,
                          self._place(batch))

  def apply(self, state: TrainState, grads: nnx.State, divisor: float
            ) -> tuple[TrainState, dict[str, jax.Array]]:
    """The optimizer update by grads / divisor; none if the divisor is infinite. Donates `state`."""
    return self._compiled("apply", "the optimizer", self._apply, state, grads, np.float32(divisor))

  def score(self, params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(logp_BxG, entropy_BxG) float32 of the targets under any parameters."""
    batch = _unscored(batch)
    dtypes = sorted({x.dtype.name for x in jax.tree.leaves(params)})
    return self._compiled("score", f"{shape_of(batch)}, parameters {' and '.join(dtypes)}",
                          self._score, params, self._place(batch))

  def annotate(self, batches: Iterable[Batch], *, old: nnx.State | None = None,
               reference: nnx.State | None = None) -> list[Batch]:
    """The batches with log-probabilities under the weights at the start of the step (`old`) and
    under the reference policy; None leaves the field as it is."""
    out = []
    for batch in batches:
      added = {}
      if old is not None:
        added["old_logp_BxG"] = self.score(old, batch)[0]
      if reference is not None:
        added["ref_logp_BxG"] = self.score(reference, batch)[0]
      if len(out) >= _IN_FLIGHT:
        jax.block_until_ready((out[-_IN_FLIGHT].old_logp_BxG, out[-_IN_FLIGHT].ref_logp_BxG))
      out.append(dataclasses.replace(batch, **added))
    return out

  def metrics(self, result: StepResult, batches: Sequence[Batch],
              folder: str | os.PathLike) -> dict[str, float]:
    """Logged metrics of an update; waits for the devices.

    Raises:
      NonFiniteError: a loss or gradient is not finite. The micro-batches that caused it are saved in `folder` as
        step_<n>_micro_<i>.npz (`batch.load_batch` reads them).
    """
    sums, applied = jax.device_get((result.sums, result.applied))
    step = int(applied["step"])
    bad = [i for i, s in enumerate(sums) if not s["finite"]]
    if bad or not applied["finite"]:
      raise _non_finite(step, bad or range(len(batches)), sums, applied, batches, epath.Path(folder),
                        self.mesh, self.rules)
    joined = functools.reduce(losses.add_metrics, [
      {k: float(v) for k, v in s.items() if k != "finite"} for s in sums])
    out = {"train/loss": joined.pop("loss") / result.divisor,
           "train/grad_norm": float(applied["grad_norm"]),
           "train/learning_rate": float(applied["learning_rate"]),
           "train/divisor": result.divisor}
    out |= balance.metrics(joined)
    return out | self.objective.summarise(joined, result.divisor)

  def _place(self, batch: Batch) -> Batch:
    return place(batch, self.mesh, self.rules, examples=self.objective.by_sequence)

  def _zeros_fn(self):
    trained, _ = self.optimizer.split(self._abstract_params)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)

  def _forward(self, params, batch: Batch, loads: list[Load] | None = None):
    with sharding.use(self.mesh, self.rules):
      model = nnx.merge(self._graphdef, params)
      hidden_BxTxD, _ = model(
        batch.tokens_BxT, batch.positions_BxTx3, batch.ends_BxT,
        key_blocks_BxCxN=batch.key_blocks_BxCxN, vision=batch.vision,
        image_index_BxT=batch.image_index_BxT, loads=loads)
      # Logits are made for targets alone: prompts and observations have none.
      hidden_BxGxD = jax.vmap(lambda hidden, at: hidden[at])(hidden_BxTxD, batch.at_BxG)
      scores = self._logprobs(hidden_BxGxD, model.unembedding(), batch.targets_BxG)
      return jax.tree.map(lambda x: sharding.constrain(x, ("batch", "length")), scores)

  def _accumulate_fn(self, params, grads, batch: Batch):
    trained, frozen = self.optimizer.split(params)

    def loss(trained):
      # Frozen parameters are constants here: no gradient of theirs is ever computed.
      loads = [] if self._experts else None
      logp_BxG, entropy_BxG = self._forward(nnx.merge_state(trained, frozen), batch, loads)
      total, sums = self.objective.loss(logp_BxG, entropy_BxG, batch)
      if not loads:
        return total, sums
      uneven, counted = balance.loss_and_sums(loads[0], self._experts.per_token, jnp.sum(batch.weights_BxG))
      return total + self.objective.balance_coef * uneven, sums | counted

    (value, sums), new = jax.value_and_grad(loss, has_aux=True)(trained)
    new = jax.tree.map(lambda g: g.astype(jnp.float32), new)
    finite = jnp.isfinite(value) & jnp.isfinite(optax.global_norm(new))
    # An infinite loss may have finite gradients: the sum becomes NaN, so that `apply` leaves the state as it is.
    poison = jnp.where(finite, 0.0, jnp.nan)
    grads = jax.tree.map(lambda total, g: total + g + poison, grads, new)
    return grads, sums | {"loss": value, "finite": finite}

  def _apply_fn(self, state: TrainState, grads, divisor):
    grads = jax.tree.map(lambda g: g / divisor, grads)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    trained, frozen = self.optimizer.split(state.params)
    updated, opt_state = self.optimizer.step(trained, grads, state.opt_state)
    new = (updated, opt_state, state.step + 1)
    # A non-finite update must not reach the parameters, so that they can still be saved. Nor may an update
    # without targets: zero gradients would still decay weights and change the optimizer's moments.
    applies = finite & jnp.isfinite(divisor)
    trained, opt_state, step = jax.tree.map(
      lambda new, old: jnp.where(applies, new, old), new, (trained, state.opt_state, state.step))
    metrics = {"grad_norm": norm, "learning_rate": self.optimizer.schedule(state.step),
               "finite": finite, "step": state.step}
    return TrainState(nnx.merge_state(trained, frozen), opt_state, step), metrics


def _unscored(batch: Batch) -> Batch:
  """The batch without the fields that scoring does not read, since they would only add compiled programs."""
  return dataclasses.replace(batch, old_logp_BxG=None, ref_logp_BxG=None, example_BxG=None)


def _non_finite(step, bad, sums, applied, batches, folder: epath.Path, mesh, rules) -> NonFiniteError:
  paths = [folder / f"step_{step}_micro_{i}.npz" for i in bad]
  for i, path in zip(bad, paths, strict=True):
    # Placed first, since a process makes the patches of its own rows only.
    gathered = jax.tree.map(whole, place(batches[i], mesh, rules))
    gathered = dataclasses.replace(gathered, example_BxG=batches[i].example_BxG)
    if jax.process_index() == 0:
      save_batch(path, gathered)
  found = [float(sums[i]["loss"]) for i in bad]
  return NonFiniteError(
    f"update {step}: loss sums {found} of micro-batches {list(bad)}, gradient norm "
    f"{float(applied['grad_norm'])}; the micro-batches are saved in {folder}", list(bad), paths)


def whole(x: np.ndarray | jax.Array) -> np.ndarray:
  """A whole array that may be split over processes; all processes must call it."""
  if isinstance(x, np.ndarray) or x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
