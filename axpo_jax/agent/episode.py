"""One episode: think, act, observe, until an answer or a limit.

An episode continues a transcript. A fresh rollout continues the prompt, an AXPO resample continues
`transcript.cut(end)`, and an interrupted rollout continues its own tokens: there is one loop and no second code
path. In: a transcript, a question, an engine and tools. Out: a Rollout.

Budgets are checked before anything is appended, so a transcript never holds a token or an image
that its limits forbid. Rules where several are possible:
- The turn limit ends the episode after the last allowed turn; the calls it made are not run, since
  nobody would see their results.
- If an observation's images do not fit the image or the token budget, the observation says so
  instead and brings no image. If its text does not fit either, the episode ends ("token_limit").
- A turn cut by length has no next turn. A turn that ends with <|endoftext|> instead of <|im_end|>
  ends the episode too.
- Only an episode that ends by itself, with a last turn that makes no call, has an answer.
- The environment steps after a turn's calls have run. It steps after the last turn too, although its calls
  are not run: a game's last move counts.
- The clock decides nothing but limits: those of an episode, a tool, a reward, an environment and a request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence

from axpo_jax.agent import environment as environments
from axpo_jax.agent import parse, reward_functions, rewards
from axpo_jax.agent import rollout as rollout_lib
from axpo_jax.agent.calls import CallRunner, Observed
from axpo_jax.agent.limits import Budget, EpisodeLimits
from axpo_jax.agent.parse import SpecialIds, ToolCall
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.tools.base import EpisodeState, PastCall, ToolBox
from axpo_jax.agent.transcript import (
  EpisodeImage,
  Kind,
  Originals,
  Outcome,
  Transcript,
  TranscriptError,
  Turn,
)  # fmt: skip
from axpo_jax.data.question import IMAGE_MARK, Question, open_image
from axpo_jax.engine.protocol import Engine, PromptTooLong, Sample, SampleRequest, SamplingParams
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor

EXACT = reward_functions.parse("exact", time_limit=60.0)


def start_transcript(question: Question, chat: Chat, tools: ToolBox, system: str,
                     processor: ImageProcessor, image_limits: ImageLimits) -> Transcript:
  """The prompt of an episode. The N rollouts of a question may share it: it is never changed.

  Args:
    question: text and images.
    chat: renders the prompt.
    tools: listed in the system message.
    system: system prompt.
    processor: makes the question's images fit for the policy.
    image_limits: pixels the policy is shown of each of them.

  Raises:
    axpo_jax.data.question.ImageError: an image cannot be opened.
    axpo_jax.model.images.ImageError: an image cannot be shown.
    axpo_jax.model.chat.ChatError: the text cannot be rendered.
  """
  ids = chat.prompt_ids(system, tools.schemas(), question.text, len(question.images))
  transcript = Transcript(SpecialIds.from_chat(chat))
  transcript.append_prompt(ids, [
      EpisodeImage.of(source, processor(open_image(source), image_limits), "question")
      for source in question.images])
  return transcript


async def continue_episode(transcript: Transcript, question: Question, engine: Engine,
                           tools: ToolBox, limits: EpisodeLimits, sampling: SamplingParams,
                           chat: Chat, processor: ImageProcessor, seed: int, *,
                           environment: environments.Environment = environments.QUESTION,
                           reward: reward_functions.RewardSum | None = EXACT, session: str = ""
                           ) -> Rollout:
  """Continues a transcript to its end.

  Args:
    transcript: a prompt, or one cut inside or at the end of a turn; it is copied, not changed.
    question: what is asked, with its gold answers.
    engine: samples tokens.
    tools: what can be called.
    limits: budgets; they count what the transcript already holds.
    sampling: how to sample; max_new_tokens is set per turn, and stop and banned ids come from
      `chat` where they are empty.
    chat: renders observations.
    processor: makes the tools' images fit for the policy.
    seed: of the episode; turn t samples with `turn_seed(seed, t)`.
    environment: what the episode is about; by default nothing but the question.
    reward: of the finished rollout; None leaves it at 0 for the caller to fill.
    session: routing key; the question's id by default, so that all rollouts and resamples of a
      question meet the same prefix cache.

  Returns:
    The finished rollout. A failing engine ends it with stop "engine_error" and its message.

  Raises:
    TranscriptError: the transcript is empty or was cut inside an observation.
    EnvironmentFailed: the environment failed, or cannot go on from a cut transcript.
  """
  episode = _Episode(transcript.copy(), question, engine, tools, limits, chat, processor, seed)
  episode.environment = environments.Running(environment, tools)
  episode.sampling = dataclasses.replace(
      sampling, stop_ids=sampling.stop_ids or tuple(chat.stop_ids),
      banned_ids=sampling.banned_ids or tuple(chat.banned_ids))
  episode.session = session or question.id
  try:
    async with asyncio.timeout(limits.deadline) as clock:
      stop = await episode.run(question)
  except TimeoutError:
    if not clock.expired():
      raise
    stop = rollout_lib.DEADLINE
  finally:
    tools.end_episode(episode.state)
    await episode.environment.close()
  rollout = Rollout(
      question_id=question.id, transcript=episode.transcript, reward=0.0,
      answer=episode.answer() if stop in (rollout_lib.ANSWER, rollout_lib.DONE) else None,
      stop=stop, calls=episode.runner.records, seed=seed, prompt_tokens=sum(episode.prompt_tokens),
      cached_tokens=sum(episode.cached_tokens),
      first_prompt_tokens=next(iter(episode.prompt_tokens), 0),
      first_cached_tokens=next(iter(episode.cached_tokens), 0),
      start=len(transcript), error=episode.error, turn_metadata=episode.turn_metadata)
  if reward is not None and not rollout.failed:
    await _judge(rollout, question, reward, chat, limits)
  return rollout


async def _judge(rollout: Rollout, question: Question, reward: reward_functions.RewardSum, chat: Chat,
                 limits: EpisodeLimits) -> None:
  """Sets the reward of a rollout; one whose reward fails has failed, or counts as 0."""
  score = await reward(reward_functions.Finished(
      question, rollout.transcript, rollout.answer, rollout.stop, rollout.calls,
      tuple(rollout.transcript.rewards), chat,
      limits.max_response_tokens))
  rollout.reward, rollout.reward_timed_out = score.reward, score.timed_out
  rollout.reward_parts, rollout.reward_error = dict(score.parts), score.error
  if score.error and reward.leave_out:
    rollout.stop, rollout.error = rollout_lib.EPISODE_ERROR, score.error


def turn_seed(seed: int, turn: int, interruptions: int = 0) -> int:
  """A 31-bit seed for one turn, stable over processes and Python versions.

  interruptions: of this turn so far. What follows one is drawn from a random stream of its own.
  """
  parts = (seed, turn, interruptions) if interruptions else (seed, turn)
  digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") >> 1


class _Episode:
  """The running state of one episode."""

  sampling: SamplingParams
  session: str
  environment: environments.Running

  def __init__(self, transcript: Transcript, question: Question, engine: Engine, tools: ToolBox,
               limits: EpisodeLimits, chat: Chat, processor: ImageProcessor, seed: int):
    if not transcript.ids or transcript.kinds[-1] == Kind.OBSERVATION:
      raise TranscriptError("only a prompt, or a transcript cut inside or after a turn, can be "
                            "continued; this one is empty or ends inside an observation")
    self.transcript = transcript
    self.engine = engine
    self.tools = tools
    self.limits = limits
    self.chat = chat
    self.seed = seed
    self.prompt_tokens: list[int] = []  # per request, expanded
    self.cached_tokens: list[int] = []
    self.error: str | None = None
    self.turn_metadata: list[dict] = []
    self.budget = Budget(limits, transcript)
    self.state = EpisodeState(question.id, Originals(transcript.images), seed=seed,
                              history=self._past_calls())
    self.runner = CallRunner(tools, self.budget, chat, processor, self.state)

  async def run(self, question: Question) -> str:
    """Runs to the end; returns the stop reason."""
    if len(self.transcript.images) > self.limits.max_images:
      return rollout_lib.IMAGE_LIMIT
    await self.environment.start(question, self.state, self._answered_turns(), self.transcript.states,
                                 self._rendered)
    while True:
      stop = None if self.transcript.turn_is_closed else await self._think()
      stop = stop or await self._act()
      if stop:
        return stop

  def answer(self) -> str | None:
    """The answer in the last turn, after its last </think>."""
    ids = self.transcript.last_turn
    if self.transcript.turn_is_closed:
      ids = ids[:-1]
    text = self.chat.decode(ids[parse.think_stop(ids, self.transcript.special):])
    return rewards.extract_answer(text, thinking=False)

  # ---- think: sample the rest of the turn ----

  async def _think(self) -> str | None:
    """Returns a stop reason, or None where the turn has ended. An engine may interrupt a sample (for new
    weights, say): the turn then continues from the tokens that it has."""
    interruptions = 0
    while True:
      room, stop = self.budget.next_sample()
      if stop:
        return stop
      request = SampleRequest(
          ids=tuple(self.transcript.ids), images=tuple(i.shown for i in self.transcript.images),
          params=dataclasses.replace(self.sampling, max_new_tokens=room),
          seeds=(turn_seed(self.seed, self._turn_number(), interruptions),), session=self.session)
      try:
        (sample,) = await self.engine.generate(request)
        self._check(sample)
        self.transcript.append_sampled(sample.ids, sample.logprobs, sample.weight_version)
      except PromptTooLong:  # the engine's rows are shorter than our budget
        return rollout_lib.TOKEN_LIMIT
      except Exception as error:  # one bad request must not end the run; it is counted
        return self._fail(f"{type(error).__name__}: {error}")
      self.prompt_tokens.append(sample.prompt_tokens)
      self.cached_tokens.append(sample.cached_tokens)
      if sample.finish_reason != "abort" or self.transcript.turn_is_closed:
        break
      if not sample.ids:  # without progress the loop would not end
        return self._fail("the engine aborted the request before its first token")
      interruptions += 1
    return self.budget.cut_by() if sample.finish_reason == "length" else None

  def _turn_number(self) -> int:
    """Number of the turn being sampled or observed on, from 0."""
    turns = len(self.transcript.turns)
    return turns - 1 if self.transcript.turn_is_open or self.transcript.turn_is_closed else turns

  def _check(self, sample: Sample) -> None:
    """Holds the engine to its contract; a client that re-tokenises prompts is caught here."""
    if sample.prompt_tokens != self.transcript.expanded_length:
      raise TranscriptError(f"the engine saw a prompt of {sample.prompt_tokens} tokens, the "
                            f"transcript has {self.transcript.expanded_length} (expanded)")
    if sample.finish_reason == "stop" and not (
        sample.ids and sample.ids[-1] in self.transcript.special.stop_ids):
      raise TranscriptError("the engine says 'stop' but the last token is not a stop token")

  def _fail(self, message: str) -> str:
    self.error = message
    return rollout_lib.ENGINE_ERROR

  # ---- act: run the calls of the finished turn, then ask the environment ----

  async def _act(self) -> str | None:
    """Returns a stop reason, or None where the transcript has an observation to go on from."""
    turn = self.state.turn = self._turn_number()
    ids = self.transcript.last_turn
    calls = self._parse(ids)
    ended = ids[-1] != self.transcript.special.im_end
    over = ended or turn + 1 >= self.limits.max_turns
    if over:
      observed = Observed()
      self.runner.skip(calls)
    else:
      observed = await self.runner.run(calls)
    step = await self.environment.step(self._policy_turn(turn, ids, last=over))
    self.transcript.rewards.append(float(step.reward))
    if step.metadata or self.turn_metadata:
      self.turn_metadata.append(dict(step.metadata))
    if stop := self._stop(step, calls, ended=ended, over=over):
      return stop
    shown = observed.shown
    if step.reply is not None:
      reply, shown = self.runner.fit(self.tools.clean(step.reply), environments.MEMORY, observed)
      ids = self._reply_ids(reply.text, len(shown))
      self.state.images.extend(shown)
    else:
      ids = self.chat.observation_ids(observed.texts)
    if not self.runner.has_room(ids, shown):
      return rollout_lib.TOKEN_LIMIT
    self.transcript.append_observation(ids, shown, observed.outcomes)
    self.transcript.states.append(self.environment.copied())
    self.state.history += _past(calls, observed.outcomes)
    return None

  def _stop(self, step: environments.Step, calls: Sequence, *, ended: bool, over: bool) -> str | None:
    """Why the episode ends with this turn; None if it goes on."""
    if step.done:
      return rollout_lib.DONE
    if not calls and step.reply is None:
      return rollout_lib.NO_ANSWER if self.answer() is None else rollout_lib.ANSWER
    if over:
      return rollout_lib.NO_ANSWER if ended else rollout_lib.TURN_LIMIT
    return None

  def _reply_ids(self, text: str, images: int) -> list[int]:
    return self.chat.follow_up_ids(text.replace(IMAGE_MARK, "(image)"), images)

  def _rendered(self, step: environments.Step) -> list[int]:
    reply = self.tools.clean(step.reply)
    return self._reply_ids(reply.text, len(reply.images))

  # ---- read the transcript ----

  def _parse(self, ids: Sequence[int]) -> list[ToolCall | parse.CallError]:
    return parse.parse_turn(ids, self.transcript.special, self.chat.decode)

  def _policy_turn(self, number: int, ids: Sequence[int], *, last: bool = False) -> environments.PolicyTurn:
    behind = parse.think_stop(ids, self.transcript.special)
    said = ids[behind:-1] if ids[-1] in self.transcript.special.stop_ids else ids[behind:]
    return environments.PolicyTurn(number, self.chat.decode(said), self.chat.decode(ids[:behind]),
                                   tuple(self._parse(ids)), last)

  def _answered(self) -> list[Turn]:
    """The turns that already have their observation."""
    turns = self.transcript.turns
    return turns[:-1] if self.transcript.turn_is_open or self.transcript.turn_is_closed else turns

  def _answered_turns(self) -> list[environments.Answered]:
    """Those turns, each with the ids that answered it."""
    turns, ids = self._answered(), self.transcript.ids
    ends = [turn.start for turn in self.transcript.turns[1:]] + [len(ids)]
    return [(self._policy_turn(number, ids[start:stop]), ids[stop:end])
            for number, ((start, stop), end) in enumerate(zip(turns, ends))]

  def _past_calls(self) -> list[PastCall]:
    """Calls of the turns that already have their observation."""
    past = []
    for (start, stop), outcomes in zip(self._answered(), self.transcript.outcomes):
      calls = self._parse(self.transcript.ids[start:stop])
      unknown = [Outcome(None, len(self.transcript.images))] * len(calls)
      past += _past(calls, outcomes or unknown)
    return past


def _past(calls: Sequence[ToolCall | parse.CallError],
          outcomes: Sequence[Outcome]) -> list[PastCall]:
  return [PastCall(call, *outcome) for call, outcome in zip(calls, outcomes, strict=True)
          if isinstance(call, ToolCall)]
