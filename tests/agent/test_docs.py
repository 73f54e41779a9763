"""docs/tools.md: its example works, its tables name what there is."""

import asyncio
import importlib
import pathlib
import re
import types

import numpy as np
import PIL.Image

from axpo_jax.agent import reward_terms
from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.image_search import ImageSearch
from axpo_jax.agent.tools.python import PythonTool
from axpo_jax.agent.tools.search import SearchTool
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.data import readers

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "tools.md").read_text()


def test_the_tool_in_ten_lines():
  code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
  assert len(code.strip().splitlines()) <= 12  # ten and the import
  scope = {}
  exec(compile(code, "docs/tools.md", "exec"), scope)
  box = ToolBox([scope["days_between"]], ["read_file"])

  def call(**arguments):
    return asyncio.run(box.call("days_between", arguments, EpisodeState("q", [])))

  assert call(first="2024-02-28", second="2024-03-01").text == "2"  # a leap year
  assert call(first="yesterday", second="2024-03-01").error == "tool_error"
  assert call(first="2024-02-28").error == "bad_arguments"


def test_the_table_has_every_tool_with_its_scope():
  for tool in (ImageZoomIn, PythonTool, SearchTool, ImageSearch):
    assert f"| `{tool.name}` | `{tool.scope}` |" in PAGE


EXTENDING = (pathlib.Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def extending(name):
  """What a block of code on the page defines."""
  code = next(block for block in re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL) if name in block)
  scope = {}
  exec(compile(code, "docs/extending.md", "exec"), scope)
  return scope


def test_the_environment_of_the_extending_page(world, scripted):
  turns = [world.ids(f"</think>{said}<|im_end|>") for said in ("one", "two", "go")]
  rollout = asyncio.run(world.resume(world.start(), scripted(turns),
                                     environment=extending("Countdown")["Countdown"]()))
  assert rollout.stop == "done" and rollout.transcript.rewards == [0, 0, 1]
  assert "1 more." in world.chat.decode(rollout.transcript.ids)


def test_the_reward_of_the_extending_page():
  scope = extending("def care")
  rollout = types.SimpleNamespace(calls=[types.SimpleNamespace(error="timeout")], response="short")
  assert asyncio.run(scope["care"](rollout)) == {"failed_calls": -0.1, "length": 0.0}
  for term in reward_terms.TERMS:
    assert f"| `{term}` |" in EXTENDING


def test_the_tool_of_the_extending_page():
  weather = extending("weather")["weather"]
  box = ToolBox([weather], ["network"])
  seen = asyncio.run(box.call("weather", {"city": "Ulm"}, EpisodeState("q", [])))
  assert seen.text == "It rains in Ulm." and box.runs_beside("weather")


def test_the_data_set_of_the_extending_page(tmp_path):
  rows = [("Which colour?", "red", PIL.Image.new("RGB", (40, 40), "red"))]
  extending("def write")["write"](rows, tmp_path)
  (question,) = readers.read_questions(tmp_path / "questions.jsonl", readers.ReaderConfig())
  assert question.answers == ("red",) and len(question.images) == 1 and question.category == "mine"


def test_the_example_of_a_tool(monkeypatch):
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "examples"))
  own = importlib.import_module("own_tool").brightness
  picture = PIL.Image.fromarray(np.repeat(np.uint8([[0, 200]]), 10, axis=0)).resize((100, 10), 0)
  box = ToolBox([own], ["read_image"])

  def call(left, right):
    return asyncio.run(box.call("brightness", {"left": left, "right": right}, EpisodeState("q", [picture])))

  assert call(0, 500).text == "0.0 of 255" and call(500, 1000).text == "200.0 of 255"
  assert call(500, 500).error == "tool_error"
