"""AXPO (arXiv 2605.28774) in JAX: train vision-language models that act.

The names below are the public API (docs/api.md). Each module loads when one of its names is first used, so that
`import axpo_jax` costs nothing and logs can be read without JAX.
"""

# ruff: noqa: F401 - type checkers read the imports, Python the table

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from axpo_jax.agent.rollout import Rollout
  from axpo_jax.agent.tools.function import tool
  from axpo_jax.agent.transcript import Transcript
  from axpo_jax.api import Policy, load_config, load_policy
  from axpo_jax.config import base_config
  from axpo_jax.data.question import Question
  from axpo_jax.data.readers import read_questions
  from axpo_jax.diagnose.figures import diagnose as diagnose_logs
  from axpo_jax.diagnose.reading import read as read_logs
  from axpo_jax.errors import ConfigError
  from axpo_jax.rl.algorithm import assign_credit, plan_resamples
  from axpo_jax.rl.credit import BranchOutcome, Credit, CreditConfig, GroupOutcome
  from axpo_jax.rl.resample import GroupView, ResampleConfig, Selection
  from axpo_jax.rollouts.collect import Group
  from axpo_jax.stages.metrics import read_metrics

# Public name -> (module, name there).
_PUBLIC = {
  "BranchOutcome": ("rl.credit", "BranchOutcome"),
  "ConfigError": ("errors", "ConfigError"),
  "Credit": ("rl.credit", "Credit"),
  "CreditConfig": ("rl.credit", "CreditConfig"),
  "Group": ("rollouts.collect", "Group"),
  "GroupOutcome": ("rl.credit", "GroupOutcome"),
  "GroupView": ("rl.resample", "GroupView"),
  "Policy": ("api", "Policy"),
  "Question": ("data.question", "Question"),
  "ResampleConfig": ("rl.resample", "ResampleConfig"),
  "Rollout": ("agent.rollout", "Rollout"),
  "Selection": ("rl.resample", "Selection"),
  "Transcript": ("agent.transcript", "Transcript"),
  "assign_credit": ("rl.algorithm", "assign_credit"),
  "base_config": ("config", "base_config"),
  "diagnose_logs": ("diagnose.figures", "diagnose"),
  "load_config": ("api", "load_config"),
  "load_policy": ("api", "load_policy"),
  "plan_resamples": ("rl.algorithm", "plan_resamples"),
  "read_logs": ("diagnose.reading", "read"),
  "read_questions": ("data.readers", "read_questions"),
  "read_metrics": ("stages.metrics", "read_metrics"),
  "tool": ("agent.tools.function", "tool"),
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, there = _PUBLIC[name]
  value = getattr(importlib.import_module(f"{__name__}.{module}"), there)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_PUBLIC})
