"""Trajectories of other makers as SFT reads them, and ours as others read them: there and back."""

import asyncio
import base64
import io
import json

import atif
import pytest
from PIL import Image

from axpo_jax.agent.rollout import ANSWER, Rollout
from axpo_jax.diagnose.reading import read
from axpo_jax.errors import ConfigError
from axpo_jax.model.images import ImageLimits
from axpo_jax.rollouts.dump import dump_rollouts
from axpo_jax.stages import export
from axpo_jax.stages.conversations import Conversations, Prompts
from axpo_jax.stages.metrics import read_metrics
from tests import children
from tests.agent.conftest import replay, scripted, world  # noqa: F401
from tests.stages import rigged

# Written in pieces that no tokenizer would choose: only token ids bring them back.
CALL = ('lo', 'ok\n</think>\n\n<tool_call>\n{"name": "image_zoom_in", "arguments": {"bbox_2d": [100, 100, 300, 300], '
        '"label": "box"}}\n</tool_call><|im_end|>')
BROKEN = ('again\n</think>\n\nHm.\n<tool_call>\n{"name": "image_zoom_in", "argu\n</tool_call><|im_end|>',)
RIGHT = ("I s", "ee\n</think>\n\n<answer>\n\\boxed{K}\n</answer><|im_end|>")


@pytest.fixture
def rollout(world, scripted):  # noqa: F811
  turns = [[i for part in text for i in world.ids(part)] for text in (CALL, BROKEN, RIGHT)]
  return asyncio.run(world.resume(world.start(), scripted(turns)))


@pytest.fixture
def prompts(world):  # noqa: F811
  return Prompts(world.chat, world.processor, ImageLimits(64 * 64, 96 * 96), world.crop, "Be brief.",
                 world.tools.schemas(), 6, world.chat.vocab_size)


@pytest.fixture
def run(tmp_path, rollout, world):  # noqa: F811
  dump_rollouts(tmp_path / "run" / "rl" / "rollouts" / "step_000002.jsonl", [rollout] * 2, chat=world.chat,
                extra=[{"gold": ["K"], "category": "perception"}, {}])
  return tmp_path / "run"


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_atif_comes_back_token_for_token(run, rollout, prompts, tmp_path, capsys):
  assert export.main([str(run), str(tmp_path / "set")]) == 0
  assert "2 trajectories" in capsys.readouterr().out
  first, _ = lines(tmp_path / "set" / "trajectories.jsonl")
  made = atif.Trajectory.model_validate(first)
  assert [step.source for step in made.steps] == ["system", "user", "agent", "agent", "agent"]
  assert made.steps[2].tool_calls[0].arguments["bbox_2d"] == [100, 100, 300, 300]
  assert made.steps[4].message == "<answer>\n\\boxed{K}\n</answer>"
  for back in Conversations(tmp_path / "set", prompts):
    a, b = back.transcript, rollout.transcript
    assert (a.ids, a.kinds) == (b.ids, b.kinds)
    assert [image.shown.key for image in a.images] == [image.shown.key for image in b.images]
    assert (back.reward, back.question_id) == (1.0, rollout.question_id)


def test_chat_comes_back_with_the_same_text(run, rollout, prompts, tmp_path, world):  # noqa: F811
  assert export.main([str(run), str(tmp_path / "set"), "--format=chat"]) == 0
  back = Conversations(tmp_path / "set", prompts)[0]
  assert world.chat.decode(back.transcript.ids) == world.chat.decode(rollout.transcript.ids)
  assert [image.shown.key for image in back.transcript.images] == [
    image.shown.key for image in rollout.transcript.images]


@pytest.mark.parametrize("form", ["atif", "chat"])
def test_diagnose_reads_what_was_exported(run, tmp_path, form):
  export.main([str(run), str(tmp_path / "set"), f"--format={form}"])
  found = read([tmp_path / "set" / "trajectories.jsonl"])
  assert not found.problems and not found.unread
  assert [call.error for call in found.traces[0].calls] == [None, "bad_json"]
  assert found.traces[0].right


def test_wrong_rollouts_are_left_out_unless_asked_for(run, rollout, tmp_path, world, capsys):  # noqa: F811
  rollout.reward = 0.0
  dump_rollouts(run / "rl" / "rollouts" / "step_000002.jsonl", [rollout], chat=world.chat)
  assert export.main([str(run), str(tmp_path / "set")]) == 2
  assert "no right trajectory" in capsys.readouterr().err
  assert export.main([str(run), str(tmp_path / "set"), "--all"]) == 0


def test_rollouts_of_the_evaluation_are_left_out(run, rollout, tmp_path, world, capsys):  # noqa: F811
  dump_rollouts(run / "eval" / "held_out" / "rollouts_00000.jsonl", [rollout], chat=world.chat)
  assert export.main([str(run), str(tmp_path / "set")]) == 0
  assert "2 trajectories" in capsys.readouterr().out
  assert export.main([str(run / "eval"), str(tmp_path / "set")]) == 0  # named itself: it is meant


@pytest.mark.parametrize("form", ["atif", "chat"])
def test_an_environments_reply_is_a_message_of_the_user(prompts, tmp_path, world, form):  # noqa: F811
  made = world.start()
  made.append_sampled(world.ids("Hm.\n</think>\n\nIs it 4?<|im_end|>"), [0.0] * len(
    world.ids("Hm.\n</think>\n\nIs it 4?<|im_end|>")), 0)
  made.append_observation(world.chat.follow_up_ids("Higher."), [])
  made.append_sampled(world.ids("So.\n</think>\n\n5<|im_end|>"), [0.0] * len(world.ids("So.\n</think>\n\n5<|im_end|>")), 0)
  dump_rollouts(tmp_path / "run" / "step_1.jsonl", [Rollout("q", made, 1.0, "5", ANSWER, [], 0, 0, 0)], chat=world.chat)
  assert export.main([str(tmp_path / "run"), str(tmp_path / "set"), f"--format={form}"]) == 0
  (line,) = lines(tmp_path / "set" / "trajectories.jsonl")
  said = [(step["source"], step["message"]) for step in line["steps"]] if form == "atif" else [
    (message["role"], message["content"]) for message in line["messages"]]
  assert said[2:] == [("agent" if form == "atif" else "assistant", "Is it 4?"), ("user", "Higher."),
                      ("agent" if form == "atif" else "assistant", "5")]
  (back,) = Conversations(tmp_path / "set", prompts)
  assert world.chat.decode(back.transcript.ids) == world.chat.decode(made.ids)


def test_a_damaged_dump_is_one_line(run, tmp_path, capsys):
  path = run / "rl" / "rollouts" / "step_000002.jsonl"
  path.write_text(path.read_text() + '{"reward": 1.0, "stop"\n')
  assert export.main([str(run), str(tmp_path / "set")]) == 2
  assert "step_000002.jsonl, line 3 is damaged" in capsys.readouterr().err
  assert not (tmp_path / "set" / "trajectories.jsonl").exists()  # two of three lines would pass for the set


# ---- other makers ----


def picture(folder, name="a.png"):
  image = Image.new("RGB", (96, 64), (200, 40, 40))
  image.save(folder / name)
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def openai(data):
  return {"messages": [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                                 {"type": "text", "text": "Which letter?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Small.", "tool_calls": [
      {"id": "1", "function": {"name": "image_zoom_in", "arguments": '{"label": "x"}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": [
      {"type": "text", "text": "a crop"}, {"type": "image_url", "image_url": {"url": "a.png"}}]},
    {"role": "assistant", "content": "\\boxed{K}", "reasoning_content": "A K."}]}


def sharegpt(data):
  call = {"name": "image_zoom_in", "arguments": {"label": "x"}}
  return {"images": ["a.png", "a.png"], "conversations": [
    {"from": "human", "value": "<image>Which letter?"},
    {"from": "gpt", "value": f"<think>Small.</think>\n<tool_call>\n{json.dumps(call)}\n</tool_call>"},
    {"from": "observation", "value": "a crop<image>"},
    {"from": "gpt", "value": "<think>A K.</think>\\boxed{K}"}]}


def trl(data):
  return {"images": ["a.png", "a.png"], "tools": None, "messages": [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Which letter?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "<think>Small.</think>"}], "tool_calls": [
      {"function": {"name": "image_zoom_in", "arguments": {"label": "x"}}}]},
    {"role": "tool", "content": [{"type": "text", "text": "a crop"}, {"type": "image"}]},
    {"role": "assistant", "content": "<think>A K.</think>\\boxed{K}"}]}


def harbor(data):
  image = {"type": "image", "source": {"media_type": "image/png", "path": "a.png"}}
  return {"schema_version": "ATIF-v1.6", "agent": {"name": "x", "version": "1"}, "steps": [
    {"step_id": 1, "source": "user", "message": [image, {"type": "text", "text": "Which letter?"}]},
    {"step_id": 2, "source": "agent", "message": "", "reasoning_content": "Small.", "tool_calls": [
      {"tool_call_id": "1", "function_name": "image_zoom_in", "arguments": {"label": "x"}}],
      # Of another tokenizer: they do not say what the step says.
      "metrics": {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5]},
      "observation": {"results": [{"source_call_id": "1", "content": [{"type": "text", "text": "a crop"}, image]}]}},
    {"step_id": 3, "source": "agent", "message": "\\boxed{K}", "reasoning_content": "A K."}]}


@pytest.mark.parametrize("maker", [openai, sharegpt, trl, harbor])
def test_four_formats_say_the_same(maker, prompts, tmp_path, world):  # noqa: F811
  (tmp_path / "set.jsonl").write_text(json.dumps(maker(picture(tmp_path))) + "\n")
  (found,) = Conversations(tmp_path / "set.jsonl", prompts)
  assert (found.reward, found.failed) == (1.0, False)
  text = world.chat.decode(found.transcript.ids)
  assert text.startswith("<|im_start|>system\nBe brief.")
  assert ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which letter?<|im_end|>\n"
          "<|im_start|>assistant\n<think>\nSmall.\n</think>\n\n<tool_call>\n"
          '{"name": "image_zoom_in", "arguments": {"label": "x"}}\n</tool_call><|im_end|>\n'
          "<|im_start|>user\n<tool_response>\na crop<|vision_start|><|image_pad|><|vision_end|>\n</tool_response>"
          "<|im_end|>\n<|im_start|>assistant\n<think>\nA K.\n</think>\n\n\\boxed{K}<|im_end|>") in text
  sampled = world.chat.decode([i for i, own in zip(found.transcript.ids, found.transcript.sampled) if own])
  assert "crop" not in sampled and sampled.count("<|im_end|>") == 2


def test_a_later_message_of_the_user_is_given(prompts, tmp_path, world):  # noqa: F811
  record = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"},
                         {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"},
                         {"role": "user", "content": "Thanks."}]}
  (tmp_path / "set.json").write_text(json.dumps([record]))
  (found,) = Conversations(tmp_path / "set.json", prompts)
  text = world.chat.decode(found.transcript.ids)
  assert "1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n2" in text
  assert text.endswith("2<|im_end|>")


GOOD = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]}


@pytest.mark.parametrize("record, reason", [
  ("{", "line 1"), ("[]", "not a JSON object"), ("[" * 100_000, ""),
  ({"messages": [{"role": "user", "content": "?"}]}, "no turn of the agent"),
  ({"messages": [{"role": "assistant", "content": "1"}]}, "no message of the user"),
  ({"messages": [*GOOD["messages"], {"role": "assistant", "content": "[TOOL_CALLS] x"}]}, "no notation explains"),
  ({"images": ["../secret.png"], **GOOD}, "leaves"),
  ({"images": ["/etc/passwd"], **GOOD}, "leaves"),
  ({"images": ["https://example.com/a.png"], **GOOD}, "network"),
  ({"images": ["a.png"] * 7, **GOOD}, "max_images=6"),
  ({"images": ["a.png"] * 2, "messages": [{"role": "user", "content": "<image>One?"}, GOOD["messages"][1]]},
   "1 marks <image> for 2 images"),
  ({"images": ["a.png"], "messages": [GOOD["messages"][0], {"role": "assistant", "content": "<image>"}]},
   "a turn of the agent holds an image"),
  ({"messages": [{"role": "system", "content": "<|im_end|>"}, *GOOD["messages"]]}, "special token"),
])
def test_a_bad_record_costs_itself(record, reason, prompts, tmp_path):
  picture(tmp_path)
  bad = record if isinstance(record, str) else json.dumps(record)
  (tmp_path / "set.jsonl").write_text(f"{bad}\n \n{json.dumps(GOOD)}\n\n")  # blank lines are no records
  found = list(Conversations(tmp_path / "set.jsonl", prompts))
  assert [rollout.failed for rollout in found] == [True, False]
  if record != "{":
    assert reason in found[0].error
  (tmp_path / "set.jsonl").write_text(f"{bad}\n")
  with pytest.raises(ConfigError, match="none of the first 1 records"):
    Conversations(tmp_path / "set.jsonl", prompts)


def test_text_of_special_tokens_stays_text(prompts, tmp_path, world):  # noqa: F811
  record = {"messages": [{"role": "user", "content": "What is <|image_pad|>?"},
                         {"role": "assistant", "content": "It is <|im_end|>.", "reasoning_content": "<tool_call>"}]}
  (tmp_path / "set.jsonl").write_text(json.dumps(record) + "\n")
  (found,) = Conversations(tmp_path / "set.jsonl", prompts)
  assert not found.transcript.images and found.transcript.first_call_span() is None
  assert found.transcript.ids.count(world.chat.tool_call_id) == sum(
    i == world.chat.tool_call_id for i in world.start().ids)  # those of the template alone


@pytest.mark.slow
def test_a_run_learns_from_conversations_by_flags_alone(inputs, tmp_path):
  """A folder with OpenAI chat, ShareGPT, TRL's form and ATIF in it, each with images."""
  folder = tmp_path / "set"
  folder.mkdir()
  data = picture(folder)
  for maker in (openai, sharegpt, trl, harbor):
    (folder / f"{maker.__name__}.jsonl").write_text(json.dumps(maker(data)) + "\n")
  done = children.launch(tmp_path / "run", [
    *rigged.flags(inputs), "--config.stages=('sft',)", "--config.sft.source=conversations",
    f"--config.sft.path={folder}", "--config.sft.steps=6", "--config.sft.examples=4", "--config.sft.max_length=1024",
    "--config.batch.length=1024", "--config.agent.system_prompt=Be brief.", "--config.sft.optimizer.learning_rate=3e-3"])
  assert done.returncode == 0, done.stderr[-4000:]
  metrics = read_metrics(tmp_path / "run")
  assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
  assert metrics[-1]["sft/nll"] < metrics[0]["sft/nll"] - 0.5
  assert (tmp_path / "run" / "sft" / "policy" / "model.safetensors").exists()
