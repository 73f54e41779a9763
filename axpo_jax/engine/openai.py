"""A teacher behind any OpenAI-compatible chat endpoint: images and text in, text out.

In: sample requests, as every engine takes them. Out: samples whose ids are the endpoint's text in the
student's own tokens. Chat endpoints give no token ids, so this is for teachers alone: what is learnt
from is the text, re-tokenised, and its log-probabilities are 0 and mean nothing. A policy that is
trained by RL is sampled by token ids (the embedded engine, SGLang's /generate).

The conversation is read back from the ids. Its messages hold the text as the student sees it, tool
schemas, calls and results included, and no field of the endpoint's own tool protocol: so a server
that renders messages with Qwen3-VL's template sees the very prompt of the student, and any other model
is told in words how to call a tool. Both kinds of replies are understood: thinking and calls in the
text, or taken out by the server's parsers into `reasoning_content` (or `reasoning`) and `tool_calls`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp
from absl import logging

from axpo_jax.engine import endpoint
from axpo_jax.engine.protocol import RequestError, Sample, SampleRequest
from axpo_jax.engine.settings import OpenAIConfig
from axpo_jax.engine.weightless import WeightlessEngine
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ProcessedImage

KEY_VARIABLE = "AXPO_TEACHER_API_KEY"
_THINK = "<think>\n"  # with it the prompt opens a turn
_THOUGHT = "\n</think>\n\n"


class EndpointError(RuntimeError):
  """The endpoint gave no sample, asked several times."""


class OpenAIEngine(WeightlessEngine):
  """See the module docstring. Implements `engine.protocol.Engine`; one event loop uses it.

  Attributes:
    prompt_gap: prompt tokens that the endpoint counted in its last reply, less those of the student;
      None until it has told any. Not 0 for another tokenizer, chat template or image size.
  """

  def __init__(self, chat: Chat, config: OpenAIConfig):
    super().__init__()
    self._chat, self.config = chat, config
    self._session: aiohttp.ClientSession | None = None
    self._free = asyncio.Semaphore(config.max_concurrent)
    self.prompt_gap: int | None = None

  async def generate(self, request: SampleRequest) -> list[Sample]:
    """One reply per seed.

    Raises:
      RequestError: the ids do not end where an assistant's turn begins, or the endpoint refuses the
        request as it stands.
      EndpointError: the endpoint failed at every attempt.
      EngineClosed: after `close`.
    """
    self._check_open()
    body = self._body(request)
    seeded = [body if "seed" in self.config.omit else body | {"seed": seed} for seed in request.seeds]
    replies = await asyncio.gather(*map(self._ask, seeded))
    samples = [self._sample(request, reply) for reply in replies]
    self._count(request, samples)
    return samples

  def _body(self, request: SampleRequest) -> dict[str, Any]:
    params = request.params
    body = {"model": self.config.model, "n": 1, "max_tokens": params.max_new_tokens,
            "messages": messages(self._chat, request.ids, request.images),
            "temperature": params.temperature, "top_p": params.top_p,
            "presence_penalty": params.presence_penalty}
    if self.config.extensions:
      body |= {"skip_special_tokens": False} | ({"top_k": params.top_k} if params.top_k else {})
    return {name: value for name, value in body.items() if name not in self.config.omit}

  async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
    config = self.config
    async with self._free:
      try:
        return await endpoint.ask(lambda: self._post(body), attempts=config.attempts,
                                  first_wait_s=config.first_wait_s)
      except endpoint.BusyError as error:
        raise EndpointError(f"{config.url}: {error}") from error
      except endpoint.RefusedError as error:
        raise RequestError(f"{config.url} refuses the request ({error})") from error

  async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
    if self._session is None:
      key = self.config.api_key
      self._session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=aiohttp.ClientTimeout(total=self.config.timeout_s),
        connector=aiohttp.TCPConnector(limit=0))
    reply = await endpoint.post_json(self._session, f"{self.config.url.rstrip('/')}/chat/completions", body)
    try:
      message, reason = (reply["choices"][0][name] for name in ("message", "finish_reason"))
      counted = (reply.get("usage") or {}).get("prompt_tokens")
      # Half of a character, which JSON can name, has no tokens.
      turn = turn_text(message).encode("utf-8", "replace").decode()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise endpoint.BusyError(f"not a chat completion: {str(reply)[:300]}") from error
    return {"turn": turn, "cut": reason == "length",
            "prompt_tokens": counted if isinstance(counted, int) else None}

  def _sample(self, request: SampleRequest, reply: dict[str, Any]) -> Sample:
    self._compare(request, reply["prompt_tokens"])
    ids = self._chat.encode(reply["turn"])
    # The endpoint may write what the policy must not: pads would be taken for images.
    ids = [i for i in ids if i not in (*self._chat.banned_ids, *self._chat.stop_ids)]
    room = request.params.max_new_tokens
    stopped = not reply["cut"] and len(ids) < room
    ids = [*ids, self._chat.im_end_id] if stopped else ids[:room]
    return Sample(
      ids=tuple(ids), logprobs=(0.0,) * len(ids), finish_reason="stop" if stopped else "length",
      prompt_tokens=request.prompt_tokens, cached_tokens=0, weight_version=self._version)

  def _compare(self, request: SampleRequest, counted: int | None) -> None:
    """Says so, the first time, if the endpoint counts another prompt than the student's."""
    if not counted:
      return
    first, self.prompt_gap = self.prompt_gap is None, counted - request.prompt_tokens
    if first and self.prompt_gap:
      logging.warning(
        "%s counts %d prompt tokens where the student has %d: another tokenizer, chat template or "
        "image size. Harmless for a teacher of another family; for a Qwen3-VL look at the limits of "
        "its image processor", self.config.url, counted, request.prompt_tokens)

  async def close(self) -> None:
    await super().close()
    if self._session is not None:
      await self._session.close()


def messages(chat: Chat, ids: Sequence[int], images: Sequence[ProcessedImage]
             ) -> list[dict[str, Any]]:
  """Chat messages of a conversation.

  Args:
    ids: collapsed; they end where the next assistant's turn begins, `<think>` and its newline
      included. Turns and images are found by id: a question may hold the text of a special token.
    images: one for each pad, in order; sent as the student sees them.

  Raises:
    RequestError: the ids end anywhere else, or pads and images differ.
  """
  turns = [_turn(chat, turn) for turn in _split(ids, chat.im_start_id)[1:]]
  if not turns or turns[-1][0] != "assistant" or chat.decode(turns[-1][1]) != _THINK:
    raise RequestError("a chat endpoint can only begin a turn, not go on with one: "
                       f"...{chat.decode(ids[-20:])!r}")
  if ids.count(chat.image_pad_id) != len(images):
    raise RequestError(f"{ids.count(chat.image_pad_id)} image pads but {len(images)} images: send "
                       "one pad per image")
  left = iter(images)
  return [{"role": role, "content": _content(chat, content, left)} for role, content in turns[:-1]]


def _turn(chat: Chat, ids: Sequence[int]) -> tuple[str, Sequence[int]]:
  """Role and content of what stands between two <|im_start|>."""
  for length in range(1, len(ids) + 1):
    head = chat.decode(ids[:length])
    if "\n" in head:
      role, _, begun = head.partition("\n")
      content = _split(ids[length:], chat.im_end_id)[0]
      return role, [*chat.encode(begun), *content]
  raise RequestError(f"a turn without a role: {chat.decode(ids)!r}")


def _split(ids: Sequence[int], at: int) -> list[list[int]]:
  parts: list[list[int]] = [[]]
  for i in ids:
    if i == at:
      parts.append([])
    else:
      parts[-1].append(i)
  return parts


def _content(chat: Chat, ids: Sequence[int], images: Iterator[ProcessedImage]
             ) -> str | list[dict[str, Any]]:
  frame = {chat.vision_start_id, chat.vision_end_id}
  first, *others = ([i for i in part if i not in frame] for part in _split(ids, chat.image_pad_id))
  if not others:
    return chat.decode(first)
  items = [_text_item(chat.decode(first))]
  for part in others:
    items += [_image_item(next(images)), _text_item(chat.decode(part))]
  return [item for item in items if item.get("text") != ""]


def _text_item(text: str) -> dict[str, Any]:
  return {"type": "text", "text": text}


def _image_item(image: ProcessedImage) -> dict[str, Any]:
  file = io.BytesIO()
  image.picture().save(file, format="PNG", compress_level=1)
  data = base64.b64encode(file.getvalue()).decode()
  return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def turn_text(message: dict[str, Any]) -> str:
  """An assistant's turn from just after `<think>` and its newline, whatever the server took out of it."""
  text = message.get("content") or ""
  thought = message.get("reasoning_content") or message.get("reasoning")
  calls = "\n".join(map(_call_text, message.get("tool_calls") or ()))
  if thought is None and not calls:
    return text.removeprefix("<think>").removeprefix("\n")
  if thought is None:
    thought, _, text = text.removeprefix("<think>").removeprefix("\n").rpartition("</think>")
  body = text.strip("\n")
  return f"{thought.strip(chr(10))}{_THOUGHT}" + "\n".join(part for part in (body, calls) if part)


def _call_text(call: dict[str, Any]) -> str:
  function = call["function"]
  arguments = function.get("arguments") or "{}"
  if not isinstance(arguments, str):
    arguments = json.dumps(arguments)
  return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}\n</tool_call>'
