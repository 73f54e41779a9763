"""Logs of other makers for the tests of the diagnosis: what happened, how each format writes it down,
and the figures again, counted as plainly as can be.

A writer of `WRITERS` takes what happened in one rollout and gives one record of its format, made from
the format's own documentation. What it cannot express (JSON that does not parse, where arguments are
objects) it writes as a failed call, and `seen` says so.
"""

import collections
import json
import pathlib
import random

# What each kind of call looks like, and what it counts as.
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




def objects_only(items: list[dict]) -> list[dict]:
  """Where arguments are objects, a call whose JSON is broken cannot be written down."""
  return [{**item, "calls": [(name, "tool_error" if kind == "bad_json" else kind)
                             for name, kind in item["calls"]]} for item in items]


RESULTS = {"ok": '{"found": 3}', "tool_error": "Error: no such place", "bad_json": "Error: cannot parse"}


def thought_of(item: dict) -> str:
  return "I could use a tool." if item["mentions"] else "I know this."


def facts_of(item: dict) -> dict:
  return {"reward": float(item["right"]), "task_id": item["question"], "step": item["step"]}


def as_qwen_messages(item: dict) -> dict:
  """Qwen's text in OpenAI's envelope; the user quotes a tool's answer in the question."""
  (_, asked), *rest = qwen_turns(item)
  messages = [{"role": "user", "content": f"{asked}: why <tool_response>3</tool_response>?"}]
  messages += [{"role": "user" if who == "tool" else who, "content": text} for who, text in rest]
  return {"messages": messages, "score": item["right"], "global_step": item["step"]}


def as_sharegpt(item: dict) -> dict:
  """LLaMA-Factory: turns from function_call and observation, which alternate."""
  turns = [{"from": "human", "value": item["question"]}]
  for name, kind in sorted(item["calls"], key=lambda call: call[1] == "no_result"):
    inside = '{"name": ' if kind == "bad_json" else json.dumps({"name": name, "arguments": {"at": 1}})
    turns.append({"from": "function_call", "value": f"<think>{thought_of(item)}</think>\n{inside}"})
    if kind != "no_result":
      turns.append({"from": "observation", "value": RESULTS[kind]})
  turns.append({"from": "gpt", "value": f"<think>{thought_of(item)}</think>It is 3."})
  return {"conversations": turns, "tools": json.dumps([{"name": "lookup"}]),
          "metadata": {"reward": int(item["right"]), "step": item["step"]}}


def as_swift(item: dict) -> dict:
  """ms-swift: messages of role tool_call and tool_response, all calls of a turn before all results."""
  messages = [{"role": "user", "content": item["question"]}]
  messages.append({"role": "assistant", "content": f"<think>\n{thought_of(item)}\n</think>\n"})
  answered = [(name, kind) for name, kind in item["calls"] if kind != "no_result"]
  silent = [(name, kind) for name, kind in item["calls"] if kind == "no_result"]
  for name, kind in answered + silent:
    inside = '{"name": ' if kind == "bad_json" else json.dumps({"name": name, "arguments": {"at": 1}})
    messages.append({"role": "tool_call", "content": inside})
  messages += [{"role": "tool_response", "content": RESULTS[kind]} for _, kind in answered]
  messages.append({"role": "assistant", "content": "It is 3."})
  return {"messages": messages, "acc": item["right"], "step": item["step"]}


def as_parts(item: dict) -> dict:
  """Content parts of type tool_call, their results in a message of role tool."""
  messages = [{"role": "user", "content": [{"type": "text", "text": item["question"]}]}]
  for number, (name, kind) in enumerate(item["calls"]):
    arguments = '{"at": ' if kind == "bad_json" else '{"at": 1}'
    messages.append({"role": "assistant", "content": [
      {"type": "reasoning", "text": thought_of(item)},
      {"type": "tool_call", "id": f"c{number}", "name": name, "arguments": arguments}]})
    if kind != "no_result":
      messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": [
        {"type": "text", "text": RESULTS[kind]}]})
  messages.append({"role": "assistant", "content": [
    {"type": "reasoning", "text": thought_of(item)}, {"type": "text", "text": "It is 3."}]})
  return {"messages": messages, **facts_of(item)}


def as_anthropic(item: dict) -> dict:
  """Anthropic's blocks; the last message is the response of a logged request."""
  messages = [{"role": "user", "content": item["question"]}]
  for number, (name, kind) in enumerate(item["calls"]):
    messages.append({"role": "assistant", "content": [
      {"type": "thinking", "thinking": thought_of(item), "signature": "x"},
      {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": {"at": 1}}]})
    if kind != "no_result":
      messages.append({"role": "user", "content": [{
        "type": "tool_result", "tool_use_id": f"toolu_{number}", "is_error": kind != "ok",
        "content": [{"type": "text", "text": "3" if kind == "ok" else "no such place"}]}]})
  last = {"role": "assistant", "type": "message", "stop_reason": "end_turn", "content": [
    {"type": "thinking", "thinking": thought_of(item)}, {"type": "text", "text": "It is 3."}]}
  return {"system": "Be right.", "messages": messages, "response": last,
          "tools": [{"name": "lookup", "input_schema": {}}], **facts_of(item)}


def as_responses(item: dict) -> dict:
  """OpenAI's Responses, as NeMo-Gym logs them: items of reasoning, calls and their outputs."""
  output = []
  for number, (name, kind) in enumerate(item["calls"]):
    output.append({"type": "reasoning", "id": f"rs_{number}", "summary": [
      {"type": "summary_text", "text": thought_of(item)}]})
    output.append({"type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}",
                   "name": name, "arguments": '{"at": ' if kind == "bad_json" else '{"at": 1}',
                   "status": "completed"})
    if kind != "no_result":
      output.append({"type": "function_call_output", "call_id": f"call_{number}",
                     "output": RESULTS[kind]})
  output.append({"type": "reasoning", "id": "rs", "summary": [
    {"type": "summary_text", "text": thought_of(item)}]})
  output.append({"type": "message", "role": "assistant", "id": "m", "content": [
    {"type": "output_text", "text": "It is 3.", "annotations": []}]})
  return {"responses_create_params": {"input": [{"role": "user", "content": item["question"]}]},
          "response": {"object": "response", "output": output}, **facts_of(item)}


def as_verifiers(item: dict) -> dict:
  """Rows of verifiers: a prompt with a worked example in it, and a completion."""
  prompt = [{"role": "system", "content": "Be right."},
            {"role": "assistant", "content": 'So: <tool_call>\n{"name": "draw"}\n</tool_call>'},
            {"role": "user", "content": item["question"]}]
  record = as_openai(item)
  completion = [message for message in record["messages"] if message["role"] in ("assistant", "tool")]
  for message in completion:  # a data set of rows keeps its calls as texts
    if "tool_calls" in message:
      message["tool_calls"] = [json.dumps(call) for call in message["tool_calls"]]
  return {"prompt": prompt, "completion": completion, "answer": "3", "task": "places",
          "example_id": item["question"], "reward": float(item["right"]),
          "info": {"step": item["step"]}}


def as_verifiers_trace(item: dict) -> dict:
  """Trace of verifiers 0.4: a graph of messages and named, weighted rewards."""
  nodes = [{"parent": None, "sampled": False, "message": {"role": "user", "content": item["question"]}},
           {"parent": 0, "sampled": False, "message": {  # an example, which the model did not write
             "role": "assistant", "content": "So", "tool_calls": [
               {"id": "c9", "type": "function", "name": "draw", "arguments": "{}"}]}}]
  for message in as_openai(item)["messages"][2:]:
    if "tool_calls" in message:
      message["tool_calls"] = [{"id": call["id"], "type": "function", **call["function"]}
                               for call in message["tool_calls"]]
    nodes.append({"parent": len(nodes) - 1, "sampled": message["role"] == "assistant",
                  "message": message})
  return {"version": 2, "id": "x", "nodes": nodes, "task": {
            "type": "Places", "data": {"q": 1}, "key": item["question"]},
          "rewards": {"right": {"score": float(item["right"]), "weight": 1.0},
                      "style": {"score": 0.5, "weight": 0.0}}, "metrics": {"turns": 2},
          "step": item["step"]}


def as_tau_bench(item: dict) -> dict:
  """tau-bench: `traj`; tasks are counted from 0 in every domain, so their instruction matters."""
  messages = as_openai(item)["messages"]
  return {"task_id": 0, "reward": float(item["right"]), "trial": 0, "traj": messages,
          "info": {"task": {"user_id": "u", "instruction": item["question"], "actions": [
            {"name": "lookup", "kwargs": {}}]}, "step": item["step"]}}


def as_tau2(items: list[dict]) -> dict:
  """results.json of tau2: one object with all simulations. The simulated user calls tools too."""
  runs = []
  for item in items:
    messages = [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Help me."},
                {"role": "user", "content": None, "tool_calls": [
                  {"id": "u0", "name": "look_at_phone", "arguments": {}, "requestor": "user"}]},
                {"role": "tool", "id": "u0", "requestor": "user", "content": "Error", "error": True}]
    for number, (name, kind) in enumerate(item["calls"]):
      messages.append({"role": "assistant", "content": None, "tool_calls": [
        {"id": f"c{number}", "name": name, "arguments": {"at": 1}, "requestor": "assistant"}]})
      if kind != "no_result":
        messages.append({"role": "tool", "id": f"c{number}", "requestor": "assistant",
                         "content": "3", "error": kind != "ok"})
    messages.append({"role": "assistant", "content": "It is 3.", "tool_calls": None, "raw_data": {
      "usage": {"server_tool_use": None}, "thinking_blocks": [
        {"type": "thinking", "thinking": thought_of(item), "signature": "x"}]}})
    runs.append({"id": "r", "task_id": item["question"], "trial": 0, "messages": messages,
                 "timestamp": f"2026-03-0{item['step']}T10:00:00.1", "start_time": "x",
                 "reward_info": {"reward": float(item["right"]), "db_check": None}})
  return {"timestamp": "20260301_101500", "tasks": [{"id": "q0"}], "simulations": runs,
          "info": {"environment_info": {"domain_name": "airline"}, "num_trials": 5}}


def as_atif(item: dict) -> dict:
  """ATIF 1.8: steps with their calls and observations; the first was copied from an older file."""
  steps = [{"source": "user", "message": item["question"]},
           {"source": "agent", "message": "", "is_copied_context": True, "tool_calls": [
             {"tool_call_id": "old", "function_name": "draw", "arguments": {}}]}]
  for number, (name, kind) in enumerate(item["calls"]):
    step = {"source": "agent", "message": "", "reasoning_content": thought_of(item), "tool_calls": [
      {"tool_call_id": f"c{number}", "function_name": name, "arguments": {"at": 1}}]}
    if kind != "no_result":
      step["observation"] = {"results": [{"source_call_id": f"c{number}", "content": RESULTS[kind]}]}
    steps.append(step)
  steps.append({"source": "agent", "message": "It is 3.", "reasoning_content": thought_of(item),
                "timestamp": f"2026-03-0{item['step']}T10:00:00Z"})
  return {"schema_version": "ATIF-v1.8", "session_id": "s", "agent": {
            "name": "terminus", "version": "1", "tool_definitions": [
              {"type": "function", "function": {"name": "lookup"}}]},
          "steps": [{"step_id": number, **step} for number, step in enumerate(steps, 1)],
          "extra": {"reward": float(item["right"]), "task_id": item["question"]}}


def as_swe_agent(item: dict) -> dict:
  """.traj of SWE-agent: each action is a command. It has no reward, and every action an observation."""
  steps = [{"action": f"{name} --at 1\n", "observation": RESULTS.get(kind, "3"), "response": "",
            "thought": thought_of(item), "state": {}, "query": []} for name, kind in item["calls"]]
  steps.append({"action": "", "observation": "", "response": f"{thought_of(item)} It is 3.",
                "thought": thought_of(item), "state": {}, "query": []})
  demonstration = {"role": "assistant", "is_demo": True, "content": "draw --at 1", "action": "draw"}
  return {"environment": "main", "trajectory": steps, "info": {"exit_status": "submitted"},
          "history": [{"role": "system", "content": "Be right."}, demonstration,
                      {"role": "user", "content": item["question"]}],
          "result": {"ok": item["right"], "id": item["question"], "step": item["step"]}}


def answered(items: list[dict]) -> list[dict]:
  """Where every call has its result."""
  return [{**item, "calls": [(name, "ok" if kind == "no_result" else kind)
                             for name, kind in item["calls"]]} for item in items]


def as_they_are(items: list[dict]) -> list[dict]:
  return items


# name -> (writer, the format it is read as, what of it can be seen).
WRITERS = {
  "openai": (as_openai, "messages", as_they_are),
  "qwen": (as_qwen, "completion", unreadable_calls_are_nameless),
  "hermes": (as_hermes, "messages", unreadable_calls_are_nameless),
  "qwen in messages": (as_qwen_messages, "messages", unreadable_calls_are_nameless),
  "sharegpt": (as_sharegpt, "messages", unreadable_calls_are_nameless),
  "ms-swift": (as_swift, "messages", unreadable_calls_are_nameless),
  "parts": (as_parts, "messages", as_they_are),
  "anthropic": (as_anthropic, "messages", objects_only),
  "responses": (as_responses, "responses", as_they_are),
  "verifiers": (as_verifiers, "completion", as_they_are),
  "verifiers trace": (as_verifiers_trace, "verifiers", as_they_are),
  "tau-bench": (as_tau_bench, "messages", as_they_are),
  "atif": (as_atif, "atif", objects_only),
  "swe-agent": (as_swe_agent, "swe-agent", lambda items: answered(objects_only(items))),
}
