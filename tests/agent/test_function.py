"""Functions as tools: the schema from hints and docstring, checked calls, all kinds of results."""

import asyncio
import json
import threading
from typing import Literal

import PIL.Image
import pytest

from axpo_jax.agent.tools.base import EpisodeState, Observation, ToolBox
from axpo_jax.agent.tools.function import tool

PICTURE = PIL.Image.new("RGB", (3, 2))


@pytest.fixture(scope="module")
def add():
  @tool(scope="read_file")  # here, since making a tool imports transformers
  def add(first: int, second: int = 2, how: Literal["sum", "product"] = "sum") -> str:
    """Combines two numbers.

    Args:
      first: the one.
      second: the other.
      how: what to do with them.
    """
    return str(first + second if how == "sum" else first * second)

  return add


def call(made, arguments, images=()):
  box = ToolBox([made], [made.scope])
  return asyncio.run(box.call(made.name, arguments, EpisodeState("q7", list(images))))


def test_schema(add):
  assert add.schema == {"type": "function", "function": {
      "name": "add", "description": "Combines two numbers.", "parameters": {
          "type": "object", "required": ["first"], "properties": {
              "first": {"type": "integer", "description": "the one."},
              "second": {"type": "integer", "description": "the other.", "default": 2},
              "how": {"type": "string", "enum": ["sum", "product"], "default": "sum",
                      "description": "what to do with them."}}}}}
  json.dumps(add.schema)


def test_calls_are_checked_against_the_hints(add):
  assert call(add, {"first": 1}).text == "3"
  assert call(add, {"first": 4, "second": 5.0, "how": "product"}).text == "20"
  assert call(add, {"first": "x"}).error == "bad_arguments"
  assert call(add, {"first": 1, "how": "power"}).error == "bad_arguments"
  assert call(add, {}).error == "bad_arguments"


def test_the_episode_is_given_and_is_not_in_the_schema():
  @tool(scope="read_image")
  def count(episode: EpisodeState, label: str) -> str:
    """Counts the images.

    Args:
      label: what to call them.
    """
    return f"{len(episode.images)} {label} of {episode.question_id}"

  assert list(count.schema["function"]["parameters"]["properties"]) == ["label"]
  assert call(count, {"label": "images"}, [PICTURE]).text == "1 images of q7"
  assert call(count, {"label": "x", "episode": 1}).error == "bad_arguments"


@pytest.mark.parametrize("result, text, images", [
    ("plain", "plain", ()), (PICTURE, "", (PICTURE,)), (["a", PICTURE, "b"], "a\nb", (PICTURE,)),
    ({"x": [1, None]}, '{"x": [1, null]}', ()), ([1, 2], "[1, 2]", ()),
])
def test_results(result, text, images):
  @tool(scope="s")
  def give() -> str:
    """Gives it."""
    return result

  assert call(give, {}) == Observation(text, images)


def test_what_it_raises_is_an_observation():
  @tool(scope="s")
  def fail() -> str:
    """Fails."""
    raise RuntimeError("no such thing")

  seen = call(fail, {})
  assert seen.error == "tool_error" and "RuntimeError: no such thing" in seen.text


def test_functions_that_wait_run_beside_the_sampling():
  names = []

  @tool(scope="s")
  async def away() -> str:
    """Waits."""
    names.append(threading.current_thread().name)
    await asyncio.sleep(0)
    return "done"

  @tool(scope="s", waits=True)
  def blocking() -> str:
    """Blocks."""
    names.append(threading.current_thread().name)
    return "done"

  assert call(away, {}).text == call(blocking, {}).text == "done"
  assert names[0] == "tools" and names[1] not in ("tools", threading.main_thread().name)


def test_a_time_limit():
  @tool(scope="s", time_limit=0.01)
  async def stuck() -> str:
    """Never comes back."""
    await asyncio.sleep(600)

  assert call(stuck, {}).error == "timeout"


def test_a_function_without_descriptions_is_refused():
  with pytest.raises(ValueError, match="bare cannot become a tool"):
    @tool(scope="s")
    def bare(x: int) -> str:
      return str(x)


def test_a_transparent_picture_of_a_tool_is_shown_on_white():
  @tool(scope="paint")
  def formula():
    """Draws black on nothing."""
    image = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    return image

  image, = call(formula, {}).images
  assert image.mode == "RGB"
  assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 1)) == (0, 0, 0)
