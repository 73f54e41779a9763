"""The actor of a stage's episodes: the policy, or the scripted teacher of the miniature world."""

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.prompts import SHORT_SYSTEM_PROMPT, SYSTEM_PROMPT
from axpo_jax.agent.transcript import Transcript
from axpo_jax.config_queries import limits
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Engine
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model.images import ImageLimits
from axpo_jax.rollouts.collect import Actor
from axpo_jax.stages import learners, plugins, sections, toolbox
from axpo_jax.stages.context import RunContext
from axpo_jax.train import examples
from axpo_jax.train.packing import PackingError

_PROMPTS = {"full": SYSTEM_PROMPT, "short": SHORT_SYSTEM_PROMPT}


def make_actor(config: ConfigDict, context: RunContext, engine: Engine, stage: str = "rl") -> Actor:
  """The policy as an actor, with the tools, limits and sampling parameters of a stage."""
  agent, own = config.agent, limits(config, stage)
  tools = toolbox.toolbox(config, context.chat, context.processor.factor, evaluation=stage == "eval",
                          folder=context.folder)
  episode_limits = EpisodeLimits(
    max_turns=own.max_turns, max_new_tokens_per_turn=own.max_new_tokens,
    max_response_tokens=own.max_response_tokens, max_total_tokens=own.max_total_tokens,
    max_images=agent.max_images, max_image_pixels=config.images.zoom_max_pixels,
    deadline=agent.deadline or None)
  sampling = sections.sampling(config, stage, stop_ids=context.chat.stop_ids,
                               banned_ids=context.chat.banned_ids)
  return Actor(
    engine=engine, chat=context.chat, processor=context.processor, toolbox=tools,
    limits=episode_limits, sampling=sampling,
    image_limits=ImageLimits(config.images.min_pixels, config.images.max_pixels),
    system_prompt=system_prompt(config),
    # Benchmarks are scored by their own rules.
    environment=plugins.environment(config),
    reward=None if stage == "eval" and config.eval.benchmarks else plugins.reward(config),
    check=_trainable(config, context) if stage == "rl" else None)


def system_prompt(config: ConfigDict) -> str:
  """The system prompt: config.agent.system_prompt is its name or its text."""
  return _PROMPTS.get(config.agent.system_prompt, config.agent.system_prompt)


def _trainable(config: ConfigDict, context: RunContext) -> Callable[[Transcript], None]:
  """A check that raises PackingError, or another ValueError, for a transcript that cannot be trained on.

  So the error fails one episode. In the update it would end the run.
  """
  def check(transcript: Transcript) -> None:
    example = examples.from_transcript(transcript, transcript.sampled, 1.0,
                                       context.model_config.image_token_id)
    learners.check_packable(example, config, context)
    if not np.isfinite(example.behaviour_logp_T).all():
      raise PackingError("the sampler gave a token no finite log-probability")
  return check


def scripted_teacher(config: ConfigDict, context: RunContext, stage: str = "sft"
                     ) -> Callable[[Question], Actor]:
  """A function from a question to the actor that follows the miniature world's script for it.

  The actor has the habits of config.sft.teacher and a stage's limits.
  """
  habits = TeacherConfig(**config.sft.teacher)
  # The actors share their tools, which may hold processes.
  idle = make_actor(config, context, TeacherEngine(context.chat, {}, habits), stage)
  return lambda question: dataclasses.replace(
    idle, engine=TeacherEngine(context.chat, {question.id: question}, habits))
