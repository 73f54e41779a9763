"""The `shell` tool in a real sandbox."""

import asyncio

import pytest

from axpo_jax.agent.parse import ToolCall
from axpo_jax.agent.tools.base import EpisodeState, PastCall, ToolBox
from axpo_jax.agent.tools.kernels import KernelConfig
from axpo_jax.agent.tools.shell import ShellTool


@pytest.fixture(scope="module")
def box(python_tool):
  tool = ShellTool(KernelConfig(isolation=python_tool.isolation, memory_mb=1024, warm=1), max_concurrent=4)
  tool.start()
  yield ToolBox([tool], ["execute"])
  tool.close()


def run(box, episode, *commands):
  async def main():
    return [(await box.call("shell", {"command": command}, episode)).text for command in commands]
  return asyncio.run(main())


def test_files_folder_and_variables_persist(box):
  episode = EpisodeState("q", [])
  seen = run(box, episode, "mkdir -p a && cd a && echo 'it{{s}}' > f", "cat f; export X='two\nlines'", "echo \"$X\"; ls",
             "cat gone", "exit 3", "cat f")
  box.end_episode(episode)
  assert seen[:3] == ["(no output)", "it{{s}}", "two\nlines\nf"]
  assert "gone" in seen[3] and "[exit status 1]" in seen[3]
  assert seen[4] == "[exit status 3]" and seen[5] == "it{{s}}"  # what exits keeps the folder of before
  other = EpisodeState("q", [])
  assert "[exit status" in run(box, other, "cat a/f")[0]  # an episode has a sandbox of its own
  box.end_episode(other)


def test_a_continued_transcript_has_the_files(box):
  past = PastCall(ToolCall("shell", {"command": "echo 1 > f; cd /"}), None, 0)
  episode = EpisodeState("q", [], history=[past])
  assert run(box, episode, "pwd; cat \"$OLDPWD/f\"") == ["/\n1"]
  box.end_episode(episode)
