"""Servers beside the trainer: no flag passes the checks, and no secret of the trainer's goes along."""

import json
import logging

import pytest

import axpo_jax
from axpo_jax.engine.sglang.server import SidecarError, SidecarSpec
from axpo_jax.engine.sglang.server.spec import process_environment, server_command
from axpo_jax.model.presets import PRESETS
from axpo_jax.stages import distributed

MODEL = f"{axpo_jax.__path__[0]}/assets/warm_start"

SECRETS = {
  "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "GOOGLE_APPLICATION_CREDENTIALS",
  "TAVILY_API_KEY", "AXPO_JUDGE_API_KEY", "AXPO_TEACHER_API_KEY", "DATABASE_URL", "PGPASSWORD", "GITHUB_PAT",
  "SSH_AUTH_SOCK", "SLACK_WEBHOOK_URL", "HTTP_PROXY", "KUBECONFIG", "SGLANG_API_KEY", "SGLANG_ADMIN_KEY", "CUDA_TOKEN",
  "NVIDIA_NGC_SECRET", "PYTHONPATH", "PYTHONSTARTUP", "GLIBC_TUNABLES"}
NEEDED = {"PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_HOME", "NCCL_DEBUG", "SGLANG_LOG_MS", "TORCHINDUCTOR_CACHE_DIR",
          "TRITON_CACHE_DIR", "LC_ALL", "XDG_CACHE_HOME", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"}


def spec(**fields) -> SidecarSpec:
  return SidecarSpec(**{"model": MODEL, "device": "cpu", "port": 0} | fields)


@pytest.mark.parametrize("flags", [
  ("--host=0.0.0.0",), ("--host", "0.0.0.0"), ("--ho=0.0.0.0",), ("--port=1",), ("--api-key=tell-nobody",),
  ("--api-key", "tell-nobody"), ("--api_key=tell-nobody",), ("--api=tell-nobody",),
  ("--admin-api-key=tell-nobody",), ("--ssl-keyfile-password=tell-nobody",), ("--config=all-of-it.yaml",),
  ("--model-path=/another",), ("--dist-init-addr=0.0.0.0:1",)])
def test_flags_behind_the_dashes(flags):
  with pytest.raises(SidecarError, match="cannot be given to SGLang itself") as error:
    spec(extra_flags=("--log-level=debug", *flags))
  assert "tell-nobody" not in str(error.value) and "\n" not in str(error.value)
  fine = spec(extra_flags=("--enable-deterministic-inference", "--chunked-prefill-size", "64"))
  assert server_command(fine, 1)[-1] == "64"


def test_environment_has_no_secrets(monkeypatch):
  for name in SECRETS | NEEDED:
    monkeypatch.setenv(name, "value")
  given = process_environment(spec(api_key="ours"), "/scratch")
  assert not SECRETS & given.keys() and given.keys() >= NEEDED
  assert given["AXPO_SIDECAR_API_KEY"] == "ours"
  asked = process_environment(spec(env=("HF_TOKEN",), extra_env={"X": "1"}), "/scratch")
  assert SECRETS & asked.keys() == {"HF_TOKEN"} and asked["X"] == "1"
  monkeypatch.delenv("HF_TOKEN")
  with pytest.raises(SidecarError, match="env names HF_TOKEN, which is not set"):
    spec(env=("HF_TOKEN",))


@pytest.mark.parametrize("coordinator, bound", [
  ("127.0.0.1:9911", "127.0.0.1:9911"), ("localhost:9911", "127.0.0.1:9911"), ("[::1]:9911", "[::1]:9911"),
  ("", None), ("127.0.0.1", None), ("host:port", None)])
def test_the_coordinator_listens_on_the_address_it_was_given(coordinator, bound):
  found = distributed.bind_address(coordinator)
  assert found == bound or (coordinator == "localhost:9911" and found == "[::1]:9911")


def test_an_address_of_another_machine_is_said(caplog):
  with caplog.at_level(logging.WARNING, "absl"):
    assert distributed.bind_address("192.0.2.7:9911") is None  # of a network for documents
  assert "listens on all of its interfaces" in caplog.text


def test_a_tower_that_sglang_would_turn_otherwise_is_refused(tmp_path):
  raw = PRESETS["tiny"].to_hf()
  raw["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 500.0}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(SidecarError, match="vision rope_theta=500, and SGLang takes 10000"):
    spec(model=str(tmp_path))
