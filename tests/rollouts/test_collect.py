"""Rollouts, resampling and credit of one step, with a policy that reads a script."""

import asyncio
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from axpo_jax.agent.environment import Environment
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.parse import SpecialIds
from axpo_jax.agent.rollout import ENGINE_ERROR
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.agent.transcript import Kind, Transcript
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Sample, SamplingParams
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits
from axpo_jax.rl.algorithm import assign_credit
from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.resample import DynamicConfig, ResampleConfig
from axpo_jax.rollouts import census, collect
from axpo_jax.rollouts.groups import (
  cut_of,
  failure_summary,
  group_stats,
  outcome_of,
  response_length,
)
from axpo_jax.train import examples
from axpo_jax.train.packing import PackingError

AXPO = ResampleConfig(ratio=0.25, k=4)
# Rollouts of a question: does it call a tool, is it right, how sure is it of the call.
# q0 triggers (both calls fail; number 2 is the less sure), q1 does not (its call succeeds).
SCRIPT = {
  "q0": [(False, True, 0), (False, True, 0), (True, False, 0.3), (False, False, 0),
         (False, False, 0), (True, False, 0.6), (False, True, 0), (False, False, 0)],
  "q1": [(True, True, 0.2)] + [(False, False, 0)] * 7,
  "q2": [(False, False, 0)] * 8,
}
RIGHT_CONTINUATION = 1  # of the K = 4: only this one


class Script:
  """An engine: rollout i of a question does what SCRIPT says, continuation k is right or not.

  An episode is known by the last mark ("r3", "k1") in its own words. The log-probability of the
  token at collapsed place p is `logprob(p)`, or log(confidence) within a call.
  """

  def __init__(self, chat: Chat):
    self.chat, self.started, self.continued, self.requests = chat, {}, {}, []

  async def generate(self, request):
    self.requests.append(request)
    name, text = request.session, self.chat.decode(request.ids)
    own = text[text.index("<|im_start|>assistant"):]
    if "<tool_response>" in own:
      return [self._sample(request, self._answer(name, re.findall(r"\b[rk]\d\b", own)[-1]))]
    if request.ids[-1] == self.chat.tool_call_id:
      k = self.continued[name] = self.continued.get(name, -1) + 1
      return [self._sample(request, self._call(f"k{k}"), inside=True)]
    i = self.started[name] = self.started.get(name, -1) + 1
    tool, _, sure = SCRIPT[name][i]
    body = f"<tool_call>{self._call(f'r{i}')}" if tool else self._boxed(name, f"r{i}")
    return [self._sample(request, f"I look r{i}.\n</think>\n\n{body}", sure)]

  def _call(self, mark):
    arguments = {"bbox_2d": [0, 0, 500, 500], "label": mark}
    return "\n" + json.dumps({"name": "image_zoom_in", "arguments": arguments}) + "\n</tool_call>"

  def _answer(self, name, mark):
    return "I see.\n</think>\n\n" + self._boxed(name, mark)

  def _boxed(self, name, mark):
    number = int(mark[1])
    right = SCRIPT[name][number][1] if mark[0] == "r" else number == RIGHT_CONTINUATION
    return f"<answer>\n\\boxed{{{'A' if right else 'B'}}}\n</answer>"

  def _sample(self, request, text, sure=0.0, inside=False):
    ids = [*self.chat.encode(text), self.chat.im_end_id]
    logprobs = [logprob(len(request.ids) + j) for j in range(len(ids))]
    if sure:
      start = ids.index(self.chat.tool_call_id)
      stop = ids.index(self.chat.tool_call_end_id) + 1
      logprobs[start:stop] = [float(np.log(sure))] * (stop - start)
    return Sample(tuple(ids), tuple(logprobs), "stop", request.prompt_tokens, 0, 7)


def logprob(place: int) -> float:
  return -1e-3 * (place + 1)


def question(name, image=None) -> Question:
  pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  return Question(name, "Read the mark.", (Image.fromarray(pixels) if image is None else image,),
                  ("A",), kind="text")


def make_actor(engine, chat, processor) -> collect.Actor:
  tools = ToolBox([ImageZoomIn(ImageLimits(32 * 32, 48 * 48), factor=processor.factor)],
                  frozenset({"read_image"}))
  return collect.Actor(
    engine=engine, chat=chat, processor=processor, toolbox=tools,
    limits=EpisodeLimits(max_new_tokens_per_turn=200),
    sampling=SamplingParams(200, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids),
    image_limits=ImageLimits(16 * 16, 64 * 64), system_prompt="Be brief.")


def play(engine, chat, processor, config=AXPO, questions=None):
  """The groups of one step."""
  async def step():
    actor = make_actor(engine, chat, processor)
    groups = await collect.sample_groups(actor, questions or [question("q0"), question("q1")], 8, 1)
    await collect.resample(actor, groups, config, 1)
    return groups

  return asyncio.run(step())


def test_a_question_whose_environment_is_away_is_left_out(chat, processor):
  class Gone(Environment):
    def opening(self, question):
      raise ConnectionError("no server")

  actor = dataclasses.replace(make_actor(Script(chat), chat, processor), environment=Gone())
  (group,) = asyncio.run(collect.sample_groups(actor, [question("q0")], 2, 1))
  assert group.rollouts == [] and group.failures == ["the question cannot be asked"] * 2


@pytest.fixture(scope="module")
def groups(chat, processor):
  return play(Script(chat), chat, processor)


def test_rollouts_are_what_the_script_says(groups):
  for group in groups:
    script = SCRIPT[group.question.id]
    assert [r.used_tool for r in group.rollouts] == [tool for tool, _, _ in script]
    assert [r.reward for r in group.rollouts] == [float(right) for _, right, _ in script]
    assert len({r.seed for r in group.rollouts}) == 8


def test_only_the_less_sure_failed_call_is_resampled(groups, chat):
  # M = floor(0.25 * 16 / 4) = 1 prefix for the step.
  (branch,), none = groups[0].branches, groups[1].branches
  assert not none
  assert branch.source == 2
  assert branch.confidence == pytest.approx(0.3)
  source = groups[0].rollouts[2].transcript
  assert branch.prefix_end == source.ids.index(chat.tool_call_id, source.prompt_length) + 1
  assert [r.reward for r in branch.rollouts] == [0, 1, 0, 0]
  for rollout in branch.rollouts:
    assert rollout.transcript.ids[:branch.prefix_end] == source.ids[:branch.prefix_end]
    assert rollout.transcript.ids != source.ids
    assert rollout.start == branch.prefix_end
    assert rollout.calls[0].error is None
    assert len(rollout.transcript.images) == 2
  seeds = [r.seed for g in groups for r in g.rollouts] + [r.seed for r in branch.rollouts]
  assert len(set(seeds)) == 20


@pytest.mark.parametrize("ratio, prefixes", [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_budget(chat, processor, ratio, prefixes):
  config = dataclasses.replace(AXPO, ratio=ratio)
  groups = play(Script(chat), chat, processor, config)
  assert sum(len(group.branches) for group in groups) == prefixes  # q0 has two failed calls
  assert [branch.source for branch in groups[0].branches] == [2, 5][:prefixes]


def test_ablations_cut_elsewhere(groups, chat):
  source = groups[0].rollouts[2].transcript
  whole = dataclasses.replace(AXPO, prefix="question")
  assert cut_of(source, whole).end == source.prompt_length
  bare = groups[0].rollouts[3].transcript
  cut = cut_of(bare, dataclasses.replace(AXPO, subgroup="no_tool")).end
  assert bare.kinds[cut - 1] == Kind.THINK
  assert bare.kinds[cut] == Kind.ANSWER
  assert bare.ids[cut - 1] == chat.think_end_id


def test_early_stop_ends_a_prefix_with_its_first_right_and_wrong_continuation(groups, chat, processor):
  engine = Script(chat)
  config = dataclasses.replace(AXPO, ratio=0.5, early_stop=True)
  stopped = play(engine, chat, processor, config)[0].branches
  # Of K = 4 the second is right; the other prefix of the question draws "k2" and later, which are not.
  assert [[r.reward for r in branch.rollouts] for branch in stopped] == [[0, 1], [0, 0, 0, 0]]
  assert [r.seed for r in stopped[0].rollouts] == [r.seed for r in groups[0].branches[0].rollouts[:2]]


class Straggler(Script):
  """Rollouts of q1 wait until a prefix of q0 is resampled."""

  def __init__(self, chat):
    super().__init__(chat)
    self.resampled = asyncio.Event()

  async def generate(self, request):
    if request.ids[-1] == self.chat.tool_call_id:
      self.resampled.set()
    elif request.session == "q1":
      await asyncio.wait_for(self.resampled.wait(), 20)
    return await super().generate(request)


def test_a_prefix_that_is_certain_to_be_chosen_does_not_wait_for_stragglers(chat, processor, groups):
  """Of two prefixes q1 could take one, so q0's first is certain and its second is not."""
  async def step():
    actor, asked = make_actor(Straggler(chat), chat, processor), iter([[question("q0"), question("q1")]])
    async with collect.Resampling(actor, dataclasses.replace(AXPO, ratio=0.5), 1) as resampling:
      made, _ = await collect.sample_step(actor, asked, 2, 8, 1, resampling, DynamicConfig())
      await resampling.finish(made)
    return made

  made = asyncio.run(step())
  assert not any(group.failed for group in made)
  assert [[branch.source for branch in group.branches] for group in made] == [[2, 5], []]
  # And it draws what it draws behind all rollouts.
  seeds = [[rollout.seed for rollout in group.branches[0].rollouts] for group in (made[0], groups[0])]
  assert seeds[0] == seeds[1]


def test_dynamic_sampling_asks_until_enough_questions_teach_something(chat, processor):
  """q2 never does; q1 has rewards that differ; q0 triggers AXPO, and has both."""
  def step(dynamic, config=AXPO):
    asked = ([question(name)] for name in ("q2", "q1", "q0"))
    async def run():
      actor = make_actor(Script(chat), chat, processor)
      async with collect.Resampling(actor, config, 1) as resampling:
        return await collect.sample_step(actor, asked, 2, 8, 1, resampling, dynamic)

    sampled, kept = asyncio.run(run())
    return [g.question.id for g in sampled], [g.question.id for g in kept]

  assert step(DynamicConfig()) == (["q2", "q1"], ["q2", "q1"])
  assert step(DynamicConfig(rounds=1)) == (["q2", "q1", "q0"], ["q1", "q0"])
  assert step(DynamicConfig(rounds=1, oversample=1.5)) == (["q2", "q1", "q0"], ["q1", "q0"])


def test_a_later_call_can_be_the_cut(chat):
  """Three calls, the second of them the least certain; the last one never ran."""
  transcript = Transcript(SpecialIds.from_chat(chat))
  transcript.append_prompt(chat.prompt_ids("Be brief.", [], "Read.", 0))
  starts = []
  for sure in (0.9, 0.4, 0.2):
    ids = [*chat.encode("I look.\n</think>\n\n<tool_call>\nx\n</tool_call>"), chat.im_end_id]
    starts.append(len(transcript) + ids.index(chat.tool_call_id) + 1)
    transcript.append_sampled(ids, [float(np.log(sure))] * len(ids), 0)
    if sure != 0.2:
      transcript.append_observation(chat.observation_ids([("nothing", 0)]))
  for cut, end, sure in (("first", starts[0], 0.9), ("last", starts[1], 0.4), ("uncertain", starts[1], 0.4)):
    assert cut_of(transcript, ResampleConfig(cut=cut)) == (end, pytest.approx(sure)), cut
    assert transcript.ids[end - 1] == chat.tool_call_id
  # Of a rollout whose only call did not run, that one.
  alone = transcript.cut(starts[0] + 3)
  assert cut_of(alone, ResampleConfig(cut="uncertain")).end == starts[0]
  assert response_length(transcript) == transcript.expanded_length - transcript.prompt_length


def _credits(groups):
  return assign_credit([outcome_of(group) for group in groups], CreditConfig())


def test_advantages_are_the_worked_values(groups):
  credits = _credits(groups)
  first = [round(c.advantage, 3) for c in credits if c.group == 0]
  high, low = 1.208, -0.725  # 3 of 8 right: 0.625 / 0.518 and -0.375 / 0.518
  assert first == [high, high, 0.935, low, low, low, high, low, -0.5, 1.5, -0.5, -0.5]
  assert [round(c.advantage, 3) for c in credits if c.group == 1] == [2.475] + [-0.354] * 7


def test_examples_carry_loss_where_they_should(groups, chat):
  """Against a slow walk over each transcript, token by token."""
  credits = _credits(groups)
  made = examples.credited(groups, credits, chat.image_pad_id)
  assert len(made) == len(credits) == 20
  for credit, example in zip(credits, made):
    group = groups[credit.group]
    branch = None if credit.branch is None else group.branches[credit.branch]
    rollout = (branch or group).rollouts[credit.rollout]
    expected = list(_walk(rollout.transcript, group, credit, branch, chat))
    tokens, masks, logprobs = zip(*expected)
    assert example.ids_T.tolist() == list(tokens)
    assert example.loss_mask_T.tolist() == list(masks)
    assert any(masks)
    np.testing.assert_array_equal(example.advantages_T,
                                  np.float32(credit.advantage) * np.array(masks))
    np.testing.assert_allclose(example.behaviour_logp_T, logprobs, rtol=1e-6)


def _walk(transcript, group, credit, branch, chat):
  """(id, carries loss, log-probability) of each expanded token, by the rules in words."""
  sampled, images = False, iter(transcript.images)
  resampled = {b.source: b.prefix_end for b in group.branches}
  opened = None  # the place of the first tool call of the episode
  for place, token in enumerate(transcript.ids):
    if place >= transcript.prompt_length and opened is None and token == chat.tool_call_id:
      opened = place
    # Sampled: from after the generation prompt to <|im_end|>.
    sampled = _in_assistant_turn(transcript, place, chat)
    carries = sampled
    if branch is not None:  # a continuation: its own tokens, behind the opening tag
      carries = sampled and opened is not None and place > opened
    elif credit.rollout in resampled:  # a source: its thinking and the opening tag
      carries = sampled and (opened is None or place == opened)
    count = next(images).shown.num_tokens if token == chat.image_pad_id else 1
    for _ in range(count):
      yield token, carries, transcript.logprobs[place] if carries else 0.0


def _in_assistant_turn(transcript, place, chat) -> bool:
  """Whether the text up to `place` is within an assistant turn that the policy writes."""
  before = chat.decode(transcript.ids[:place])
  return before.rpartition("<|im_start|>")[2].startswith("assistant\n<think>\n") and (
    "<|im_end|>" not in before.rpartition("<|im_start|>")[2])


def test_behaviour_logprobs_are_those_of_the_sampler(groups):
  """The script's log-probability is a function of the place, so a shift would show."""
  transcript = groups[0].branches[0].rollouts[0].transcript
  for place in np.flatnonzero(transcript.sampled):
    inside_source_call = place == groups[0].branches[0].prefix_end - 1
    wanted = np.log(0.3) if inside_source_call else logprob(place)
    assert transcript.logprobs[place] == pytest.approx(wanted)


class Unreliable(Script):
  """Raises at the given requests, counted from 0."""

  def __init__(self, chat, broken):
    super().__init__(chat)
    self.broken, self.count = broken, -1

  async def generate(self, request):
    self.count += 1
    out = await super().generate(request)
    if self.count in self.broken:
      raise RuntimeError("no answer")
    return out


def test_failing_request_costs_its_own_episode_only(chat, processor):
  # The first requests of rollouts 0 and 2 (the prefix that would be resampled) of q0.
  groups = play(Unreliable(chat, {0, 2}), chat, processor, dataclasses.replace(AXPO, ratio=0.5))
  assert [len(g.rollouts) for g in groups] == [6, 8]
  assert [g.failed for g in groups] == [2, 0]
  (branch,) = groups[0].branches
  assert groups[0].rollouts[branch.source].confidence() == pytest.approx(0.6)
  assert len(examples.credited(groups, _credits(groups), chat.image_pad_id)) == 6 + 8 + 4


def test_what_breaks_in_an_episode_ends_that_episode_alone(chat, processor):
  """A reward that raises, and a trajectory that cannot be packed."""
  def check(transcript):
    if "r4" in chat.decode(transcript.ids[transcript.prompt_length:]):
      raise PackingError("too long")

  real = collect.continue_episode

  async def judged(*args, **options):
    rollout = await real(*args, **options)
    if args[1].id == "q1" and rollout.reward:
      raise OverflowError("int too large")
    return rollout

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collect, "continue_episode", judged)
    actor = dataclasses.replace(make_actor(Script(chat), chat, processor), check=check)
    groups = asyncio.run(collect.sample_groups(actor, [question("q0"), question("q1")], 8, 1))
  assert [len(g.rollouts) for g in groups] == [7, 6]
  assert groups[0].failures == ["PackingError: too long"]
  assert sorted(groups[1].failures) == ["OverflowError: int too large", "PackingError: too long"]
  assert failure_summary(groups, most=1) == (
    "2 x PackingError: too long; and 1 other reasons")


def test_branch_of_which_nothing_is_left_is_dropped(chat, processor):
  engine = Script(chat)
  play(engine, chat, processor, dataclasses.replace(AXPO, ratio=0.0))
  ordinary = len(engine.requests)
  groups = play(Unreliable(chat, set(range(ordinary, ordinary + 4))), chat, processor)
  assert [len(g.branches) for g in groups] == [0, 0]
  assert groups[0].failed == 4
  # The script never waits, so an episode's requests follow each other: k1 makes two.
  broken = {ordinary, ordinary + 3, ordinary + 4}
  groups = play(Unreliable(chat, broken), chat, processor)
  (branch,) = groups[0].branches
  assert [r.reward for r in branch.rollouts] == [1.0]  # a lone continuation: no advantage
  assert _credits(groups)[8].advantage == 0


def test_question_whose_image_does_not_open_is_left_out(chat, processor):
  bad = question("q1", pathlib.Path("no_such_file.png"))
  groups = play(Script(chat), chat, processor, questions=[bad, question("q0")])
  assert [len(g.rollouts) for g in groups] == [0, 8]
  assert groups[0].failed == 8
  assert all(r.stop != ENGINE_ERROR for r in groups[1].rollouts)
  stats = group_stats(groups, AXPO, chat)
  assert census.census(stats)["rollout/rollouts"] == 8
  assert not stats[0].triggered


def test_census_of_the_step(groups, chat):
  stats = group_stats(groups, AXPO, chat)
  metrics = census.census(stats) | census.resample_census(stats, budget=1)
  assert metrics["rollout/tool_attempt_rate"] == 3 / 16
  assert metrics["rollout/tool_all_wrong_rate"] == 0.5
  assert metrics["rollout/tool_all_wrong_rate_after"] == 0
  assert metrics["axpo/triggered"] == 1
  assert metrics["axpo/recovered_share"] == 1
  assert metrics["axpo/continuation_success_rate"] == 0.25
  assert metrics["axpo/confidence_selected"] == pytest.approx(0.3)
  assert metrics["axpo/confidence_other"] == pytest.approx((0.6 + 0.2) / 2)
