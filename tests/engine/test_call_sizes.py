"""The shapes that are said to be possible, beside those that calls have."""

import numpy as np
import pytest

from axpo_jax.engine.embedded.batches import copy_batches, padded_list, prefill_batches
from axpo_jax.engine.embedded.call_sizes import CallSizes
from axpo_jax.engine.embedded.prefix_pool import Layout, Move
from axpo_jax.engine.settings import EmbeddedConfig

SMALL = EmbeddedConfig(rows=8, length=32, max_running=8, min_batch=2, min_tokens=8, min_slots=16,
                       decode_block=4, prefill_tokens=40, patch_lengths=(16, 64))


def test_by_hand():
  """Rows 2, 4, 8; tokens 8, 16, 32; slots 16, 24, 32; of 8 tokens 5 rows are within the budget."""
  sizes = CallSizes.of(SMALL, 1)
  assert {rows for rows, tokens, _ in sizes.prefills() if tokens == 8} == {1, 2, 4, 5}
  assert {(rows, slots) for rows, tokens, slots in sizes.prefills() if tokens == 16} == {
    (rows, slots) for rows in (1, 2) for slots in (16, 24, 32)}
  assert {(rows, slots) for rows, tokens, slots in sizes.prefills() if tokens == 32} == {(1, 24), (1, 32)}
  rows = [2**i for i in range(10)]
  features = {rows * patches // 4 for rows in rows for patches in (16, 64)}
  assert len(features) == 12  # two rows of 64 patches are as many as eight of 16
  # Rows times tokens of a prefill: 8, 16, 32 or 40.
  assert sizes.programs(4) == {
    "encode": 20, "pick": 12 * 4, "copy": 9, "prefill": 2 * (12 + 6 + 2), "decode": 9}
  # Of two kinds of sampling one penalises what an answer of up to 100 tokens holds: no list, 64, 128.
  long = CallSizes.of(EmbeddedConfig(length=128, max_running=16, min_slots=128), 1)
  assert long.programs(4, (0, 100))["decode"] == 3 * long.programs(4)["decode"] == 3


@pytest.mark.parametrize("shards", [1, 2])
def test_calls_have_no_other_shapes(model_config, ask, shards):
  from axpo_jax.engine.embedded.batches import Prompt
  rng, layout, sizes = np.random.default_rng(shards), Layout(8, shards), CallSizes.of(SMALL, shards)
  met = set(), set()
  for _ in range(60):
    rows = rng.permutation(8)[:rng.integers(1, 9)].tolist()
    prompts = [Prompt.of(ask(range(10, 10 + rng.integers(2, 33))), model_config) for _ in rows]
    jobs = [(prompt, Move(row, int(rng.integers(8)), int(rng.integers(prompt.length))))
            for row, prompt in zip(rows, prompts)]
    met[0].update((inputs.tokens_BxT.shape[0] // shards, inputs.tokens_BxT.shape[1], slots)
                  for inputs, slots in prefill_batches(
                    jobs, {}, sizes.batch, sizes.tokens, sizes.slots, layout=layout,
                    most_tokens=SMALL.prefill_tokens))
    met[1].update((len(row), slots) for _, row, slots in copy_batches(jobs, sizes.copy, sizes.slots, layout))
  assert met[0] <= sizes.prefills() and len(met[0]) > 8
  assert met[1] <= sizes.copies()


def test_lists_of_tokens_that_are_penalised():
  assert [padded_list(n) for n in (0, 1, 64, 65, 4097)] == [64, 64, 64, 128, 8192]
