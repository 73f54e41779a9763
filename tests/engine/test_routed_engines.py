"""A mixture of experts in both engines: what they draw, and how likely they say it is, is the model's."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.sglang.server import Sidecar, SidecarError, SidecarSpec
from axpo_jax.model import hf
from axpo_jax.model.config import ExpertsConfig
from tests.engine.conftest import CONFIG, ENGINE, Reference, Subject, write_processor

ROUTED = dataclasses.replace(
  CONFIG,
  text=dataclasses.replace(CONFIG.text, experts=ExpertsConfig(count=8, per_token=2, intermediate_size=24)),
  vision=dataclasses.replace(CONFIG.vision, deepstack_layers=(0, 1, 2)))  # SGLang takes three
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def routed() -> Reference:
  return Reference(config=ROUTED)


def check(subject, ask, text, image):
  """Prompts of several lengths, one with a picture, greedily and drawn."""
  prompts = [(text(0, 7), ()), (text(1, 20) + subject.picture + text(2, 3), (image(0),)), (text(3, 33), ())]
  greedy = subject.run(*(ask(ids, images, 6, temperature=0) for ids, images in prompts))
  for (sample,), (ids, images) in zip(greedy, prompts, strict=True):
    assert sample.ids == subject.reference.greedy(ids, images, 6)
  drawn = subject.run(*(ask(ids, images, 6, seeds=(1, 2)) for ids, images in prompts))
  for samples, (ids, images) in zip(drawn, prompts, strict=True):
    for sample in samples:
      want = subject.reference.logprobs(ids, images, sample.ids)
      assert np.abs(np.asarray(sample.logprobs) - want).max() < TOLERANCE


@pytest.mark.slow
def test_embedded_engine(routed, ask, text, image):
  check(Subject(EmbeddedEngine(ROUTED, routed.graphdef, routed.params, config=ENGINE), routed), ask, text, image)


def test_servers_take_three_deepstack_features(tmp_path):
  """SGLang's mixture of experts adds three whatever config.json says, and ends at the first image."""
  two = dataclasses.replace(ROUTED, vision=CONFIG.vision)
  (tmp_path / "config.json").write_text(json.dumps(two.to_hf()))
  with pytest.raises(SidecarError, match="2 DeepStack features"):
    SidecarSpec(model=str(tmp_path))


@pytest.mark.slow
def test_real_server_and_pushed_weights(sidecar_python, routed, connect, ask, text, image, tmp_path):
  hf.save_checkpoint_hf(tmp_path / "policy", routed.params, ROUTED)
  write_processor(tmp_path / "policy")
  spec = SidecarSpec(model=str(tmp_path / "policy"), device="cpu", port=0, context_length=128, max_running=8,
                     max_total_tokens=4096, extra_env={"OMP_NUM_THREADS": "1"})
  with Sidecar(spec, tmp_path / "sidecar") as sidecar:
    engine = connect(sidecar.urls, model=ROUTED)
    subject = Subject(engine, routed, seeded=False)
    subject.reset()
    check(subject, ask, text, image)
    other = Reference(seed=1, config=ROUTED)
    asyncio.run(engine.update_weights(other.params, 1))
    check(dataclasses.replace(subject, reference=other), ask, text, image)
    asyncio.run(engine.close())
