"""The simulator on cases that can be computed by hand."""

import collections
import itertools
import json
import math

import numpy as np
import pytest

from axpo_jax.rl import algorithm
from axpo_jax.rl.resample import GroupView, ResampleConfig, prefix_budget
from benchmarks import simulate, simulate_inputs
from benchmarks.simulate_servers import Plant, Request, Server, Simulation
from benchmarks.simulate_steps import Planner, Policy, Question, Rollout, Run, Turn

GRPO = ResampleConfig(ratio=0.0)


def server(**speeds) -> Server:
  return Server(Simulation(), Plant(**{"servers": 1, "iteration_s": 1.0, "row_s": 0.0} | speeds))


def ends(found: Server, requests, *, install=None) -> list[float]:
  """When each (start, request) is done; `install` is (time, seconds, on_push)."""
  clock = found._simulation

  async def one(start, request):
    await clock.sleep(start)
    await found.generate(request)
    return clock.now

  async def push(at, seconds, on_push):
    await clock.sleep(at)
    await found.install(seconds, on_push)

  if install:
    clock.spawn(push(*install))
  return [clock.run(task) for task in [clock.spawn(one(*entry)) for entry in requests]]


def request(tokens, context=0, new=0, name=None) -> Request:
  return Request(name or object(), context, new, tokens)


# ---- one server


def test_two_requests_share_a_server():
  # Together 1 + 2 * 0.5 = 2 s an iteration for 4 tokens, then alone 1.5 s for 6.
  found = server(sequence_s=0.5)
  assert ends(found, [(0, request(10)), (0, request(4))]) == [17, 8]
  found.advance()
  assert found.seconds["decode"] == pytest.approx(17)
  assert found.drawn == 14


def test_prefill_stops_decoding():
  # 0-5 prefill, 2 tokens, at 7 a second prefill of 5 s, then one token together (1 s) and the other's 2 more.
  found = server(prefill_s=0.5)
  assert ends(found, [(0, request(3, new=10)), (7, request(3, new=10))]) == [13, 15]
  found.advance()
  assert found.seconds["prefill"] == pytest.approx(10)


def test_long_contexts_slow_decoding():
  # 10 tokens of context grow to 14: the integral of their reading, 10 * 4 + 4^2 / 2, and 4 iterations.
  found = server(context_s=1.0)
  found._simulation.at(2 + 20 + 2, found.advance)  # half of it, by the same rule
  found._simulation.at(2 + 20 + 2, found._schedule)
  assert ends(found, [(0, request(4, context=10))]) == [pytest.approx(52)]


def test_slots_and_pool_make_requests_wait():
  assert ends(server(slots=1), [(0, request(3)), (0, request(3))]) == [3, 6]
  assert ends(server(pool=5), [(0, request(3)), (0, request(3))]) == [3, 6]


def test_a_block_ends_together():
  assert ends(server(block=16), [(0, request(3)), (0, request(17))]) == [16, 32]


def test_a_cached_prefix_is_not_computed_again_until_the_pool_is_full():
  found = server(prefill_s=1.0, pool=100)
  assert ends(found, [(0, request(1, context=10, name="a")), (100, request(1, context=10, name="a"))]) == [11, 101]
  # 95 newer tokens have taken its place.
  later = [(0, request(5, context=90, name="b")), (200, request(1, context=10, name="a"))]
  assert ends(found, later)[1] == 101 + 200 + 11


@pytest.mark.parametrize("on_push, end, thrown", [("partial", 12, 0), ("drop", 16, 4), ("drain", 10, 0)])
def test_what_a_push_does_to_running_samples(on_push, end, thrown):
  # 10 tokens; at 4 s weights load for 2 s. A request that comes at 5 waits in any case.
  found = server()
  assert ends(found, [(0, request(10)), (5, request(1))], install=(4, 2, on_push)) == [
    end, 13 if on_push == "drain" else 7]
  assert found.thrown == thrown


def test_an_interrupted_sample_prefills_all_that_it_has():
  # 4 of 10 tokens are drawn; its 6 of context and these 4 are computed again, 10 s behind the load.
  found = server(prefill_s=1.0)
  assert ends(found, [(0, request(10, context=6))], install=(10, 2, "partial")) == [10 + 2 + 10 + 6]


def test_an_aborted_request_makes_room():
  found = server(sequence_s=1.0)
  slow, fast = request(100), request(4)
  found._simulation.at(2.0 * 3, found.abort, slow)  # two iterations of 3 s together, then 2 s each alone
  assert ends(found, [(0, slow), (0, fast)]) == [6, 10]
  assert found.thrown == 2


def test_littles_law():
  rng = np.random.default_rng(0)
  found = server(iteration_s=0.01, sequence_s=0.002, slots=6)
  requests = [(start, request(int(tokens))) for start, tokens in zip(
    np.cumsum(rng.exponential(0.5, 200)), rng.integers(1, 100, 200))]
  for _, one in requests:
    one.new = 0
  done = ends(found, requests)
  area = sum(count * (after - at) for (at, count), (after, _) in itertools.pairwise(found.history))
  # Mean number in service = rate x mean time in service: with slots, a request's begins when one is free.
  busy, free = 0.0, []
  for (start, _), end in sorted(zip(requests, done), key=lambda entry: entry[0][0]):
    begin = start if len(free) < 6 else max(start, sorted(free)[-6])
    busy += end - begin
    free.append(end)
  assert area == pytest.approx(busy, rel=1e-6)


# ---- the plan


def groups(rng, count, n):
  for index in range(count):
    used = rng.random(n) < 0.4
    right = (rng.random(n) < rng.choice([0.0, 0.5])) & used
    yield GroupView(right.astype(float), used, used, rng.random(n), index)


@pytest.mark.parametrize("ratio, seed", itertools.product([0.05, 0.25, 2.0], range(5)))
def test_the_budget_is_never_exceeded_and_exact_is_the_plan(ratio, seed):
  rng, config = np.random.default_rng(seed), ResampleConfig(ratio=ratio)
  views = list(groups(rng, 24, 8))
  planned = algorithm.plan_resamples(views, config)
  for mode in ("barrier", "exact", "first"):
    planner = Planner(24, 8, config, mode)
    served = [planner.complete(views[i]) for i in rng.permutation(24)]
    everything = list(itertools.chain(*served))
    pairs = {(chosen.group, chosen.rollout) for chosen in everything}
    assert len(pairs) == len(everything) <= prefix_budget(24 * 8, config) <= ratio * 24 * 8 / 4
    assert len(everything) == len(planned)  # and none of it is left over
    if mode != "first":
      assert pairs == {(chosen.group, chosen.rollout) for chosen in planned}
    if mode == "barrier":
      assert not any(served[:-1])
  if ratio == 2.0:
    exact = Planner(24, 8, config, "exact")
    assert any([exact.complete(view) for view in views][:-1])  # it does begin before the last


# ---- the step


class Fixed:
  """The same questions at every step."""

  def __init__(self, questions):
    self.questions = questions

  def step(self, seed, number, questions, rollouts):
    return self.questions


def question(*rollouts: Rollout) -> Question:
  return Question(0, rollouts, lambda i, k: Rollout([Turn(0, 7)]))


def plain(tokens, tool_s=0.0) -> Rollout:
  turns = [Turn(0, tokens, tool_s)] + [Turn(0, 1)] * bool(tool_s)
  return Rollout(turns, used_tool=bool(tool_s))


def run(questions, policy=simulate.TODAY, n=2, config=GRPO, **speeds) -> Run:
  return Run(Fixed(questions), Plant(**{"servers": 100, "iteration_s": 1.0, "row_s": 0.0} | speeds), policy,
             questions=len(questions), rollouts=n, config=config)


def test_with_servers_without_end_a_step_is_its_longest_episode():
  steps = run([question(plain(5), plain(9)), question(plain(3, tool_s=20.0), plain(2))], update_s=6.0).train(3)
  assert [step.step_s for step in steps] == [24 + 6] * 3
  assert [step.tokens for step in steps] == [5 + 9 + 4 + 2] * 3


def test_phases_add_up():
  for delta, push in ((False, 2 + 1 + 1), (True, 3e-3 * 3 + 1)):
    found = run([question(plain(5), plain(9))], Policy(delta=delta), servers=1, update_s=6.0, control_s=1.0,
                push_bytes=100.0, write_rate=50.0, load_rate=100.0)
    (step,) = found.train(1, warm=1)
    assert (step.push_s, step.wait_s, step.update_s) == (pytest.approx(push), pytest.approx(9), 6)
    assert sum(found.servers[0].seconds.values()) == pytest.approx(step.step_s)


@pytest.mark.parametrize("update_s, staleness, seconds, lag", [
  (6.0, 0, 16, 0), (6.0, 1, 10, 1), (20.0, 0, 30, 0), (20.0, 1, 20, 1), (20.0, 2, 20, 2)])
def test_staleness_hides_the_shorter_of_two(update_s, staleness, seconds, lag):
  steps = run([question(plain(10), plain(10))], Policy(staleness), update_s=update_s).train(4, warm=4)
  assert [step.step_s for step in steps] == [seconds] * 4
  assert [step.lag for step in steps] == [lag] * 4


def test_the_next_collection_beside_stragglers():
  # 18 of 20 rollouts take 5 s, then two take 15. Beside them the next one begins at 5.
  many = [question(plain(5), plain(5)) for _ in range(9)] + [question(plain(15), plain(15))]
  apart, beside = (run(many, Policy(1, overlap=overlap)).train(4, warm=4) for overlap in (False, True))
  assert [step.step_s for step in apart] == [15] * 4
  assert np.mean([step.step_s for step in beside]) < 15


def test_the_slowest_are_dropped_and_counted():
  (step,) = run([question(plain(5), plain(9, tool_s=3.0), plain(2))], Policy(extra=1)).train(1)
  assert step.step_s == 5
  assert [rollout.used_tool for rollout in step.dropped] == [True]
  assert [rollout.tokens for rollout in step.kept] == [2, 5]


@pytest.mark.parametrize("mode, wait", [("barrier", 30 + 7), ("exact", 30), ("first", 30)])
def test_continuations_begin_when_their_question_is_complete(mode, wait):
  hard = question(plain(5, tool_s=1.0), plain(4))  # triggered; complete at 7, its continuations take 7
  config = ResampleConfig(ratio=4.0)  # four prefixes: whatever the other question is, this one is in the plan
  (step,) = run([hard, question(plain(30), plain(3))], Policy(resample=mode), config=config).train(1)
  assert (step.wait_s, step.triggered, step.prefixes, step.continuations) == (wait, 1, 1, 4)
  assert step.tokens == 6 + 4 + 30 + 3 + 4 * 7


# ---- what it is fed with


def test_the_preset_is_the_papers_gap():
  made = simulate_inputs.WORKLOADS["8b"].step(0, 0, 600, 8)
  assert 0.27 < np.mean([rollout.used_tool for one in made for rollout in one.rollouts]) < 0.33
  tried = [[rollout.right for rollout in one.rollouts if rollout.used_tool] for one in made]
  assert 0.35 < np.mean([not any(right) for right in tried if right]) < 0.45
  assert [one.rollouts for one in made[:9]] == [
    one.rollouts for one in simulate_inputs.WORKLOADS["8b"].step(0, 0, 9, 8)]


def record(group, tokens, branch=None):
  """A dumped rollout: 20 tokens of prompt, one turn."""
  extra = {"group": group} | ({} if branch is None else {"branch": 0, "source": branch, "prefix_end": 20})
  return {"first_prompt_tokens": 25, "start": 20, "reward": 0.0, "seed": tokens, "calls": [], "extra": extra,
          "transcript": {"kinds": [[0, 20], [1, tokens - 1], [4, 1]]}}


def test_a_dumped_rollout_is_its_turns():
  line = record(0, 3) | {"reward": 1.0, "calls": [{"turn": 0, "seconds": 0.5}, {"turn": 0, "seconds": 0.25}]}
  line["transcript"]["kinds"] = [[0, 20], [1, 6], [4, 1], [2, 5], [4, 1], [5, 1], [3, 30], [5, 4], [1, 8], [4, 2]]
  (prompt, (rollout,), _), = simulate_inputs._questions([line])
  assert prompt == 25
  assert rollout.turns == [Turn(0, 13, 0.75), Turn(35, 10, 0)]
  assert (rollout.used_tool, rollout.right, rollout.call_at) == (True, True, 8)


@pytest.fixture
def folder(tmp_path):
  """A run of GRPO, ten steps: 10 ms an iteration and 1 ms a token of it, 5 s and 1 ms a token an update."""
  config = {"rl": {"recipe": "grpo", "questions": 3, "num_rollouts": 2, "resample": {"ratio": 0.0, "k": 4}},
            "rollout": {"engine": "embedded", "embedded": {"decode_block": 1, "max_running": 64}}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  dumps = tmp_path / "rl" / "rollouts"
  dumps.mkdir(parents=True)
  rng, lines = np.random.default_rng(0), []
  for step in range(1, 11):
    lengths = rng.integers(20, 100, (3, 2))
    records = [record(group, int(tokens)) for group, own in enumerate(lengths) for tokens in own]
    (dumps / f"step_{step:06d}.jsonl").write_text("\n".join(map(json.dumps, records)))
    rollout, update = 0.01 * lengths.max() + 0.001 * lengths.sum(), 5 + 0.001 * (3 * 25 + lengths.sum())
    lines.append({"time/rollout_s": rollout, "time/resample_s": 0.0, "time/update_s": update, "time/weights_s": 0.1,
                  "time/step_s": rollout + update + 0.1, "time/compile_s": 9.0 * (step == 1),
                  "time/engine_compilations": 3, "rollout/rollouts": 6.0, "rollout/turns_mean": 1.0,
                  "rollout/turns_max": 1.0, "rollout/length_max": float(lengths.max()),
                  "rollout/length_mean": lengths.mean(), "pack/tokens": float(3 * 25 + lengths.sum())})
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return tmp_path


def test_speeds_are_fitted_and_predict_a_run(folder, capsys):
  _, steps = simulate_inputs.read_run(folder)
  assert [step.compiled for step in steps] == [True] + [False] * 9
  plant = simulate_inputs.fit_plant(json.loads((folder / "config.json").read_text()), steps[1:], steps)
  assert (plant.iteration_s, plant.sequence_s, plant.update_s, plant.row_s) == pytest.approx((0.01, 0.001, 5, 0.001))
  simulate.main(["--run", str(folder), "--check"])
  printed = capsys.readouterr().out
  assert "off by 0 % in the median and by 0 % at most" in printed
  assert "| step |" in printed


def test_a_run_without_dumps_says_what_to_do(folder):
  for dump in (folder / "rl" / "rollouts").iterdir():
    dump.unlink()
  with pytest.raises(SystemExit, match="dump_every=1"):
    simulate.main(["--run", str(folder)])


def test_tables_and_picture(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(simulate, "WARM", 0)
  monkeypatch.setattr(simulate, "TABLES", {"One?": {"as it is": Policy(), "2 more": Policy(extra=2)}})
  picture = tmp_path / "step.png"
  simulate.main(["--questions=4", "--samplers=2", "--trainers=2", "--steps=1", f"--plot={picture}"])
  printed = capsys.readouterr().out
  rows = collections.Counter(line.count("|") for line in printed.splitlines() if "|" in line)
  assert rows == {19: 4}  # head, rule, two policies
  assert "- 2 more: dropped 8 a step" in printed  # 2 of each of 4 questions
  assert picture.stat().st_size > 1000


@pytest.mark.parametrize("flags, message", [
  (["--check"], "--run"), (["--split"], "--gpus"), (["--steps=0"], "--steps=0"),
  (["--samplers=3", "--tensor_parallel=2"], "whole servers")])
def test_wrong_flags(flags, message, capsys):
  with pytest.raises(SystemExit):
    simulate.main(flags)
  assert message in capsys.readouterr().err


def test_a_faster_machine_is_faster():
  slow, fast = (simulate_inputs.h100_8b(samplers, 4) for samplers in (4, 16))
  means = [np.mean([step.step_s for step in Run(
    simulate_inputs.WORKLOADS["8b"], plant, Policy(), questions=32, rollouts=8, config=ResampleConfig()).train(2)])
           for plant in (slow, fast)]
  assert means[0] > means[1] and not math.isnan(means[1])
