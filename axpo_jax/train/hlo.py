"""What a compiled TPU program moves: read from its HLO text, loops counted as often as they run.

In: `compiled.as_text()`. Out: bytes that one chip reads and writes in HBM, and bytes that it sends to
other chips by kind of collective. The compiler's own `cost_analysis` counts the body of a loop once,
and a model is one loop over its layers.

HBM bytes are operands plus outputs of every kernel that stand in HBM. Where a kernel reads a slice of
an operand or writes into one in place, only the slice counts.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"\d+")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They name or reorder values without a kernel of their own.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "iota", "opt-barrier", "domain"}
_SLICES = ("dynamic-slice", "slice", "gather")


class HloError(ValueError):
  """HLO text that this reader does not understand."""


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one execution on one chip.

  Attributes:
    hbm_bytes: read and written.
    sent_bytes: to other chips, by kind of collective, in a ring of its group.
    collectives: how many run, by kind.
  """

  hbm_bytes: float
  sent_bytes: dict[str, float]
  collectives: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str  # attributes
  root: bool

  def called(self, attribute: str) -> str | None:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
    return found and found[1]


def read_traffic(text: str) -> Traffic:
  """Adds up a program.

  Raises:
    HloError: no entry computation, or a loop whose number of rounds is not a constant.
  """
  program = _Program(text)
  hbm = 0.0
  sent, counts = collections.Counter(), collections.Counter()
  for instruction, times in program.executed():
    kind = instruction.op.removesuffix("-start")
    if kind in _COLLECTIVES:
      sent[kind] += times * program.sent(instruction, kind)
      counts[kind] += times
    hbm += times * program.hbm(instruction)
  return Traffic(hbm, dict(sent), dict(counts))


class _Program:
  """Instructions by computation."""

  def __init__(self, text: str):
    self.computations: dict[str, list[_Instruction]] = {}
    self.types: dict[str, str] = {}
    self.entry = ""
    body: list[_Instruction] = []
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        body = self.computations[header[1]] = []
        self.entry = header[1] if line.startswith("ENTRY") else self.entry
      elif found := _INSTRUCTION.match(line):
        instruction = _instruction(line, *found.groups())
        body.append(instruction)
        self.types[instruction.name] = instruction.type
    if not self.entry:
      raise HloError("the text has no ENTRY computation: is it HLO?")

  def executed(self) -> Iterator[tuple[_Instruction, int]]:
    """Every instruction that is scheduled, and how often it runs. Of a branch the costliest arm,
    told by its number of instructions."""
    todo = [(self.entry, 1)]
    while todo:
      name, times = todo.pop()
      for instruction in self.computations[name]:
        yield instruction, times
        if instruction.op == "while":
          rounds = self.rounds(instruction.called("condition"))
          todo.append((instruction.called("body"), times * rounds))
        elif instruction.op == "conditional":
          todo.append((max(_branches(instruction), key=lambda n: len(self.computations[n])), times))
        elif instruction.op in ("call", "async-start"):
          callee = instruction.called("to_apply") or instruction.called("calls")
          todo.append((callee, times))

  def rounds(self, condition: str) -> int:
    """How often a loop runs: the constant that its counter, from 0, is compared with."""
    bounds = {int(found[1]) for i in self.computations[condition]
              if i.op == "constant" and (found := re.match(r"(-?\d+)\)", i.rest))}
    if len(bounds) != 1:
      raise HloError(f"the condition {condition} of a loop has the constants {sorted(bounds)}")
    return bounds.pop()

  def sent(self, instruction: _Instruction, kind: str) -> float:
    """Bytes that a chip sends if the group is a ring."""
    inputs = sum(_bytes(self.types.get(name, "")) for name in instruction.operands)
    if kind == "collective-permute":
      return inputs
    size = _group_size(instruction.rest)
    if kind == "all-gather":
      return inputs * (size - 1)
    return inputs * (size - 1) / size * (2 if kind == "all-reduce" else 1)

  def hbm(self, instruction: _Instruction) -> float:
    """Bytes of operands and outputs in HBM; for fusions see the module's docstring."""
    if instruction.op in _FREE or instruction.op.endswith("-done"):
      return 0.0
    if instruction.op in ("copy-start", "slice-start") or instruction.op.endswith("-start"):
      # The type holds the input beside the output: the input is there once.
      return _bytes(instruction.type, hbm_only=True)
    outputs = _bytes(instruction.type, hbm_only=True)
    if instruction.op in _SLICES:
      return 2 * outputs
    if instruction.op == "dynamic-update-slice":
      return 2 * _bytes(self.types.get(instruction.operands[1], ""), hbm_only=True)
    inputs = [_bytes(self.types.get(name, ""), hbm_only=True) for name in instruction.operands]
    if instruction.op == "fusion":
      inputs, outputs = self._fused(instruction, inputs, outputs)
    return sum(inputs) + outputs

  def _fused(self, fusion: _Instruction, inputs: list[float], outputs: float):
    partial, in_place = self._slices(fusion.called("calls"))
    inputs = [min(size, partial.get(i, size)) for i, size in enumerate(inputs)]
    return inputs, min(outputs, in_place) if in_place else outputs

  def _slices(self, name: str) -> tuple[dict[int, float], float]:
    """Parameters of a fused computation that are only read or written in part -> bytes of the part;
    and the bytes written by a root that updates in place (0: it does not)."""
    body = self.computations[name]
    made = {i.name: i for i in body}
    users = collections.defaultdict(list)
    for instruction in body:
      for operand in instruction.operands:
        users[operand].append(instruction)
    partial = {}
    for instruction in body:
      if instruction.op != "parameter":
        continue
      parts = [_part(user, instruction.name, self.types) for user in users[instruction.name]]
      if parts and None not in parts:
        partial[int(instruction.rest.split(")")[0])] = sum(parts)
    root = next(i for i in body if i.root)
    while root.op == "bitcast":
      root = made[root.operands[0]]
    if root.op != "dynamic-update-slice":
      return partial, 0.0
    return partial, _bytes(self.types[root.operands[1]])


def _instruction(line: str, name: str, kind: str, op: str, rest: str) -> _Instruction:
  operands = tuple(_NAME.findall(rest.split(")")[0]))
  return _Instruction(name, kind, op, operands, rest, line.lstrip().startswith("ROOT "))


def _part(user: _Instruction, operand: str, types: dict[str, str]) -> float | None:
  """Bytes of `operand` that `user` touches, None if all."""
  if user.op in _SLICES and user.operands[0] == operand:
    return _bytes(user.type)
  if user.op == "dynamic-update-slice" and user.operands[0] == operand:
    return _bytes(types[user.operands[1]])
  return None


def _branches(instruction: _Instruction) -> list[str]:
  if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
    return _NAME.findall(listed[1])
  return [instruction.called("true_computation"), instruction.called("false_computation")]


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


def _bytes(type_text: str, hbm_only: bool = False) -> float:
  """Bytes of all arrays of a type; with `hbm_only` of those in the default memory space."""
  total = 0.0
  for dtype, dims, layout in _ARRAY.findall(type_text):
    if dtype == "token" or (hbm_only and re.search(r"S\([1-9]\d*\)", layout)):
      continue
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])
    total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
  return total
