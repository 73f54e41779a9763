"""What a step is said to need of a chip, by hand."""

import dataclasses

from axpo_jax.train.aot import CHIPS, Program
from axpo_jax.train.slice_report import Report, advice, largest_tokens

GIB = 2.0**30
PROGRAMS = {name: Program(size * GIB, 0.0, None, 0.0)
            for name, size in (("score", 2), ("accumulate", 3), ("apply", 1))}
HELD = {kind: size * GIB for kind, size in
        (("parameters", 4), ("reference", 4), ("optimizer", 2), ("gradients", 4), ("batch", 0.5))}
REPORT = Report(CHIPS["v5e"], 4, HELD, 0.0, PROGRAMS, 1, 1024, 0.0)


def together(report) -> dict[str, float]:
  return {name: report.total(name) / GIB for name in PROGRAMS}


def test_memory_of_a_chip_by_function():
  """Gradients come after scoring, two micro-batches are on their way, an offloaded reference scores."""
  assert together(REPORT) == {"score": 13, "accumulate": 18, "apply": 16}
  assert REPORT.excess / GIB == 18 - 15.75
  offloaded = dataclasses.replace(REPORT, reference_offload=True)
  assert together(offloaded) == {"score": 13, "accumulate": 14, "apply": 12}
  assert offloaded.excess < 0


def test_advice_names_what_is_not_done_yet():
  options = {"remat": "full", "mu_dtype": "bfloat16", "param_dtype": "bfloat16", "rows_a_shard": 1}
  assert any("reference_offload=True (saves 4.00" in line for line in advice(REPORT, **options))
  small = dataclasses.replace(REPORT, chip=dataclasses.replace(CHIPS["v5e"], hbm=8 * GIB))
  offloaded = dataclasses.replace(small, reference_offload=True)
  assert advice(offloaded, **options)
  assert not any("offload" in line for line in advice(offloaded, **options))


def test_largest_micro_batch():
  """14 of 15.75 GiB are taken, of which 4 go with the 1,024 tokens: 3 of temporaries, two batches."""
  report = dataclasses.replace(REPORT, reference_offload=True)
  assert largest_tokens(report, 64) == 5.75 / 4 * 1024
  # A second size shows that 1 GiB of the temporaries stays: 3 GiB go with the tokens.
  twice = dataclasses.replace(PROGRAMS["accumulate"], temporaries=5 * GIB)
  assert largest_tokens(report, 64, twice, 2048) == 4.75 / 3 * 1024 // 64 * 64
