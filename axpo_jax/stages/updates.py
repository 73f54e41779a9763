"""From the rollouts of a step to new weights.

In: the step's groups and the train state. Out: the next train state and metrics:

  credit      one advantage for each rollout, prefix and continuation     algorithm.assign_credit
  examples    tokens, images and loss masks of the sequences              train.examples
  batches     packed micro-batches of static shapes                       train.packing
  score       log-probabilities of the reference and the old weights      Learner.annotate
  weights     what each token weighs in the loss, and the divisor         algorithm.loss_weights
  update      `rl.updates` optimizer updates                              Learner.update
"""

import time
from collections.abc import Sequence

from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax.model import lora
from axpo_jax.rl import algorithm
from axpo_jax.rl.credit import Credit
from axpo_jax.rl.recipes import Recipe
from axpo_jax.rollouts import census
from axpo_jax.rollouts.groups import Group, outcome_of
from axpo_jax.stages import gauges, learners
from axpo_jax.stages.context import RunContext
from axpo_jax.train import examples, pictures
from axpo_jax.train.batch import Batch, packing_metrics, sums_by_example, with_weights
from axpo_jax.train.packing import Example
from axpo_jax.train.state import TrainState, move_params
from axpo_jax.train.step import Learner, whole


def kept_reference(params: nnx.State, config: ConfigDict, context: RunContext) -> nnx.State | None:
  """The reference policy to keep for the KL, in the hosts' memory where the config says so.

  None where the loss has no KL, or where the reference is the policy with its adapters switched off.
  """
  if context.lora is not None or not config.rl.loss.kl_coef:
    return None
  return move_params(params, "pinned_host") if config.rl.reference_offload else params


class PolicyUpdate:
  """The update of one RL stage.

  Args:
    reference: see `kept_reference`.
    folder: of the stage; micro-batches that broke an update are saved there.
  """

  def __init__(self, config: ConfigDict, context: RunContext, recipe: Recipe, learner: Learner,
               reference: nnx.State | None, folder: epath.Path):
    self._config, self._context, self._recipe, self._learner = config, context, recipe, learner
    self._reference, self._folder = reference, folder

  def __call__(self, state: TrainState, groups: Sequence[Group], version: int
               ) -> tuple[TrainState, dict[str, float]]:
    """Up to `rl.updates` optimizer updates; none if every rollout failed.

    Args:
      state: donated.
      version: of its weights, as the sampler counts.
    """
    rl, model = self._config.rl, self._context.model_config
    kept = [group for group in groups if group.rollouts]
    credits = self.credits(kept)
    trained = examples.credited(kept, credits, model.image_token_id, version)
    parts = algorithm.split_updates(list(zip(trained, credits, strict=True)), rl.updates)
    updates = [self._packed([example for example, _ in part]) for part in parts]
    packed, start = [batch for batches in updates for batch in batches], time.perf_counter()
    metrics = census.credit_census(credits) | packing_metrics(packed, trained)
    # All are scored before the first update: with the weights that the step began with.
    updates = [self._scored(batches, state.params) for batches in updates]
    logged = []
    for part, batches in zip(parts, updates, strict=True):
      batches, divisor, counted = self._weighted(
        batches, [earned for _, earned in part], len(groups) * len(part) / len(trained))
      state, result = self._learner.update(state, batches, divisor)
      logged.append(self._learner.metrics(result, batches, self._folder / "nonfinite") | counted)
    metrics |= gauges.utilisation(model, packed, time.perf_counter() - start, self._context.mesh.devices.flat)
    return state, metrics | _joined(logged)

  def credits(self, groups: Sequence[Group]) -> list[Credit]:
    """Advantage and region of every sequence. Groups that lost every rollout have none."""
    return algorithm.assign_credit([outcome_of(group) for group in groups if group.rollouts],
                                   self._recipe.credit, self._recipe.shaping)

  def _packed(self, trained: list[Example]) -> list[Batch]:
    return pictures.fetched(learners.pack_examples(self._config, self._context, trained), trained)

  def _scored(self, batches: list[Batch], params: nnx.State) -> list[Batch]:
    """The batches with the log-probabilities of the reference and, where the ratio needs them, of `params`."""
    rl = self._config.rl
    needs_old = algorithm.needs_old_logprobs(self._recipe.loss, rl.updates, rl.old_logprobs)
    return self._learner.annotate(batches, old=params if needs_old else None,
                                  reference=self._reference_of(params) if rl.loss.kl_coef else None)

  def _reference_of(self, params: nnx.State) -> nnx.State:
    if self._reference is None:
      return lora.switched_off(params)
    # One in the hosts' memory is copied to the devices for this call alone, while there are no gradients.
    return move_params(self._reference, "device")

  def _weighted(self, batches: list[Batch], credits: list[Credit], questions: float
                ) -> tuple[list[Batch], float, dict[str, float]]:
    """An update's batches with the weights of the loss, its divisor, and metrics of both.

    Args:
      questions: of the step, times the share of its sequences that this update has.
    """
    loss, gap_sums_S = self._recipe.loss, None
    tokens_S = sums_by_example(batches, [batch.weights_BxG for batch in batches], len(credits))
    if loss.tis_mask is not None:
      gaps = [whole(batch.old_logp_BxG) - batch.behaviour_logp_BxG for batch in batches]
      gap_sums_S = sums_by_example(batches, gaps, len(credits))
    found = algorithm.loss_weights(credits, tokens_S, questions, loss, gap_sums_S)
    return with_weights(batches, found.weights_S), found.divisor, found.metrics


def _joined(updates: list[dict[str, float]]) -> dict[str, float]:
  """Metrics of a step's updates: largest of what is a maximum, mean of the rest."""
  out = {}
  for name in updates[0] if updates else ():
    values = [metrics[name] for metrics in updates if name in metrics]
    largest = name.partition("/lag_")[0].endswith("_max")
    out[name] = max(values) if largest else sum(values) / len(values)
  return out
