"""The audit log: what it holds, that it only grows, and doing an episode's calls again."""

import asyncio
import json

import pytest

from axpo_jax.agent.tools import audit
from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.search import Hit, SearchTool
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.model.images import ImageLimits

CALL = 't\n</think>\n\n<tool_call>\n{}\n</tool_call><|im_end|>'
ANSWER = "s\n</think>\n\n<answer>\n\\boxed{K}\n</answer><|im_end|>"
ZOOM = json.dumps({"name": "image_zoom_in",
                   "arguments": {"bbox_2d": [100, 100, 300, 300], "label": "box"}})
SEARCH = json.dumps({"name": "search", "arguments": {"query": "kites"}})
FIELDS = {"run", "time", "step", "question", "episode", "seed", "turn", "tool", "arguments", "scope",
          "granted_scopes", "dry_run", "outcome", "digest", "seconds", "bytes", "images",
          "images_before"}


class Web:
  waits = False

  def __init__(self, text="A kite is a bird."):
    self.text, self.asked = text, 0

  async def search(self, query, max_results):
    self.asked += 1
    return [Hit("Kites", "https://birds.example", self.text)]


def boxed(world, *more, scopes=("read_image",), **changes):
  zoom = ImageZoomIn(ImageLimits(48 * 48, 48 * 48), factor=world.processor.factor)
  return ToolBox([zoom, *more], scopes, **changes)


def play(world, scripted, tools, *turns, **changes):
  engine = scripted([world.ids(turn) for turn in (*turns, ANSWER)])
  return asyncio.run(world.resume(world.start(), engine, tools=tools, **changes))


@pytest.fixture
def log(tmp_path):
  made = audit.AuditLog(tmp_path / "deep" / "audit.jsonl", run="r1")
  yield made
  made.close()


def test_a_line_a_call_with_everything_in_it(world, scripted, log):
  box = boxed(world, audit=log)
  box.step = 7
  play(world, scripted, box, CALL.format(ZOOM), CALL.format('{"name": 3'))
  first, second = audit.read(log.path)
  assert first.keys() == second.keys() == FIELDS
  assert (first["run"], first["step"], first["question"], first["seed"]) == ("r1", 7, "q1", 5)
  assert (first["turn"], first["tool"], first["outcome"]) == (0, "image_zoom_in", "ok")
  assert first["arguments"]["bbox_2d"] == [100, 100, 300, 300]
  assert (first["scope"], first["granted_scopes"]) == ("read_image", ["read_image"])
  assert first["bytes"] == 48 * 32 * 3 + len("Image 1: zoomed from image 0.")
  assert (first["images"], first["images_before"], second["images_before"]) == (1, 1, 2)
  assert (second["turn"], second["tool"], second["outcome"]) == (1, "", "bad_json")
  assert first["episode"] == second["episode"] and first["seconds"] > 0


def test_a_network_tool_that_is_not_granted(world, scripted, log):
  web = Web()
  rollout = play(world, scripted, boxed(world, SearchTool(web), audit=log), CALL.format(SEARCH),
                 CALL.format(ZOOM))
  assert [call.error for call in rollout.calls] == ["refused", None] and web.asked == 0
  assert rollout.stop == "answer" and rollout.reward == 1.0
  refused = next(audit.read(log.path))
  assert (refused["outcome"], refused["scope"]) == ("refused", "network")
  assert "needs the permission 'network'" in world.chat.decode(rollout.transcript.ids)


def test_a_dry_run_acts_on_nothing_and_records_everything(world, scripted, log):
  web = Web()
  box = boxed(world, SearchTool(web), scopes=("read_image", "network"), dry_run=True, audit=log)
  rollout = play(world, scripted, box, CALL.format(SEARCH), CALL.format(ZOOM))
  assert web.asked == 0 and len(rollout.transcript.images) == 1
  assert [entry["outcome"] for entry in audit.read(log.path)] == ["dry_run", "dry_run"]
  assert all(entry["dry_run"] for entry in audit.read(log.path))


def test_an_episode_can_be_done_again_from_its_log(world, scripted, log, python_tool):
  """Zoom, search, an unreadable call, and a kernel whose second cell needs the first and the crop."""
  def tools(**changes):
    return boxed(world, SearchTool(Web()), python_tool, scopes=("read_image", "network", "execute"),
                 **changes)

  def cell(code):
    return CALL.format(json.dumps({"name": "python", "arguments": {"code": code}}))

  limits = world.limits.__class__(max_turns=9, max_new_tokens_per_turn=300, max_images=9,
                                  max_response_tokens=9000, max_total_tokens=9999)
  play(world, scripted, tools(audit=log), cell("n = len(_images)"), CALL.format(ZOOM),
       CALL.format(SEARCH), CALL.format("{"), cell("n, len(_images), _images[1].size"), limits=limits)
  play(world, scripted, tools(audit=log), CALL.format(ZOOM))  # another episode in the same log
  one, other = audit.episodes(audit.read(log.path)).values()
  assert len(one) == 5 and len(other) == 1
  images = [world.start().images[0].original]
  done = asyncio.run(audit.replay(one, tools(), images))
  assert [again.same for again in done] == [True] * 5
  assert done[-1].observation.text == "(1, 2, (48, 32))"
  assert asyncio.run(audit.replay([], tools(), images)) == []


def test_a_replay_that_differs_is_seen(world, scripted, log):
  scopes = ("read_image", "network")
  play(world, scripted, boxed(world, SearchTool(Web()), scopes=scopes, audit=log),
       CALL.format(SEARCH), CALL.format(ZOOM))
  entries = list(audit.read(log.path))
  images = [world.start().images[0].original]
  other_web = boxed(world, SearchTool(Web("A kite is a toy.")), scopes=scopes)
  assert [a.same for a in asyncio.run(audit.replay(entries, other_web, images))] == [False, True]
  other_image = [images[0].transpose(0)]
  same_web = boxed(world, SearchTool(Web()), scopes=scopes)
  assert [a.same for a in asyncio.run(audit.replay(entries, same_web, other_image))] == [True, False]


def test_images_that_the_episode_did_not_keep(world, scripted, log):
  """The second crop did not fit the budget; the third call must meet the images it met then."""
  limits = world.limits.__class__(max_turns=9, max_new_tokens_per_turn=200, max_images=2)
  again = ZOOM.replace('"label"', '"img_idx": 2, "label"')
  play(world, scripted, boxed(world, audit=log), CALL.format(ZOOM), CALL.format(ZOOM),
       CALL.format(again), limits=limits)
  entries = list(audit.read(log.path))
  assert [entry["outcome"] for entry in entries] == ["ok", "ok", "bad_arguments"]
  done = asyncio.run(audit.replay(entries, boxed(world), [world.start().images[0].original]))
  assert [again.same for again in done] == [True] * 3


def test_it_only_grows_and_counts_on(world, scripted, log):
  play(world, scripted, boxed(world, audit=log), CALL.format(ZOOM))
  before = log.path.read_bytes()
  second = audit.AuditLog(log.path, run="r1")
  play(world, scripted, boxed(world, audit=second), CALL.format(ZOOM))
  second.close()
  assert log.path.read_bytes().startswith(before)
  used = audit.totals(audit.read(log.path))
  assert (used.calls, used.images, used.bytes) == (2, 2, 2 * (48 * 32 * 3 + 29))


def test_a_line_that_a_crash_cut_is_left_out_and_a_damaged_one_named(log):
  log({"question": "q"})
  with log.path.open("ab") as file:
    file.write(b'{"run": "r')
  assert [entry["question"] for entry in audit.read(log.path)] == ["q"]
  with log.path.open("ab") as file:
    file.write(b'\n{"run": "r"}\n')
  with pytest.raises(audit.AuditError, match="line 2"):
    list(audit.read(log.path))


def test_a_log_that_fails_ends_the_run(world):
  def full(entry):
    raise OSError("no space left")

  with pytest.raises(OSError, match="no space"):
    asyncio.run(boxed(world, audit=full).call("image_zoom_in", {}, EpisodeState("q", [])))
