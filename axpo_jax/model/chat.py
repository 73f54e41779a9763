"""Chat: from messages to token ids, in the format of Qwen3-VL-Thinking.

A conversation is append-only token ids. `Chat.prompt_ids` renders its start through the
tokenizer's own chat template; after a sampled turn only the delta is rendered, by
`Chat.observation_ids`, and appended. Nothing that was sampled is rendered or tokenised again,
because the template drops earlier reasoning and trims white space.

Ids are in collapsed form: an image is one `<|image_pad|>` between `<|vision_start|>` and
`<|vision_end|>`, whatever number of tokens it expands to in the model.

Questions, tool results and the schemas of tools are untrusted (an MCP server lists its own). They may contain the
text of a special token, such as `<|image_pad|>` or `</tool_response>`. That text is kept, but tokenised in pieces,
so that no special token comes of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMAGE_MARK = "<image>"  # where a question's text wants its next image

# The names that a Qwen3-VL tokenizer gives to the tokens we depend on, by attribute of `Chat`.
SPECIAL_TOKENS = {
  "image_pad_id": "<|image_pad|>",
  "video_pad_id": "<|video_pad|>",
  "vision_start_id": "<|vision_start|>",
  "vision_end_id": "<|vision_end|>",
  "im_start_id": "<|im_start|>",
  "im_end_id": "<|im_end|>",
  "endoftext_id": "<|endoftext|>",
  "think_id": "<think>",
  "think_end_id": "</think>",
  "tool_call_id": "<tool_call>",
  "tool_call_end_id": "</tool_call>",
  "tool_response_id": "<tool_response>",
  "tool_response_end_id": "</tool_response>",
}

# Marks where a special token's text is cut. A Unicode noncharacter: no text that is
# meant for interchange contains it.
_CUT = "\ufdd0"
_TURN = "(the sampled turn)"


class ChatError(ValueError):
  """The tokenizer or a message does not fit the chat format."""


class ImageCountError(ChatError):
  """The image pads of a sequence and its images do not match."""


class Chat:
  """Renders and tokenises conversations.

  Args:
    tokenizer: a Hugging Face fast tokenizer with a chat template and Qwen3-VL's special tokens.

  Attributes:
    image_pad_id, im_end_id, think_end_id, ...: see `SPECIAL_TOKENS`.
    banned_ids: ids that a policy must never sample (image and video pads).
    stop_ids: ids that end a turn.
    vocab_size: ids that the tokenizer can give are below this. A model's embedding may be larger.

  Raises:
    ChatError: a special token or the chat template is missing.
  """

  image_pad_id: int
  video_pad_id: int
  vision_start_id: int
  vision_end_id: int
  im_start_id: int
  im_end_id: int
  endoftext_id: int
  think_id: int
  think_end_id: int
  tool_call_id: int
  tool_call_end_id: int
  tool_response_id: int
  tool_response_end_id: int

  def __init__(self, tokenizer: Any):
    self.tokenizer = tokenizer
    self._backend = tokenizer.backend_tokenizer
    added = tokenizer.get_added_vocab()
    if missing := [token for token in SPECIAL_TOKENS.values() if token not in added]:
      raise ChatError(
        f"the tokenizer {_name(tokenizer)} has no single token for {', '.join(missing)}: "
        "use the tokenizer of a Qwen3-VL-Thinking checkpoint or add these tokens"
      )
    if not tokenizer.chat_template:
      raise ChatError(
        f"the tokenizer {_name(tokenizer)} has no chat template: put the model's "
        "chat_template.jinja (or chat_template.json) into its folder"
      )
    for attribute, token in SPECIAL_TOKENS.items():
      setattr(self, attribute, added[token])
    self.banned_ids = (self.image_pad_id, self.video_pad_id)
    self.stop_ids = (self.im_end_id, self.endoftext_id)
    self.vocab_size = max(len(tokenizer), max(added.values()) + 1)
    self._added_ids = frozenset(added.values())
    # Looks ahead, so that every occurrence loses its first character, even where two overlap.
    names = "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True) if len(t) > 1)
    self._special = re.compile(f"(?=(?:{names}))(.)", re.DOTALL)

  @classmethod
  def from_pretrained(cls, path: str | Path) -> Chat:
    """Loads a Hugging Face tokenizer folder."""
    from transformers import AutoTokenizer  # takes a while, and tests of other code need none

    return cls(AutoTokenizer.from_pretrained(str(path)))

  def prompt_ids(
    self, system: str, tools: Sequence[dict], question_text: str, num_images: int
  ) -> list[int]:
    """Ids of the prompt up to and including `<think>` and its newline.

    Args:
      system: system prompt, ours; "" for none.
      tools: OpenAI function schemas; they are listed in the system message.
      question_text: the question. Each `<image>` in it takes one image; images without a mark
        come first.
      num_images: how many images the question has.

    Raises:
      ImageCountError: more marks than images, or a pad in the system prompt.
    """
    content = _question_items(self._guard(question_text), num_images)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    ids = self._encode_guarded(self._render(messages, [self._guard_all(tool) for tool in tools]))
    self.check_images(ids, num_images)
    return ids

  def observation_ids(self, observations: Sequence[tuple[str, int]]) -> list[int]:
    """Ids to append after a turn that ended with `<|im_end|>`: the newline that the template puts
    there, one user turn with every observation, and the next generation prompt.

    Args:
      observations: for each tool call in order, its text and how many images follow the text.

    Raises:
      ChatError: no observations, or a template that renders tool results in an unknown way.
    """
    if not observations:
      raise ChatError("observation_ids needs at least one observation, got none")
    return self._after_turn([
      {"role": "tool", "content": _observation_items(self._guard(text), num_images)}
      for text, num_images in observations], sum(num_images for _, num_images in observations))

  def follow_up_ids(self, text: str, num_images: int = 0) -> list[int]:
    """`observation_ids` for a further message of the user."""
    return self._after_turn([{"role": "user", "content": _question_items(self._guard(text), num_images)}],
                            num_images)

  def turn_ids(self, thinking: str, text: str, calls: Sequence[tuple[str, Any] | str] = ()) -> list[int]:
    """Ids of an assistant's turn that another model wrote, as the policy would sample it: after the prompt's
    `<think>` and newline, up to `<|im_end|>`.

    Args:
      calls: the name and the arguments of each, or the text of one that is no call.
    """
    parts = [self._guard(thinking.strip()), "\n</think>\n\n", self._guard(text.strip())]
    for number, call in enumerate(calls):
      inside = call if isinstance(call, str) else json.dumps(
        {"name": call[0], "arguments": call[1]}, ensure_ascii=False)
      parts += ["\n" if number or text.strip() else "", "<tool_call>\n", self._guard(inside.strip()),
                "\n</tool_call>"]
    return self._encode_guarded("".join(parts) + SPECIAL_TOKENS["im_end_id"])

  def _after_turn(self, given: Sequence[dict], num_images: int) -> list[int]:
    """Ids that the template puts between the end of an assistant's turn and the next one, if these messages
    come in between."""
    messages = [
      {"role": "user", "content": "?"},
      {"role": "assistant", "content": _TURN, "reasoning_content": "."}, *given]
    turn_end = _TURN + SPECIAL_TOKENS["im_end_id"]
    _, found, delta = self._render(messages, ()).partition(turn_end)
    if not found:
      raise ChatError(
        f"the chat template of {_name(self.tokenizer)} does not end an assistant turn with "
        f"{SPECIAL_TOKENS['im_end_id']} right after its text"
      )
    ids = self._encode_guarded(delta)
    self.check_images(ids, num_images)
    return ids

  def check_images(self, ids: Sequence[int], num_images: int) -> None:
    """Checks that collapsed `ids` hold one image pad for each image and no video.

    Raises:
      ImageCountError: they do not.
    """
    pads = sum(1 for i in ids if i == self.image_pad_id)
    if pads != num_images:
      raise ImageCountError(
        f"the sequence has {pads} {SPECIAL_TOKENS['image_pad_id']} tokens and {num_images} images: "
        "each image needs exactly one pad before expansion; was a pad sampled or an image dropped?"
      )
    if self.video_pad_id in ids:
      raise ImageCountError(
        f"the sequence holds {SPECIAL_TOKENS['video_pad_id']}, and video is not supported: "
        "pass its frames as images"
      )

  def encode(self, text: str) -> list[int]:
    """Ids of trusted text; special tokens written in it become special tokens."""
    return self._backend.encode(text, add_special_tokens=False).ids

  def encode_plain(self, text: str) -> list[int]:
    """Ids of text that is not ours: never a special token, and `decode` gives the text back."""
    ids = self._encode_guarded(self._guard(text))
    if not self._added_ids.isdisjoint(ids):
      raise ChatError(f"the tokenizer finds a special token in plain text: {text!r}")
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, special tokens included."""
    return self._backend.decode(list(ids), skip_special_tokens=False)

  def _guard(self, text: str) -> str:
    """Text in which every special token's name is cut in two by `_CUT`."""
    return self._special.sub(rf"\1{_CUT}", text.replace(_CUT, ""))

  def _guard_all(self, value: Any) -> Any:
    """A JSON value whose texts went through `_guard`."""
    if isinstance(value, str):
      return self._guard(value)
    if isinstance(value, Mapping):
      return {self._guard(str(key)): self._guard_all(item) for key, item in value.items()}
    return [self._guard_all(item) for item in value] if isinstance(value, (list, tuple)) else value

  def _encode_guarded(self, text: str) -> list[int]:
    """Ids of rendered text whose untrusted parts went through `_guard`."""
    return [i for piece in text.split(_CUT) if piece for i in self.encode(piece)]

  def _render(self, messages: list[dict], tools: Sequence[dict]) -> str:
    return self.tokenizer.apply_chat_template(
      messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=False
    )


def _question_items(text: str, num_images: int) -> list[dict]:
  """Content items of a question, an image at each mark and the rest in front."""
  first, *others = text.split(IMAGE_MARK)
  if len(others) > num_images:
    raise ImageCountError(
      f"the question has {len(others)} {IMAGE_MARK} marks and {num_images} images: "
      f"remove marks or add images; text: {text[:200]!r}"
    )
  items = [{"type": "image"}] * (num_images - len(others)) + [_text_item(first)]
  for part in others:
    items += [{"type": "image"}, _text_item(part)]
  return [item for item in items if item.get("text") != ""]


def _observation_items(text: str, num_images: int) -> list[dict]:
  return [_text_item(text)] + [{"type": "image"}] * num_images


def _text_item(text: str) -> dict:
  return {"type": "text", "text": text}


def _name(tokenizer: Any) -> str:
  return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
