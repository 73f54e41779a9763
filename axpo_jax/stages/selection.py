"""Applies the filters to samples: which trajectories SFT trains on, and which questions RL.

In: shards of this run's stages, or of folders that the config names. Out: what is kept, and a tally of how many
were left out and why.
"""

import json

from etils import epath
from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.data import filters
from axpo_jax.errors import ConfigError
from axpo_jax.model.images import ImageProcessor
from axpo_jax.rollouts import shards


def trajectories(sft: ConfigDict, processor: ImageProcessor, folder: epath.Path | None
                 ) -> tuple[shards.Trajectories, filters.Tally | None]:
  """The trajectories of SFT, each read from disk when it is used. Shards are filtered, a dump is not.

  Args:
    sft: the config's section.
    folder: of the run; its stage "teach" is read if the section names no folder.

  Raises:
    ConfigError: the filter keeps nothing.
  """
  if sft.source == "jsonl":
    return shards.Trajectories(sft.path, processor), None
  path, reasons = sft.path or folder / "teach" / "shards", []

  def choose(record: shards.Record) -> list[int]:
    judged = set(record.judged)
    why = [filters.trajectory(stats.reward, stats.total_tokens, failed=i not in judged,
                              max_tokens=sft.max_length, keep_wrong=sft.keep_wrong)
           for i, stats in enumerate(record.stats)]
    reasons.extend(why)
    return [i for i, reason in enumerate(why) if reason == filters.KEPT]

  found = shards.Trajectories(path, processor, choose)
  tally = filters.Tally.of("trajectories", reasons)
  if not len(found):
    raise ConfigError(f"config.sft: no trajectory of {path} is left to learn from: {tally}")
  return found, tally


def questions(config: ConfigDict, folder: epath.Path | None
              ) -> tuple[list[shards.Record] | None, filters.Tally | None]:
  """Records of the questions that RL trains on; (None, None) without samples to filter by.

  Args:
    folder: of the run; its stages "screen" and "teach" are read if the config names no folders.

  Raises:
    ConfigError: a folder holds no records.
  """
  section = config.rl.filter
  policy = _records("config.rl.filter.policy", section.policy, config, folder, "screen")
  teacher = _records("config.rl.filter.teacher", section.teacher, config, folder, "teach")
  asked = teacher if policy is None else policy
  if asked is None:
    return None, None
  thresholds = filters.Thresholds(section.solved, section.hopeless)
  taught = {record.id: record.counts for record in teacher or ()}
  reasons = [filters.question(None if policy is None else record.counts, taught.get(record.id),
                              thresholds) for record in asked]
  kept = [record for record, reason in zip(asked, reasons) if reason == filters.KEPT]
  return kept, filters.Tally.of("questions", reasons)


def _records(field: str, path: str, config: ConfigDict, folder: epath.Path | None, stage: str
             ) -> list[shards.Record] | None:
  """Records of a folder, or of one of this run's stages; None where there is neither."""
  if not path and (folder is None or stage not in config.stages):
    return None
  try:
    return list(shards.records(path or folder / stage / "shards"))
  except shards.ShardError as error:
    raise ConfigError(f"{field}={path!r}: {error}") from error


def report_tally(tally: filters.Tally | None, folder: epath.Path) -> None:
  """Prints a filter's tally and writes it to filter.json in a stage's folder; None (no filter) does nothing."""
  if tally is None:
    return
  print(f"{folder.name}: {tally}")
  paths.make(folder)
  paths.write_text(folder / "filter.json", json.dumps(tally.to_json(), indent=2) + "\n")
