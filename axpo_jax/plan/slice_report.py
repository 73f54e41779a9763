"""Whether a run fits a slice of TPUs or GPU servers, and what to change if it does not.

In: the compiled functions of the step and of the embedded engine (`aot`). Out: a Report, and its text.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from axpo_jax.plan.aot import FUNCTIONS, SAMPLER, Program
from axpo_jax.plan.chips import Chip

_GIB = 2.0**30
# Micro-batches on the devices at once, see `step.Learner.update`.
_BATCHES = 2
# Bytes of a collective that takes as long as its start.
_SMALL = 2**20


@dataclasses.dataclass(frozen=True)
class Report:
  """A run's programs, and what it keeps on the chips beside them.

  Attributes:
    chips: of the mesh.
    held: bytes of a chip by kind: parameters, reference, optimizer, gradients, batch; and of the embedded
      engine its weights and its pool.
    programs: by function.
    reference_offload: the reference is on the chips only while it scores.
    remat, mu_dtype, param_dtype: of the config, for advice.
    rows_a_shard: of a micro-batch.
    copies: of the parameters, each on chips/copies of them: the mesh axis data.
    mesh_hint: axis sizes that a mesh with all-reduces of padded weights should have; None: unknown.
  """

  chip: Chip
  chips: int
  held: Mapping[str, float]
  programs: Mapping[str, Program]
  reference_offload: bool = False
  remat: str = "full"
  mu_dtype: str = "float32"
  param_dtype: str = "float32"
  rows_a_shard: int = 1
  copies: int = 1
  mesh_hint: Mapping[str, int] | None = None

  def memory(self, function: str) -> dict[str, float]:
    """Bytes of a chip while a function runs, by kind. Gradients come after scoring, batches after
    sampling."""
    held = {kind: size * (_BATCHES if kind == "batch" else 1) for kind, size in self.held.items()}
    if function in SAMPLER:
      held.pop("batch")
    if function in SAMPLER or function == "score":
      held.pop("gradients")
    if function != "score" and self.reference_offload:
      held.pop("reference", None)
    return held | {"temporaries": self.programs[function].temporaries}

  def total(self, function: str) -> float:
    return sum(self.memory(function).values())

  @property
  def fullest(self) -> str:
    """The function that needs most."""
    return max(self.programs, key=self.total)

  @property
  def excess(self) -> float:
    """Bytes that the run exceeds a chip by; negative: what is left."""
    return self.total(self.fullest) - self.chip.memory


def text(report: Report) -> str:
  """Two tables in Markdown, of memory and of work, and what they say."""
  names = list(report.programs)
  tables = [_table(["memory of a chip, GiB", *names], _memory_rows(report, names)),
            _table(["one execution", *names], _work_rows(report, names))]
  return "\n\n".join(part for part in (*tables, _padded(report), verdict(report)) if part)


def verdict(report: Report) -> str:
  """One line: whether the run fits; if not, by how much and what to change."""
  function, need, chip = report.fullest, report.total(report.fullest), report.chip
  of = f"{_gib(need)} of {_gib(chip.memory)} GiB a chip ({function})"
  if report.excess > 0:
    changes = "; or ".join(advice(report))
    return f"**The run does not fit** by {_gib(report.excess)} GiB: {of}. Change: {changes}."
  needed = {*FUNCTIONS, *(SAMPLER if "engine's pool" in report.held else ())}
  what = "The run" if needed <= report.programs.keys() else "What was compiled"
  return f"**{what} fits**: at most {of}, {_gib(-report.excess)} to spare."


def advice(report: Report) -> list[str]:
  """What would make the run fit, what saves most first."""
  memory = report.memory(report.fullest)
  temporaries, out = memory["temporaries"], []
  sampler = memory.get("engine's weights", 0.0) + memory.get("engine's pool", 0.0)
  if sampler or report.fullest in SAMPLER:
    saved = sampler + (temporaries if report.fullest in SAMPLER else 0.0)
    out += [(saved, "config.rollout.engine=sglang"),
            (saved - memory.get("engine's weights", 0.0), "fewer config.rollout.embedded.rows")]
  if report.fullest not in SAMPLER:
    batch = memory.get("batch", 0.0)
    state = sum(memory.values()) - batch - temporaries
    split = report.chips // report.copies
    if (free := report.chip.memory - temporaries - batch) > 0:
      chips = -(-int(split * state) // int(free))
      out.append((state - free, f"at least {chips} chips on fsdp or tensor instead of {split}"))
    if report.copies > 1:
      out.append((state * (1 - 1 / report.copies), "config.mesh.data=1"))
    if report.remat != "full":
      out.append((temporaries, "config.model.remat=full"))
    rows = report.rows_a_shard
    out.append((temporaries * (1 - 1 / rows), "fewer config.batch.rows") if rows > 1 else
               (temporaries / 2, "a shorter config.batch.length, or a larger config.mesh.tensor"))
  if report.mu_dtype == "float32":
    out.append((memory["optimizer"] / 4, "config.optimizer.mu_dtype=bfloat16"))
  if report.param_dtype == "float32":
    out.append((memory["parameters"] / 2, "config.model.param_dtype=bfloat16"))
  if reference := memory.get("reference", 0.0):
    out.append((reference, "no reference policy: config.rl.loss.kl_coef=0"))
    if not report.reference_offload:
      out.append((reference, "config.rl.reference_offload=True"))
  return [f"{text} (saves {_gib(saved)})" for saved, text in sorted(out, reverse=True)]


def _padded(report: Report) -> str:
  """Which programs gather weights by all-reduces, and what to do about it. For small arrays, where bytes
  do not count, that is a good choice."""
  found = {name: [one for one in program.collectives or () if one.padded and one.sent > _SMALL]
           for name, program in report.programs.items()}
  listed = ", ".join(f"{name} {sum(one.times for one in padded):,} times, "
                     f"{sum(one.total for one in padded) / 1e9:,.1f} GB"
                     for name, padded in found.items() if padded)
  if not listed:
    return ""
  better = " ".join(f"--config.mesh.{axis}={size}" for axis, size in (report.mesh_hint or {}).items())
  return (f"**Slow collectives**: whole zero-padded weights are all-reduced ({listed}), which sends twice "
          f"the bytes of the all-gathers that they replace. Try {better or 'another config.mesh'}.")


def _memory_rows(report: Report, names: Sequence[str]) -> list[list[str]]:
  columns = [report.memory(name) for name in names]
  kinds = list(dict.fromkeys(kind for column in columns for kind in column))
  kinds.sort(key=lambda kind: kind == "temporaries")
  rows = [[kind, *(_gib(column[kind]) if kind in column else "" for column in columns)]
          for kind in kinds]
  rows.append(["**together**", *(f"**{_gib(report.total(name))}**" for name in names)])
  rows.append(["limit", *[_gib(report.chip.memory)] * len(names)])
  return rows


def _work_rows(report: Report, names: Sequence[str]) -> list[list[str]]:
  programs = [report.programs[name] for name in names]
  counts, sent = collections.defaultdict(dict), collections.defaultdict(dict)
  for name, program in report.programs.items():
    for one in program.collectives or ():
      counts[one.kind][name] = counts[one.kind].get(name, 0) + one.times
      sent[one.kind][name] = sent[one.kind].get(name, 0.0) + one.total
  rows = [["PFLOP", *(f"{p.flops / 1e15:,.2f}" for p in programs)]]
  rows += [[f"{kind}: times, GB sent by a chip", *(
    f"{counts[kind].get(name, 0):,}, {sent[kind].get(name, 0.0) / 1e9:,.2f}" for name in names)]
    for kind in sorted(counts)]
  rows += [
    ["least seconds by FLOPs", *(f"{p.flops / (p.chips * report.chip.flops):.3f}" for p in programs)],
    ["least seconds by collectives", *(
      "?" if p.collectives is None else
      f"{sum(one.total for one in p.collectives) / report.chip.link:.3f}" for p in programs)],
    ["core seconds to compile", *(f"{p.seconds:,.0f}" for p in programs)]]
  return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

  def line(cells):
    first, *rest = (cell.ljust(w) if not i else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
    return f"| {' | '.join((first, *rest))} |"

  rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
  return "\n".join([line(head), rule, *map(line, rows)])


def _gib(size: float) -> str:
  return f"{size / _GIB:,.2f}"
