"""Runs that something ends, and that go on as if nothing had: a kill (-9) with everything on an object
store, a real server on loopback; and the notice that a machine is taken away."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

import axpo_jax
from axpo_jax import paths
from axpo_jax.agent.tools import audit
from axpo_jax.engine.sglang.server.spec import free_port
from axpo_jax.stages.metrics import read_metrics
from axpo_jax.train import preemption
from axpo_jax.train.checkpoint import Checkpoints
from tests import children, gcs
from tests.stages import rigged
from tests.stages.rigged import untimed

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
MAIN = REPO / "launch" / "main.py"
STORE = epath.Path(gcs.BUCKET)


def assert_same(run, micro_run):
  """All numbers, all policies and what was sampled."""
  assert untimed(read_metrics(run)) == untimed(read_metrics(micro_run))
  for stage in ("sft", "rl"):
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
      place = f"{stage}/policy/{file}"
      assert (run / place).read_bytes() == (micro_run / place).read_bytes(), place
  for step in range(1, 5):
    place = f"rl/rollouts/step_{step:06d}.jsonl"
    ours, theirs = ([json.loads(line)["transcript"] for line in (folder / place).read_text().splitlines()]
                    for folder in (run, micro_run))
    assert ours == theirs


@pytest.mark.slow
def test_killed_on_an_object_store_it_is_the_run_in_a_folder(inputs, micro_run):
  """Everything is there: policy and questions that are read, and all that is written."""
  with gcs.running():
    for name, last in (("policy", "config.json"), ("data", "questions.jsonl")):
      paths.upload(inputs / name, STORE / name, last)
    run, flags = STORE / "runs" / "one", [*rigged.flags(STORE), "--config.log.tensorboard=True"]
    # After the last step's line, before its checkpoint.
    died = children.launch(run, flags, program=children.dying(8))
    assert died.returncode == -signal.SIGKILL, died.stderr[-4000:]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    done = children.launch(run, flags)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(run, micro_run)
    assert all((run / file).exists() for file in ("curves.png", "config.json", "summary.md"))
    assert paths.glob(run / "tensorboard", "events.*")
    images = {image["shown"] for line in (run / "rl/rollouts/step_000001.jsonl").read_text().splitlines()
              for image in json.loads(line)["transcript"]["images"]}
    assert images and all((run / f"rl/rollouts/images/{key}.png").exists() for key in images)
    # No call of RL is missing in the log, though the process had no chance to send its last lines.
    assert calls(run) == calls(micro_run) != set()
  assert not (REPO / "gs:").exists()  # where pathlib would have put it


def calls(run) -> set:
  return {(entry["question"], entry["seed"], entry["turn"], entry["digest"])
          for entry in audit.read(run / "audit.jsonl") if entry["question"].startswith("q")}


@pytest.fixture
def notice(monkeypatch):
  """SIGTERM is a notice to this process, which has had none."""
  monkeypatch.setattr(preemption, "_requested", threading.Event())
  before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
  preemption.install()
  yield lambda: os.kill(os.getpid(), signal.SIGTERM)
  for each, handler in before.items():
    signal.signal(each, handler)


def test_notice_ends_at_once_what_has_no_state(notice):
  with pytest.raises(preemption.Stopped):
    notice()
    time.sleep(10)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process


def test_notice_waits_for_the_end_of_what_has_state(notice):
  reached = []
  with pytest.raises(preemption.Stopped), preemption.held():
    notice()
    assert preemption.stop_requested()
    reached.append("the end")
  assert reached == ["the end"]


def test_notice_cancels_what_is_awaited(notice):
  seen = []

  async def work():
    try:
      await asyncio.sleep(3600)
    except asyncio.CancelledError:
      seen.append("cancelled")
      raise

  async def everything():
    assert await preemption.cancel_on_stop(lambda: asyncio.sleep(0, "done")) == "done"
    asyncio.get_running_loop().call_later(0.1, notice)
    for _ in range(2):  # and what comes next is not begun
      with pytest.raises(preemption.Stopped):
        await preemption.cancel_on_stop(work)

  with pytest.raises(preemption.Stopped), preemption.held():
    asyncio.run(everything())
  assert seen == ["cancelled"]


# Runs launch/main.py with sys.argv[2:]. When it comes to the place sys.argv[1] the first time, it gets
# SIGTERM (or says so, and waits for it), and what it was about to do there never ends.
TOLD = f"""
import asyncio, os, runpy, signal, sys
sys.path.insert(0, {str(REPO)!r})
from axpo_jax.rollouts import shards
from axpo_jax.stages import evaluate, metrics, rl
place = sys.argv.pop(1)

def endless(at, function):
  async def told(*args):
    if not at(*args):
      return await function(*args)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(3600)
  return told

if place == "sft":
  write = metrics.MetricsWriter.write
  def told(self, step, values):
    write(self, step, values)
    os.kill(os.getpid(), signal.SIGTERM)
  metrics.MetricsWriter.write = told
elif place == "rollouts, told from outside":
  os.kill = lambda *_: print("there", flush=True)
  rl.Loop.collect = endless(lambda loop, step: step == 1, rl.Loop.collect)
elif place == "evaluation":
  collect = rl.Loop.collect
  async def collected(self, step):
    evaluate.run = endless(lambda *args: True, evaluate.run)
    return await collect(self, step)
  rl.Loop.collect = collected
elif place in ("teach", "screen", "eval"):
  shard = shards._Run.shard
  async def finished_first(self, number, asked):
    if number and place in self.folder.parts:
      while not (self.folder / "records_00000.jsonl").exists():
        await asyncio.sleep(0.05)
      os.kill(os.getpid(), signal.SIGTERM)
      await asyncio.sleep(3600)
    return await shard(self, number, asked)
  shards._Run.shard = finished_first
sys.argv[0] = {str(MAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_told_to_stop_it_saves_and_goes_on(inputs, micro_run, tmp_path):
  """At the end of SFT's step, and at once in an evaluation, which here would never end."""
  for place, steps, stage, saved in (
    ("sft", [1], "sft", [1]), ("evaluation", [1, 2, 3, 4, 4, 5], "rl", [2])):
    told = children.launch(tmp_path, rigged.flags(inputs), program=("-c", TOLD, place))
    assert told.returncode == preemption.EXIT_CODE, told.stderr[-4000:]
    assert told.stderr.endswith("stopped by SIGTERM: the same command resumes from here\n")
    assert [line["step"] for line in read_metrics(tmp_path)] == steps, place
    folders = (tmp_path / stage / "checkpoints").iterdir()
    assert sorted(int(folder.name) for folder in folders) == saved, place
  done = children.launch(tmp_path, rigged.flags(inputs))
  assert done.returncode == 0, done.stderr[-4000:]
  assert_same(tmp_path, micro_run)


@pytest.mark.slow
def test_told_among_shards_it_keeps_those_that_are_finished(inputs, tmp_path):
  """In each of the stages that only sample; the other shard, which here would never end, is sampled when
  the run goes on."""
  flags = [*rigged.flags(inputs), "--config.stages=('teach','screen','eval')", "--config.eval.questions=2"]
  flags += [f"--config.{stage}.{name}" for stage in ("teach", "screen", "eval")
           for name in ("shard=1", "rollouts=1")]
  flags += [f"--config.{stage}.questions=2" for stage in ("teach", "screen")]
  folders = [tmp_path / "teach" / "shards", tmp_path / "screen" / "shards", tmp_path / "eval" / "held_out"]
  kept = {}
  for folder in folders:
    told = children.launch(tmp_path, flags, program=("-c", TOLD, folder.parent.name))
    assert told.returncode == preemption.EXIT_CODE, told.stderr[-4000:]
    assert "stopped by SIGTERM" in told.stderr
    kept[folder], = folder.glob("records_*.jsonl")
    kept[folder] = kept[folder].read_bytes()
  done = children.launch(tmp_path, flags)
  assert done.returncode == 0, done.stderr[-4000:]
  for folder in folders:
    first, second = sorted(folder.glob("records_*.jsonl"))
    assert first.read_bytes() == kept[folder]
    assert [json.loads(file.read_bytes())["id"] for file in (first, second)] == ["q0", "q1"]


@pytest.mark.slow
def test_of_two_processes_either_may_be_told(inputs, tmp_path):
  """The other one hears of it among rollouts that would never end; both stop at one step."""
  port = free_port("127.0.0.1")
  processes = [subprocess.Popen(
    [sys.executable, "-c", TOLD, "rollouts, told from outside", f"--config={children.MICRO}",
     f"--workdir={tmp_path / 'run'}", *rigged.flags(inputs), "--config.stages=('rl',)", "--config.rl.steps=2",
     "--config.eval.every=-1", "--config.mesh.fsdp=2", "--config.checkpoint.every=5",
     f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process_id={i}"],
    cwd=REPO, env=children.environment(1, children.PATIENT), stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True)
    for i in range(2)]
  try:
    assert any(line == "there\n" for line in processes[0].stdout), processes[0].stderr.read()[-4000:]
    processes[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert [process.returncode for process in processes] == [preemption.EXIT_CODE] * 2, ends
  assert all("stopped by SIGTERM" in stderr for _, stderr in ends)
  assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
  with Checkpoints(tmp_path / "run" / "rl" / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [1]
