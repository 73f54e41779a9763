"""What a run is said to need of a chip, by hand."""

import dataclasses

from axpo_jax.plan.aot import Program
from axpo_jax.plan.chips import CHIPS
from axpo_jax.plan.slice_report import Report, text, verdict

GIB = 2.0**30
# 1.576e15 FLOPs take one second on four chips of 197e12, twice over.
PROGRAMS = {name: Program(size * GIB, 1.576e15, 60.0, chips=4)
            for name, size in (("score", 2), ("accumulate", 3), ("apply", 1))}
HELD = {kind: size * GIB for kind, size in
        (("parameters", 4), ("reference", 4), ("optimizer", 2), ("gradients", 4), ("batch", 0.5))}
REPORT = Report(CHIPS["v5e"], HELD, PROGRAMS)
ENGINE = {"engine's weights": 2 * GIB, "engine's pool": 6 * GIB}


def together(report) -> dict[str, float]:
  return {name: report.total(name) / GIB for name in report.programs}


def test_memory_of_a_chip_by_function():
  """Gradients come after scoring, two micro-batches are in flight, an offloaded reference scores."""
  assert together(REPORT) == {"score": 13, "accumulate": 18, "apply": 16}
  assert REPORT.excess / GIB == 18 - 15.75
  offloaded = dataclasses.replace(REPORT, reference_offload=True)
  assert together(offloaded) == {"score": 13, "accumulate": 14, "apply": 12}
  assert offloaded.excess < 0


def test_the_embedded_engine_is_in_memory_beside_training():
  """Its weights and pool are there all the time; while it samples there are no gradients or batches."""
  programs = PROGRAMS | {"decode": Program(5 * GIB, 0.0, 0.0)}
  report = dataclasses.replace(REPORT, held=HELD | ENGINE, programs=programs)
  assert together(report) == {"score": 21, "accumulate": 26, "apply": 24, "decode": 23}


def test_the_table_has_a_column_for_each_function():
  rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
          for line in text(REPORT).splitlines() if line.startswith("|")}
  assert rows["memory of a chip, GiB"] == ["score", "accumulate", "apply"]
  assert rows["gradients"] == ["", "4.00", "4.00"] and rows["batch"] == ["1.00"] * 3
  assert rows["**together**"] == ["**13.00**", "**18.00**", "**16.00**"]
  assert rows["PFLOP, all chips"] == ["1.58"] * 3 and rows["seconds at the chips' peak"] == ["2.000"] * 3


def test_the_verdict_is_one_line():
  assert verdict(REPORT).startswith(
    "**The run does not fit** by 2.25 GiB: 18.00 of 15.75 GiB a chip (accumulate).")
  fits = dataclasses.replace(REPORT, reference_offload=True)
  assert verdict(fits) == ("**The run fits**: at most 14.00 of 15.75 GiB a chip (accumulate), 1.75 to "
                           "spare.")
  without_decode = dataclasses.replace(fits, held=HELD | dict.fromkeys(ENGINE, 0.0))
  assert verdict(without_decode).startswith("**What was compiled fits**")
