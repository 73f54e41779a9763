"""Answers that a policy writes to stop or to fool the rewards."""

import asyncio
import os
import pathlib
import subprocess
import sys
import time

import pytest

from axpo_jax.agent import mathematics, rewards
from axpo_jax.data.question import Question
from tests.hostile import corpus


@pytest.fixture(scope="module", autouse=True)
def quick_workers():
  """The real processes with a tenth of their time, so that many attacks take seconds."""
  patch = pytest.MonkeyPatch()
  patch.setattr(mathematics, "CPU_SECONDS", 0.2)
  mathematics._threads.cache_clear()
  yield
  patch.undo()
  mathematics._threads.cache_clear()
  mathematics._asked.cache_clear()


@pytest.mark.parametrize("case", corpus.cases("answers"))
def test_answers(case):
  answer = case.get("answer") or "9" * case["long"]
  question = Question("q", "?", (), (case.get("gold", "\\frac{1}{2}"),), kind="math")
  with corpus.bounds(seconds=10):
    assert rewards.judge(question, answer) == 0.0


def test_an_event_loop_goes_on_while_answers_run_out_of_time():
  """32 rollouts with one endless answer: counted as such, asked once, and nobody else waits."""
  question = Question("q", "?", (), ("x^2",), kind="math")
  turns = 0

  async def other():
    nonlocal turns
    while True:
      await asyncio.sleep(0.01)
      turns += 1

  async def main():
    beside = asyncio.create_task(other())
    verdicts = await asyncio.gather(*(rewards.judge_soon(question, f"(({9 - i % 2}!)!)!")
                                      for i in range(32)))
    beside.cancel()
    return verdicts

  with corpus.bounds(seconds=10):
    assert set(asyncio.run(main())) == {rewards.Verdict(0.0, timed_out=True)}
  assert turns > 5  # of 40 in the 0.4 s of two endless answers; where they block the loop, at most 3


ORDINARY = ["12", "-7", "0.75", "1.5", "\\frac{3}{4}", "\\frac12", "2\\sqrt{3}", "4\\pi", "60^\\circ", "\\frac{\\pi}{6}",
            "3 + \\sqrt{2}", "50 - \\frac{25\\pi}{4}", "x = 5", "2x + 1", "x^2 - 1", "5 \\text{ cm}", "(1, 2)", "3:4",
            "1,000", "2^{10}"]


def cpu_seconds(pid: int) -> float:
  """Of a process, the children that it has waited for, and those that run."""
  used = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
  children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
  return sum(map(int, used)) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, map(int, children)))


def test_ordinary_answers_cost_less_than_two_milliseconds():
  """Of CPU time, this process's share included: 400 pairs of answer and gold answer."""
  questions = [Question("q", "?", (), (gold,), kind="math") for gold in ORDINARY]
  worker = mathematics._Worker()
  try:
    assert worker.ask(("same", "x", "x"))["result"]
    asked, begin, before = [], time.process_time(), cpu_seconds(worker._process.pid)
    for answer in ORDINARY:
      for gold, found in (pair for question in questions for pair in rewards._by_rule(question, answer)):
        if found is None:
          asked.append(worker.ask(("same", answer, gold)))
    used = time.process_time() - begin + cpu_seconds(worker._process.pid) - before
  finally:
    worker._kill()
  assert not any("died" in said for said in asked) and len(asked) > 200
  assert used / len(ORDINARY)**2 < 2e-3, f"{used / len(ORDINARY)**2 * 1e3:.2f} ms"


IGNORING = """
import signal
from axpo_jax.agent import mathematics
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
mathematics.CPU_SECONDS = 0.2
assert mathematics.same("((9!)!)!", "x^2") is None
"""


def test_a_parent_that_ignores_and_blocks_the_timers_signal_changes_nothing():
  """As a profiler in the trainer's process may; what it ignores and blocks is inherited. Without its limit
  the answer takes the minute of wall time."""
  subprocess.run([sys.executable, "-c", IGNORING], check=True, timeout=40,
                 cwd=pathlib.Path(__file__).parents[2])


def test_thousands_of_open_boxes():
  with corpus.bounds(seconds=2):
    assert rewards.extract_answer("</think>" + "\\boxed{" * 30_000) is None


@pytest.mark.parametrize("options", [(), ("red", "blue", "green")])
@pytest.mark.parametrize("case", corpus.cases("choices"))
def test_hedges(case, options):
  if not options and case["case"].endswith("text alone"):
    pytest.skip("only the options' texts tell")
  assert rewards.judge(Question("q", "?", (), ("A",), options=options), case["answer"]) == 0.0


@pytest.mark.parametrize("answer, options", [
    ("A. red", ()), ("A. 5 g", ()), ("A) a cat", ()), ("(A) two cats", ("two cats", "a dog")),
    ("A. not enough information", ("not enough information", "a dog")),
    ("A. the red one", ("red", "blue")), ("A: red or blue", ("red or blue", "blue"))])
def test_no_hedges(answer, options):
  assert rewards.judge(Question("q", "?", (), ("A",), options=options), answer) == 1.0
