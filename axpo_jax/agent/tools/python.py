"""`python`: a persistent kernel for every episode, in a sandbox.

In: code. Out: what the cell printed, and its figures as images. A kernel starts with an episode's
first cell and dies with the episode. A cell that runs too long, or kills its kernel, loses all
variables: the observation says so, and the next cell meets an empty kernel. An episode that
continues a cut transcript gets a kernel in which the cells of the transcript have run again.
"""

from __future__ import annotations

import os
from typing import Any

from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.base import (
  NOT_RUN,
  TIMEOUT,
  EpisodeState,
  Observation,
  PastCall,
  Tool,
  failure,
)
from axpo_jax.agent.tools.kernels import BaseKernel, CellResult, KernelConfig, KernelPool
from axpo_jax.agent.tools.remote import RemotePool

CELL_ERROR = "cell_error"  # the cell raised; the kernel lives
KERNEL_DIED = "kernel_died"
NOT_REBUILT = "not_rebuilt"  # the cells of a cut transcript could not be run again
# After one of these the variables are gone.
_LOST = frozenset({TIMEOUT, KERNEL_DIED, NOT_REBUILT})

_DESCRIPTION = (
  "Runs Python code and returns what it prints, the value of its last expression and its "
  "figures (plt.show()). Variables persist over the calls. numpy, scipy, sympy, matplotlib and PIL "
  "are there; _pil_images is the list of the images so far, as PIL images. No network.")


class PythonTool(Tool):
  """The tool.

  Args:
    config: limits of a kernel on this machine.
    url: of an executor (`remote`): kernels are there, with its limits, and none is here.
    timeout: seconds a cell may take unless its call says otherwise.
    max_timeout: the most a call may ask for; more is taken as this.
    max_concurrent: cells that run at once; by default as many as this process has cores, or 1,024 elsewhere.
  """

  name = "python"
  scope = "execute"
  aliases = ("code_interpreter",)
  waits = True
  _argument, _unit = "code", "cell"
  _takes, _description = "The code of the cell.", _DESCRIPTION

  def __init__(self, config: KernelConfig | None = None, *, url: str = "", timeout: int = 12,
               max_timeout: int = 60, max_concurrent: int | None = None):
    config = config or KernelConfig()
    self.isolation = config.isolation
    self._pool = RemotePool(url) if url else KernelPool(config)
    self._max_timeout = max_timeout
    # An executor bounds the cells that run there by itself.
    self.max_concurrent = max_concurrent or (1024 if url else len(os.sched_getaffinity(0)))
    self.schema = {"type": "function", "function": {
        "name": self.name, "description": self._description,
        "parameters": {"type": "object", "required": [self._argument], "properties": {
            self._argument: {"type": "string", "description": self._takes},
            "timeout": {"type": "integer", "description": f"Seconds the {self._unit} may take.",
                        "default": timeout}}}}}

  def start(self) -> None:
    """Builds the sandbox and warms kernels, so that a host that cannot fails here.

    Raises:
      SandboxError: says what the host lacks and what to set.
    """
    background.run(self._pool.start())

  def close(self) -> None:
    """Ends all kernels. They end with this process too."""
    background.run(self._pool.close())

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Runs one cell in the episode's kernel."""
    kernel = episode.memory.get(self.name)
    if kernel is None:
      kernel = await self._pool.take()
      # Once this episode has had a kernel, the loss of it is known to the policy.
      past = [] if self.name in episode.memory else cells_to_replay(episode.history, self._names)
      episode.memory[self.name] = kernel
      if past and (problem := await self._rebuild(kernel, past, episode)):
        episode.memory[self.name] = None
        return problem
    timeout = min(max(arguments["timeout"], 1), self._max_timeout)
    result = await kernel.run(self._cell(arguments), timeout, episode.images[kernel.images_sent:])
    if result.kernel_is_gone:
      episode.memory[self.name] = None
    return _observation(result, timeout, len(episode.images))

  def end(self, episode: EpisodeState) -> None:
    kernel = episode.memory.pop(self.name, None)
    if kernel is not None:
      background.loop().call_soon_threadsafe(kernel.kill)

  def _cell(self, arguments: dict[str, Any]) -> str:
    """The Python code that carries out a call."""
    return arguments["code"]

  @property
  def _names(self) -> frozenset[str]:
    return frozenset((self.name, *self.aliases))

  async def _rebuild(self, kernel: BaseKernel, past: list[PastCall],
                     episode: EpisodeState) -> Observation | None:
    """Runs the cells of a cut transcript again; returns what went wrong, if anything did."""
    for cell in past:
      # Twice the time it had: it finished then, and the machine may be busier now.
      arguments = self.check(cell.call.arguments)
      timeout = 2 * min(max(arguments["timeout"], 1), self._max_timeout)
      images = episode.images[kernel.images_sent:cell.images]
      result = await kernel.run(self._cell(arguments), timeout, images)
      if result.kernel_is_gone:
        return failure(NOT_REBUILT, "the kernel died while the earlier cells were run again; all "
                       "variables are lost")
    return None


def cells_to_replay(history: list[PastCall], names: frozenset[str]) -> list[PastCall]:
  """The cells whose effects a kernel must hold: those that ran since the last one died."""
  cells: list[PastCall] = []
  for past in history:
    if past.call.name not in names or past.error in NOT_RUN:
      continue
    cells = [] if past.error in _LOST else [*cells, past]
  return cells


def _observation(result: CellResult, timeout: float, images: int) -> Observation:
  """What the policy is shown; its figures become the images from number `images` on."""
  parts = [result.stdout.strip("\n")]
  if result.stderr.strip():
    parts.append(f"[stderr]\n{result.stderr.strip()}")
  parts += [f"Image {images + i}: figure." for i in range(len(result.figures))]
  text = "\n".join(part for part in parts if part)
  if result.status == "timeout":
    return _lost(TIMEOUT, f"the cell took longer than {timeout:g} seconds and was stopped", text)
  if result.status == "died":
    return _lost(KERNEL_DIED, f"the kernel died: {result.reason}", text)
  return Observation(text or "(no output)", result.figures,
                     CELL_ERROR if result.status == "failed" else None)


def _lost(kind: str, what: str, output: str) -> Observation:
  printed = f"\nIt had printed:\n{output}" if output else ""
  return failure(kind, f"{what}; all variables are lost{printed}")
