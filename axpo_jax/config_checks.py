"""Checks a configuration before anything is loaded, so that a run fails in its first seconds.

In: the whole tree of `config.base_config`. Out: nothing, or a `ConfigError` that names the field, its
value and what to set it to. Checks without JAX come first. Then every record of every stage is built
once (`stages.sections`), since a run builds some of them hours after its start.
"""

import math
import os

from ml_collections import ConfigDict

from axpo_jax import hub, paths
from axpo_jax.config import BENCHMARKS, LIMITS, PUBLIC_SETS, STAGES
from axpo_jax.config_queries import (
  apply_recipe,
  fields,
  longest_episode,
  reads_held_out,
  sampling_stages,
)
from axpo_jax.errors import ConfigError
from axpo_jax.stages import plugins

_TOOLS = ("image_zoom_in", "python", "shell", "tavily-search", "image_search")
_TRACKERS = ("wandb", "trackio")
_FILE_SOURCES = ("jsonl", "parquet", "datasets", *PUBLIC_SETS, *BENCHMARKS)
_DTYPES = ("float32", "bfloat16")
_CHOICES = {
  "model.export_dtype": _DTYPES, "rollout.embedded.dtype": _DTYPES, "rollout.sglang.push_dtype": _DTYPES,
  "optimizer.mu_dtype": _DTYPES, "sft.optimizer.mu_dtype": _DTYPES, "rollout.engine": ("embedded", "sglang"),
  "rollout.sidecar.device": ("cuda", "cpu"), "rl.old_logprobs": ("current", "trainer"),
  "data.source": ("miniworld", *_FILE_SOURCES), "data.eval_source": ("", *_FILE_SOURCES),
  "teach.engine": ("scripted", "policy", "openai"), "sft.source": ("jsonl", "shards", "conversations", "teacher"),
  "agent.search.backend": ("tavily", "local", "recorded", "miniworld"),
  "agent.reward_failure": ("leave_out", "zero"),
}
# Lower bounds of numbers that no record checks.
_LEAST = {
  **dict.fromkeys((
    "rl.steps", "rl.questions", "rl.updates", "rl.max_lost_steps", "sft.steps", "sft.examples", "sft.max_length",
    "teach.rollouts", "teach.shard", "screen.rollouts", "screen.shard",
    *(f"{endpoint}.{name}" for endpoint in ("teach", "eval.judge", "agent.judge")
      for name in ("max_concurrent", "attempts", "timeout_s")),
    "eval.questions", "eval.rollouts", "eval.shard", "batch.rows", "batch.length", "batch.image_rows",
    "batch.logprob_chunk", "checkpoint.every", "checkpoint.keep", "data.miniworld.train_size",
    "agent.max_observation_tokens", "agent.python.timeout", "agent.search.max_concurrent",
    "agent.image_search.max_results", "rollout.sidecar.tensor_parallel", "rollout.sidecar.max_running",
    "images.min_pixels", "images.zoom_min_pixels"), 1),
  **dict.fromkeys((
    "teach.questions", "screen.questions", "sft.balance_coef", "log.dump_every", "rollout.staleness", "agent.max_images",
    "agent.deadline", "agent.reward_time_limit", "eval.judge.max_requests", "agent.judge.max_requests", "agent.python.max_concurrent", "rollout.sidecar.servers",
    "rollout.sidecar.max_total_tokens", "rollout.embedded.length", "rollout.sglang.length",
    *(f"agent.{limits}.{name}" for limits in ("episode_limits", "run_limits")
      for name in ("calls", "seconds", "bytes", "images")),
    *(f"{section}.{name}" for section in ("optimizer", "sft.optimizer")
      for name in ("learning_rate", "weight_decay", "clip_norm"))), 0),
  # A single rollout has nothing to be compared with: its advantage is 0.
  "rl.num_rollouts": 2,
  "eval.every": -1,
}
_SHARES = ("data.max_bad_share", "data.miniworld.large_share", "data.miniworld.easy_share",
           "rl.filter.solved", "rl.filter.hopeless", "rollout.sidecar.mem_fraction")
_NOT_BELOW = (  # (the smaller, the greater)
  ("images.min_pixels", "images.max_pixels"), ("images.zoom_min_pixels", "images.zoom_max_pixels"),
  ("agent.python.timeout", "agent.python.max_timeout"))


def validate(config: ConfigDict) -> None:
  """Applies config.rl.recipe, downloads what is named on the hub, and checks the whole config.

  Raises:
    ConfigError: an invalid value; the message names the field and how to fix it.
  """
  apply_recipe(config)
  _validate_values(config)
  hub.fetch_named(config)
  _validate_model(config.model)
  _validate_mesh(config.mesh)
  _validate_data(config)
  _validate_stages(config)
  _validate_lengths(config)
  _validate_limits(config)
  _validate_rollout(config)
  _validate_tools(config)
  _validate_judges(config)
  plugins.reward(config)
  plugins.environment(config)
  from axpo_jax.stages import sections  # loads JAX, which the checks above do not need
  sections.check(config)


def _validate_model(model: ConfigDict) -> None:
  if bool(model.checkpoint) == bool(model.preset):
    raise ConfigError(
      "set config.model.checkpoint to a Qwen3-VL folder in Hugging Face layout or its name on the hub "
      "(--config.model.checkpoint=Qwen/Qwen3-VL-8B-Thinking), or config.model.preset for "
      f"random parameters; now checkpoint={model.checkpoint!r}, preset={model.preset!r}")
  _require_folder("config.model.checkpoint", model.checkpoint)
  if model.preset and not model.tokenizer:
    raise ConfigError("config.model.preset brings no tokenizer: set config.model.tokenizer to a "
                      "folder with tokenizer and preprocessor_config.json")
  _require_folder("config.model.tokenizer", model.tokenizer)


def _validate_lengths(config: ConfigDict) -> None:
  """Checks that episodes and trajectories fit a row of a batch."""
  if config.batch.length % 64:
    raise ConfigError(f"config.batch.length={config.batch.length} must be a multiple of 64")
  trained = config.agent.max_total_tokens
  if "rl" in config.stages and trained > config.batch.length:
    raise ConfigError(f"an episode of config.agent.max_total_tokens={trained} tokens does not fit a "
                      f"row of config.batch.length={config.batch.length}: raise the latter")
  if "sft" in config.stages and config.sft.max_length > config.batch.length:
    raise ConfigError(f"a trajectory of config.sft.max_length={config.sft.max_length} tokens does not fit "
                      f"a row of config.batch.length={config.batch.length}: raise the latter")


def _validate_rollout(config: ConfigDict) -> None:
  if (config.rollout.engine == "sglang" and not config.rollout.urls and not config.model.checkpoint
      and not _begins_without_policy(config)):
    raise ConfigError("servers start from a checkpoint folder: set config.model.checkpoint, or name "
                      "running ones in config.rollout.urls")
  if (url := config.agent.python.url) and not url.startswith(("http://", "https://")):
    raise ConfigError(f"config.agent.python.url={url!r}: write http://host:port")
  if bad := [url for url in config.rollout.urls if not url.startswith(("http://", "https://"))]:
    raise ConfigError(f"config.rollout.urls names {bad}: write http://host:port")
  if "rl" in config.stages and config.rollout.temperature <= 0:
    raise ConfigError(f"config.rollout.temperature={config.rollout.temperature} makes all rollouts of a "
                      "question the same: set it above 0")
  if config.rollout.engine == "sglang" and config.rollout.presence_penalty and "rl" in config.stages:
    raise ConfigError(f"config.rollout.presence_penalty={config.rollout.presence_penalty}: SGLang "
                      "reports log-probabilities behind the penalty, which the trainer cannot compute "
                      "again: set it to 0, or use config.rollout.engine='embedded'")


def _validate_judges(config: ConfigDict) -> None:
  for name in ("agent", "eval"):
    judge = config[name].judge
    if bool(judge.url) != bool(judge.model):
      raise ConfigError(f"config.{name}.judge.url={judge.url!r} and config.{name}.judge.model="
                        f"{judge.model!r}: set both or neither")


def _validate_values(config: ConfigDict) -> None:
  """Checks single fields: finite, within bounds, one of the choices."""
  values = dict(fields(config))
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f"config.{name}={value} is not a finite number")
  for name, choices in _CHOICES.items():
    if values[name] not in choices:
      raise ConfigError(f"config.{name}={values[name]!r}; choose one of {choices}")
  for name, least in _LEAST.items():
    if values[name] < least:
      raise ConfigError(f"config.{name}={values[name]} must be {least} or more")
  for name in _SHARES:
    if not 0 <= values[name] <= 1:
      raise ConfigError(f"config.{name}={values[name]} is a share: give 0 to 1")
  for low, high in _NOT_BELOW:
    if values[low] > values[high]:
      raise ConfigError(f"config.{low}={values[low]} is above config.{high}={values[high]}: swap them")
  if unknown := sorted(set(config.log.trackers) - set(_TRACKERS)):
    raise ConfigError(f"config.log.trackers names {unknown}; there are {_TRACKERS}")
  if bad := [step for step in config.log.profile_steps if not isinstance(step, int) or step < 1]:
    raise ConfigError(f"config.log.profile_steps names {bad}: steps are numbers from 1 on")
  stages = tuple(config.stages)
  if not stages:
    raise ConfigError(f"config.stages is empty: name some of {STAGES}")
  if unknown := sorted(set(stages) - set(STAGES)):
    raise ConfigError(f"config.stages names {unknown}; stages are {STAGES}")
  if len(set(stages)) < len(stages):
    raise ConfigError(f"config.stages={stages} names a stage twice: each has one folder, so run them apart")


def _validate_mesh(mesh: ConfigDict) -> None:
  for axis, size in mesh.items():
    if size == 0 or size < -1:
      raise ConfigError(f"config.mesh.{axis}={size}: sizes are 1 or more, or -1 for what is left")
  filling = [f"config.mesh.{axis}=-1" for axis, size in mesh.items() if size == -1]
  if len(filling) > 1 and (len(filling) > 2 or mesh.data != -1 or mesh.fsdp != -1):
    raise ConfigError(f"{' and '.join(filling)}: only one axis may be -1, which takes what is left, or "
                      "data and fsdp together")


def _validate_limits(config: ConfigDict) -> None:
  """Checks the limits of episodes by stage, and that the longest episode fits the engine."""
  for name in sorted({"agent", *sampling_stages(config)} - {"rl"}):
    section = config[name]
    for field in LIMITS:
      if section[field] < 1:
        raise ConfigError(f"config.{name}.{field}={section[field]} must be 1 or more")
    if section.max_response_tokens >= section.max_total_tokens:
      raise ConfigError(
        f"config.{name}.max_response_tokens={section.max_response_tokens} leaves no room for a prompt "
        f"in config.{name}.max_total_tokens={section.max_total_tokens}: raise the latter")
  longest, field = longest_episode(config)
  given = config.rollout[config.rollout.engine].length
  if sampling_stages(config) and 0 < given < longest:
    raise ConfigError(
      f"an episode of {field}={longest} tokens does not fit "
      f"config.rollout.{config.rollout.engine}.length={given}: raise the latter, or set it to 0 for "
      "the longest episode")


def _validate_data(config: ConfigDict) -> None:
  data, stages = config.data, set(config.stages)
  if data.source == "miniworld":
    if data.eval_source:
      raise ConfigError(f"config.data.eval_source={data.eval_source!r}: the miniature world brings "
                        "its held-out questions; leave it empty")
    return
  if {"teach", "screen", "rl"} & stages:
    _require_data("config.data.path", data.path)
  if reads_held_out(config):
    _require_data("config.data.eval_path", data.eval_path)
  _require_folder("config.data.image_folder", data.image_folder)


def _require_data(field: str, path: str) -> None:
  """A file, or a folder of files."""
  if not paths.parse(path or "?", field).is_dir():
    _require_file(field, path)


def _begins_without_policy(config: ConfigDict) -> bool:
  """Whether SFT trains the policy before any stage samples from it."""
  stages = [stage for stage in config.stages
            if not (stage == "teach" and config.teach.engine != "policy")]
  return stages[:1] == ["sft"]


def _validate_stages(config: ConfigDict) -> None:
  """Checks the sections that single stages read."""
  stages, sft, teach = config.stages, config.sft, config.teach
  if "teach" in stages:
    if teach.engine == "scripted" and config.data.source != "miniworld":
      raise ConfigError("config.teach.engine='scripted' knows the miniature world alone: choose "
                        "'policy' or 'openai'")
    if teach.engine == "openai" and not (teach.url and teach.model):
      raise ConfigError(f"config.teach.url={teach.url!r} and config.teach.model={teach.model!r}: set "
                        "both, such as http://localhost:8000/v1 and the model's name there")
  if "sft" in stages:
    if sft.source == "jsonl":
      _require_file("config.sft.path", sft.path)
    if sft.source == "conversations" and not paths.parse(sft.path or "?", "config.sft.path").is_dir():
      _require_file("config.sft.path", sft.path)
    if sft.source == "shards" and not sft.path and "teach" not in stages[:stages.index("sft")]:
      raise ConfigError("config.sft.path is empty: set it to a folder of sampled shards (the "
                        "teach/shards of another run), or put 'teach' before 'sft' in config.stages")
    if sft.source == "shards":
      _require_folder("config.sft.path", sft.path)
  for name in ("policy", "teacher"):
    _require_folder(f"config.rl.filter.{name}", config.rl.filter[name])
  if "eval" in stages:
    _validate_benchmarks(config.eval)


def _validate_benchmarks(section: ConfigDict) -> None:
  if unknown := sorted(name for name in section.benchmarks if name not in BENCHMARKS and ":" not in name):
    raise ConfigError(f"config.eval.benchmarks names {unknown}; there are {BENCHMARKS}, and your own as "
                      "'module:name'")
  if section.benchmarks and not section.folder:
    raise ConfigError("config.eval.folder is empty: set it to the folder that holds one folder for "
                      f"each of config.eval.benchmarks={tuple(section.benchmarks)}")
  for name in map(_benchmark_name, section.benchmarks):
    if not (paths.parse(section.folder, "config.eval.folder") / name).is_dir():
      raise ConfigError(f"config.eval.folder={section.folder!r} has no folder {name!r}: put that "
                        "benchmark's files there (docs/data.md), or leave it out of "
                        "config.eval.benchmarks")


def _benchmark_name(name: str) -> str:
  """The name of a benchmark's folder; a user's own benchmark is imported to get it."""
  if ":" not in name:
    return name
  from axpo_jax.eval import benchmarks  # loads math-verify, which other runs do not need here
  try:
    return benchmarks.named(name).name
  except ValueError as error:
    raise ConfigError(f"config.eval.benchmarks: {error}") from error


def _validate_tools(config: ConfigDict) -> None:
  agent = config.agent
  offered = {*agent.tools, *config.eval.extra_tools}
  if unknown := sorted(name for name in offered if name not in _TOOLS and ":" not in name):
    raise ConfigError(f"config.agent.tools names {unknown}; there are {_TOOLS}, and functions of yours as "
                      "'module:name'")
  if agent.mcp:
    _require_file("config.agent.mcp", agent.mcp)
  if "image_search" in offered:
    _require_file("config.agent.image_search.cache", agent.image_search.cache)
  if "tavily-search" not in offered:
    return
  search = agent.search
  if search.backend == "local" and not os.path.exists(search.corpus or "?"):
    raise ConfigError(f"config.agent.search.corpus={search.corpus!r}: set it to a folder of documents "
                      "or a .jsonl file")
  if search.backend == "recorded" and not search.record:
    raise ConfigError("config.agent.search.record is empty: set it to a folder of recorded answers")


def _require_folder(field: str, value: str) -> None:
  if value and not paths.parse(value, field).is_dir():
    raise ConfigError(f"{field}={value!r} is not a folder")


def _require_file(field: str, value: str) -> None:
  if not value:
    raise ConfigError(f"{field} is empty: set it to a file (--{field}=/path/to/file)")
  if not paths.parse(value, field).is_file():
    raise ConfigError(f"{field}={value!r} is not a file")
