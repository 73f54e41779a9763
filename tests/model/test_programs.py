"""Compiled programs are counted once each, kept where the config says, and hold no second copy of the
weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from axpo_jax.model import programs, sharding
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.plan import aot
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.state import make_optimizer
from axpo_jax.train.step import Learner, supervised_objective


def test_each_shape_is_met_once():
  programs.metrics()
  before, calls = len(programs.met()), programs.Compiled()
  double = jax.jit(lambda x: 2 * x)
  for size in (3, 4, 3, 3):
    assert calls("double", f"{size} values", double, jnp.ones(size)).sum() == 2 * size
  assert len(calls) == 2
  new = programs.met()[before:]
  assert [(p.function, p.shapes) for p in new] == [("double", "3 values"), ("double", "4 values")]
  first = programs.metrics()
  assert first["time/programs"] == before + 2
  assert first["time/compile_s"] == pytest.approx(sum(p.seconds for p in new)) and new[0].seconds > 0
  assert programs.metrics()["time/compile_s"] == 0  # nothing since


def test_where_compiled_programs_are_kept(monkeypatch, tmp_path):
  kept = jax.config.jax_compilation_cache_dir
  assert kept  # the tests' own, from the environment
  programs.use_cache(str(tmp_path))
  assert jax.config.jax_compilation_cache_dir == kept
  set_to = []
  monkeypatch.setattr(programs.jax.config, "update", lambda name, value: set_to.append((name, value)))
  monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
  monkeypatch.setenv("HOME", "/home/somebody")
  for path in ("", "~/compiled", "gs://bucket/compiled"):
    programs.use_cache(path)
  assert set_to == [("jax_compilation_cache_dir", "/home/somebody/compiled"),
                    ("jax_compilation_cache_dir", "gs://bucket/compiled")]


def test_weights_are_converted_one_layer_at_a_time():
  tiny = PRESETS["tiny"]
  text = dataclasses.replace(tiny.text, vocab_size=256, hidden_size=256, intermediate_size=1024,
                             num_layers=12)
  config = dataclasses.replace(
    tiny, text=text, vision=dataclasses.replace(tiny.vision, out_hidden_size=256),
    dtype="bfloat16", param_dtype="bfloat16")
  mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
  learner = Learner(config, make_optimizer(OptimizerConfig(1e-3, 1)), supervised_objective(), mesh)
  options = dict(rows=1, length=64, rows_multiple_of=1, image_rows_multiple_of=1, patch_buckets=(64,),
                 row_buckets=(1,), vision_config=config.vision)
  batch = aot.abstract_batch(mesh, options, image_share=0.0, scored=False)
  memory = learner.trace(batch)["score"].lower().compile().memory_analysis()
  model = nnx.eval_shape(lambda: nnx.state(Qwen3VL(config, rngs=nnx.Rngs(0)), nnx.Param))
  stack = sum(x.size for x in jax.tree.leaves(model["text"]["layers"]))
  assert memory.temp_size_in_bytes < stack  # in float32 they are four times as many bytes


def test_xla_is_left_alone_where_it_does_well():
  assert programs.compiler_options(None, "float32", jnp.dtype("float32")) is None
