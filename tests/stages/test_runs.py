"""Whole runs through the one entry: what a user of the package does, at its smallest, with the policy
of `rigged`."""

import asyncio
import dataclasses
import functools
import http.server
import io
import json
import pathlib
import shutil
import signal
import threading

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from axpo_jax import paths
from axpo_jax.config_checks import validate
from axpo_jax.errors import ConfigError
from axpo_jax.model import sharding
from axpo_jax.rollouts import dump, shards
from axpo_jax.stages import engines, experiment, rl
from axpo_jax.stages.context import run_context
from axpo_jax.stages.metrics import read_metrics
from configs import eval_8b
from tests import children
from tests.stages import micro_config, rigged
from tests.stages.rigged import untimed


@pytest.fixture(scope="module")
def overrides(inputs) -> list[str]:
  return rigged.flags(inputs)


def micro(overrides, **changes):
  """The micro config in this process; `changes` are overrides with "__" for dots."""
  config = micro_config.get_config()
  for flag in overrides:
    name, value = flag.removeprefix("--config.").split("=")
    config.update_from_flattened_dict({name: value})
  config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  return config


@pytest.fixture
def one_device(monkeypatch):
  """Runs in this process see one of its eight devices."""
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(
    sharding.make_mesh, devices=jax.devices()[:1]))


def test_run_leaves_what_it_promises(micro_run):
  for stage in ("sft", "rl"):
    for file in ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"):
      assert (micro_run / stage / "policy" / file).exists()
    assert (micro_run / stage / "checkpoints" / "4").exists()
  assert (micro_run / "rl" / "rollouts" / "step_000002.txt").read_text()
  assert (micro_run / "curves.png").stat().st_size > 10_000
  table = (micro_run / "summary.md").read_text()
  assert "tool-attempt rate" in table
  assert table in (micro_run / "printed.txt").read_text()


def test_metrics_of_a_run(micro_run):
  lines = read_metrics(micro_run)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8]  # SFT, evaluation, RL
  sft, (start, *rl) = lines[:4], lines[4:]
  assert sft[-1]["sft/nll"] < sft[0]["sft/nll"]
  assert ["eval/pass_at_1" in line for line in (start, *rl)] == [True, False, True, False, True]
  # The rigged policy triggers, and some of its failed calls are recovered.
  assert sum(line["axpo/recovered"] for line in rl) > 0
  for line in rl:
    assert line["axpo/budget"] == 4  # floor(0.5 * 4 * 4 / 2)
    assert line["axpo/prefixes"] <= 4
    assert line["axpo/continuations"] == 2 * line["axpo/prefixes"]
    assert line["train/sequences"] == 16 + line["axpo/continuations"]
    assert line["train/logp_gap_abs_max"] < 1e-4  # sampler and trainer are one policy
    assert line["rollout/failed"] == 0
  assert rl[0]["train/kl"] < 1e-9 < rl[1]["train/kl"]  # the first step's policy is the reference


@pytest.mark.slow
def test_killed_and_resumed_run_repeats_the_unbroken_one(micro_run, overrides, tmp_path):
  # In SFT; in RL before its first checkpoint (the evaluation stays); in RL between two.
  for die_at in (3, 5, 7):
    died = children.launch(tmp_path, overrides, program=children.dying(die_at))
    assert died.returncode == -signal.SIGKILL, died.stderr[-4000:]
    assert read_metrics(tmp_path)[-1]["step"] == die_at
  assert children.launch(tmp_path, overrides).returncode == 0
  assert untimed(read_metrics(tmp_path)) == untimed(read_metrics(micro_run))
  for stage in ("sft", "rl"):
    file = pathlib.Path(stage) / "policy" / "model.safetensors"
    assert (tmp_path / file).read_bytes() == (micro_run / file).read_bytes()


def test_finished_run_is_not_run_again(micro_run, overrides, one_device, tmp_path, capsys):
  run = shutil.copytree(micro_run, tmp_path / "run")
  experiment.run(micro(overrides), run)
  assert "rl: already done" in capsys.readouterr().out
  assert (run / "metrics.jsonl").read_bytes() == (micro_run / "metrics.jsonl").read_bytes()


def test_workdir_of_another_config_is_refused(micro_run, overrides):
  before = (micro_run / "config.json").read_bytes()
  with pytest.raises(ConfigError, match="another configuration"):
    experiment.run(micro(overrides, seed=1), micro_run)
  assert (micro_run / "config.json").read_bytes() == before


@pytest.mark.slow
def test_axpo_without_budget_is_grpo_bit_for_bit(overrides, one_device, tmp_path):
  common = {"stages": ("rl",), "rl__steps": 2}
  experiment.run(micro(overrides, rl__resample__ratio=0.0, **common), tmp_path / "axpo")
  experiment.run(micro(overrides, rl__recipe="grpo", **common), tmp_path / "grpo")
  axpo, grpo = (untimed(read_metrics(tmp_path / name)) for name in ("axpo", "grpo"))
  assert axpo == grpo
  assert axpo[1]["axpo/triggered"] > 0
  assert axpo[1]["axpo/prefixes"] == 0


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(micro_run, overrides, tmp_path):
  """RL step 1 again, from the same SFT policy, on a mesh of 2 x 2 x 2, which splits rows too, and with
  the reference in the host's memory."""
  flags = [f"--config.model.checkpoint={micro_run / 'sft' / 'policy'}", *overrides[1:]]
  experiment.run(micro(flags, stages=("rl",), rl__steps=1, eval__questions=1, mesh__fsdp=2,
                       mesh__context=2, mesh__tensor=2, rl__reference_offload=True), tmp_path)
  one, eight = untimed(read_metrics(micro_run))[5], untimed(read_metrics(tmp_path))[1]
  names = [name for name in one if not name.startswith(("pack/", "eval/")) and name != "step"]
  assert len(names) > 60
  for name in names:
    if name.startswith("train/logp_gap"):  # sampler against trainer: rounding itself, on any mesh
      assert abs(eight[name]) < 1e-5 and abs(one[name]) < 1e-5, name
    else:
      assert eight[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_config_of_the_8b_trains_any_checkpoint(overrides, tmp_path, python_isolation):
  """The paper's config with smaller numbers, through the command line."""
  micro_sizes = micro(overrides)
  flags = [*overrides, "--config.model.dtype=float32", "--config.agent.system_prompt=short",
           "--config.rl.steps=1", "--config.rl.questions=4", "--config.rl.num_rollouts=4",
           "--config.eval.questions=2", "--config.eval.rollouts=2",
           "--config.log.tensorboard=False", "--config.rollout.engine=embedded",
           "--config.agent.search.backend=miniworld",
           f"--config.agent.python.isolation={python_isolation}"]
  flags += [f"--config.{section}.{name}={value}" for section, values in (
    ("batch", micro_sizes.batch), ("rollout.embedded", micro_sizes.rollout.embedded),
    ("images", micro_sizes.images))
    for name, value in values.items()]
  flags += [f"--config.{section}.{name}={limit}" for section in ("agent", "eval") for name, limit in (
    ("max_new_tokens", 64), ("max_response_tokens", 192), ("max_total_tokens", 704))]
  flags.append("--config.batch.length=704")  # the tools' descriptions alone take 300 tokens
  done = children.launch(tmp_path, flags, config="configs/axpo_8b.py")
  assert done.returncode == 0, done.stderr[-4000:]
  start, step = read_metrics(tmp_path)
  assert start["eval/pass_at_1"] >= 0
  assert step["train/grad_norm"] > 0
  assert (tmp_path / "rl" / "policy" / "model.safetensors").exists()


class FlakyEngine:
  """Fails for every request of one question, and for the first of every other. For one of them the
  second brings no log-probabilities: a trajectory that cannot be trained on."""

  def __init__(self, engine):
    self._engine, self.met = engine, set()

  async def generate(self, request):
    if request.session == "q0" or request.session not in self.met:
      self.met.add(request.session)
      raise RuntimeError("out of order")
    samples = await self._engine.generate(request)
    if request.session == "q4" and "spoiled" not in self.met:
      self.met.add("spoiled")
      samples = [dataclasses.replace(s, logprobs=(float("nan"),) * len(s.ids)) for s in samples]
    return samples

  def __getattr__(self, name):
    return getattr(self._engine, name)


def test_what_fails_is_counted_and_the_run_goes_on(
    inputs, overrides, one_device, tmp_path, monkeypatch):
  data = shutil.copytree(inputs / "data", tmp_path / "data")
  cut = (data / "1.png").read_bytes()[:60]  # the header is whole, the pixels are not
  (data / "1.png").write_bytes(cut)
  lines = (data / "questions.jsonl").read_text().splitlines(keepends=True)
  (data / "questions.jsonl").write_text("".join(lines[i] for i in (0, 1, 3, 4)))
  make = engines.make_engine
  monkeypatch.setattr(engines, "make_engine", lambda *args: FlakyEngine(make(*args)))
  config = micro(overrides, stages=("rl",), rl__steps=1, data__path=str(data / "questions.jsonl"))
  experiment.run(config, tmp_path / "run")
  start, step = read_metrics(tmp_path / "run")
  assert start["eval/failed"] == 2 + 1  # q0 whole, one of q1
  # q0's four (the engine), q1's four (its image); q3 and q4 lose one rollout each, q4 one more.
  assert step["rollout/failed"] == 4 + 4 + 1 + 1 + 1
  assert step["rollout/rollouts"] == 3 + 2
  assert np.isfinite(step["train/loss"])


def test_step_without_any_rollout_changes_nothing(
    overrides, one_device, tmp_path, monkeypatch):
  make = engines.make_engine

  def broken(*args):
    engine = make(*args)
    engine.generate = FlakyEngine(engine).generate
    return engine

  monkeypatch.setattr(engines, "make_engine", broken)
  config = micro(overrides, stages=("rl",), rl__steps=2, rl__num_rollouts=1, rl__questions=2,
                 rl__max_lost_steps=2)
  policy = config.model.checkpoint
  loop = rl.Loop(config, run_context(config), policy, tmp_path)
  before = jax.tree.map(np.asarray, loop.state.params)
  batch, metrics = asyncio.run(loop.step(lambda: loop.collect(0)))
  assert [len(group.rollouts) for group in batch.groups] == [0, 0]
  assert metrics["rollout/failed"] == 2
  assert loop.steps_done == 1
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, loop.state.params))
  with pytest.raises(rl.RolloutsFailed, match=r"last 2 steps failed .*: 2 x RuntimeError: out of order"):
    asyncio.run(loop.step(lambda: loop.collect(1)))


@pytest.mark.slow
def test_rollouts_ahead_are_bounded_and_a_resume_skips_no_question(
    overrides, one_device, tmp_path, monkeypatch):
  """With staleness 2: lag at most 2; died between checkpoints, each question is trained on once."""
  ahead = {"stages": ("rl",), "rollout__staleness": 2, "log__dump_every": 1,
           "rl__loss__tis_mask": 1.5}
  strict = {"stages": ("rl",), "log__dump_every": 1}
  experiment.run(micro(overrides, **strict), tmp_path / "strict")
  update = rl.Loop.update

  def dying(self, groups):
    if self.steps_done == 3:
      raise InterruptedError("the machine is gone")
    return update(self, groups)

  monkeypatch.setattr(rl.Loop, "update", dying)
  with pytest.raises(InterruptedError):
    experiment.run(micro(overrides, **ahead), tmp_path / "ahead")
  assert [line["step"] for line in read_metrics(tmp_path / "ahead")] == [0, 1, 2, 3]
  monkeypatch.setattr(rl.Loop, "update", update)
  experiment.run(micro(overrides, **ahead), tmp_path / "ahead")
  lines = read_metrics(tmp_path / "ahead")
  assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
  assert max(line["rollout/lag_max"] for line in lines[1:]) in (1, 2)
  assert all(line["rollout/lag_max"] <= 2 for line in lines[1:])
  late = [line for line in lines[1:] if line["rollout/lag_max"] > 0]
  assert late and all(any(f"train/logp_gap_abs_mean/lag_{k}" in line for k in (1, 2))
                      for line in late)
  assert all(0 <= line["train/tis_masked_share"] <= 1 for line in lines[1:])
  for step in range(1, 5):
    assert _asked(tmp_path / "ahead", step) == _asked(tmp_path / "strict", step)
  assert all(line["rollout/lag_max"] == 0 for line in read_metrics(tmp_path / "strict")[1:])


def _asked(workdir, step) -> list[str]:
  lines = (workdir / "rl" / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
  return list(dict.fromkeys(json.loads(line)["question_id"] for line in lines))


CHAIN = {
  "stages": ("teach", "sft", "screen", "rl", "eval"), "data__source": "miniworld",
  "teach__engine": "scripted", "teach__questions": 6, "teach__rollouts": 2, "teach__shard": 2,
  "sft__source": "shards", "sft__steps": 2, "sft__teacher__p_wrong_mark": 0.3,
  "screen__questions": 5, "screen__rollouts": 2, "screen__shard": 2,
  "rl__steps": 1, "rl__questions": 2, "eval__every": 0, "eval__shard": 1, "log__dump_every": 1}


@pytest.mark.slow
def test_chain_from_questions_to_results(overrides, one_device, tmp_path, monkeypatch, capsys):
  """teach -> filter -> SFT -> screen -> filter -> AXPO -> evaluation. Then the same again, broken off in
  every stage that samples."""
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  experiment.run(micro(overrides, **CHAIN), whole)
  printed = capsys.readouterr().out
  taught, screened = (list(shards.records(whole / stage / "shards")) for stage in ("teach", "screen"))
  assert (len(taught), len(screened)) == (6, 5)
  right = sum(record.counts.passed for record in taught)
  assert 0 < right < 12  # the teacher points beside the mark now and then
  assert f"sft: {right} of 12 trajectories kept" in printed
  solved = {record.id for record in screened if record.counts.passed == 2}
  hopeless = {record.id for record in taught if not record.counts.passed}
  trained_on = {record.id for record in screened} - solved - hopeless
  assert json.loads((whole / "rl" / "filter.json").read_text())["kept"] == len(trained_on)
  assert set(_asked(whole, 1)) <= trained_on
  (held_out,) = json.loads((whole / "eval" / "results.json").read_text()).values()
  assert (held_out["questions"], held_out["rollouts"], held_out["failed"]) == (2, 4, 0)
  assert "tool-attempt rate" in printed and "tool use" in printed  # both tables
  assert (whole / "summary.md").read_text() in printed

  write, died = paths.write_text, []

  def dying(path, text):
    write(path, text)
    stage = path.relative_to(broken).parts[0]
    if path.name.startswith("records_") and stage not in died:
      died.append(stage)
      raise InterruptedError("the machine is gone")

  monkeypatch.setattr(paths, "write_text", dying)
  for stage in ("teach", "screen", "eval"):
    with pytest.raises(InterruptedError):
      experiment.run(micro(overrides, **CHAIN), broken)
    assert died[-1] == stage
  experiment.run(micro(overrides, **CHAIN), broken)
  assert untimed(read_metrics(broken)) == untimed(read_metrics(whole))
  for file in ("sft/filter.json", "rl/filter.json", "eval/results.json", "teach/shards/done.json"):
    assert (broken / file).read_text() == (whole / file).read_text()


@pytest.mark.slow
def test_evaluation_of_benchmarks(overrides, one_device, tmp_path, capsys):
  """The paper's config with smaller numbers, on two benchmarks in their public layouts."""
  folder = tmp_path / "benchmarks"
  (folder / "vstar").mkdir(parents=True)
  (folder / "mmsearch").mkdir()
  Image.new("RGB", (64, 48), (200, 10, 20)).save(folder / "vstar" / "sa_1.jpg")
  options = "\n(A) red\n(B) blue\n(C) grey\n(D) pink\nAnswer with the option's letter."
  (folder / "vstar" / "test_questions.jsonl").write_text("".join(json.dumps({
    "image": "sa_1.jpg", "category": category, "label": "A", "question_id": number,
    "text": f"What colour?{options}"}) + "\n"
    for number, category in enumerate(("direct_attributes", "relative_position", "direct_attributes"))))
  pq.write_table(pa.Table.from_pylist([{
    "sample_id": str(number), "query": "Which letter?", "query_image": None, "area": "news",
    "gt_answer": "B", "alternative_gt_answers": ["B C"]} for number in range(2)]),
    folder / "mmsearch" / "end2end.parquet")
  small, config = micro(overrides), eval_8b.get_config()
  config.update(model=small.model, agent=small.agent.copy_and_resolve_references(),
                mesh=small.mesh, log=small.log, images=small.images)
  config.rollout.update(engine="embedded", embedded=small.rollout.embedded)
  config.eval.update(folder=str(folder), benchmarks=("vstar", "mmsearch"), max_turns=2,
                     max_new_tokens=64, max_response_tokens=192, max_total_tokens=384, shard=2)
  validate(config)
  run = tmp_path / "run"
  experiment.run(config, run)
  printed = capsys.readouterr().out
  results = json.loads((run / "eval" / "results.json").read_text())
  assert list(results) == ["vstar", "mmsearch"]
  for name, questions in (("vstar", 3), ("mmsearch", 2)):
    found = list(shards.records(run / "eval" / name))
    assert (results[name]["questions"], results[name]["rollouts"]) == (questions, 4 * questions)
    assert all(len(record.stats) == 4 for record in found)  # every rollout is kept
    rewards = [stats.reward for record in found for stats in record.stats]
    assert results[name]["pass_at_1"] == pytest.approx(sum(rewards) / len(rewards))
    assert sum(rewards) > 0  # the rigged policy says A or B
    for record in found:
      for stats, answer, score in zip(record.stats, record.answers, record.scores, strict=True):
        wanted = {"vstar": {"A": 1.0}, "mmsearch": {"B": 1.0}}[name].get(answer, 0.0)
        assert stats.reward == score.value == wanted, answer
  assert results["vstar"]["direct_attributes/pass_at_1"] >= 0
  assert results["mmsearch"]["f1"] == results["mmsearch"]["pass_at_1"]
  for row in ("| vstar", "| mmsearch", "| mean"):
    assert row in printed
  experiment.run(config, run)  # nothing is left to do, and nothing changes
  assert json.loads((run / "eval" / "results.json").read_text()) == results


class JudgeEndpoint(http.server.BaseHTTPRequestHandler):
  """Says that nothing is right, and that every solution has one point of its rubric."""

  bodies: tuple = ()

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    type(self).bodies += (body,)
    graded = body["response_format"]["json_schema"]["name"] == "grade"
    said = json.dumps({"correct": False, "score": 1} if graded else {"verdict": "INCORRECT"})
    answer = json.dumps({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}).encode()
    self.send_response(200)
    self.send_header("content-length", str(len(answer)))
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *arguments):
    pass


@pytest.mark.slow
def test_a_judge_sees_what_the_official_one_sees(overrides, one_device, tmp_path):
  """HR-MMSearch's the image, Math-VR's the whole response and the rubric."""
  folder, picture = tmp_path / "benchmarks", io.BytesIO()
  Image.new("RGB", (64, 48), "red").save(picture, "PNG")
  rows = {"hr_mmsearch": {"sample_id": "1", "query": "Who?", "ground_truth": "Ada",
                          "query_image": {"bytes": picture.getvalue(), "path": None}},
          "mathvr": {"id": 1, "question": "Find $x$.", "answers": ["4"], "total_score": 2.0, "scores": [1, 1],
                     "scoring_points": ["squares", "sums"]}}
  for name, row in rows.items():
    (folder / name).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), folder / name / "test.parquet")
  small, config = micro(overrides), eval_8b.get_config()
  config.update(model=small.model, agent=small.agent.copy_and_resolve_references(),
                mesh=small.mesh, log=small.log, images=small.images)
  config.rollout.update(engine="embedded", embedded=small.rollout.embedded)
  handler = type("Handler", (JudgeEndpoint,), {})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config.eval.update(folder=str(folder), benchmarks=tuple(rows), max_turns=2, max_new_tokens=64,
                       max_response_tokens=192, max_total_tokens=384)
    config.eval.judge.update(url=f"http://127.0.0.1:{server.server_port}/v1", model="m")
    validate(config)
    experiment.run(config, tmp_path / "run")
    server.shutdown()
  contents = [body["messages"][1]["content"] for body in handler.bodies]
  seen = [content for content in contents if isinstance(content, list)]
  graded = [json.loads(content) for content in contents if isinstance(content, str)]
  assert seen and all([part["type"] for part in parts] == ["image_url", "text"] for parts in seen)
  assert graded and all(asked["rubric"]["scoring_points"] == ["squares", "sums"] for asked in graded)
  run = tmp_path / "run"
  said = dump.responses(run / "eval" / "mathvr" / "rollouts_00000.jsonl", run_context(config).chat)
  assert {asked["solution"] for asked in graded} <= set(said)
  results = json.loads((run / "eval" / "results.json").read_text())
  assert results["mathvr"]["process_score"] == pytest.approx(0.35) and results["hr_mmsearch"]["judged_share"] > 0
