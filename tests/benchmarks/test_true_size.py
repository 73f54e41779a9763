"""The rehearsal's parts: a tokenizer with the released ids, a chain that is a call, and what watches."""

import itertools
import sys

import numpy as np
import pytest

from axpo_jax.agent import parse
from axpo_jax.agent.rewards import extract_answer
from axpo_jax.model import hf
from axpo_jax.model.chat import Chat
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.images import ImageProcessor
from benchmarks import random_policy, true_size


def test_tokenizer_has_the_released_ids(tmp_path):
  vocabulary = random_policy.write_tokenizer(tmp_path)
  chat = Chat.from_pretrained(tmp_path)
  assert chat.vocab_size == 151_669
  # The ids in Qwen/Qwen3-VL's tokenizer_config.json.
  assert (chat.im_start_id, chat.im_end_id, chat.vision_start_id, chat.image_pad_id, chat.tool_call_id,
          chat.tool_call_end_id, chat.think_id, chat.think_end_id) == (
            151_644, 151_645, 151_652, 151_655, 151_657, 151_658, 151_667, 151_668)
  assert ImageProcessor.from_checkpoint(tmp_path).factor == 32
  # Whatever way the chain goes, it is a turn that the parser and the rewards understand.
  chain, special = random_policy.chain(vocabulary), parse.SpecialIds.from_chat(chat)
  ids, seen = chat.encode("<think>\n")[-1:], set()
  assert ids[0] in chain
  for first, call in itertools.product((0, -1), repeat=2):
    turn = ids
    while turn[-1] != chat.im_end_id:
      then = list(chain[turn[-1]])
      turn = [*turn, then[call if turn[-1] == chat.think_end_id else first]]
    calls = parse.parse_turn(turn[1:], special, chat.decode)
    seen.add(calls[0].name if calls else extract_answer(chat.decode(turn)))
    assert all(sum(shares.values()) == pytest.approx(1) for shares in chain.values())
  assert seen == {"image_zoom_in", "blue"}


def test_weights_fit_the_config(tmp_path):
  size = random_policy.write(tmp_path / "policy", random_policy.SIZES["small"])
  config = ModelConfig.from_hf(tmp_path / "policy")
  assert len(list((tmp_path / "policy").glob("*.safetensors"))) > 2  # sharded, with an index
  params = hf.by_path(hf.load_params(tmp_path / "policy", config))
  assert size == 2 * sum(x.size for x in params.values())
  gate_DxF = np.asarray(params["text", "layers", "gate", "kernel"][0], np.float32)
  embedding_VxD = np.asarray(params["text", "embedding"], np.float32)
  words = sorted(random_policy.chain(random_policy.write_tokenizer(tmp_path)))
  # A neuron a word: it answers to that word's embedding alone.
  fired = np.abs(embedding_VxD[words] @ gate_DxF[:, :len(words)]) > 1
  assert fired.sum(0).tolist() == fired.sum(1).tolist() == [1] * len(words)


def test_a_watched_process_is_measured_phase_by_phase():
  watch = true_size.Watch(2e9)
  script = ("import time; print('loaded', flush=True); x = b'1' * 300_000_000; del x;"
            "print('done', flush=True); time.sleep(60)")
  text = watch.run("run: ", [sys.executable, "-c", script], [("load", "loaded"), ("work", "done")],
                   kill=lambda: True)
  assert "done" in text
  load, work = watch.phases
  assert work.peak > 300e6 > work.end and load.peak < 300e6 and work.seconds < 50
  with pytest.raises(SystemExit, match="ended early"):
    watch.run("run: ", [sys.executable, "-c", "print('no')"], [("load", "loaded")])
