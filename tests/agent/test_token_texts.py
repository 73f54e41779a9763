"""The text of single tokens, and its place in a dump."""

import asyncio
import json

import pytest

from axpo_jax.agent.token_texts import token_texts
from axpo_jax.rollouts.dump import dump_rollouts


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本 and 🙂🙂", "", "\\boxed{½}"])
def test_joined_they_are_the_text(text, world):
  ids = world.ids(text)
  pieces = token_texts(ids, world.chat.decode)
  assert len(pieces) == len(ids)
  assert "".join(pieces) == text


def test_bytes_that_are_no_character(world):
  """A policy may sample the beginning of a character and go on with something else."""
  (*begun, _) = world.ids("🙂")
  ids = [*begun, *world.ids(" and words")]
  pieces = token_texts(ids, world.chat.decode)
  assert len(pieces) == len(ids)
  assert "".join(pieces).endswith(" and words")
  assert "\ufffd" in "".join(pieces)


def test_a_dump_carries_them(world, scripted, tmp_path):
  engine = scripted([world.ids("I see\n</think>\n\n<answer>\n\\boxed{K}\n</answer><|im_end|>")])
  rollout = asyncio.run(world.resume(world.start(), engine))
  dump_rollouts(tmp_path / "a.jsonl", [rollout], chat=world.chat)
  transcript = json.loads((tmp_path / "a.jsonl").read_text())["transcript"]
  assert "".join(transcript["pieces"]) == world.chat.decode(transcript["ids"])
