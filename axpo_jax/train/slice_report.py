"""Whether a train step fits a slice of TPUs, how fast it could be, and what to change if it does not.

In: the compiled functions of the step (`aot.compile_step`). Out: a Report, and its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from axpo_jax.train.aot import FUNCTIONS, Chip, Program

_GIB = 2.0**30
# Micro-batches on the devices at once, see `step.Learner.update`.
_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class Report:
  """A step of one micro-batch.

  Attributes:
    chips: of the slice.
    held: bytes of a chip by kind: parameters, reference, optimizer, gradients, batch.
    reference_offload: the reference is on the chips only while it scores.
    sampler: bytes of a chip that the embedded engine takes beside training; 0 if there is none.
    programs: by function.
    scores: how often the step scores its micro-batch before it trains on it (reference, old policy).
    tokens: of the micro-batch.
    needed: FLOPs that forward and backward need at least, see `flops.needed`.
  """

  chip: Chip
  chips: int
  held: Mapping[str, float]
  sampler: float
  programs: Mapping[str, Program]
  scores: int
  tokens: int
  needed: float
  reference_offload: bool = False

  def memory(self, function: str) -> dict[str, float]:
    """Bytes of a chip while a function runs, by kind. Gradients come after scoring."""
    held = {kind: size * (_BATCHES if kind == "batch" else 1) for kind, size in self.held.items()}
    if function == "score":
      del held["gradients"]
    elif self.reference_offload:
      held.pop("reference", None)
    return held | {"temporaries": self.programs[function].temporaries}

  def total(self, function: str) -> float:
    return sum(self.memory(function).values())

  @property
  def excess(self) -> float:
    """Bytes that training exceeds a chip by; negative: what is left."""
    return max(map(self.total, self.programs)) - self.chip.hbm

  def seconds(self, function: str) -> dict[str, float]:
    """Least seconds of a function by what bounds it; empty if it was not compiled whole."""
    program = self.programs[function]
    if program.traffic is None:
      return {}
    return {"FLOPs": program.flops / (self.chips * self.chip.flops),
            "HBM": program.traffic.hbm_bytes / self.chip.hbm_bandwidth,
            "interconnect": sum(program.traffic.sent_bytes.values()) / self.chip.ici_bandwidth}

  @property
  def step_seconds(self) -> float | None:
    """Every function at the roofline of its tightest bound; None if one did not compile."""
    bounds = {name: self.seconds(name) for name in self.programs}
    if not all(bounds.values()):
      return None
    return sum(max(seconds.values()) * (self.scores if name == "score" else 1)
               for name, seconds in bounds.items())

  @property
  def mfu(self) -> float | None:
    seconds = self.step_seconds
    return seconds and self.needed / (seconds * self.chips * self.chip.flops)


def largest_tokens(report: Report, multiple: int, other: Program | None = None, other_tokens: int = 0
                   ) -> int:
  """Most tokens of a micro-batch that fit, a multiple of `multiple`: temporaries and batch of
  `accumulate` are taken as linear between two compiled sizes. 0 if nothing fits.

  Args:
    other: `accumulate` at another size of `other_tokens` tokens. Without it temporaries are taken as
      proportional to the tokens: too many for a larger micro-batch than the compiled one, since some
      of them are the parameters', so that at least the result fits.
  """
  here = report.programs["accumulate"].temporaries
  there = other.temporaries if other else 0.0
  slope = (there - here) / (other_tokens - report.tokens)
  slope += _BATCHES * report.held["batch"] / report.tokens
  room = report.chip.hbm - (report.total("accumulate") - slope * report.tokens)
  return max(int(room / slope) // multiple, 0) * multiple


def advice(report: Report, *, remat: str, mu_dtype: str, param_dtype: str, rows_a_shard: int
           ) -> list[str]:
  """What would make training fit, what saves most first; empty if it fits."""
  if report.excess <= 0:
    return []
  held, temporaries = report.held, max(p.temporaries for p in report.programs.values())
  state = sum(size for kind, size in held.items() if kind != "batch")
  free = report.chip.hbm - temporaries - _BATCHES * held["batch"]
  out = []
  if free > 0:
    out.append((state - free, f"at least {-(-int(report.chips * state) // int(free))} chips on fsdp or "
                f"tensor, instead of {report.chips}"))
  if remat != "full":
    out.append((temporaries, "config.model.remat=full"))
  if rows_a_shard > 1:
    out.append((temporaries * (1 - 1 / rows_a_shard), "fewer config.batch.rows"))
  else:
    out.append((temporaries / 2, "a shorter config.batch.length, or a larger config.mesh.tensor"))
  if mu_dtype == "float32":
    out.append((held["optimizer"] / 4, "config.optimizer.mu_dtype=bfloat16"))
  if param_dtype == "float32":
    saved = (held["parameters"] + held.get("reference", 0.0)) / 2
    out.append((saved, "config.model.param_dtype=bfloat16"))
  if reference := held.get("reference", 0.0):
    out.append((reference, "no reference policy: config.rl.loss.kl_coef=0"))
    if not report.reference_offload:
      out.append((min(reference, held["gradients"]), "config.rl.reference_offload=True"))
  return [f"{text} (saves {_gib(saved)} GiB)" for saved, text in sorted(out, reverse=True)]


def text(report: Report) -> str:
  """Three tables in Markdown: memory, work and movement, least times."""
  names = [name for name in FUNCTIONS if name in report.programs]
  return "\n\n".join([
    _table(["HBM of a chip, GiB", *names], _memory_rows(report, names)),
    _table(["for one micro-batch", *names], _work_rows(report, names)),
    _table(["least seconds by", *names], _seconds_rows(report, names)),
  ])


def _memory_rows(report: Report, names: Sequence[str]) -> list[list[str]]:
  columns = [report.memory(name) for name in names]
  kinds = list(dict.fromkeys(kind for column in columns for kind in column))
  rows = [[kind, *(_gib(column[kind]) if kind in column else "" for column in columns)]
          for kind in kinds]
  rows.append(["**together**", *(f"**{_gib(report.total(name))}**" for name in names)])
  rows.append(["limit", *[_gib(report.chip.hbm)] * len(names)])
  return rows


def _work_rows(report: Report, names: Sequence[str]) -> list[list[str]]:
  programs = [report.programs[name] for name in names]
  traffic = [program.traffic for program in programs]
  rows = [["PFLOPs, all chips", *(f"{p.flops / 1e15:,.2f}" for p in programs)],
          ["HBM traffic of a chip, GB", *(f"{t.hbm_bytes / 1e9:,.1f}" if t else "?" for t in traffic)]]
  for kind in dict.fromkeys(kind for t in traffic if t for kind in t.sent_bytes):
    rows.append([f"sent by a chip, {kind}, GB", *(
      f"{t.sent_bytes.get(kind, 0) / 1e9:,.2f}" if t else "?" for t in traffic)])
  rows.append(["core seconds to compile", *(f"{p.seconds:,.0f}" for p in programs)])
  return rows


def _seconds_rows(report: Report, names: Sequence[str]) -> list[list[str]]:
  bounds = [report.seconds(name) for name in names]
  return [[kind, *(f"{b[kind]:.3f}" if b else "?" for b in bounds)]
          for kind in ("FLOPs", "HBM", "interconnect")]


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
