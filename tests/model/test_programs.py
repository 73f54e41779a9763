"""Compiled programs are counted once each, and kept where the config says."""

import jax
import jax.numpy as jnp
import pytest

from axpo_jax.model import programs


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
