r"""The miniature tokenizer: what must be one token, what a call costs, and that it can be made again."""

import json
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from axpo_jax.agent.prompts import SHORT_SYSTEM_PROMPT, SYSTEM_PROMPT
from axpo_jax.agent.tools.zoom import SCHEMA
from axpo_jax.model.chat import Chat
from experiments.miniworld import make_tokenizer

ASSET = Path(__file__).parents[2] / "axpo_jax/assets/tiny_tokenizer"
CALL = (
  '<tool_call>\n{"name": "image_zoom_in", "arguments": {"bbox_2d": [200, 400, 400, 600], '
  '"label": "red circle", "img_idx": 0}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def chat():
  return Chat.from_pretrained(ASSET)


def pieces(chat, text):
  return [chat.decode([i]) for i in chat.encode(text)]


def test_asset_is_what_the_program_makes(tmp_path):
  make_tokenizer.write(tmp_path)
  made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  shipped = Tokenizer.from_file(str(ASSET / "tokenizer.json"))
  # Parsed and written again, so that another version's layout of the file makes no difference.
  assert made.to_str() == shipped.to_str()
  config = "tokenizer_config.json"
  assert (tmp_path / config).read_bytes() == (ASSET / config).read_bytes()


def test_vocabulary_size_and_order_of_special_tokens(chat):
  assert 1000 <= chat.vocab_size == make_tokenizer.VOCAB_SIZE <= 1500
  # Qwen3-VL's ids, counted from <|endoftext|> = 151643.
  qwen = {"<|im_start|>": 1, "<|im_end|>": 2, "<|vision_start|>": 9, "<|vision_end|>": 10,
          "<|image_pad|>": 12, "<|video_pad|>": 13}
  added = chat.tokenizer.get_added_vocab()
  assert {token: added[token] - chat.endoftext_id for token in qwen} == qwen
  assert len(added) == 26 and max(added.values()) == chat.vocab_size - 1


@pytest.mark.parametrize("value", range(0, 1001, 20))
def test_a_coordinate_is_one_token(chat, value):
  assert pieces(chat, f"[{value}, {value}, {value}, {value}]") == [
    "[", f"{value}", ",", f" {value}", ",", f" {value}", ",", f" {value}", "]"]
  call = CALL.replace("200, 400, 400, 600", f"{value}, 20, 40, {value}")
  assert len(pieces(chat, call)) == len(pieces(chat, CALL))


@pytest.mark.parametrize("glyph", string.ascii_letters + string.digits)
def test_a_character_in_the_box_is_one_token(chat, glyph):
  assert pieces(chat, f"<answer>\n\\boxed{{{glyph}}}\n</answer>") == [
    "<answer>", "\n", "\\boxed{", glyph, "}", "\n", "</answer>"]


def test_a_call_is_short_and_its_choices_are_tokens(chat):
  tokens = pieces(chat, CALL)
  assert len(tokens) <= 22
  for choice in ("image_zoom_in", "200", " 400", " 600", "red", " circle", "0"):
    assert choice in tokens
  for name in ("python", "tavily-search"):
    assert name in pieces(chat, f'{{"name": "{name}", "arguments": {{}}}}')


def test_prompts_are_affordable(chat):
  assert len(chat.encode(SHORT_SYSTEM_PROMPT)) <= 35
  assert len(chat.prompt_ids(SHORT_SYSTEM_PROMPT, [SCHEMA], "Where is the red mark?", 1)) <= 280


def test_system_prompts_ask_for_what_the_reward_reads():
  for prompt in (SYSTEM_PROMPT, SHORT_SYSTEM_PROMPT):
    assert "<answer>\n\\boxed{" in prompt and "}\n</answer>" in prompt
  assert "image_zoom_in" in SYSTEM_PROMPT and "search" in SYSTEM_PROMPT


def test_any_text_survives(chat):
  every_byte = "".join(map(chr, range(256)))
  code = 'def f(x):\n\treturn {"a": [1,2], \'b\': x**2}  # ünïcode ☃ 🙂 e\u0301\r\n'
  for text in (every_byte, code, "1234567 0.5e-3", json.dumps({"code": code}), " lead and trail  "):
    assert chat.decode(chat.encode(text)) == text


def test_too_small_a_corpus_is_an_error(monkeypatch):
  monkeypatch.setattr(make_tokenizer, "corpus", lambda: iter(["only this"]))
  with pytest.raises(ValueError, match="VOCAB_SIZE is 1408"):
    make_tokenizer.build_tokenizer()
