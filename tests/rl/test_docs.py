"""The pages about the algorithm and its metrics say what the code does."""

import contextlib
import io
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from axpo_jax.eval import passk
from axpo_jax.rl import losses, recipes
from axpo_jax.rl.algorithm import assign_credit
from axpo_jax.rl.credit import BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rollouts import census
from axpo_jax.rollouts.acting import acting_census

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_worked_example_runs_and_prints_what_the_page_shows():
  page = (DOCS / "algorithm.md").read_text()
  code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code, "docs/algorithm.md", "exec"), {})
  width = max(map(len, printed.getvalue().splitlines()))
  assert [line[:width].rstrip() for line in shown.splitlines()] == printed.getvalue().splitlines()


def test_every_recipe_is_on_the_page_with_its_overrides():
  page = (DOCS / "algorithm.md").read_text()
  for name, overrides in recipes.RECIPES.items():
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    for field, value in overrides.items():
      assert f"{field}={value:g}" in row if isinstance(value, float) else f"{field}={value}" in row


def _documented():
  """Names in backticks; `a/b`, `_c` abbreviates a/b with its last part replaced."""
  page = (DOCS / "metrics.md").read_text()
  names = set(re.findall(r"`([a-z]+/[a-z0-9_/<>]+)`", page))
  for line in page.splitlines():
    cell = line.split("|")[1] if line.startswith("|") else ""
    full = re.findall(r"`([a-z]+/[a-z0-9_]+)`", cell)
    for suffix in re.findall(r"`(_[a-z0-9_]+)`", cell):
      for base in full:
        names |= {base[:i] + suffix for i, letter in enumerate(base) if letter == "_"}
  return names


def _produced():
  tool = {"used_tool": True, "num_calls": 2, "turns": 2, "sampled_tokens": 5, "confidence": 0.5}
  bare = {"used_tool": False, "num_calls": 0, "turns": 1, "sampled_tokens": 5}
  more = {"total_tokens": 9, "prompt_tokens": 9, "cached_tokens": 3, "tool_errors": {"x": 1},
          "reward_timed_out": True}
  rollouts = [census.RolloutStats(0.0, **tool, stop="x", **more) for _ in range(5)]
  rollouts += [census.RolloutStats(1.0, **bare, stop="x")]
  branch = census.BranchStats(0, rollouts[1:3], prefix_tokens=4, cached_tokens=3)
  groups = [census.GroupStats(rollouts, [branch], triggered=True)]
  names = set(census.census(groups)) | set(census.resample_census(groups, budget=2))
  names |= set(acting_census([census.GroupStats(rollouts, acting=label)
                              for label in ("act", "decline")]))
  outcome = GroupOutcome(np.zeros(4), [BranchOutcome(0, np.array([1.0, 0.0]))])
  names |= set(census.credit_census(assign_credit([outcome], CreditConfig())))
  x = jnp.linspace(-2.0, -1.0, 8)
  config = LossConfig(dual_clip=3.0)
  names |= set(losses.summarise(losses.policy_loss(x, x, x, x, x, -x, config, x)[1], 1.0))
  names |= set(passk.summarise([[1, 0, 0, 0], [0, 0, 0, 0]]))
  return {name.replace("/stop/x", "/stop/<reason>").replace("/tool_errors/x", "/tool_errors/<kind>")
          for name in names}


def test_every_metric_is_documented():
  missing = _produced() - _documented()
  assert not missing
