"""From a config and a topology to what `launch/compile.py` prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from axpo_jax.config import ConfigError, engine_length
from axpo_jax.model import hf
from axpo_jax.model.cache import KVCache
from axpo_jax.model.config import PRESETS, ModelConfig
from axpo_jax.rl.losses import LossConfig
from axpo_jax.train import aot, build, flops, slice_report
from axpo_jax.train.batch import Batch, batch_shards
from axpo_jax.train.step import Learner, policy_objective, supervised_objective


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config's train step on a slice.

  rows: of a micro-batch: config.batch.rows, rounded up to fill the slice.
  """

  config: ConfigDict
  topology: str
  model: ModelConfig
  mesh: jax.sharding.Mesh
  rows: int
  image_share: float

  @classmethod
  def from_config(cls, config: ConfigDict, topology: str, *, layers: int = 0,
                  image_share: float = 0.25) -> Plan:
    """Raises ConfigError, TopologyError or ShardingError."""
    mesh = aot.slice_mesh(topology, dict(config.mesh))
    model = _model_config(config, layers)
    shards = batch_shards(mesh)
    return cls(config, topology, model, mesh, -(-config.batch.rows // shards) * shards, image_share)

  @property
  def tokens(self) -> int:
    return self.rows * self.config.batch.length

  def describe(self) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
    text = (f"{self.mesh.size} chips as {self.topology}, mesh {mesh}; {self.model.text.num_layers} "
            f"layers; micro-batches of {self.rows} rows x {self.config.batch.length:,} = "
            f"{self.tokens:,} tokens, {self.tokens // self.mesh.size:,} a chip")
    if self.rows != self.config.batch.rows:
      text += (f"\nconfig.batch.rows={self.config.batch.rows} does not fill the slice: set it to a "
               f"multiple of {batch_shards(self.mesh)}; computed with {self.rows}")
    return text

  def report(self, functions: Sequence[str], *, budget: bool) -> Iterator[str]:
    """Compiles, and writes each part down as soon as it is known."""
    learner, batch = self.learner(), self.batch(self.rows, self.config.batch.length)
    programs = aot.compile_step(learner, batch, functions)
    report = self._measured(learner, batch, programs)
    yield "\n\n".join([slice_report.text(report), *self._verdict(report)])
    if "accumulate" in programs and budget:
      yield self._budget(learner, report)
    elif "accumulate" in programs and report.excess <= 0:
      yield self._least_budget(report)

  def learner(self) -> Learner:
    config = self.config
    if "rl" in config.stages:
      objective, steps = policy_objective(LossConfig(**config.rl.loss)), config.rl.steps
      section, frozen = config.optimizer, config.model.freeze_vision
    else:
      objective, steps = supervised_objective(), config.sft.steps
      section, frozen = config.sft.optimizer, config.sft.freeze_vision
    return Learner(self.model, build.optimizer(section, steps, frozen), objective, self.mesh,
                   chunk=config.batch.logprob_chunk)

  def batch(self, rows: int, length: int) -> Batch:
    return aot.abstract_batch(
      self.mesh, self.model.vision, rows=rows, length=length,
      image_pixels=self.config.images.max_pixels, image_share=self.image_share,
      scored=self._has_reference)

  @property
  def _has_reference(self) -> bool:
    return "rl" in self.config.stages and bool(self.config.rl.loss.kl_coef)

  def _measured(self, learner: Learner, batch: Batch, programs) -> slice_report.Report:
    held = aot.held_bytes(learner, batch)
    if self._has_reference:
      held["reference"] = held["parameters"]
    rl = self.config.rl
    old = "rl" in self.config.stages and (rl.updates > 1 or rl.old_logprobs == "trainer")
    patches = math.prod(batch.vision.segments_RxP.shape) if batch.vision else 0
    needed = 3 * flops.needed(
      self.model, tokens=self.tokens, targets=self.tokens, patches=patches,
      seen=min(self.config.agent.max_total_tokens, self.config.batch.length) / 2,
      seen_patches=self.config.images.max_pixels / self.model.vision.patch_size**2)
    return slice_report.Report(
      aot.chip_of(self.topology), self.mesh.size, held, self._sampler(learner), programs,
      self._has_reference + old, self.tokens, needed, rl.reference_offload)

  def _sampler(self, learner: Learner) -> float:
    """Bytes that the embedded engine's weights and KV rows take of a chip."""
    config = self.config.rollout
    if config.engine != "embedded" or "rl" not in self.config.stages:
      return 0.0
    engine = config.embedded
    length = engine_length(self.config)
    pool = jax.eval_shape(lambda: KVCache.empty(self.model, engine.rows, length, engine.dtype))
    whole = sum(x.size * x.dtype.itemsize for x in (pool.k_LxBxKxHxS, pool.v_LxBxKxSxH))
    parts = math.gcd(self.model.text.num_kv_heads, self.mesh.shape["tensor"])
    return aot.shard_bytes(learner.abstract_state().params, engine.dtype) + whole / parts

  def _verdict(self, report: slice_report.Report) -> list[str]:
    excess, lines = report.excess, []
    if excess > 0:
      lines.append(f"**Does not fit**: {excess / 2**30:,.2f} GiB a chip too much. What would help:")
      lines.append("\n".join(f"- {line}" for line in slice_report.advice(
        report, remat=self.model.remat, mu_dtype=self.config.optimizer.mu_dtype,
        param_dtype=self.model.param_dtype, rows_a_shard=self.rows // batch_shards(self.mesh))))
    else:
      lines.append(f"**Fits**, with {-excess / 2**30:,.2f} GiB a chip to spare.")
    if report.sampler > -excess:
      lines.append(f"The embedded sampler would take {report.sampler / 2**30:,.2f} GiB a chip beside "
                   "it, which is too much: use servers (config.rollout.engine=sglang), fewer "
                   "config.rollout.embedded.rows, or a larger config.mesh.tensor.")
    if (seconds := report.step_seconds) is not None:
      lines.append(
        f"A step of one micro-batch takes at least {seconds:.2f} s, each function at its tightest "
        f"bound: {report.tokens / seconds / report.chips:,.0f} tokens/s a chip, "
        f"MFU at most {100 * report.mfu:.0f} %.")
    return lines

  def _budget(self, learner: Learner, report: slice_report.Report) -> str:
    """Temporaries grow with the rows of a chip, so two sizes tell the others. Where one row a chip
    is too much already, the second size is half a row."""
    length, rows = self.config.batch.length, self.rows
    fits = report.excess <= 0
    other_rows, other_length = (2 * rows, length) if fits else (rows, length // 2)
    other = aot.compile_step(learner, self.batch(other_rows, other_length), ["accumulate"])
    shards = batch_shards(self.mesh)
    multiple = shards * (length if fits else 64)
    most = slice_report.largest_tokens(report, multiple, other["accumulate"],
                                       other_rows * other_length)
    rest = f"{most // (shards * length)} rows a shard" if fits else f"rows of {most // rows:,}"
    return (f"Largest micro-batch that fits: {most:,} tokens ({rest}), if memory is linear between the "
            f"compiled sizes {rows} x {length:,} and {other_rows} x {other_length:,}.")

  def _least_budget(self, report: slice_report.Report) -> str:
    shards, length = batch_shards(self.mesh), self.config.batch.length
    most = slice_report.largest_tokens(report, shards * length)
    return (f"Largest micro-batch that fits: at least {most:,} tokens ({most // (shards * length)} rows "
            "a shard), as if all temporaries grew with the rows; --budget compiles a second size and "
            "says more.")


def _model_config(config: ConfigDict, layers: int) -> ModelConfig:
  section = config.model
  if section.preset:
    if section.preset not in PRESETS:
      raise ConfigError(f"config.model.preset={section.preset!r}; there are {sorted(PRESETS)}")
    base = PRESETS[section.preset]
  elif section.checkpoint:
    base = hf.load_config(section.checkpoint)
  else:
    raise ConfigError("set config.model.preset (--config.model.preset=8b), or config.model.checkpoint "
                      f"to a folder with config.json; presets are {sorted(PRESETS)}")
  least = len(base.vision.deepstack_layers)
  if layers and not least <= layers <= base.text.num_layers:
    raise ConfigError(f"--layers={layers}: from {least}, the layers that take image features, to "
                      f"{base.text.num_layers}")
  text = dataclasses.replace(base.text, num_layers=layers or base.text.num_layers)
  return build.computed_as(dataclasses.replace(base, text=text), section)
