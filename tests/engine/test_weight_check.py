"""Checksums that do not fit the push. What real servers answer is in test_sglang_engine.py."""

import pathlib

import pytest

from axpo_jax.engine.sglang.api import LoadError
from axpo_jax.engine.sglang.weight_check import WeightCheck
from axpo_jax.engine.sglang.weight_push import Push

DOWN, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


def push(tag, changed=None):
  return Push(version=0, tag=tag, folder=pathlib.Path("pushed"), previous=None, changed=changed and frozenset(changed),
              bytes_written=8, seconds=0.1)


def sums(down, norm="n", ranks=1):
  # Buffers have other endings, and are nobody's weights.
  return {f"{rank}/{name}": value for rank in range(ranks)
          for name, value in ((DOWN, down), (NORM, norm), ("rotary.cos_cache", "c"))}


@pytest.fixture
def check():
  """After a first push that one server has taken."""
  made, first = WeightCheck(frozenset({DOWN, NORM})), push("1")
  made.next_push(first)
  made.check("a", sums("old"), first)
  return made


def test_what_the_push_changed_and_no_more(check):
  second = push("2", ["model.language_model.layers.0.mlp.down_proj.weight"])
  check.next_push(second)
  with pytest.raises(LoadError, match=r"a did not take the push as written: 1 differ .*down_proj"):
    check.check("a", sums("old"), second)
  with pytest.raises(LoadError, match=r"a did not take the push as written: 1 differ .*norm"):
    check.check("a", sums("new", "other"), second)
  check.check("a", sums("new"), second)


def test_servers_with_one_layout_agree(check):
  first = push("1")
  with pytest.raises(LoadError, match="b and another server hold different weights"):
    check.check("b", sums("older"), first)
  check.check("c", sums("halves", ranks=2), first)  # split over two GPUs: other sums
  with pytest.raises(LoadError, match="c holds other tensors than the model"):
    check.check("c", {"0/model.embed.weight": "x"}, first)


def test_who_comes_back_with_the_push_before_decides_nothing(check):
  second = push("2", ["model.language_model.layers.0.mlp.down_proj.weight"])
  check.next_push(second)
  check.check("b", sums("old"), push("1"))
  check.check("a", sums("new"), second)
