"""Diagnosis of foreign logs: read as written, counted as a second count has it, without JAX."""

import collections
import json
import pathlib
import random
import subprocess
import sys

import pytest
from scipy.stats import binomtest

from axpo_jax.eval.diagnose.__main__ import main
from axpo_jax.eval.diagnose.figures import diagnose
from axpo_jax.eval.diagnose.intervals import wilson
from axpo_jax.eval.diagnose.reading import read
from axpo_jax.eval.diagnose.traces import Call, Fields, Trace, TraceError
from axpo_jax.eval.diagnose.warnings import collapse
from axpo_jax.rl import census
from axpo_jax.rl.acting import acting_census

REPO = pathlib.Path(__file__).parents[2]
# What each kind of call looks like in the two foreign ways of writing, and what it counts as.
KINDS = ("ok", "tool_error", "bad_json", "no_result")


def episodes(seed: int) -> list[dict]:
  """What happened, before anyone writes it down: 6 questions x 5 rollouts x 3 steps."""
  rng = random.Random(seed)
  out = []
  for step in (1, 2, 3):
    for question in range(6):
      for _ in range(5):
        calls = []
        if rng.random() < 0.5:
          calls = [(rng.choice(["lookup", "draw"]), rng.choices(KINDS, [6, 2, 1, 1])[0])
                   for _ in range(rng.choice([1, 1, 2]))]
        out.append({"question": f"q{question}", "step": step, "right": rng.random() < 0.4,
                    "calls": calls, "mentions": rng.random() < 0.3,
                    "acting": ("act", "decline", "either")[question % 3]})
  return out


def counted(items: list[dict]) -> dict[str, tuple[int, int]]:
  """The figures again, as plainly as can be."""
  n = collections.Counter()
  of = collections.Counter()

  def add(name, yes):
    n[name] += bool(yes)
    of[name] += 1

  groups = collections.defaultdict(list)
  for item in items:
    groups[item["step"], item["question"]].append(item)
  for members in groups.values():
    tool = [m for m in members if m["calls"]]
    plain = [m for m in members if not m["calls"]]
    if tool:
      add("tool_all_wrong_rate", all(not m["right"] for m in tool))
    if plain:
      add("no_tool_all_wrong_rate", all(not m["right"] for m in plain))
    worked = any(m["right"] for m in tool)
    for m in members:
      add("success_rate", m["right"])
      add("tool_attempt_rate", m["calls"])
      add("mention_without_call_rate", not m["calls"] and m["mentions"])
      for name, error in m["calls"]:
        add("tool_error_rate", error != "ok")
        add(f"error_rate of {name}", error != "ok")
      if m["calls"]:
        add("tool_success_rate", m["right"])
        add("stop_after_first_call_rate", len(m["calls"]) == 1)
      else:
        add("no_tool_success_rate", m["right"])
        add("declined_well", m["right"])
        add("failed_to_act", not m["right"] and worked)
        add("acting_failed_too", not m["right"] and tool and not worked)
        add("nobody_acted", not m["right"] and not tool)
  return {name: (n[name], of[name]) for name in of}


def as_openai(item: dict) -> dict:
  thought = "I could use a tool." if item["mentions"] else "I know this."
  messages = [{"role": "system", "content": "Be right."},
              {"role": "user", "content": [{"type": "text", "text": item["question"]}]}]
  for number, (name, kind) in enumerate(item["calls"]):
    arguments = '{"at": ' if kind == "bad_json" else '{"at": 1}'
    messages.append({"role": "assistant", "content": None, "reasoning_content": thought,
                     "tool_calls": [{"id": f"c{number}", "type": "function",
                                     "function": {"name": name, "arguments": arguments}}]})
    if kind != "no_result":
      text = {"ok": '{"found": 3}', "tool_error": '{"error": "no such place"}',
              "bad_json": "Error: cannot parse"}[kind]
      messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": text})
  messages.append({"role": "assistant", "content": "It is 3.", "reasoning_content": thought})
  return {"messages": messages, "metadata": {
    "correct": item["right"], "qid": item["question"], "step": item["step"]}}


def qwen_turns(item: dict) -> list[tuple[str, str]]:
  # A call quoted in the thinking is no call; where there is none at all, it would be a mention.
  thought = "I could use a tool." if item["mentions"] else "I know this."
  quoted = " <tool_call>{}</tool_call> is how." if item["calls"] else ""
  thought = f"<think>\n{thought}{quoted}\n</think>\n"
  turns = [("user", item["question"])]
  for name, kind in item["calls"]:
    inside = '{"name": ' if kind == "bad_json" else json.dumps(
      {"name": name, "arguments": {"at": 1}})
    turns.append(("assistant", f"{thought}<tool_call>\n{inside}\n</tool_call>"))
    if kind != "no_result":
      text = {"ok": "found 3", "tool_error": "Error: no such place",
              "bad_json": "Error: cannot parse"}[kind]
      turns.append(("tool", f"<tool_response>\n{text}\n</tool_response>"))
  return [*turns, ("assistant", f"{thought}It is 3.")]


def as_qwen(item: dict) -> dict:
  """What verl writes: prompt and output as ChatML, score, step."""
  (_, asked), *rest = qwen_turns(item)
  system = 'Call so: <tool_call>\n{"name": <name>}\n</tool_call>'
  role = {"tool": "user", "assistant": "assistant"}
  output = "".join(f"<|im_start|>{role[who]}\n{text}<|im_end|>\n" for who, text in rest)
  return {"input": f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
                   "<|im_start|>assistant\n",
          "output": output.removeprefix("<|im_start|>assistant\n"),
          "score": float(item["right"]), "step": item["step"]}


def as_hermes(item: dict) -> dict:
  """ShareGPT turns, by day instead of by step."""
  names = {"user": "human", "assistant": "gpt", "tool": "tool"}
  return {"conversations": [{"from": names[who], "value": text}
                            for who, text in qwen_turns(item)],
          "extra_info": {"score": int(item["right"]), "question_id": item["question"],
                         "date": f"2026-03-0{item['step']}T12:00:00Z"}}


def write(path: pathlib.Path, records: list) -> pathlib.Path:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def unreadable_calls_are_nameless(items: list[dict]) -> list[dict]:
  """In text logs the name of a call that is not JSON is not known."""
  return [{**item, "calls": [("(unreadable)" if kind == "bad_json" else name, kind)
                             for name, kind in item["calls"]]} for item in items]


@pytest.mark.parametrize("style, form, seen", [
  (as_openai, "openai", lambda items: items),
  (as_qwen, "text", unreadable_calls_are_nameless),
  (as_hermes, "text", unreadable_calls_are_nameless)])
def test_figures_are_those_of_a_plain_count(style, form, seen, tmp_path):
  items = episodes(seed=5)
  reading = read([write(tmp_path / "log.jsonl", [style(item) for item in items])])
  assert (reading.formats, reading.problems) == ({form: len(items)}, [])
  result = diagnose(reading.traces)
  found = {name: (share["count"], share["of"]) for name, share in result["figures"].items()}
  found |= {f"error_rate of {tool}": (share["errors"], share["calls"])
            for tool, share in result["tools"].items()}
  assert found == counted(seen(items))
  for share in result["figures"].values():
    assert share["value"] == pytest.approx(share["count"] / share["of"])
    assert share["low"] <= share["value"] <= share["high"]
  by_step = [counted([item for item in items if item["step"] == step])["tool_attempt_rate"]
             for step in (1, 2, 3)]
  assert [(row["figures"]["tool_attempt_rate"]["count"], row["rollouts"])
          for row in result["over_time"]] == by_step
  times = [row["when"] for row in result["over_time"]]
  assert times == ([1, 2, 3] if style is not as_hermes
                   else ["2026-03-01", "2026-03-02", "2026-03-03"])


def test_a_plain_text_file_of_conversations(tmp_path):
  items = [item for item in episodes(seed=2) if item["step"] == 1]
  text = ""
  for item in items:
    record = as_qwen(item)
    text += f"reward={int(item['right'])} step={item['step']} question_id={item['question']}\n"
    text += record["input"] + record["output"] + "\n"
  (tmp_path / "log.txt").write_text(text)
  figures = diagnose(read([tmp_path]).traces)["figures"]
  expected = counted(unreadable_calls_are_nameless(items))
  for name in ("success_rate", "tool_attempt_rate", "tool_all_wrong_rate", "tool_error_rate"):
    assert (figures[name]["count"], figures[name]["of"]) == expected[name]


def test_names_agree_with_the_training_metrics():
  """On our own rollouts the figures are those that the loop logs."""
  items = episodes(seed=9)
  traces, groups = [], collections.defaultdict(list)
  for i, item in enumerate(items):
    calls = [Call(name, None if kind == "ok" else kind) for name, kind in item["calls"]]
    traces.append(Trace(str(i), item["question"], item["step"], float(item["right"]), calls,
                        "a tool" if item["mentions"] else "", acting=item["acting"]))
    groups[item["step"], item["question"], item["acting"]].append(census.RolloutStats(
      float(item["right"]), bool(calls), len(calls), 1, 1, "answer",
      collections.Counter(call.error for call in calls if call.error),
      item["mentions"] and not calls))
  stats = [census.GroupStats(members, acting=key[2]) for key, members in groups.items()]
  logged = census.census(stats, prefix="x") | acting_census(stats, prefix="x")
  figures = diagnose(traces)["figures"]
  shared = [name for name in figures if f"x/{name}" in logged]
  assert len(shared) == 16
  for name in shared:
    assert figures[name]["value"] == pytest.approx(logged[f"x/{name}"]), name


@pytest.mark.parametrize("count, of", [(0, 7), (7, 7), (3, 10), (50, 400)])
def test_wilson_is_scipys(count, of):
  interval = binomtest(count, of).proportion_ci(method="wilson")
  assert wilson(count, of) == pytest.approx((interval.low, interval.high))


def test_alike_rollouts_widen_the_interval():
  """100 questions whose 8 rollouts all agree tell as much as 100 rollouts, not as 800."""
  def rate(rollouts):
    return diagnose([Trace("", f"q{q}", None, float(q % 2), [Call("t")])
                     for q in range(100) for _ in range(rollouts)])["figures"]["success_rate"]
  one, many = rate(1), rate(8)
  assert (one["interval"], many["interval"]) == ("wilson", "bootstrap")
  assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], rel=0.2)


def test_bad_lines_are_named_and_counted(tmp_path, capsys):
  good = as_openai(episodes(1)[0])
  path = tmp_path / "log.jsonl"
  path.write_text("\n".join([json.dumps(good), "{broken", json.dumps({"messages": []}),
                             json.dumps(good | {"reward": "maybe"}), "[1]", "",
                             json.dumps(good)]) + "\n")
  assert main([str(path), "--out", str(tmp_path / "out")]) == 0
  result = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
  assert result["rollouts"] == 2
  assert [problem["line"] for problem in result["problems"]] == [2, 3, 4, 5]
  for problem, reason in zip(result["problems"], ("not JSON", "messages", "'maybe'", "object")):
    assert problem["file"] == str(path)
    assert reason in problem["reason"]
  printed = capsys.readouterr().out
  assert f"{path}:2: not JSON" in printed
  assert printed == (tmp_path / "out" / "diagnosis.md").read_text() + "\n"


def test_a_collapse_is_told_with_its_step(tmp_path):
  def at(step, tries):
    return [Trace("", f"q{i}", step, 1.0, [Call("zoom")] * (i < tries)) for i in range(40)]
  steady = [trace for step in range(1, 11) for trace in at(step, 20)]
  falling = [trace for step in range(1, 11) for trace in at(step, 20 if step < 6 else 2)]
  assert "collapse" not in [w["kind"] for w in diagnose(steady)["warnings"]]
  (warning,) = [w for w in diagnose(falling)["warnings"] if w["kind"] == "collapse"]
  assert "from 6 on" in warning["text"]
  assert "50.0 %" in warning["text"]
  assert "5.0 %" in warning["text"]
  assert collapse([]) is None
  assert [w["kind"] for w in diagnose(at(1, 0))["warnings"]] == ["no_tools"]


def test_strict_tells_by_its_exit_status(tmp_path):
  path = write(tmp_path / "log.jsonl",
               [as_openai(item | {"calls": []}) for item in episodes(1)])
  arguments = [str(path), "--out", str(tmp_path)]
  assert main(arguments) == 0
  assert main([*arguments, "--strict"]) == 1
  assert main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2


def test_fields_can_be_named():
  record = {"score": 0, "result": {"ok": True}, "when": 1_767_225_600}
  fields = Fields({"reward": "result.ok", "when": "when"})
  assert fields.common(record) == {"reward": 1.0, "when": "2026-01-01"}
  assert Fields().common(record) == {"reward": 0.0, "when": None}
  with pytest.raises(TraceError, match="no field"):
    Fields({"rewrd": "x"})


def test_needs_numpy_alone():
  """A team that never trains installs no JAX, transformers or torch."""
  code = ("import sys\n"
          "for name in ('jax', 'flax', 'transformers', 'torch', 'PIL', 'ml_collections'):\n"
          "  sys.modules[name] = None\n"
          "from axpo_jax.eval.diagnose.__main__ import main\n"
          "try: main(['--help'])\n"
          "except SystemExit as end: assert not end.code\n"
          "del sys.modules['jax']\n"
          "import axpo_jax.eval.diagnose.dumps\n"
          "assert 'jax' not in sys.modules\n")
  done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
