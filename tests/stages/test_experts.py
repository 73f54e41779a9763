"""A mixture of experts through a whole run: SFT, then RL with the embedded engine, by flags alone."""

import json

import pytest

from axpo_jax.stages.metrics import read_metrics
from tests import children
from tests.conftest import TINY
from tests.stages import rigged


@pytest.mark.slow
def test_run_of_a_mixture_of_experts(inputs, tmp_path):
  flags = ["--config.model.preset=tiny_moe", f"--config.model.tokenizer={TINY}",
           "--config.sft.balance_coef=0.001", "--config.rl.steps=2", "--config.eval.every=-1",
           "--config.lora.rank=4", "--config.lora.targets=('q','k','v','o')", *rigged.flags(inputs)[1:]]
  done = children.launch(tmp_path, flags)
  assert done.returncode == 0, done.stderr[-4000:]
  lines = read_metrics(tmp_path)
  sft, rl = ([line for line in lines if name in line] for name in ("sft/nll", "train/logp_gap_abs_max"))
  assert len(sft) == 4 and len(rl) == 2
  assert sft[-1]["sft/nll"] < sft[0]["sft/nll"]
  for line, stage in [*((line, "sft") for line in sft), *((line, "train") for line in rl)]:
    # 8 experts, 2 a token: even, or all tokens with the same two. The loss is 2 where all is even.
    assert 1 <= line[f"{stage}/expert_load"] <= line[f"{stage}/expert_load_max"] <= 4
    assert 1.9 < line[f"{stage}/router_balance"] < 8
  # Sampler and trainer, prefill, decoding and packed rows: all send a token to the same experts.
  assert all(line["train/logp_gap_abs_max"] < 1e-4 for line in rl)
  raw = json.loads((tmp_path / "rl" / "policy" / "config.json").read_text())
  assert raw["model_type"] == "qwen3_vl_moe" and raw["text_config"]["num_experts"] == 8
