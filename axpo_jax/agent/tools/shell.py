"""The `shell` tool: commands in a shell of the episode's own, in the sandbox of the `python` tool.

In: a command. Out: what it prints. Files, the working folder and variables that are exported persist over
the episode's turns, and a transcript that is continued runs its commands again first. docs/tools.md says
what the sandbox holds.
"""

from __future__ import annotations

from typing import Any

from axpo_jax.agent.tools.python import PythonTool

# Runs in the kernel: its folder and environment are those of the last command.
_RUN = """
import os as _os, subprocess as _subprocess
_end = _os.path.join(_os.environ.setdefault("AXPO_FOLDER", _os.getcwd()), ".end")
_status = _subprocess.run(["/bin/sh", "-c", COMMAND + "\\nstatus=$?; { pwd; env -0; } > '" + _end
                           + "'; exit $status"], stderr=_subprocess.STDOUT, stdout=_subprocess.PIPE,
                          stdin=_subprocess.DEVNULL)
print(_status.stdout.decode("utf-8", "replace"), end="")
if _status.returncode:
  print(f"[exit status {_status.returncode}]")
if _os.path.exists(_end):
  _folder, _, _rest = open(_end, "rb").read().partition(b"\\n")
  _os.remove(_end)
  _os.chdir(_folder)
  _os.environb.clear()
  _os.environb.update(part.split(b"=", 1) for part in _rest.split(b"\\0") if b"=" in part)
"""


class ShellTool(PythonTool):
  """The tool; its arguments are the `python` tool's."""

  name = "shell"
  aliases = ("bash",)
  _argument, _unit = "command", "command"
  _takes = "The command, or several lines of them."
  _description = (
    "Runs commands in a shell and returns what they print. Files, the working folder and exported "
    "variables persist over the calls. No network.")

  def _cell(self, arguments: dict[str, Any]) -> str:
    return _RUN.replace("COMMAND", repr(arguments["command"]))
