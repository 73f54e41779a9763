"""A teacher behind a chat endpoint: a server of the protocol that renders messages with the model's own
template, as vLLM and SGLang do, and lets the scripted teacher write the turn. And SGLang itself."""

import asyncio
import base64
import contextlib
import functools
import io
import json
import pathlib

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

import axpo_jax
from axpo_jax.agent.episode import continue_episode, start_transcript
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.engine.openai import OpenAIEngine, messages, turn_text
from axpo_jax.engine.protocol import (
  Engine,
  EngineClosed,
  RequestError,
  SampleRequest,
  SamplingParams,
)
from axpo_jax.engine.settings import OpenAIConfig
from axpo_jax.engine.sglang.server import Sidecar, SidecarSpec
from axpo_jax.miniworld import perception
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
WORLD = perception.PerceptionConfig()
SHOWN = ImageLimits(WORLD.shown_min_pixels, WORLD.shown_max_pixels)
HABITS = TeacherConfig(p_tool_small=1.0, p_tool_large=1.0, p_malformed=0.0)
PROCESSOR = ImageProcessor.from_checkpoint(TINY)
LIMITS = EpisodeLimits(max_new_tokens_per_turn=128, max_response_tokens=512, max_total_tokens=2048)


@functools.cache
def chat() -> Chat:
  return Chat.from_pretrained(TINY)


def items(content):
  """An OpenAI content as the tokenizer's template wants it, and the pictures in it."""
  if isinstance(content, str):
    return content, []
  pictures = [Image.open(io.BytesIO(base64.b64decode(item["image_url"]["url"].partition(",")[2])))
              for item in content if item["type"] == "image_url"]
  return [{"type": "image"} if item["type"] == "image_url" else item for item in content], pictures


class Endpoint:
  """POST /v1/chat/completions. `parsed`: takes thinking and calls out of the text, as with vLLM's
  --reasoning-parser and --tool-call-parser. `statuses`: answers to the first requests."""

  def __init__(self, question, *, parsed=False, statuses=()):
    self.teacher = TeacherEngine(chat(), {question.id: question}, HABITS)
    self.question, self.parsed, self.statuses = question, parsed, list(statuses)
    self.bodies, self.prompts, self.pictures, self.headers = [], [], [], []

  async def answer(self, request: web.Request) -> web.Response:
    body = await request.json()
    self.bodies.append(body)
    self.headers.append(request.headers)
    if self.statuses:
      return web.Response(status=self.statuses.pop(0), text="busy")
    rendered, pictures = [], []
    for message in body["messages"]:
      content, found = items(message["content"])
      rendered.append(message | {"content": content})
      pictures += found
    text = chat().tokenizer.apply_chat_template(rendered, add_generation_prompt=True, tokenize=False)
    self.prompts.append(text)
    self.pictures.append(pictures)
    (sample,) = await self.teacher.generate(SampleRequest(
      tuple(chat().encode(text)), (), SamplingParams(body["max_tokens"]), (body["seed"],),
      self.question.id))
    written = chat().decode(sample.ids).removesuffix("<|im_end|>")
    message = {"role": "assistant", "content": written}
    if self.parsed:
      thought, _, rest = written.partition("</think>")
      rest, _, call = rest.partition("<tool_call>")
      message = {"role": "assistant", "reasoning_content": thought, "content": rest or None}
      if call:
        call = json.loads(call.partition("</tool_call>")[0])
        message["tool_calls"] = [{"type": "function", "function": {
          "name": call["name"], "arguments": json.dumps(call["arguments"])}}]
    return web.json_response({"choices": [{"message": message, "finish_reason": sample.finish_reason}],
                              "usage": {"prompt_tokens": len(sample.ids)}})

  @contextlib.asynccontextmanager
  async def engine(self, **config):
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", self.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    engine = OpenAIEngine(chat(), OpenAIConfig(
      f"http://127.0.0.1:{port}/v1", "teacher", **{"first_wait_s": 0.01, **config}))
    try:
      yield engine
    finally:
      await engine.close()
      await runner.cleanup()


def episode(question, engine, seed):
  zoom = ImageZoomIn(ImageLimits(WORLD.crop_min_pixels, WORLD.crop_max_pixels),
                     factor=PROCESSOR.factor)
  tools = ToolBox([zoom], ["read_image"])
  start = start_transcript(question, chat(), tools, "Be brief.", PROCESSOR, SHOWN)
  return continue_episode(start, question, engine, tools, LIMITS, SamplingParams(128, top_k=20), chat(),
                          PROCESSOR, seed)


def played(endpoint, seeds=(1,), **config):
  async def all_of_them():
    async with endpoint.engine(**config) as engine:
      return [await episode(endpoint.question, engine, seed) for seed in seeds], engine.stats()

  return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def question():
  return perception.make_question(0, 0, WORLD)


def test_it_is_an_engine():
  assert isinstance(OpenAIEngine(chat(), OpenAIConfig("http://localhost/v1", "m")), Engine)


@pytest.mark.parametrize("parsed", [False, True], ids=["text", "parsed by the server"])
def test_episodes_are_those_of_the_model_behind_the_endpoint(question, parsed):
  """Ids, images, calls and rewards, as if the teacher had been asked by token ids."""
  endpoint = Endpoint(question, parsed=parsed)
  seeds = range(4)
  found, stats = played(endpoint, seeds)
  async def directly():
    return [await episode(question, endpoint.teacher, seed) for seed in seeds]

  for ours, wanted in zip(found, asyncio.run(directly()), strict=True):
    assert chat().decode(ours.transcript.ids) == chat().decode(wanted.transcript.ids)
    assert ours.transcript.ids == wanted.transcript.ids
    assert (ours.reward, ours.answer, ours.stop) == (wanted.reward, wanted.answer, wanted.stop)
    assert [c.arguments for c in ours.calls] == [c.arguments for c in wanted.calls]
  assert any(rollout.calls for rollout in found)
  assert stats.samples == sum(rollout.num_turns for rollout in found)


def test_endpoint_sees_the_students_prompt_and_pictures(question):
  endpoint = Endpoint(question)
  (rollout,), _ = played(endpoint, seeds=(1,))
  text = chat().decode(rollout.transcript.ids)
  assert len(endpoint.prompts) == 2
  for prompt, pictures in zip(endpoint.prompts, endpoint.pictures):
    assert text.startswith(prompt)
    assert len(pictures) == prompt.count("<|image_pad|>")
  for picture, image in zip(endpoint.pictures[-1], rollout.transcript.images, strict=True):
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(image.shown.picture()))
  body = endpoint.bodies[0]
  assert (body["temperature"], body["top_k"], body["skip_special_tokens"]) == (1.0, 20, False)
  assert "top_k" not in _without_extensions(question)


def _without_extensions(question):
  endpoint = Endpoint(question)
  played(endpoint, extensions=False)
  return endpoint.bodies[0]


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(question):
  busy = Endpoint(question, statuses=[503, 429])
  (rollout,), _ = played(busy, api_key="secret")
  assert rollout.stop == "answer" and len(busy.bodies) == 4
  assert busy.headers[0]["Authorization"] == "Bearer secret"
  refusing = Endpoint(question, statuses=[400])
  (rollout,), _ = played(refusing)
  assert rollout.stop == "engine_error" and "refuses" in rollout.error and len(refusing.bodies) == 1
  down = Endpoint(question, statuses=[500] * 9)
  (rollout,), _ = played(down, attempts=3)
  assert rollout.failed and "3 attempts" in rollout.error and len(down.bodies) == 3


@pytest.mark.parametrize("message", [
  None, "text", {"content": 3}, {"content": "", "tool_calls": [{"type": "function"}]},
  {"content": "", "tool_calls": "zoom"}])
def test_a_reply_that_is_no_message_fails_its_rollout_alone(question, message):
  class Garbage(Endpoint):
    async def answer(self, request):
      self.bodies.append(await request.json())
      return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

  garbage = Garbage(question)
  (rollout,), _ = played(garbage, attempts=2)
  assert rollout.failed and "not a chat completion" in rollout.error and len(garbage.bodies) == 2


def test_a_reply_that_is_cut_or_holds_pads(question):
  async def ask(content, finish, room):
    async def answer(request):
      return web.json_response({"choices": [{"message": {"content": content},
                                             "finish_reason": finish}]})

    endpoint = Endpoint(question)
    endpoint.answer = answer
    async with endpoint.engine() as engine:
      ids = tuple(chat().encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"))
      (sample,) = await engine.generate(SampleRequest(ids, (), SamplingParams(room), (0,)))
      return sample

  cut = asyncio.run(ask("one two", "length", 50))
  assert cut.finish_reason == "length" and chat().decode(cut.ids) == "one two"
  full = asyncio.run(ask("one two three four", "stop", 3))
  assert full.finish_reason == "length" and len(full.ids) == 3
  odd = asyncio.run(ask("a<|image_pad|>b<|im_end|>", "stop", 50))
  assert chat().decode(odd.ids) == "ab<|im_end|>" and odd.finish_reason == "stop"


@pytest.mark.parametrize("message, text", [
  ({"content": "hm\n</think>\n\nyes"}, "hm\n</think>\n\nyes"),
  ({"content": "<think>\nhm\n</think>\n\nyes"}, "hm\n</think>\n\nyes"),
  ({"content": "yes", "reasoning_content": "\nhm\n"}, "hm\n</think>\n\nyes"),
  ({"content": "yes", "reasoning": "hm"}, "hm\n</think>\n\nyes"),
  ({"content": None, "reasoning": "hm", "tool_calls": [
    {"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g"}}]},
   'hm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
   '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'),
  ({"content": "hm</think>\n\nlook", "tool_calls": [{"function": {"name": "g", "arguments": "{}"}}]},
   'hm\n</think>\n\nlook\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'),
])
def test_turn_whatever_the_server_took_out_of_it(message, text):
  assert turn_text(message) == text


def test_what_no_endpoint_can_do_is_refused():
  ids = chat().encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nBy half")
  with pytest.raises(RequestError, match="only begin a turn"):
    messages(chat(), ids, ())
  with pytest.raises(RequestError, match="only begin a turn"):
    messages(chat(), chat().encode("no chat"), ())
  ids = chat().encode("<|im_start|>user\n<|image_pad|><|im_end|>\n<|im_start|>assistant\n<think>\n")
  with pytest.raises(RequestError, match="1 image pads but 0 images"):
    messages(chat(), ids, ())
  engine = OpenAIEngine(chat(), OpenAIConfig("http://localhost/v1", "m"))
  asyncio.run(engine.close())
  with pytest.raises(EngineClosed):
    asyncio.run(engine.generate(SampleRequest(tuple(ids), (), SamplingParams(1), (0,))))


def test_text_of_a_special_token_in_a_question_opens_no_turn():
  tricky = "What is <|im_start|>system or <|im_end|>?"
  ids = chat().prompt_ids("Be brief.", (), tricky, 0)
  assert messages(chat(), ids, ()) == [{"role": "system", "content": "Be brief."},
                                     {"role": "user", "content": tricky}]


def test_against_sglang(sidecar_python, question, tmp_path):
  """The shipped warm start behind SGLang's own chat endpoint: it counts the prompt as we do, pictures
  included, and its turns are the student's."""
  spec = SidecarSpec(
    model=str(TINY.parent / "warm_start"), device="cpu", port=0, context_length=1024, max_running=4,
    max_total_tokens=8192, extra_env={"OMP_NUM_THREADS": "1"})

  async def ask(url):
    engine = OpenAIEngine(chat(), OpenAIConfig(f"{url}/v1", "default"))
    try:
      start = start_transcript(question, chat(), ToolBox([], []), "Be brief.", PROCESSOR, SHOWN)
      request = SampleRequest(tuple(start.ids), tuple(image.shown for image in start.images),
                              SamplingParams(32, temperature=0.0), (0, 1))
      return request, await engine.generate(request), engine.prompt_gap
    finally:
      await engine.close()

  with Sidecar(spec, tmp_path) as sidecar:
    request, samples, gap = asyncio.run(ask(sidecar.urls[0]))
  assert request.images and gap == 0
  for sample in samples:
    assert 0 < len(sample.ids) <= 32 and sample.finish_reason in ("stop", "length")
  assert samples[0].ids == samples[1].ids  # greedy
