"""What a run is said to need of a chip, by hand."""

import dataclasses

import pytest

from axpo_jax.plan.aot import Program
from axpo_jax.plan.chips import CHIPS
from axpo_jax.plan.hlo import Collective
from axpo_jax.plan.slice_report import Report, advice, text, verdict

GIB = 2.0**30
PROGRAMS = {name: Program(size * GIB, 0.0, (), 0.0)
            for name, size in (("score", 2), ("accumulate", 3), ("apply", 1))}
HELD = {kind: size * GIB for kind, size in
        (("parameters", 4), ("reference", 4), ("optimizer", 2), ("gradients", 4), ("batch", 0.5))}
REPORT = Report(CHIPS["v5e"], 4, HELD, PROGRAMS)
ENGINE = {"engine's weights": 2 * GIB, "engine's pool": 6 * GIB}


def together(report) -> dict[str, float]:
  return {name: report.total(name) / GIB for name in report.programs}


def test_memory_of_a_chip_by_function():
  """Gradients come after scoring, two micro-batches are on their way, an offloaded reference scores."""
  assert together(REPORT) == {"score": 13, "accumulate": 18, "apply": 16}
  assert REPORT.excess / GIB == 18 - 15.75
  offloaded = dataclasses.replace(REPORT, reference_offload=True)
  assert together(offloaded) == {"score": 13, "accumulate": 14, "apply": 12}
  assert offloaded.excess < 0


def test_the_embedded_engine_stands_beside_training():
  """Its weights and pool are there all the time; while it samples there are no gradients or batches."""
  programs = PROGRAMS | {"decode": Program(5 * GIB, 0.0, (), 0.0)}
  report = dataclasses.replace(REPORT, held=HELD | ENGINE, programs=programs)
  assert together(report) == {"score": 21, "accumulate": 26, "apply": 24, "decode": 23}
  assert "config.rollout.engine=sglang (saves 8.00)" in advice(report)


def test_the_verdict_is_one_line_with_the_fields_to_change():
  assert verdict(REPORT) == (
    "**The run does not fit** by 2.25 GiB: 18.00 of 15.75 GiB a chip (accumulate). Change: "
    + "; or ".join(advice(REPORT)) + ".")
  assert "config.rl.reference_offload=True (saves 4.00)" in advice(REPORT)
  fits = dataclasses.replace(REPORT, reference_offload=True)
  assert verdict(fits) == ("**The run fits**: at most 14.00 of 15.75 GiB a chip (accumulate), 1.75 to "
                           "spare.")
  assert not any("offload" in line for line in advice(fits))
  without_decode = dataclasses.replace(fits, held=HELD | dict.fromkeys(ENGINE, 0.0))
  assert verdict(without_decode).startswith("**What was compiled fits**")


def test_what_more_copies_of_the_weights_cost_is_said():
  """14 GiB of state, four times on 16 chips: four chips hold a copy, and 12.25 GiB are free for it."""
  report = dataclasses.replace(REPORT, chips=16, copies=4)
  assert "config.mesh.data=1 (saves 10.50)" in advice(report)
  assert "at least 5 chips on fsdp or tensor instead of 4 (saves 2.25)" in advice(report)
  assert not any("mesh.data" in line for line in advice(REPORT))


@pytest.mark.parametrize("hint, said", [
  ({"data": 4, "fsdp": 16}, "Try --config.mesh.data=4 --config.mesh.fsdp=16."),
  (None, "Try another config.mesh.")])
def test_weights_gathered_by_all_reduce_are_said(hint, said):
  small = Collective("all-reduce", 1e5, 36, padded=True)
  programs = PROGRAMS | {"score": dataclasses.replace(PROGRAMS["score"], collectives=[small])}
  assert "Slow" not in text(dataclasses.replace(REPORT, programs=programs))
  padded = Collective("all-reduce", 1e9, 36, padded=True)
  programs = PROGRAMS | {"score": dataclasses.replace(PROGRAMS["score"], collectives=[padded])}
  found = text(dataclasses.replace(REPORT, programs=programs, mesh_hint=hint))
  assert "(score 36 times, 36.0 GB)" in found and said in found
  assert "| all-reduce: times, GB sent by a chip | 36, 36.00 |" in found
