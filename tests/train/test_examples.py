"""From transcripts with images to what the learner trains on."""

import asyncio
import dataclasses
import pathlib
import pickle

import numpy as np
import pytest

import axpo_jax
from axpo_jax.agent.transcript import Kind
from axpo_jax.config import ASSETS
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld import perception
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.teacher import TeacherConfig
from axpo_jax.rl.credit import ALL, CONTINUATION, PREFIX, Credit
from axpo_jax.rollouts.groups import Branch, Group, for_training
from axpo_jax.stages import actors, learners, sft
from axpo_jax.stages.context import run_context
from axpo_jax.train import examples
from axpo_jax.train.packing import PackingError
from configs.sft_tiny import get_config

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
# A teacher that always looks closer and never errs.
SURE = {"p_tool_small": 1.0, "p_tool_large": 1.0, "p_wrong_mark": 0.0, "p_off_cell": 0.0,
        "p_malformed": 0.0, "p_misread_crop": 0.0}


@pytest.fixture(scope="module")
def config():
  config = get_config()
  config.model.checkpoint, config.model.preset = "", "tiny"
  config.model.tokenizer = str(ASSETS / "tiny_tokenizer")
  config.mesh.update(data=1, fsdp=-1, tensor=1)
  return config


@pytest.fixture(scope="module")
def context(config):
  return run_context(config)


@pytest.fixture(scope="module")
def group(config, context):
  """A question, two of the teacher's rollouts, and a branch from the first one's call."""
  question = perception.make_question(0, 3, perception.PerceptionConfig(mix=(("read", 1.0),)), "rl")
  actor = actors.make_actor(config, context, TeacherEngine(context.chat, {question.id: question},
                                                   TeacherConfig(**SURE)))

  async def roll():
    start = actor.start(question)
    rollouts = [await actor.roll(start, question, seed) for seed in (1, 2)]
    end = rollouts[0].transcript.prefix_end()
    cut = rollouts[0].transcript.cut(end)
    branch = Branch(0, end, 0.5, [await actor.roll(cut, question, s) for s in (3, 4)])
    return Group(question, rollouts, [branch])

  return asyncio.run(roll())


def test_supervised_example_is_what_the_teacher_said(group, context):
  rollout = group.rollouts[0]
  assert rollout.reward == 1
  example = examples.supervised(rollout, context.model_config.image_token_id)
  said = context.chat.decode(example.ids_T[example.loss_mask_T])
  turns = [context.chat.decode(rollout.transcript.ids[slice(*t)]) for t in rollout.transcript.turns]
  assert said == "".join(turns)
  assert said.count("<|im_end|>") == 2
  assert "<tool_response>" not in said
  assert "<|image_pad|>" not in said


def test_expanded_arrays_agree(group, context):
  transcript = group.rollouts[0].transcript
  example = examples.supervised(group.rollouts[0], context.model_config.image_token_id)
  assert len(example.ids_T) == transcript.expanded_length
  assert [image.key for image in example.images] == [i.shown.key for i in transcript.images]
  for number, image in enumerate(example.images):
    here = example.image_T == number
    assert here.sum() == image.num_tokens
    assert example.image_offset_T[here].tolist() == list(range(image.num_tokens))
    assert (example.ids_T[here] == context.model_config.image_token_id).all()
    # The grid's rows and columns count up from one shared start.
    grid = example.positions_Tx3[here][:, 1:] - example.positions_Tx3[here][0, 1:]
    height, width = (side // 2 for side in image.grid_hw)
    assert grid.tolist() == [[r, c] for r in range(height) for c in range(width)]


def test_regions_split_a_rollout(group, context):
  """The source's prefix and a continuation's tokens: one transcript's tokens, each learnt once."""
  made = examples.credited(
    [group], [Credit(0, 0, None, PREFIX, 2.0), Credit(0, 1, None, ALL, -1.0),
              Credit(0, 0, 0, CONTINUATION, 0.5)], context.model_config.image_token_id)
  prefix, whole, continuation = made
  said = [context.chat.decode(e.ids_T[e.loss_mask_T]) for e in made]
  assert said[0].endswith("</think>\n\n<tool_call>")
  assert said[0].count("<tool_call>") == 1
  assert said[2].startswith('\n{"name"')
  assert "</tool_call>" in said[2]
  assert said[1].startswith(context.chat.decode(
    [i for i, kind in zip(group.rollouts[1].transcript.ids, group.rollouts[1].transcript.kinds)
     if kind == Kind.THINK][:3]))
  for example, advantage in ((prefix, 2.0), (whole, -1.0), (continuation, 0.5)):
    assert set(example.advantages_T[example.loss_mask_T].tolist()) == {advantage}
    assert not example.advantages_T[~example.loss_mask_T].any()
    assert not example.behaviour_logp_T[~example.loss_mask_T].any()
    assert np.isfinite(example.behaviour_logp_T).all()
  # Both cut at the same place: nothing is learnt twice and nothing is left out.
  last, first = np.flatnonzero(prefix.loss_mask_T)[-1], np.flatnonzero(continuation.loss_mask_T)[0]
  assert first == last + 1


def test_tokens_of_a_turn_get_its_own_advantage_too(group, context):
  turns = tuple(0.25 * (i + 1) for i in range(len(group.rollouts[0].transcript.turns)))
  (plain,), (turned,) = (
    examples.credited([group], [Credit(0, 0, None, ALL, -1.0, own)], context.model_config.image_token_id)
    for own in ((), turns))
  extra_T = turned.advantages_T - plain.advantages_T
  runs = np.split(extra_T[plain.loss_mask_T], np.flatnonzero(np.diff(np.flatnonzero(plain.loss_mask_T)) > 1) + 1)
  assert [set(run.tolist()) for run in runs] == [{own} for own in turns]
  assert not extra_T[~plain.loss_mask_T].any()


def test_other_processes_train_on_the_same_and_get_no_pixels_with_it(group, context):
  sent = pickle.dumps(for_training([group]))
  (received,) = pickle.loads(sent)
  rollouts = [*group.rollouts, *group.branches[0].rollouts]
  images = [image.shown for rollout in rollouts for image in rollout.transcript.images]
  tokens = sum(len(rollout.transcript) for rollout in rollouts)
  assert images and len(sent) < 40 * tokens + 500 * len(images) + 5000
  assert not any(image.source for r in received.rollouts for image in r.transcript.images)
  credits = [Credit(0, 0, None, PREFIX, 2.0), Credit(0, 1, None, ALL, -1.0),
             Credit(0, 0, 0, CONTINUATION, 0.5)]
  ours, theirs = (examples.credited([g], credits, context.model_config.image_token_id, 3)
                  for g in (group, received))
  for our, their in zip(ours, theirs, strict=True):
    for field in dataclasses.fields(our):
      if field.name == "images":
        assert [(image.key, image.grid_hw, image.patch_dim) for image in our.images] == [
          (image.key, image.grid_hw, image.patch_dim) for image in their.images]
        assert not any(image.pixels_HxWx3 is not None for image in their.images)
      else:
        np.testing.assert_array_equal(getattr(our, field.name), getattr(their, field.name))


def test_sft_stream_leaves_out_what_is_wrong_and_counts_it(config, context):
  local = config.copy_and_resolve_references()
  with local.unlocked():
    local.sft.teacher.update(p_misread_large=0.6, p_tool_small=0.0, p_tool_large=0.0)
  local.sft.examples = 16
  made, counts = next(sft.sft_batches(local, context))
  assert len(made) == 16
  assert counts["data/trajectories_read"] > 20
  assert counts["data/kept_share"] == 16 / counts["data/trajectories_read"]


def test_sft_stream_leaves_out_what_cannot_be_packed(config, context, monkeypatch):
  local = config.copy_and_resolve_references()
  local.sft.examples, local.sft.keep_wrong = 16, True

  def check(example, *args):
    if len(example) % 3 == 0:
      raise PackingError("an image of too many patches")

  monkeypatch.setattr(learners, "check_example", check)
  made, counts = next(sft.sft_batches(local, context))
  assert len(made) == 16 < counts["data/trajectories_read"]
  assert all(len(example) % 3 for example in made)


def test_sft_stream_of_nothing_but_wrong_trajectories_is_an_error(config, context, monkeypatch):
  monkeypatch.setattr(sft, "_MOST_DROPPED", 5)
  local = config.copy_and_resolve_references()
  local.agent.max_new_tokens = 4  # cuts every turn
  with pytest.raises(ConfigError, match="max_new_tokens"):
    next(sft.sft_batches(local, context))
