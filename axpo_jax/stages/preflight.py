"""Checks a run's input files and tools before the run claims its folder.

In: a checked config and its RunContext. Out: nothing, or a ConfigError that names file and field. It reads the
headers of weights and the first records of question files, and starts the tools.
"""

import dataclasses
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.agent.transcript import TranscriptError
from axpo_jax.config_queries import reads_held_out
from axpo_jax.data import adapters, readers
from axpo_jax.data.question import Question
from axpo_jax.errors import ConfigError
from axpo_jax.eval import benchmarks
from axpo_jax.model import hf
from axpo_jax.rollouts import shards
from axpo_jax.stages import sections, sft, toolbox
from axpo_jax.stages.context import RunContext

# Most questions of a file that are read, and most seconds that this may take: records may be large.
_QUESTIONS, _SECONDS = 200, 2.0
_SHOWN = 3  # tensors that do not fit, in the message


def check_files(config: ConfigDict, context: RunContext) -> None:
  """Checks the files that the run reads.

  Raises:
    ConfigError: something is missing, damaged or of another kind.
  """
  stages = set(config.stages)
  if config.model.checkpoint:
    _check_weights(config.model.checkpoint, context)
  if {"teach", "screen", "rl"} & stages:
    _check_questions(config, "config.data.path", config.data.path, config.data.source,
                     least=config.rl.questions if "rl" in stages else 1)
  if reads_held_out(config):
    _check_questions(config, "config.data.eval_path", config.data.eval_path,
                     config.data.eval_source or config.data.source)
  if "eval" in stages:
    for name in config.eval.benchmarks:
      _check_benchmark(config, name)
  if "sft" in stages:
    _check_trajectories(config, context)
  for name in ("policy", "teacher") if "rl" in stages else ():
    _check_shards(f"config.rl.filter.{name}", config.rl.filter[name])


def _check_weights(path: str, context: RunContext) -> None:
  try:
    hf.check_checkpoint(paths.local(path), context.model_config)
  except (hf.CheckpointError, OSError) as error:
    lines = str(error).splitlines()
    more = f" and {len(lines) - 1 - _SHOWN} more" if len(lines) - 1 > _SHOWN else ""
    text = f"{lines[0]} {'; '.join(line.strip() for line in lines[1:1 + _SHOWN])}{more}"
    raise ConfigError(f"config.model.checkpoint={path!r}: {text.strip()}") from error


def _check_questions(config: ConfigDict, field: str, path: str, source: str, least: int = 1) -> None:
  if source == "miniworld":
    return
  # Nothing is written into the cache yet.
  how = dataclasses.replace(sections.reader(config, source), image_cache="", min_records=_QUESTIONS)
  report = readers.ReadReport(quiet=True)
  stream = (adapters.read(source, path, how, report) if source in adapters.LAYOUTS
            else readers.read_questions(path, how, report))
  where = f"{field}={path!r}"
  count = _read_some(where, stream, report)
  if count is not None and count < least:
    raise ConfigError(f"{where} holds {count} questions, and a step takes config.rl.questions={least} "
                      "different ones: lower it, or add questions")


def _check_benchmark(config: ConfigDict, name: str) -> None:
  benchmark = benchmarks.named(name)
  folder = paths.parse(config.eval.folder, "config.eval.folder") / benchmark.name
  how = readers.ReaderConfig(image_check="none", max_bad_share=config.data.max_bad_share)
  report = readers.ReadReport(quiet=True)
  _read_some(f"config.eval.folder: {name}", benchmark.read(folder, how, report), report)


def _read_some(where: str, stream: Iterator[Question], report: readers.ReadReport) -> int | None:
  """Reads the first questions; returns how many there are, or None if the file has more."""
  end = time.monotonic() + _SECONDS
  try:
    for _ in stream:
      if report.records >= _QUESTIONS or time.monotonic() >= end:
        return None
  except readers.ReaderError as error:
    raise ConfigError(f"{where}: {error}") from error
  if report.records == report.bad:
    raise ConfigError(f"{where} holds no question")
  return report.records - report.bad


def _check_trajectories(config: ConfigDict, context: RunContext) -> None:
  section = config.sft
  if section.source == "shards":
    _check_shards("config.sft.path", section.path)
  if section.source == "conversations":
    sft.conversations(config, context)
  if section.source != "jsonl":
    return
  try:
    found = shards.Trajectories(section.path, context.processor)
    if not len(found):
      raise ConfigError(f"config.sft.path={section.path!r} holds no trajectory")
    found[0]
  except TranscriptError as error:
    raise ConfigError(f"config.sft.path={section.path!r} is no dump of rollouts (docs/data.md): {error}"
                      ) from error


def _check_shards(field: str, path: str) -> None:
  try:
    if path:
      next(shards.records(path), None)
  except shards.ShardError as error:
    raise ConfigError(f"{field}={path!r}: {error}") from error


def start_tools(config: ConfigDict, context: RunContext) -> None:
  """Starts the tools; the stages use the started ones.

  Raises:
    ConfigError: a tool lacks a package, a key, a file or a sandbox.
  """
  stages = set(config.stages)
  acts = stages - {"sft", "eval"} or (stages == {"sft"} and config.sft.source == "teacher")
  for evaluation in (*([False] if acts else ()), *([True] if stages & {"rl", "eval"} else ())):
    toolbox.toolbox(config, context.chat, context.processor.factor, evaluation=evaluation,
                    folder=context.folder)
