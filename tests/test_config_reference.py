"""docs/configuration.md has every field with its meaning, and is today's."""

import pathlib
import re

from axpo_jax.config import LIMITS, base_config
from axpo_jax.config_queries import fields
from axpo_jax.config_reference import reference

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "configuration.md"


def _sections() -> dict[str, str]:
  parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)
  return dict(zip(parts[1::2], parts[2::2]))


def test_page_is_todays():
  assert PAGE.read_text() == reference(), "python -m axpo_jax.config_reference > docs/configuration.md"


def test_every_field_has_its_default_and_a_meaning():
  sections = _sections()
  for path, value in fields(base_config()):
    section, _, name = path.rpartition(".")
    if section in ("teach", "screen") and name in LIMITS:
      continue  # those of "agent"
    text = sections[section or "The run"]
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    default, meaning = row.split(" | ")[1:3]
    assert default.strip("`") in (str(value), repr(value)) or "assets" in default
    introduced = not text.lstrip().startswith("|")
    assert meaning.strip(" |") or introduced, path


def test_comments_reach_the_fields_they_stand_at():
  """In config.py above, behind, and behind with a second line below; and in a dataclass's docstring."""
  sections = _sections()
  assert "| `dump_every` | `10` | steps between dumps of all rollouts" in sections["log"]
  assert "half the cost" in next(line for line in sections["rl"].splitlines() if "old_logprobs" in line)
  assert "| `k` | `4` | K, continuations per selected prefix [paper]. |" in sections["rl.resample"]
  assert sections["optimizer"].count("| Adam's. |") == 3  # one entry for b1, b2 and eps
  assert "of the run's stages. The servers' context must be larger" in sections["rollout.sglang"]
