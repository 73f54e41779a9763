"""The servers' own environment: found, made once, and never half made."""

import pytest

from axpo_jax.engine.sglang.server import SidecarError, environment


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("AXPO_CACHE", str(tmp_path))
  monkeypatch.delenv("AXPO_SIDECAR_PYTHON", raising=False)
  return tmp_path


def test_named_python_wins(monkeypatch, tmp_path):
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\n")
  monkeypatch.setenv("AXPO_SIDECAR_PYTHON", str(program))
  with pytest.raises(SidecarError, match="no program that can be run"):
    environment.find_python("cpu")
  program.chmod(0o755)
  assert environment.find_python("cpu") == str(program)


def test_complete_environment_is_used_again():
  folder = environment.environment_folder("cpu")
  folder.mkdir()
  (folder / "complete").touch()
  steps = []
  assert environment.install("cpu", steps.append) == str(folder / "bin" / "python")
  assert environment.find_python("cpu") == str(folder / "bin" / "python")
  assert not steps


def test_failed_installation_is_an_error_and_no_environment(monkeypatch):
  """What pip says is in the error; a half-made folder is not taken for an environment, then or later."""
  for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  with pytest.raises(SidecarError, match=r"(?s)pip install.*torch"):
    environment.install("cpu", lambda line: None)
  with pytest.raises(SidecarError, match="--install"):
    environment.find_python("cpu")


def test_other_requirements_are_another_environment(monkeypatch, tmp_path):
  before = environment.environment_folder("cpu")
  assert before != environment.environment_folder("cuda")
  changed = tmp_path / "requirements.txt"
  changed.write_text(environment.requirements("cpu").read_text() + "another-package\n")
  monkeypatch.setattr(environment, "requirements", lambda device: changed)
  assert environment.environment_folder("cpu") != before


def test_every_requirement_is_pinned():
  """The CPU list is installed without looking at requirements of requirements: it must be complete."""
  for device in ("cpu", "cuda"):
    lines = environment.requirements(device).read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted and all("==" in line for line in wanted)
  assert environment.requirements("cpu").read_text().count("sglang==0.5.23\n") == 1
