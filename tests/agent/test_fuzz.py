"""Whatever a policy writes, no exception leaves the tools or the loop.

The same with a million inputs and guided by coverage: benchmarks/fuzz_tools.py.
"""

import asyncio
import json
import os

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axpo_jax.agent.parse import CallError, ToolCall, parse_call, parse_turn
from axpo_jax.agent.rollout import STOPS
from axpo_jax.agent.tools.base import EpisodeState, Observation, ToolBox
from axpo_jax.agent.tools.corpus import Document, LocalSearch
from axpo_jax.agent.tools.function import tool
from axpo_jax.agent.tools.search import SearchTool
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.model.images import ImageLimits

EXAMPLES = int(os.environ.get("AXPO_FUZZ_EXAMPLES", "150"))
SCOPES = ("read_image", "network", "execute", "s")
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck))


def many(number: float, flag: bool = True, names: list[str] | None = None) -> str:
  """Takes arguments of many kinds.

  Args:
    number: any.
    flag: any.
    names: any.
  """
  return f"{number} {flag} {names}"


numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False),
                    st.sampled_from([0, -1, 10**400, 1e308, 2**63]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=30)),
    lambda inner: st.one_of(st.lists(inner, max_size=5),
                            st.dictionaries(st.text(max_size=5), inner, max_size=4)), max_leaves=8)
names = st.one_of(st.sampled_from(["image_zoom_in", "image_zoom_in_tool", "tavily-search", "search",
                                   "python", "many"]), st.text(max_size=8))
keys = st.one_of(st.sampled_from(["bbox_2d", "bbox", "label", "img_idx", "query", "max_results", "code",
                                  "timeout", "number", "flag", "names"]), st.text(max_size=5))
boxes = st.lists(numbers, min_size=4, max_size=4)
# Half of the calls are nearly right, so that they come as far as the tool.
near = st.one_of(
    st.fixed_dictionaries({"bbox_2d": boxes, "label": st.text(max_size=3)}, optional={"img_idx": numbers}),
    st.fixed_dictionaries({"query": st.text(max_size=30)}, optional={"max_results": numbers}),
    st.fixed_dictionaries({"code": st.text(max_size=20)}, optional={"timeout": st.integers(-3, 1)}),
    st.fixed_dictionaries({"number": numbers}, optional={"flag": values, "names": values}))
arguments = st.one_of(near, st.dictionaries(keys, values, max_size=5))


@pytest.fixture(scope="module")
def box(python_tool):
  return ToolBox([ImageZoomIn(ImageLimits(32 * 32, 64 * 64), factor=16), python_tool, tool(scope="s")(many),
                  SearchTool(LocalSearch([Document("Kites", "A kite is a bird.")]))], SCOPES)


@pytest.fixture(scope="module")
def state(box):
  pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
  made = EpisodeState("q", [PIL.Image.fromarray(pixels)])
  yield made
  box.end_episode(made)


@fuzz
@given(st.one_of(st.text(), values.map(json.dumps),
                 st.builds(lambda n, a: json.dumps({"name": n, "arguments": a}), names, values)))
def test_parse_call(text):
  call = parse_call(text)
  if isinstance(call, ToolCall):
    assert isinstance(call.name, str) and isinstance(call.arguments, dict)
  else:
    assert isinstance(call, CallError) and call.message


@fuzz
@given(ids=st.lists(st.integers(0, 30), max_size=60))
def test_parse_turn(special, ids):
  for call in parse_turn(ids, special, lambda ids: "".join(chr(96 + i) for i in ids)):
    assert isinstance(call, ToolCall | CallError)


@fuzz
@given(name=names, arguments=arguments)
def test_every_tool_with_any_arguments(box, state, name, arguments):
  seen = asyncio.run(box.call(name, arguments, state))
  assert isinstance(seen, Observation)
  seen.text.encode()  # can be tokenised
  assert all(image.width and image.height for image in seen.images)


@settings(fuzz, max_examples=max(EXAMPLES // 3, 1))
@given(st.lists(st.one_of(
    st.builds(lambda n, a: json.dumps({"name": n, "arguments": a}), names, arguments),
    st.text(max_size=40)), min_size=1, max_size=3))
def test_the_whole_loop(world, scripted, box, calls):
  turn = [*world.ids("t</think>"), *(i for call in calls for i in (
      *world.ids("<tool_call>"), *world.chat.encode_plain(call.encode("utf-8", "replace").decode()),
      *world.ids("</tool_call>"))), *world.ids("<|im_end|>")]
  limits = world.limits.__class__(max_turns=3, max_new_tokens_per_turn=10_000, max_images=4)
  answer = world.ids("s</think><answer>\\boxed{K}</answer><|im_end|>")
  engine = scripted([turn, answer])
  rollout = asyncio.run(world.resume(world.start(), engine, tools=box, limits=limits))
  assert rollout.stop in STOPS and rollout.stop != "engine_error"
  assert len(rollout.calls) == len(calls)
