"""A very small random policy, a plain reference for it, and the engines that must agree with both.

`engine` is what every engine implementation is held to: another one joins by a new value of its
parameter, serving the same weights.
"""

import asyncio
import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from axpo_jax.model.images import ProcessedImage
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision_inputs import mrope_positions, pack_images
from axpo_jax.rollout.embedded import EmbeddedConfig, EmbeddedEngine
from axpo_jax.rollout.engine import Engine, SampleRequest, SamplingParams

PAD, START, END = 2, 0, 1
BANNED = (PAD, 3)  # no policy may draw image or video pads
LENGTH = 96  # tokens a row of the engine holds
CONFIG = ModelConfig(
  text=TextConfig(
    vocab_size=91, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, mrope_section=(4, 2, 2), rope_theta=10_000.0, tie_word_embeddings=True,
    max_positions=1024,
  ),
  vision=VisionConfig(
    depth=3, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_heads=2, patch_size=4,
    num_position_embeddings=36, deepstack_layers=(0, 1),
  ),
  image_token_id=PAD, video_token_id=3, vision_start_token_id=START, vision_end_token_id=END,
  dtype="float32",
)  # fmt: skip
ENGINE = EmbeddedConfig(
  rows=16, length=LENGTH, max_running=10, decode_block=4, min_batch=10, min_slots=LENGTH,
)  # fmt: skip


class Reference:
  """The policy as plain full forward passes: no cache, one sequence at a time."""

  def __init__(self, seed: int = 0):
    def init():
      return Qwen3VL(CONFIG, rngs=nnx.Rngs(seed))

    self.graphdef = nnx.graphdef(nnx.eval_shape(init))
    self.params = jax.jit(lambda: nnx.state(init()))()
    self._forward = jax.jit(self._logits)

  def _logits(self, params, tokens, positions, real, vision, index):
    model = nnx.merge(self.graphdef, params)
    hidden, _ = model(tokens, positions, real, vision=vision, image_index_BxT=index)
    return model.logits(hidden)[0]

  def logits(self, ids, images=()) -> np.ndarray:
    """[expanded T, V] of collapsed ids."""
    sizes = iter(image.num_tokens for image in images)
    tokens = [t for i in ids for t in ([PAD] * next(sizes) if i == PAD else [i])]
    grids = [(image.grid_hw[0] // 2, image.grid_hw[1] // 2) for image in images]
    size = len(tokens)
    at = np.zeros((1, LENGTH, 3), np.int32)
    at[0, :size] = mrope_positions(tokens, grids, PAD)
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, :size] = tokens
    vision, offsets = pack_images(list(images), CONFIG.vision, row_buckets=(2,))
    index = np.full((1, LENGTH), -1, np.int32)
    index[padded == PAD] = np.concatenate(
      [np.zeros(0)] + [o + np.arange(i.num_tokens) for o, i in zip(offsets, images, strict=True)]
    )
    real = (np.arange(LENGTH) < size).astype(np.int32)[None]
    return np.asarray(self._forward(self.params, padded, at, real, vision, index))[:size]

  def greedy(self, ids, images, count, *, presence=0.0, banned=()) -> tuple[int, ...]:
    ids, new = list(ids), []
    for _ in range(count):
      scores = self.logits(ids, images)[-1].astype(np.float64)
      scores[[*BANNED, *banned]] = -np.inf
      scores[sorted(set(new))] -= presence
      new.append(int(scores.argmax()))
      ids.append(new[-1])
    return tuple(new)

  def logprobs(self, ids, images, new, *, temperature=1.0, banned=()) -> np.ndarray:
    """Of each of `new` after `ids`, normalised over what is not banned."""
    scores = self.logits((*ids, *new), images)[-len(new) - 1 : -1].astype(np.float64) / temperature
    scores[:, [*BANNED, *banned]] = -np.inf
    scores -= scores.max(1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    return scores[np.arange(len(new)), list(new)]


@dataclasses.dataclass
class Subject:
  """An engine under test with a cache that starts empty, and the reference it must agree with."""

  engine: Engine
  reference: Reference
  length: int = LENGTH
  picture: tuple[int, ...] = (START, PAD, END)  # how an image stands in a prompt

  def run(self, *requests):
    """The samples of requests that are submitted together, in order."""
    async def together():
      return await asyncio.gather(*(self.engine.generate(request) for request in requests))

    return asyncio.run(together())

  def reset(self):
    """Empty cache, zero counters, the first weights as version 0."""
    asyncio.run(self.engine.update_weights(self.reference.params, 0))
    self.engine.stats(reset=True)


@pytest.fixture(scope="session")
def reference() -> Reference:
  return Reference()


@pytest.fixture(scope="session", params=["embedded"])
def _served(request, reference) -> Subject:
  assert request.param == "embedded"
  return Subject(
    EmbeddedEngine(CONFIG, reference.graphdef, reference.params, config=ENGINE), reference
  )


@pytest.fixture
def subject(_served) -> Subject:
  _served.reset()
  return _served


@pytest.fixture
def embedded(reference):
  """embedded(**fields): a new embedded engine of the same model with other sizes."""
  def make(**fields) -> Subject:
    config = dataclasses.replace(ENGINE, **fields)
    engine = EmbeddedEngine(CONFIG, reference.graphdef, reference.params, config=config)
    return Subject(engine, reference)

  return make


@pytest.fixture(scope="session")
def image():
  """image(seed, h, w): random patches on an h x w grid."""
  def make(seed: int, h: int = 4, w: int = 6) -> ProcessedImage:
    patches = np.random.default_rng([seed, h, w]).normal(size=(h * w, CONFIG.vision.patch_dim))
    patches = patches.astype(np.float32)
    return ProcessedImage(patches, (h, w), None, hashlib.sha256(patches.tobytes()).hexdigest())

  return make


@pytest.fixture(scope="session")
def text():
  """text(seed, count): random text ids, without any id that means something."""
  def make(seed: int, count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(10, 91, count))

  return make


@pytest.fixture(scope="session")
def ask():
  """ask(ids, images, max_new, seeds=..., **params): a SampleRequest; pads are always banned."""
  def make(ids, images=(), max_new=8, *, seeds=(0,), banned_ids=(), **params) -> SampleRequest:
    params = SamplingParams(max_new, banned_ids=(*BANNED, *banned_ids), **params)
    return SampleRequest(tuple(ids), tuple(images), params, tuple(seeds))

  return make


@pytest.fixture
def other_params(reference):
  """Parameters of the same shapes that say something else."""
  return jax.tree.map(lambda x: jnp.flip(x, -1), reference.params)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
  return CONFIG
