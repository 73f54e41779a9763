"""Which collectives a compiled program runs, read from its HLO text, of TPUs, GPUs or CPUs.

The compiler's own `cost_analysis` does not name collectives, counts the body of a loop once (a model is
one loop over its layers), and gives nothing at all for GPUs that are not here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
# They pass a value on as it is.
_SAME = ("bitcast", "copy", "convert", "reshape", "optimization-barrier")


class HloError(ValueError):
  """HLO text that this reader does not understand."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    sent: bytes that a chip sends each time, if the group is a ring.
    times: how often it runs.
    padded: an all-reduce of shards that stand in zeros: it does what an all-gather would do with
      half of the bytes.
  """

  kind: str
  sent: float
  times: int = 1
  padded: bool = False

  @property
  def total(self) -> float:
    """Bytes that a chip sends in one execution of the program."""
    return self.sent * self.times


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str  # attributes

  def called(self, attribute: str) -> str | None:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
    return found and found[1]


def collectives(text: str, rounds: int = 1) -> list[Collective]:
  """All collectives that one execution runs; of a branch those of its costliest arm.

  Args:
    rounds: of loops whose number of rounds the program does not know.

  Raises:
    HloError: no entry computation, or a collective whose groups cannot be read.
  """
  return list(_Program(text, rounds).executed())


class _Program:
  """Instructions by computation and name, and the instruction that is a computation's result."""

  def __init__(self, text: str, rounds: int):
    self.computations: dict[str, dict[str, _Instruction]] = {}
    self.roots: dict[str, _Instruction] = {}
    self.entry, self.unknown_rounds = "", rounds
    here, body = "", {}
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        here, body = header[1], self.computations.setdefault(header[1], {})
        self.entry = here if line.startswith("ENTRY") else self.entry
      elif found := _INSTRUCTION.match(line):
        name, kind, op, rest = found.groups()
        body[name] = _Instruction(name, kind, op, tuple(_NAME.findall(rest.split(")")[0])), rest)
        if line.lstrip().startswith("ROOT "):
          self.roots[here] = body[name]
    if not self.entry:
      raise HloError("the text has no ENTRY computation: is it HLO?")

  def executed(self, name: str = "") -> Iterator[Collective]:
    """Of one execution of a computation, the entry by default."""
    body = self.computations[name or self.entry]
    for instruction in body.values():
      kind, rest = instruction.op.removesuffix("-start"), instruction.rest
      if kind in KINDS:
        yield self._collective(instruction, kind, body)
      elif instruction.op == "while":
        times = self._rounds(instruction)
        for inner in self.executed(instruction.called("body")):
          yield dataclasses.replace(inner, times=inner.times * times)
      elif instruction.op == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
        arms = _NAME.findall(listed[1]) if listed else [
          instruction.called(f"{side}_computation") for side in ("true", "false")]
        yield from max((list(self.executed(arm)) for arm in arms),
                       key=lambda arm: sum(one.total for one in arm))
      elif callee := instruction.called("calls") or (
          instruction.op == "call" and instruction.called("to_apply")):
        yield from self.executed(callee)

  def _rounds(self, loop: _Instruction) -> int:
    """What the compiler noted, or else the constant that the counter, from 0, is compared with."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(noted[1])
    bounds = {int(found[1]) for i in self.computations[loop.called("condition")].values()
              if i.op == "constant" and (found := re.match(r"(\d+)\)", i.rest))}
    return bounds.pop() if len(bounds) == 1 else self.unknown_rounds

  def _collective(self, instruction: _Instruction, kind: str, body) -> Collective:
    size = _bytes("".join(body[name].type for name in instruction.operands))
    if kind == "collective-permute":
      return Collective(kind, size)
    group = _group_size(instruction.rest)
    sent = size * (group - 1) / (1 if kind == "all-gather" else group)
    if kind != "all-reduce":
      return Collective(kind, sent)
    padded = any(self._padded(body[name], body, group) for name in instruction.operands)
    return Collective(kind, 2 * sent, padded=padded)

  def _padded(self, made: _Instruction, body, group: int) -> bool:
    """Whether a value is one shard of `group`, written into an array of the size of all of them."""
    while True:
      if callee := made.op == "fusion" and made.called("calls"):
        body, made = self.computations[callee], self.roots[callee]
      elif made.op in _SAME and made.operands[0] in body:
        made = body[made.operands[0]]
      else:
        break
    written = {"dynamic-update-slice": 1, "pad": 0}.get(made.op)
    if written is None or group == 1:
      return False
    return _bytes(body[made.operands[written]].type) * group <= _bytes(made.type)


def _group_size(attributes: str) -> int:
  """Chips that take part in one group of a collective."""
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}",
                       attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(listed[1].split(","))
  raise HloError(f"a collective without groups that this reader knows: {attributes[:200]}")


def _bytes(type_text: str) -> float:
  """Bytes of all arrays of a type."""
  total = 0.0
  for dtype, dims in _ARRAY.findall(type_text):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
  return total
