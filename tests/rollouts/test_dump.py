"""Rollouts on disk: the same bits back, images once, and a text for people."""

import asyncio
import json
import math

import numpy as np
import pytest

from axpo_jax.agent.transcript import TranscriptError
from axpo_jax.rollouts.dump import (
  ImageStore,
  dump_rollouts,
  load_rollouts,
  readable,
  transcript_from_json,
  transcript_to_json,
)

CALL = ('look\n</think>\n\n<tool_call>\n{"name": "image_zoom_in", "arguments": '
        '{"bbox_2d": [100, 100, 300, 300], "label": "box"}}\n</tool_call><|im_end|>')
RIGHT = "I see\n</think>\n\n<answer>\n\\boxed{K}\n</answer><|im_end|>"


@pytest.fixture
def rollout(world, scripted):
  engine = scripted([world.ids(CALL), world.ids(RIGHT)])
  return asyncio.run(world.resume(world.start(), engine))


def assert_same(a, b):
  assert (a.ids, a.kinds, a.versions, a.special) == (b.ids, b.kinds, b.versions, b.special)
  assert np.asarray(a.logprobs).tobytes() == np.asarray(b.logprobs).tobytes()
  assert len(a.images) == len(b.images)
  for x, y in zip(a.images, b.images):
    assert (x.origin, x.shown.key, x.shown.grid_hw) == (y.origin, y.shown.key, y.shown.grid_hw)
    assert x.shown.patches().tobytes() == y.shown.patches().tobytes()
    assert x.original.tobytes() == y.original.tobytes()


def test_round_trip_is_bit_exact(rollout, processor, tmp_path):
  t = rollout.transcript
  t.logprobs[-1] = -1 / 3
  t.logprobs[-2] = -math.inf
  t.logprobs[-3] = float(np.float32(-0.1))
  store = ImageStore(tmp_path)
  text = json.dumps(transcript_to_json(t, store), allow_nan=False)
  assert_same(transcript_from_json(json.loads(text), store, processor), t)


def test_a_loaded_transcript_continues_where_the_other_would(
    rollout, world, replay, processor, tmp_path):
  store, t = ImageStore(tmp_path), rollout.transcript
  prefix = t.cut(t.prefix_end())
  loaded = transcript_from_json(transcript_to_json(prefix, store), store, processor)
  again = asyncio.run(world.resume(loaded, replay(t)))
  assert_same(again.transcript, t)
  assert again.reward == 1.0


def test_dump_and_load(rollout, world, processor, tmp_path):
  path = tmp_path / "dumps" / "step_3.jsonl"
  for _ in range(2):  # a second dump replaces the first
    dump_rollouts(path, [rollout, rollout], chat=world.chat,
                  extra=[{"group": 0}, {"group": 0, "branch": 1}])
  loaded = list(load_rollouts(path, processor))
  assert len(loaded) == 2
  for one in loaded:
    assert_same(one.transcript, rollout.transcript)
    assert one.calls == rollout.calls
    assert one.to_json() == rollout.to_json()
    assert one.confidence() == rollout.confidence()
  assert json.loads(path.read_text().splitlines()[1])["extra"] == {"group": 0, "branch": 1}
  # Three pictures: the original, what is shown of it, and the crop (shown as it is).
  assert len(list((path.parent / "images").iterdir())) == 3
  assert sorted(p.name for p in path.parent.iterdir()) == ["images", "step_3.jsonl", "step_3.txt"]
  assert "branch=1" in path.with_suffix(".txt").read_text()


def test_without_originals_only_what_was_seen_is_stored(rollout, processor, tmp_path):
  dump_rollouts(tmp_path / "a.jsonl", [rollout], originals=False)
  assert len(list((tmp_path / "images").iterdir())) == 2
  (loaded,) = load_rollouts(tmp_path / "a.jsonl", processor)
  image = loaded.transcript.images[0]
  assert image.original.tobytes() == rollout.transcript.images[0].shown.picture().tobytes()


def test_damage_is_named(rollout, processor, tmp_path):
  path = tmp_path / "a.jsonl"
  dump_rollouts(path, [rollout])
  record = json.loads(path.read_text())
  record["transcript"]["ids"].pop()
  path.write_text(path.read_text() + json.dumps(record) + "\n")
  with pytest.raises(TranscriptError, match=r"line 2: damaged transcript"):
    list(load_rollouts(path, processor))
  key = rollout.transcript.images[0].shown.key
  (tmp_path / "images" / f"{key}.png").unlink()
  with pytest.raises(TranscriptError, match=rf"line 1: image .*{key}.png is missing"):
    list(load_rollouts(path, processor))


def test_an_image_with_other_pixels_is_named(rollout, processor, tmp_path):
  path = tmp_path / "a.jsonl"
  dump_rollouts(path, [rollout])
  store = ImageStore(tmp_path / "images")
  shown, crop = (image.shown.key for image in rollout.transcript.images)
  store.path(shown).write_bytes(store.path(crop).read_bytes())
  with pytest.raises(TranscriptError, match="does not hold the pixels"):
    list(load_rollouts(path, processor))


def test_readable(rollout, world):
  t = rollout.transcript
  text = readable(t, world.chat)
  at = 0
  for part in (
      "--- PROMPT", f"[image 0: images/{t.images[0].shown.key}.png", "--- THINK turn 0",
      "look\n</think>", "--- CALL turn 0", "[100, 100, 300, 300]", "--- OBSERVATION",
      "Image 1: zoomed from image 0.", f"[image 1: images/{t.images[1].shown.key}.png, 48x32, "
      "from image_zoom_in]", "--- THINK turn 1", "--- ANSWER turn 1", "\\boxed{K}"):
    at = text.index(part, at)  # each part after the one before
  assert "<|image_pad|>" not in text
