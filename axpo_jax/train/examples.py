"""From transcripts and credit to training examples.

A transcript's arrays are collapsed (one id an image); the trainer's are expanded. The mask, advantage and
behaviour log-probability of every token are made in collapsed form and expanded by the transcript's map. No other
module handles both forms.
"""

from collections.abc import Sequence

import numpy as np

from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.transcript import Transcript
from axpo_jax.model.vision_inputs import mrope_positions
from axpo_jax.rl.algorithm import loss_mask
from axpo_jax.rl.credit import Credit
from axpo_jax.rollouts.groups import Group
from axpo_jax.train.packing import Example


def from_transcript(transcript: Transcript, mask_C: np.ndarray, advantage: float | np.ndarray,
                    image_token_id: int, version: int | None = None) -> Example:
  """The expanded example of a transcript.

  Args:
    mask_C: bool, which collapsed tokens carry loss.
    advantage: the same for all of them, or one for each collapsed token.
    version: of the weights that will be trained on it; the lag of tokens counts up to it. None: no lag.
  """
  expanded = transcript.expand()
  source_T = expanded.source_T
  images = [image.shown for image in transcript.images]
  grids = [image.merged_hw for image in images]
  mask_T = mask_C[source_T]
  advantage = advantage[source_T] if isinstance(advantage, np.ndarray) else advantage
  logprobs_T = np.asarray(transcript.logprobs, np.float32)[source_T]
  return Example(
    ids_T=expanded.ids_T, positions_Tx3=mrope_positions(expanded.ids_T, grids, image_token_id),
    image_T=expanded.image_T, image_offset_T=expanded.image_offset_T, images=tuple(images),
    loss_mask_T=mask_T, advantages_T=np.where(mask_T, advantage, 0.0).astype(np.float32),
    behaviour_logp_T=np.where(mask_T, logprobs_T, 0.0).astype(np.float32),
    lag_T=None if version is None else np.where(
      mask_T, version - np.asarray(transcript.versions)[source_T], 0))


def supervised(rollout: Rollout, image_token_id: int) -> Example:
  """The example of a teacher's rollout: every sampled token carries loss, with advantage 1."""
  return from_transcript(rollout.transcript, rollout.transcript.sampled, 1.0,
                         image_token_id)


def credited(groups: Sequence[Group], credits: Sequence[Credit], image_token_id: int,
             version: int | None = None) -> list[Example]:
  """One example per credit: the tokens it covers, with its advantage (section 3 of the paper).

  version: of the weights about to be trained, see `from_transcript`.

  A credit on the region "prefix" covers the source's tokens before the cut, so that the source's
  own failed continuation is masked; "continuation" covers a branch's tokens from the cut on, so
  that the frozen prefix is masked in its K copies.
  """
  return [_credited(groups[credit.group], credit, image_token_id, version) for credit in credits]


def _credited(group: Group, credit: Credit, image_token_id: int, version: int | None) -> Example:
  if credit.branch is None:
    rollout = group.rollouts[credit.rollout]
    cut = {branch.source: branch.prefix_end for branch in group.branches}.get(credit.rollout, 0)
  else:
    branch = group.branches[credit.branch]
    rollout, cut = branch.rollouts[credit.rollout], branch.prefix_end
  mask_C = loss_mask(rollout.transcript.sampled, credit.region, cut)
  advantage = credit.advantage
  if credit.turns:
    advantage = np.full(len(mask_C), credit.advantage)
    for (start, stop), own in zip(rollout.transcript.turns, credit.turns):
      advantage[start:stop] += own
  return from_transcript(rollout.transcript, mask_C, advantage, image_token_id, version)
