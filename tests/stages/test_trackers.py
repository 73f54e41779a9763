"""The real wandb, offline; and what a tracker may cost a run: nothing."""

import asyncio
import contextlib
import json
import sqlite3
import struct
import sys
import time
import types

import pytest
from ml_collections import ConfigDict

from axpo_jax.errors import ConfigError
from axpo_jax.stages import trackers
from axpo_jax.stages.metrics import MetricsWriter
from tests.agent.conftest import scripted, world  # noqa: F401
from tests.stages.test_conversations import CALL, RIGHT


def config(*names):
  return ConfigDict({"seed": 3, "log": {"trackers": names, "project": "tests"}})


@pytest.fixture
def rollout(world, scripted):  # noqa: F811
  turns = [[i for part in text for i in world.ids(part)] for text in (CALL, RIGHT)]
  return asyncio.run(world.resume(world.start(), scripted(turns)))


def records(log: bytes):
  """The records of wandb's log: LevelDB's format, blocks of 32 kB with chunks of a record in each."""
  from wandb.proto import wandb_internal_pb2

  at, data = 7, b""  # behind the file's own header
  while at + 7 <= len(log):
    if 32768 - at % 32768 < 7:  # the rest of a block that no chunk's header fits in
      at += 32768 - at % 32768
      continue
    _, length, kind = struct.unpack_from("<IHB", log, at)
    data += log[at + 7:at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or the last of several
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      yield record
      data = b""


def test_wandb_offline_has_the_metrics_and_a_table_with_pictures(tmp_path, monkeypatch, rollout, world):  # noqa: F811
  for name, value in (("MODE", "offline"), ("DATA_DIR", str(tmp_path / "data")), ("CACHE_DIR", str(tmp_path / "cache"))):
    monkeypatch.setenv(f"WANDB_{name}", value)
  (tracker,) = trackers.start(config("wandb"), tmp_path)
  with MetricsWriter(tmp_path, tensorboard=False, trackers=[tracker]) as writer:
    tracker.table(1, [(rollout, {"gold": ["K"]})], world.chat)
    writer.write(1, {"rollout/reward_mean": 0.25, "rollout/odd": float("nan")})
    writer.write(2, {"rollout/reward_mean": 0.5})
  tracker.close()
  (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
  for _ in range(300):  # its service may write the end behind `finish`
    found = list(records(log.read_bytes()))
    if found and found[-1].WhichOneof("record_type") == "exit":
      break
    time.sleep(0.1)
  history = [{item.key or item.nested_key[0]: item.value_json for item in record.history.item}
             for record in found if record.WhichOneof("record_type") == "history"]
  assert [json.loads(line["rollout/reward_mean"]) for line in history] == [0.25, 0.5]
  assert "rollout/odd" not in history[0]
  # Tables are artifacts, and their pictures wait beside the run to be sent: the question's and the crop.
  staged = [path.read_bytes() for path in (tmp_path / "data" / "artifacts").rglob("*") if path.is_file()]
  assert sum(data.startswith(b"\x89PNG") for data in staged) == 2
  (table,) = (log.parent / "files" / "media").rglob("*.table.json")
  table = json.loads(table.read_text())
  row = dict(zip(table["columns"], table["data"][0]))
  assert (row["reward"], row["gold"], row["calls"], row["kind"]) == (1.0, "K", 1, "rollout")
  assert "image_zoom_in" in row["trajectory"] and row["crop"] == "Image"


def test_trackio_has_the_metrics_and_a_table_with_pictures(tmp_path, monkeypatch, rollout, world):  # noqa: F811
  """The real one, which writes a database on this machine; a resumed run goes on in its own."""
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "data"))  # read when it is imported
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  pytest.importorskip("trackio", reason="NOT TESTED HERE: trackio itself. pip install trackio")
  for step in (1, 2):
    (tracker,) = trackers.start(config("trackio"), tmp_path / "run")
    tracker.log(step, {"rollout/reward_mean": step / 4, "rollout/odd": None})
    if step == 2:
      tracker.table(step, [(rollout, {"gold": ["K"]})], world.chat)
    tracker.close()
    assert not tracker._failed
  (database,) = (tmp_path / "data").glob("*.db")
  with contextlib.closing(sqlite3.connect(database)) as found:
    rows = [(run, step, json.loads(logged)) for run, step, logged in
            found.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")]
  assert len({run for run, *_ in rows}) == 1
  assert [(step, logged) for _, step, logged in rows[:2]] == [
    (1, {"rollout/reward_mean": 0.25}), (2, {"rollout/reward_mean": 0.5})]
  (row,) = rows[2][2]["rollouts"]["_value"]
  assert (row["reward"], row["gold"], row["calls"], row["kind"]) == (1.0, "K", 1, "rollout")
  for name in ("image", "crop"):
    assert (tmp_path / "data" / "media" / row[name]["file_path"]).read_bytes().startswith(b"\x89PNG")


def fake(**attributes):
  def nothing(*args, **kwargs):
    return None
  return types.SimpleNamespace(**{"init": nothing, "log": nothing, "finish": nothing, "Settings": nothing,
                                  **attributes})


def test_a_resumed_run_goes_on_in_its_own(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setitem(sys.modules, "wandb", fake(init=lambda **options: asked.append(options)))
  for folder in ("a", "a", "b"):
    trackers.start(config("wandb"), trackers.epath.Path(tmp_path / folder))
  assert asked[0]["id"] == asked[1]["id"] != asked[2]["id"]
  (tmp_path / "a").rename(tmp_path / "old")
  trackers.start(config("wandb"), trackers.epath.Path(tmp_path / "a"))  # the same path on another machine
  (tmp_path / "old").rename(tmp_path / "copy")
  trackers.start(config("wandb"), trackers.epath.Path(tmp_path / "copy"))  # and a copy of the folder
  assert len({options["id"] for options in asked}) == 4
  assert (asked[0]["resume"], asked[0]["name"], asked[0]["config"]["seed"]) == ("allow", "a", 3)


def test_what_fails_later_is_said_once_and_costs_nothing(tmp_path, monkeypatch, caplog):
  def broken(*args, **kwargs):
    raise OSError("no network")
  monkeypatch.setitem(sys.modules, "trackio", fake(log=broken, finish=broken))
  (tracker,) = trackers.start(config("trackio"), tmp_path)
  with MetricsWriter(tmp_path, tensorboard=False, trackers=[tracker]) as writer:
    writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 2.0})
  tracker.close()
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
  assert [record.message for record in caplog.records].count(
    "trackio failed, and the run goes on without it: no network") == 1


def test_one_that_does_not_start_stops_the_run_with_one_line(tmp_path, monkeypatch):
  def refused(**options):
    raise RuntimeError("api_key not configured\n(no-tty)")
  monkeypatch.setitem(sys.modules, "wandb", fake(init=refused))
  with pytest.raises(ConfigError, match=r"wandb does not start \(api_key not configured \(no-tty\)\): log in"):
    trackers.start(config("wandb"), tmp_path)
  monkeypatch.setitem(sys.modules, "trackio", None)
  with pytest.raises(ConfigError, match=r"'trackio': pip install trackio"):
    trackers.start(config("trackio"), tmp_path)


def test_a_table_takes_the_same_of_every_question():
  notes = [{"group": g, **({"branch": 0} if b else {})} for g in range(20) for b in (0, 0, 1)]
  kept = trackers.chosen(list(range(60)), notes)
  assert len(kept) == 32
  firsts = [note for number, note in kept if number % 3 != 1]
  assert len(firsts) == 32  # a second rollout of any question comes after all firsts and continuations
