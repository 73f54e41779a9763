"""Hermes calls: read by token id after the last </think>, and every mistake has a name."""

import pytest

from axpo_jax.agent.parse import CallError, SpecialIds, ToolCall, parse_call, parse_turn

GOOD = '<tool_call>\n{"name": "zoom", "arguments": {"x": [1, 2]}}\n</tool_call>'


@pytest.fixture(scope="module")
def parse(chat):
  special = SpecialIds.from_chat(chat)
  return lambda text: parse_turn(chat.encode(text), special, chat.decode)


def test_one_call(parse):
  assert parse(f"hm</think>\n\n{GOOD}<|im_end|>") == [ToolCall("zoom", {"x": [1, 2]})]


def test_several_calls_keep_their_order(parse):
  other = GOOD.replace("zoom", "search")
  names = [call.name for call in parse(f"hm</think>\n\n{GOOD}\n{other}{GOOD}<|im_end|>")]
  assert names == ["zoom", "search", "zoom"]


@pytest.mark.parametrize("text", [
    f"I could write {GOOD} here</think>\n\nno<|im_end|>",
    f"{GOOD}<|im_end|>",  # the thinking never ended
    f"one</think>{GOOD} no, wait</think> none<|im_end|>",
    "hm</think>\n\nnothing to call<|im_end|>",
    "hm</think> </tool_call><|im_end|>",
])
def test_not_a_call(parse, text):
  assert parse(text) == []


def test_a_tag_spelled_in_ordinary_tokens_is_not_a_call(chat):
  ids = [*chat.encode("hm</think>\n\n"), *chat.encode_plain(GOOD)]
  assert GOOD in chat.decode(ids)
  assert parse_turn(ids, SpecialIds.from_chat(chat), chat.decode) == []


@pytest.mark.parametrize("inside, kind, says", [
    ('{"name": "zoom", "arguments": {', "bad_json", "not valid JSON"),
    ("", "bad_json", "not valid JSON"),
    ('{"name": "zoom", "arguments": {"x": NaN}}', "bad_json", "NaN"),
    ('{"name": "zoom", "arguments": {"x": -Infinity}}', "bad_json", "Infinity"),
    ('[1, 2]', "bad_call", "an array"),
    ('null', "bad_call", "null"),
    ('{"arguments": {}}', "bad_call", '"name"'),
    ('{"name": 3, "arguments": {}}', "bad_call", '"name"'),
    ('{"name": "zoom"}', "bad_call", '"arguments"'),
    ('{"name": "zoom", "arguments": "{}"}', "bad_call", '"arguments"'),
    ("[" * 100_000, "bad_json", "not valid JSON"),
    ("1" * 5000, "bad_json", "not valid JSON"),
])
def test_malformed_calls_are_named(inside, kind, says):
  error = parse_call(inside)
  assert isinstance(error, CallError)
  assert error.kind == kind and says in error.message and error.text == inside


def test_unclosed_call(parse):
  (error,) = parse('hm</think><tool_call>{"name": "zoom", "arguments": {}}<|im_end|>')
  assert (error.kind, error.text) == ("unclosed", '{"name": "zoom", "arguments": {}}')


def test_an_opening_tag_inside_a_call_belongs_to_it(parse):
  (error,) = parse(f"hm</think><tool_call>{GOOD}<|im_end|>")
  assert error.kind == "bad_json"
