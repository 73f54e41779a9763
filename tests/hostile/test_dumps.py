"""Dumps of strangers: what a line says is bounded before anything is made of it, and names no file
outside the dump's own folder of images."""

import dataclasses
import json

import PIL.Image
import pytest

from axpo_jax.agent.parse import SpecialIds
from axpo_jax.agent.transcript import TranscriptError
from axpo_jax.report.pictures import Pictures
from axpo_jax.rollouts.dump import ImageStore, rollout_from_line
from tests.hostile import corpus

SPECIAL = {field.name: number for number, field in enumerate(dataclasses.fields(SpecialIds))}


def line(**changes) -> str:
  transcript = {"format": 1, "special": SPECIAL, "ids": [9, 9], "kinds": [[0, 2]], "versions": [[0, 2]],
                "logprobs": [0.0, 0.0], "images": [], "outcomes": []} | changes
  return json.dumps({"transcript": transcript})


@pytest.mark.parametrize("text, reason", [
  ("[" * 100_000, "recursion"),
  ('{"transcript": ' * 50_000, "recursion"),
  (line(kinds=[[0, 10**12]]), "runs of another length"),
  (line(versions=[[0, 10**12], [0, 2 - 10**12]]), "runs of another length"),
  (line(format=2), "format 2"),
  (line(special={}), "missing"),
])
def test_lines(tmp_path, text, reason):
  with corpus.bounds(seconds=5), pytest.raises(TranscriptError, match=f"there: .*{reason}"):
    rollout_from_line(text, ImageStore(tmp_path / "images"), None, "there")


@pytest.mark.parametrize("key", ["../secret", "ABSOLUTE", "link", "../images/../secret"])
def test_images_of_a_dump_lie_in_its_folder(tmp_path, key):
  folder, secret = tmp_path / "images", tmp_path / "secret"
  folder.mkdir()
  PIL.Image.new("RGB", (6, 4)).save(f"{secret}.png")
  (folder / "link.png").symlink_to(f"{secret}.png")
  key = key.replace("ABSOLUTE", str(secret))
  with pytest.raises(TranscriptError, match="leaves"):
    ImageStore(folder).existing(key)
  image = {"shown": key, "original": None, "origin": "question"}
  with pytest.raises(TranscriptError, match=r"there: .*leaves"):
    rollout_from_line(line(ids=[SPECIAL["image_pad"], 9], images=[image]), ImageStore(folder), None, "there")
  pictures = Pictures(64)
  shown = pictures.found[pictures.add(folder, key)]
  assert shown.uri == ""
