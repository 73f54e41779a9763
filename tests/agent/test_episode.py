"""The loop: continue a transcript, run the calls, keep the budgets."""

import asyncio
import dataclasses
import itertools
import math
import pickle

import numpy as np
import PIL.Image
import pytest

from axpo_jax.agent.episode import start_transcript, turn_seed
from axpo_jax.agent.tools.base import Observation, Tool, ToolBox
from axpo_jax.agent.transcript import Kind, TranscriptError
from axpo_jax.data import question as question_lib
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import PromptTooLong, Sample
from axpo_jax.model.images import ImageLimits

ZOOM = ('<tool_call>\n{{"name": "image_zoom_in", "arguments": {{"bbox_2d": [{0}, {0}, {1}, {1}], '
        '"label": "box"}}}}\n</tool_call>')
CALL = f"look closer\n</think>\n\n{ZOOM.format(100, 300)}<|im_end|>"
TWO = f"twice\n</think>\n\n{ZOOM.format(0, 200)}\n{ZOOM.format(400, 600)}<|im_end|>"
RIGHT = "I see\n</think>\n\n<answer>\n\\boxed{K}\n</answer><|im_end|>"
WRONG = RIGHT.replace("K", "M")


def play(world, scripted, *turns, start=None, **changes):
  """Runs one episode; returns the rollout and the engine. Strings are encoded."""
  engine = scripted([world.ids(turn) if isinstance(turn, str) else turn for turn in turns],
                    finish=changes.pop("finish", "stop"))
  rollout = asyncio.run(world.resume(start or world.start(), engine, **changes))
  return rollout, engine


def limits(world, **changes):
  return dataclasses.replace(world.limits, **changes)


def test_an_answer_at_once(world, scripted):
  start = world.start()
  rollout, engine = play(world, scripted, RIGHT, start=start)
  assert (rollout.stop, rollout.answer, rollout.reward) == ("answer", "K", 1.0)
  assert not rollout.used_tool and rollout.confidence() is None and not rollout.calls
  assert rollout.transcript.ids == start.ids + world.ids(RIGHT)
  assert len(start) == rollout.start  # the given transcript did not grow
  assert play(world, scripted, WRONG)[0].reward == 0.0
  (request,) = engine.requests
  assert request.ids == tuple(start.ids) and request.images == (start.images[0].shown,)
  assert request.params.stop_ids == world.chat.stop_ids
  assert request.params.banned_ids == world.chat.banned_ids
  assert request.params.max_new_tokens == 200 and request.session == "q1"
  assert (rollout.prompt_tokens, rollout.cached_tokens) == (start.expanded_length, 3)


def test_a_tool_call_and_its_observation(world, scripted):
  rollout, engine = play(world, scripted, CALL, RIGHT)
  t = rollout.transcript
  assert rollout.stop == "answer" and rollout.used_tool and rollout.num_turns == 2
  text = world.chat.decode(t.ids)
  assert text.endswith(
      f"{CALL}\n<|im_start|>user\n<tool_response>\nImage 1: zoomed from image 0."
      "<|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n"
      f"<|im_start|>assistant\n<think>\n{RIGHT}")
  assert [image.origin for image in t.images] == ["question", "image_zoom_in"]
  # The crop comes from the original: 0.1 to 0.3 of 512 x 400.
  expected = t.images[0].original.crop((51, 40, 154, 120)).resize(
      t.images[1].original.size, 3)
  assert t.images[1].original.tobytes() == expected.tobytes()
  assert t.images[1].shown.picture().tobytes() == expected.tobytes()  # and is not resized again
  (call,) = rollout.calls
  assert (call.turn, call.name, call.error) == (0, "image_zoom_in", None)
  assert call.arguments["bbox_2d"] == [100, 100, 300, 300]
  # The second request continues the first and sends both images.
  assert engine.requests[1].ids[:len(engine.requests[0].ids)] == engine.requests[0].ids
  assert engine.requests[1].images == tuple(image.shown for image in t.images)
  lengths = [request.prompt_tokens for request in engine.requests]
  assert (rollout.prompt_tokens, rollout.first_prompt_tokens) == (sum(lengths), lengths[0])
  assert (rollout.cached_tokens, rollout.first_cached_tokens) == (6, 3)


def test_sampled_tokens_are_the_engines_and_only_they_have_logprobs(world, scripted):
  rollout, _ = play(world, scripted, TWO, CALL, RIGHT)
  t = rollout.transcript
  sampled = [i for text in (TWO, CALL, RIGHT) for i in world.ids(text)]
  mask = t.sampled
  assert [i for i, m in zip(t.ids, mask) if m] == sampled
  assert np.array_equal(np.isnan(t.logprobs), ~mask)
  assert {v for v, m in zip(t.versions, mask) if m} == {11}
  newline = t.turns[0].stop  # the client's newline after <|im_end|>
  assert t.ids[newline - 1] == world.chat.im_end_id
  assert t.kinds[newline] == Kind.INSERTED and not mask[newline]
  assert math.isnan(t.logprobs[newline]) and t.versions[newline] == -1


def test_confidence_is_the_mean_probability_of_the_first_call(world, scripted):
  rollout, _ = play(world, scripted, TWO, RIGHT)
  t = rollout.transcript
  start, stop = t.first_call_span()
  assert world.chat.decode(t.ids[start:stop]) == ZOOM.format(0, 200)
  by_hand = sum(math.exp(x) for x in t.logprobs[start:stop]) / (stop - start)
  assert rollout.confidence() == pytest.approx(by_hand, rel=1e-12)


def test_several_calls_share_one_user_turn_and_count_up(world, scripted):
  rollout, _ = play(world, scripted, TWO, RIGHT)
  text = world.chat.decode(rollout.transcript.ids)
  observation = text[text.index(TWO) + len(TWO):]
  assert observation.count("<|im_start|>user") == 1
  assert observation.index("Image 1: zoomed") < observation.index("Image 2: zoomed")
  assert len(rollout.transcript.images) == 3 and len(rollout.calls) == 2


def test_a_crop_can_be_zoomed_again(world, scripted):
  again = CALL.replace('"label": "box"', '"label": "box", "img_idx": 1')
  rollout, _ = play(world, scripted, CALL, again, RIGHT)
  assert "Image 2: zoomed from image 1." in world.chat.decode(rollout.transcript.ids)
  assert [call.error for call in rollout.calls] == [None, None]


@pytest.mark.parametrize("inside, kind", [
    ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 9', "bad_json"),
    ('{"name": "image_zoom_in"}', "bad_call"),
    ('{"name": "browse", "arguments": {}}', "unknown_tool"),
    ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [9, 9, 1, 1], "label": ""}}',
     "bad_arguments"),
    ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 9, 9], "label": "", '
     '"img_idx": 7}}', "bad_arguments"),
    ('{"name": "<|image_pad|></tool_response>", "arguments": {}}', "unknown_tool"),
    ('{"name": "\\ud800<|image_pad|></tool_response>", "arguments": {}}', "bad_call"),
])
def test_malformed_calls_get_an_error_observation_and_the_episode_goes_on(
    world, scripted, inside, kind):
  if "<|image_pad|>" in inside:  # as sampled: no special token among the text
    turn = [*world.ids("hm</think><tool_call>"), *world.chat.encode_plain(inside),
            *world.ids("</tool_call><|im_end|>")]
  else:
    turn = f"hm</think><tool_call>{inside}</tool_call><|im_end|>"
  rollout, _ = play(world, scripted, turn, RIGHT)
  assert rollout.stop == "answer" and rollout.used_tool
  assert [call.error for call in rollout.calls] == [kind]
  assert "<tool_response>\nError: " in world.chat.decode(rollout.transcript.ids)
  assert len(rollout.transcript.images) == 1


def test_a_quoted_call_is_not_run(world, scripted):
  quoted = f"I could write {ZOOM.format(0, 100)}\n</think>\n\n<answer>K</answer><|im_end|>"
  rollout, _ = play(world, scripted, quoted)
  assert rollout.stop == "answer" and not rollout.used_tool and not rollout.calls


def test_refused_scope(world, scripted):
  tools = ToolBox(world.tools.tools, [])
  rollout, _ = play(world, scripted, CALL, RIGHT, tools=tools)
  assert rollout.stop == "answer" and [c.error for c in rollout.calls] == ["refused"]


# ---- how episodes end ----

def test_no_answer(world, scripted):
  assert play(world, scripted, "hm</think>who knows<|im_end|>")[0].stop == "no_answer"
  rollout, _ = play(world, scripted, "<answer>K</answer><|im_end|>")  # never stopped thinking
  assert (rollout.stop, rollout.answer, rollout.reward) == ("no_answer", None, 0.0)


def test_turn_limit_does_not_run_the_last_calls(world, scripted):
  rollout, engine = play(world, scripted, CALL, TWO, limits=limits(world, max_turns=2))
  assert rollout.stop == "turn_limit" and len(engine.requests) == 2
  assert [call.error for call in rollout.calls] == [None, "not_run", "not_run"]
  assert rollout.transcript.ids[-1] == world.chat.im_end_id and rollout.reward == 0.0
  assert len(rollout.transcript.images) == 2


def test_a_turn_cut_by_length_has_no_next_turn(world, scripted):
  rollout, engine = play(world, scripted, CALL, RIGHT,
                         limits=limits(world, max_new_tokens_per_turn=5))
  assert rollout.stop == "length" and len(engine.requests) == 1
  assert rollout.transcript.turn_is_open
  n = len(world.ids(RIGHT))
  whole = play(world, scripted, RIGHT, limits=limits(world, max_new_tokens_per_turn=n))[0]
  assert whole.reward == 1.0
  cut = play(world, scripted, RIGHT, limits=limits(world, max_new_tokens_per_turn=n - 1))[0]
  assert (cut.stop, cut.answer, cut.reward) == ("length", None, 0.0)


def test_response_tokens_count_observations_expanded(world, scripted):
  full, _ = play(world, scripted, CALL, RIGHT)
  used = full.transcript.expanded_length - world.start().expanded_length
  tight = limits(world, max_response_tokens=used)
  assert play(world, scripted, CALL, RIGHT, limits=tight)[0].stop == "answer"
  rollout, _ = play(world, scripted, CALL, RIGHT,
                    limits=limits(world, max_response_tokens=used - 1))
  assert rollout.stop == "token_limit"
  assert rollout.transcript.expanded_length == full.transcript.expanded_length - 1


@pytest.mark.parametrize("spare", range(0, 80, 7))
def test_no_budget_is_ever_exceeded(world, scripted, spare):
  total = world.start().expanded_length + len(world.ids(TWO)) + spare
  rollout, _ = play(world, scripted, TWO, RIGHT, limits=limits(world, max_total_tokens=total))
  t = rollout.transcript
  assert t.expanded_length <= total
  assert t.ids.count(world.chat.image_pad_id) == len(t.images)
  if rollout.num_turns == 1:
    assert rollout.stop == "token_limit" and t.turn_is_closed  # nothing half appended


def test_images_that_do_not_fit_are_left_out_and_the_observation_says_so(world, scripted):
  rollout, _ = play(world, scripted, TWO, RIGHT, limits=limits(world, max_images=2))
  text = world.chat.decode(rollout.transcript.ids)
  assert "Image 1: zoomed" in text and "Image 2: zoomed" not in text
  assert "at most 2 images are allowed and there are 2" in text
  assert [call.error for call in rollout.calls] == [None, "image_limit"]
  assert len(rollout.transcript.images) == 2 and rollout.stop == "answer"


def test_images_that_do_not_fit_the_tokens_are_left_out(world, scripted):
  big = Painter(ImageLimits(320 * 320, 320 * 320))  # 400 tokens
  total = world.start().expanded_length + 250
  rollout, _ = play(world, scripted, PAINT, RIGHT, tools=ToolBox([big], ["paint"]),
                    limits=limits(world, max_total_tokens=total))
  assert [call.error for call in rollout.calls] == ["image_limit"]
  assert "does not fit the rest of the token budget" in world.chat.decode(rollout.transcript.ids)
  assert rollout.stop == "answer" and len(rollout.transcript.images) == 1


def test_a_question_with_too_many_images_is_not_sampled(world, scripted):
  rollout, engine = play(world, scripted, limits=limits(world, max_images=0))
  assert rollout.stop == "image_limit" and not engine.requests


def test_a_prompt_that_fills_the_budget_is_not_sampled(world, scripted):
  rollout, engine = play(world, scripted, limits=limits(world, max_total_tokens=10))
  assert rollout.stop == "token_limit" and not engine.requests


def test_endoftext_ends_the_episode(world, scripted):
  rollout, engine = play(world, scripted, CALL.replace("<|im_end|>", "<|endoftext|>"))
  assert rollout.stop == "no_answer" and len(engine.requests) == 1
  assert [call.error for call in rollout.calls] == ["not_run"]
  assert play(world, scripted, RIGHT.replace("<|im_end|>", "<|endoftext|>"))[0].reward == 1.0


# ---- the machine's faults ----

def test_a_failing_engine_ends_the_episode_only(world, scripted):
  rollout, _ = play(world, scripted, CALL, RuntimeError("device lost"))
  assert rollout.stop == "engine_error" and rollout.failed and rollout.reward == 0.0
  assert rollout.error == "RuntimeError: device lost" and rollout.num_turns == 1


def test_a_prompt_too_long_for_the_engine_is_a_token_limit(world, scripted):
  assert play(world, scripted, PromptTooLong("rows hold 8"))[0].stop == "token_limit"


@pytest.mark.parametrize("change, says", [
    ({"prompt_tokens": 3}, "saw a prompt of 3 tokens"),
    ({"ids": (5, 6, 7)}, "not a stop token"),
    ({"logprobs": (0.0,)}, "1 log-probabilities"),
    ({"ids": (), "finish_reason": "abort"}, "aborted"),
    ({"ids": "pad"}, "banned_ids"),
])
def test_an_engine_that_breaks_its_contract(world, scripted, change, says):
  ids = tuple(world.ids(RIGHT))
  good = Sample(ids, (-0.1,) * len(ids), "stop", world.start().expanded_length, 0, 0)
  if change.get("ids") == "pad":
    change = {"ids": (world.chat.image_pad_id, *ids[1:])}
  rollout, _ = play(world, scripted, dataclasses.replace(
      good, **({"logprobs": (-0.1,) * len(change["ids"])} if "ids" in change else {}) | change))
  assert rollout.stop == "engine_error" and says in rollout.error


def test_an_interrupted_turn_continues_from_its_tokens(world, scripted):
  """Twice, by two updates of the weights: no token is lost or drawn again, each has its version, and each
  part has a random stream of its own."""
  ids, room = world.ids(RIGHT), world.start().expanded_length
  cuts = [0, 3, 4, len(ids)]
  parts = [Sample(tuple(ids[a:b]), (-0.1 * (n + 1),) * (b - a), "stop" if n == 2 else "abort", room + a, 0, n)
           for n, (a, b) in enumerate(itertools.pairwise(cuts))]
  rollout, engine = play(world, scripted, *parts)
  transcript = rollout.transcript
  assert rollout.reward == 1.0 and rollout.num_turns == 1
  assert transcript.ids[transcript.prompt_length:] == list(ids)
  assert transcript.versions[transcript.prompt_length:] == [0] * 3 + [1] + [2] * (len(ids) - 4)
  assert [len(request.ids) for request in engine.requests] == [
    transcript.prompt_length + cut for cut in cuts[:3]]
  assert len({request.seeds for request in engine.requests}) == 3


def test_an_engines_own_length_limit_is_a_token_limit(world, scripted):
  assert play(world, scripted, world.ids(RIGHT)[:4], finish="length")[0].stop == "token_limit"


def test_deadline(world):
  class Stuck:
    async def generate(self, request):
      await asyncio.sleep(60)
  rollout = asyncio.run(world.resume(world.start(), Stuck(),
                                     limits=limits(world, deadline=0.01)))
  assert rollout.stop == "deadline" and rollout.failed
  assert rollout.transcript.ids == world.start().ids


# ---- continue = cut + continue ----

def test_a_cut_continues_to_the_same_transcript(world, scripted, replay):
  """Wherever an episode is cut inside or at the end of a turn, or after an observation."""
  whole, _ = play(world, scripted, TWO, CALL, RIGHT)
  t = whole.transcript
  cuts = [n for turn in t.turns for n in range(turn.start, turn.stop + 1)]
  assert t.prefix_end() in cuts
  for n in cuts:
    again = asyncio.run(world.resume(t.cut(n), replay(t)))
    assert again.transcript.ids == t.ids and again.transcript.kinds == t.kinds
    assert np.array_equal(again.transcript.logprobs, t.logprobs, equal_nan=True)
    assert again.transcript.versions == t.versions
    assert [i.shown.key for i in again.transcript.images] == [i.shown.key for i in t.images]
    assert (again.stop, again.reward, again.start) == (whole.stop, whole.reward, n)


def test_k_continuations_of_a_prefix(world, scripted):
  """Each begins inside the call, decodes on its own, and the source stays as it was."""
  whole, _ = play(world, scripted, CALL, WRONG)
  source = whole.transcript
  end = source.prefix_end()
  assert source.ids[end - 1] == world.chat.tool_call_id
  before = list(source.ids)
  rest = world.ids(ZOOM.format(500, 700))[1:] + world.ids("<|im_end|>")
  good, engine = play(world, scripted, rest, RIGHT, start=source.cut(end), seed=1)
  bad, _ = play(world, scripted, world.ids("nonsense</tool_call><|im_end|>"), WRONG,
                start=source.cut(end), seed=2)
  assert (good.reward, bad.reward) == (1.0, 0.0)
  assert good.used_tool and bad.used_tool
  assert [c.error for c in good.calls] == [None] and [c.error for c in bad.calls] == ["bad_json"]
  assert engine.requests[0].ids == tuple(before[:end]) and source.ids == before
  # The turn's own budget counts the prefix.
  prefix = end - source.turns[0].start
  assert engine.requests[0].params.max_new_tokens == 200 - prefix


def test_a_cut_at_the_turn_limit(world, scripted, replay):
  whole, _ = play(world, scripted, CALL, RIGHT)
  after = whole.transcript.cut(whole.transcript.turns[1].start)
  rollout = asyncio.run(world.resume(after, replay(whole.transcript),
                                     limits=limits(world, max_turns=1)))
  assert rollout.stop == "turn_limit" and rollout.transcript.ids == after.ids


def test_a_cut_inside_an_observation_is_refused(world, scripted):
  whole, _ = play(world, scripted, CALL, RIGHT)
  n = whole.transcript.kinds.index(Kind.OBSERVATION) + 2
  with pytest.raises(TranscriptError, match="inside an observation"):
    play(world, scripted, RIGHT, start=whole.transcript.cut(n))


def test_earlier_calls_are_handed_to_tools(world, scripted):
  class Witness(Painter):
    async def run(self, arguments, episode):
      seen.append([past.call.name for past in episode.history])
      return Observation("ok")
  seen = []
  tools = ToolBox([*world.tools.tools, Witness(None)], ["read_image", "paint"])
  whole, _ = play(world, scripted, CALL, PAINT, RIGHT, tools=tools)
  start = whole.transcript.cut(whole.transcript.turns[1].start)
  play(world, scripted, PAINT, RIGHT, start=start, tools=tools)
  assert seen == [["image_zoom_in"], ["image_zoom_in"]]


# ---- seeds, prompts, pictures of tools ----

def test_seeds_differ_by_turn_and_episode(world, scripted):
  _, engine = play(world, scripted, CALL, RIGHT, seed=7)
  assert [r.seeds for r in engine.requests] == [(turn_seed(7, 0),), (turn_seed(7, 1),)]
  seeds = {turn_seed(s, t) for s in range(100) for t in range(5)}
  assert len(seeds) == 500 and all(0 <= s < 2**31 for s in seeds)
  assert turn_seed(0, 0) == 642837039  # printf 0:0 | b2sum -l 32, halved


def test_start_transcript_marks_and_limits(world):
  t = world.start()
  assert set(t.kinds) == {Kind.PROMPT} and np.isnan(t.logprobs).all()
  assert t.images[0].original.size == (512, 400)
  assert np.prod(t.images[0].shown.size) <= 96 * 96
  assert "image_zoom_in" in world.chat.decode(t.ids)


def test_a_question_cannot_smuggle_special_tokens(world):
  question = Question("q", "<|image_pad|> </think><tool_call>", (), ("K",))
  t = start_transcript(question, world.chat, world.tools, "", world.processor,
                       ImageLimits(64, 4096))
  assert world.chat.image_pad_id not in t.ids and not t.images
  assert world.chat.think_end_id not in t.ids


def test_a_tools_image_of_an_odd_size_is_rounded_to_the_factor(world, scripted):
  tools = ToolBox([Painter(None)], ["paint"])
  rollout, _ = play(world, scripted, PAINT, RIGHT, tools=tools)
  image = rollout.transcript.images[1]
  assert image.original.size == (50, 70) and image.shown.size == (48, 64)
  assert image.original.tobytes() == bytes(50 * 70 * 3)


def test_a_tools_image_is_shown_no_larger_than_any_image_may_be(world, scripted):
  tools = ToolBox([Painter(None)], ["paint"])
  rollout, _ = play(world, scripted, PAINT, RIGHT, tools=tools,
                    limits=limits(world, max_image_pixels=40 * 40))
  image = rollout.transcript.images[1]
  assert image.original.size == (50, 70) and image.shown.size == (32, 32)  # scale 0.68


def test_pixels_are_kept_once_and_originals_decoded_when_a_tool_reads_them(
    world, scripted, tmp_path, monkeypatch):
  """Of 4K pictures the decoded ones would fill the host: what waits holds a path, and what is shown."""
  path, opened = tmp_path / "large.png", []
  world.question.images[0].save(path)
  monkeypatch.setattr(question_lib, "_decoded", question_lib._Decoded(1 << 30))
  real = question_lib.load_image
  monkeypatch.setattr(question_lib, "load_image", lambda source: opened.append(source) or real(source))
  other = dataclasses.replace(world, question=dataclasses.replace(world.question, images=(path,)))
  rollout, _ = play(other, scripted, CALL, RIGHT)
  question, crop = rollout.transcript.images
  assert question.source == path and crop.source is None  # the crop is shown as it is
  assert opened == [path]  # for the prompt and for the tool
  assert len(pickle.dumps(rollout.transcript.images)) < question.shown.pixels_HxWx3.nbytes + (
    crop.shown.pixels_HxWx3.nbytes) + 2000
  same, _ = play(world, scripted, CALL, RIGHT)
  assert same.transcript.images[1].shown.key == crop.shown.key


def test_decoded_images_are_kept_up_to_their_limit(tmp_path):
  paths = [tmp_path / f"{i}.png" for i in range(4)]
  for path in paths:
    PIL.Image.new("RGB", (10, 10)).save(path)
  kept = question_lib._Decoded(800)  # two of them
  first = [kept.open(path) for path in paths]
  assert kept.open(paths[3]) is first[3] and kept.open(paths[2]) is first[2]
  assert kept.open(paths[0]) is not first[0]
  assert kept._size == 800 and list(kept._kept) == [paths[2], paths[0]]


def test_an_image_that_cannot_be_shown(world, scripted):
  painter = Painter(None)
  painter.size = (3000, 4)
  rollout, _ = play(world, scripted, PAINT, RIGHT, tools=ToolBox([painter], ["paint"]))
  assert [call.error for call in rollout.calls] == ["bad_image"] and rollout.stop == "answer"


PAINT = 'hm</think><tool_call>{"name": "paint", "arguments": {}}</tool_call><|im_end|>'


class Painter(Tool):
  """A tool that returns an empty picture."""

  name, scope = "paint", "paint"
  size = (50, 70)

  def __init__(self, limits):
    self.schema = {"type": "function", "function": {"name": "paint", "parameters": {
        "type": "object", "properties": {}}}}
    if limits is not None:
      side = math.isqrt(limits.max_pixels)
      self.size = (side, side)

  async def run(self, arguments, episode):
    import PIL.Image
    return Observation("painted", (PIL.Image.new("RGB", self.size),))
