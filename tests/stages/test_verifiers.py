"""Environments of the verifiers package: its own TextArena games and rubric judge, and a taskset of ours.

verifiers 0.4 pins a version of mcp that our MCP tools are beyond: run this in an environment of its own, with
`pip install verifiers textarena nltk`. Hangman draws from a word list of NLTK's, which lies on the network; here
it is a file with the same name and few words.
"""

import asyncio
import functools
import json
import re

import jax
import pytest

from axpo_jax.agent.environment import PolicyTurn
from axpo_jax.model import sharding
from axpo_jax.stages import experiment
from axpo_jax.stages.metrics import read_metrics
from tests.agent import chat_server
from tests.stages import rigged
from tests.stages.test_plugins import config_of

pytest.importorskip("verifiers", reason="verifiers is not installed: pip install verifiers textarena nltk, in an "
                                        "environment without MCP tools")
from axpo_jax.agent.environments import verifiers as adapter
from axpo_jax.agent.tools import background

# What the policy says to Hangman: one letter in brackets.
LETTERS = {
  "\n": {"</think>": 1.0},
  "</think>": {"[": 1.0},
  "[": {"A": 0.5, "B": 0.5},
  "A": {"]": 1.0},
  "B": {"]": 1.0},
  "]": {"<|im_end|>": 1.0},
}
ENVIRONMENT = "axpo_jax.agent.environments.verifiers:Taskset"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(
    sharding.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """NLTK's word list, in miniature, where NLTK looks for it."""
  nltk = pytest.importorskip("nltk", reason="nltk is not installed: pip install textarena nltk")
  folder = tmp_path_factory.mktemp("nltk")
  corpus = folder / "corpora" / "words"
  corpus.mkdir(parents=True)
  (corpus / "README").write_text("")
  for name in ("en", "en-basic"):
    (corpus / name).write_text("ab\nbaa\nabc\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("NLTK_DATA", str(folder))  # whatever else is in `path` is no trusted folder
    patch.setattr(nltk.data, "path", [str(folder)])
    patch.setattr(nltk, "download", lambda *a, **k: True)  # it would ask the network at every import
    pytest.importorskip("textarena", reason="textarena is not installed: pip install textarena nltk")
    yield


def hangman(**config):
  return {"taskset": "textarena", "config": {"game": "Hangman-v0"} | config, "most": 8}


def run(checkpoint, folder, arguments):
  """The metrics of two steps, and the dumped rollouts of the last."""
  path = folder / "tasks.jsonl"
  others = {name: value for name, value in arguments.items() if name != "taskset"}
  adapter.main([arguments["taskset"], str(path), json.dumps(others)])
  config = config_of(checkpoint, folder, reward="environment", environment=ENVIRONMENT,
                     environment_args=json.dumps(arguments))
  config.data.path = str(path)
  config.agent.max_total_tokens, config.batch.length, config.eval.max_total_tokens = 1024, 1216, 1024  # rules of a game
  experiment.run(config, folder / "run")
  dumped = (folder / "run" / "rl" / "rollouts" / "step_000002.jsonl").read_text().splitlines()
  return ([line for line in read_metrics(folder / "run") if "rollout/reward_mean" in line],
          [json.loads(line) for line in dumped])


def verdict(prompt):
  """A judge who looks whether an A was guessed. It names the criteria that it was asked for."""
  response = prompt.partition("Response")[2] or prompt
  said = "yes" if "[A]" in response else "no"
  return json.dumps({"verdicts": [{"name": name, "reason": "seen", "verdict": said}
                                  for name in re.findall(r"^- (\w+): ", prompt, re.MULTILINE)]})


@pytest.mark.slow
def test_a_game_of_the_package_with_its_rubric_judge(words, tmp_path):
  (tmp_path / "rubric.json").write_text(json.dumps([{"name": "vowel", "text": "Was an A guessed?"}]))
  checkpoint = rigged.write_policy(tmp_path / "policy", follow=LETTERS)
  with chat_server.serving(verdict) as (url, asked):
    judge = {"id": "rubric", "path": str(tmp_path / "rubric.json"), "weight": 0.5, "model": "judge", "base_url": url,
             "api_key_var": "HOME"}
    lines, dumped = run(checkpoint, tmp_path, hangman(task={"judges": [judge]}))
  assert asked
  assert all(line["rollout/failed"] == 0 and line["train/logp_gap_abs_max"] < 1e-4 for line in lines)
  assert {len(rollout["transcript"]["rewards"]) for rollout in dumped} >= {2}  # several turns
  for rollout in dumped:
    noted = rollout["turn_metadata"][-1]
    assert rollout["reward"] == pytest.approx(noted["rewards"]["game_reward"] + noted["rewards"]["rubric"])
    assert noted["rewards"]["rubric"] == 0.5 * noted["metrics"]["rubric/vowel"]
  assert {rollout["turn_metadata"][-1]["metrics"]["rubric/vowel"] for rollout in dumped} == {0.0, 1.0}
  assert {rollout["turn_metadata"][-1]["rewards"]["game_reward"] for rollout in dumped} >= {0.0, 1.0}


@pytest.mark.slow
def test_a_taskset_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / "own_tasks.py").write_text(TASKS)
  monkeypatch.syspath_prepend(str(tmp_path))
  _, dumped = run(rigged.write_policy(tmp_path / "policy"), tmp_path, {"taskset": "own_tasks:Letters"})
  assert {0.5, 1.5} <= {rollout["reward"] for rollout in dumped}
  for rollout in dumped:
    if rollout["turn_metadata"]:
      noted = rollout["turn_metadata"][-1]
      assert rollout["reward"] == sum(noted["rewards"].values()) and "turns" in noted["metrics"]


def test_the_same_turns_give_the_same_replies(words):
  """So a frozen prefix can be replayed."""
  taskset = adapter.Taskset(**hangman())
  question = question_of(taskset)
  assert "You are playing Hangman" in taskset.opening(question).text
  first, second = (play(taskset, question, ["[B]", "[B]"]) for _ in range(2))
  assert first == second
  assert first[0].reply and first[0].reward == 0.0


def test_the_last_turn_ends_the_game(words):
  """A limit that ends the episode ends the game too: it is scored as unfinished."""
  taskset = adapter.Taskset(**hangman())
  only, = play(taskset, question_of(taskset), ["[B]"], last=True)
  assert only.reply is None and only.metadata["rewards"] == {"game_reward": 0.0}


def test_what_cannot_be_played_is_refused(words, tmp_path):
  with pytest.raises(ValueError, match="endless"):
    adapter.Taskset("textarena", {"game": "Hangman-v0"})
  with pytest.raises(ValueError, match="several agents"):
    adapter.Taskset(**hangman(), env={"id": "user-sim"})


def question_of(taskset):
  from axpo_jax.data.question import Question
  record = taskset.questions()[0]
  return Question(id=record["id"], text=record["question"], images=(), answers=(record["answer"],))


def play(taskset, question, texts, *, last=False):
  """The steps that answer some turns."""
  async def episode():
    state = await taskset.start(question, None)
    try:
      return [await taskset.step(state, PolicyTurn(number, text, "", (), last and number == len(texts) - 1))
              for number, text in enumerate(texts)]
    finally:
      await asyncio.wait_for(taskset.close(state), 10)
  return background.run(episode())


TASKS = '''
import verifiers.v1 as vf


class Data(vf.TaskData):
  answer: str = ""


class Letter(vf.Task[Data]):
  @vf.reward(weight=1.0)
  async def right(self, trace):
    return float(self.data.answer in trace.last_reply)

  @vf.reward(weight=0.5)
  async def said_something(self, trace):
    return float(bool(trace.last_reply))

  @vf.metric
  async def turns(self, trace):
    return float(trace.num_turns)


class Letters(vf.Taskset[Letter]):
  def load(self):
    for i in range(12):
      yield Letter(Data(prompt=f"Say letter {i}.", answer="AB"[i % 2]), self.config.task)
'''
