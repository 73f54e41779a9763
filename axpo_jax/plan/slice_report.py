"""Whether a run fits a slice of TPUs or GPU servers: one table, and a verdict.

In: the compiled functions of the step and of the embedded engine (`aot`). Out: a Report, and its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from axpo_jax import markdown
from axpo_jax.plan.aot import FUNCTIONS, SAMPLER, Program
from axpo_jax.plan.chips import Chip

_GIB = 2.0**30
# Micro-batches on the devices at once, see `step.Learner.update`.
_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class Report:
  """A run's programs, and what stays on the chips beside them.

  Attributes:
    held: bytes of a chip by kind: parameters, reference, optimizer, gradients, batch; and the embedded
      engine's weights and pool.
    programs: by function.
    reference_offload: the reference is on the chips only while it scores.
  """

  chip: Chip
  held: Mapping[str, float]
  programs: Mapping[str, Program]
  reference_offload: bool = False

  def memory(self, function: str) -> dict[str, float]:
    """Bytes of a chip while a function runs, by kind."""
    held = {kind: size * (_BATCHES if kind == "batch" else 1) for kind, size in self.held.items()}
    if function in SAMPLER:
      held.pop("batch")  # made of what was sampled
    if function in SAMPLER or function == "score":
      held.pop("gradients")  # made after scoring
    if function != "score" and self.reference_offload:
      held.pop("reference", None)
    return held | {"temporaries": self.programs[function].temporaries}

  def total(self, function: str) -> float:
    return sum(self.memory(function).values())

  @property
  def fullest(self) -> str:
    """The function that needs most memory."""
    return max(self.programs, key=self.total)

  @property
  def excess(self) -> float:
    """Bytes that `fullest` needs beyond a chip's memory; negative: bytes to spare."""
    return self.total(self.fullest) - self.chip.memory


def text(report: Report) -> str:
  """The table in Markdown, with a column for each function, and the verdict."""
  columns = {name: report.memory(name) for name in report.programs}
  programs = report.programs.values()
  rows = [["memory of a chip, GiB", *columns]]
  rows += [[kind, *(_gib(column[kind]) if kind in column else "" for column in columns.values())]
           for kind in (*report.held, "temporaries")]
  rows += [
    ["**together**", *(f"**{_gib(report.total(name))}**" for name in columns)],
    ["limit", *[_gib(report.chip.memory)] * len(columns)],
    ["PFLOP, all chips", *(f"{p.flops / 1e15:,.2f}" for p in programs)],
    ["seconds at the chips' peak", *(f"{p.flops / (p.chips * report.chip.flops):.3f}" for p in programs)],
    ["core seconds to compile", *(f"{p.seconds:,.0f}" for p in programs)]]
  return f"{markdown.table(rows)}\n\n{verdict(report)}"


def verdict(report: Report) -> str:
  """One line: whether the run fits, and by how much."""
  function = report.fullest
  need = f"{_gib(report.total(function))} of {_gib(report.chip.memory)} GiB a chip ({function})"
  if report.excess > 0:
    return (f"**The run does not fit** by {_gib(report.excess)} GiB: {need}. What saves memory, and what it "
            "costs: docs/pods.md#memory.")
  needed = {*FUNCTIONS, *(SAMPLER if "engine's pool" in report.held else ())}
  what = "The run" if needed <= report.programs.keys() else "What was compiled"
  return f"**{what} fits**: at most {need}, {_gib(-report.excess)} to spare."


def _gib(size: float) -> str:
  return f"{size / _GIB:,.2f}"
