"""Group advantages: the worked values of the paper's rule, and its invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.rl import advantages

binary_groups = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)


@pytest.mark.parametrize(
  ("right", "of_right", "of_wrong"),
  [(1, 1.5, -0.5), (2, 0.866, -0.866), (3, 0.5, -1.5)],
)
def test_worked_values_of_four(right, of_right, of_wrong):
  got = advantages.group_advantages([1.0] * right + [0.0] * (4 - right))
  np.testing.assert_allclose(got, [of_right] * right + [of_wrong] * (4 - right), atol=5e-4)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_equal_rewards_have_zero_advantage(reward, size):
  np.testing.assert_array_equal(advantages.group_advantages([reward] * size), np.zeros(size))


@given(binary_groups, st.sampled_from([0, 1]))
def test_matches_numpy(rewards, ddof):
  rewards = np.array(rewards)
  want = np.zeros_like(rewards)
  if rewards.std() > 0:
    want = (rewards - rewards.mean()) / (rewards.std(ddof=ddof) + 1e-6)
  np.testing.assert_allclose(
    advantages.group_advantages(rewards, ddof=ddof), want, rtol=1e-12, atol=1e-14
  )


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12), st.randoms())
@settings(max_examples=50)
def test_permutation_is_bit_exact(rewards, random):
  order = list(range(len(rewards)))
  random.shuffle(order)
  got = advantages.group_advantages(np.array(rewards)[order])
  np.testing.assert_array_equal(got, advantages.group_advantages(rewards)[order])


def test_dr_grpo_only_centres():
  got = advantages.group_advantages([1, 0, 0, 0], normalise_std=False)
  np.testing.assert_allclose(got, [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("bad", [[], [[1.0]], [0.0, np.nan], [np.inf, 1.0]])
def test_bad_rewards_are_named(bad):
  with pytest.raises(ValueError, match="rewards must be"):
    advantages.group_advantages(bad)


def test_input_is_not_changed():
  rewards = np.array([1.0, 0.0])
  advantages.group_advantages(rewards)
  np.testing.assert_array_equal(rewards, [1.0, 0.0])
