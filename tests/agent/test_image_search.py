"""The cached image search: results by question, missing thumbnails, damaged caches."""

import asyncio
import json
import pathlib
import pickle

import PIL.Image
import pytest

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.image_search import ImageCacheError, ImageSearch


@pytest.fixture
def cache(tmp_path):
  PIL.Image.new("RGB", (896, 448), (1, 2, 3)).save(tmp_path / "a.png")
  (tmp_path / "broken.png").write_bytes(b"\x89PNG")
  path = tmp_path / "cache.json"
  path.write_text(json.dumps({"fvqa_1": {
      "tool_returned_web_title": ["A kite", "No picture", "Broken", "Gone", "Again"],
      "cached_images_path": ["a.png", None, "broken.png", "gone.png", "a.png"]}}))
  return path


def call(tool, question, images=(), arguments=None):
  box = ToolBox([tool], ["network"])
  return asyncio.run(box.call("image_search", arguments or {}, EpisodeState(question, list(images))))


def test_results_of_the_question(cache):
  seen = call(ImageSearch(cache), "fvqa_1", [PIL.Image.new("RGB", (2, 2))])
  assert seen.error is None
  assert seen.text == ("[1] A kite (image 1)\n[2] No picture\n[3] Broken\n[4] Gone\n"
                       "[5] Again (image 2)")
  assert [image.size for image in seen.images] == [(448, 224)] * 2
  assert call(ImageSearch(cache, max_results=2), "fvqa_1").text.endswith("[2] No picture")


def test_a_question_without_results_and_wrong_arguments(cache):
  assert call(ImageSearch(cache), "fvqa_2").error == "search_error"
  assert call(ImageSearch(cache), "fvqa_1", arguments={"query": "x"}).error == "bad_arguments"


@pytest.mark.parametrize("content, says", [
    ("[]", "not an object"), ("{", "cache.json"), ('{"q": []}', "question 'q'"),
    ('{"q": {"tool_returned_web_title": ["a"], "cached_images_path": []}}', "of one length"),
])
def test_damaged_caches_are_named(tmp_path, content, says):
  path = tmp_path / "cache.json"
  path.write_text(content)
  with pytest.raises(ImageCacheError, match=says):
    ImageSearch(path)
  with pytest.raises(ImageCacheError):
    ImageSearch(tmp_path / "nowhere.json")


def test_a_pickle_is_refused_and_never_read(tmp_path):
  class Evil:
    def __reduce__(self):
      return (pathlib.Path.touch, (tmp_path / "ran",))
  (tmp_path / "cache.pkl").write_bytes(pickle.dumps({"q": Evil()}))
  with pytest.raises(ImageCacheError, match="is a pickle"):
    ImageSearch(tmp_path / "cache.pkl")
  assert not (tmp_path / "ran").exists()


def test_a_cache_shows_no_picture_outside_its_folder(tmp_path):
  (tmp_path / "data").mkdir()
  PIL.Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
  (tmp_path / "data" / "cache.json").write_text(json.dumps({"q": {
    "tool_returned_web_title": ["one", "two"],
    "cached_images_path": ["../secret.png", str(tmp_path / "secret.png")]}}))
  tool = ImageSearch(tmp_path / "data" / "cache.json")
  seen = asyncio.run(tool.run({}, EpisodeState("q", [PIL.Image.new("RGB", (4, 4))])))
  assert seen.images == ()
