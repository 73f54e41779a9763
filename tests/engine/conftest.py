"""A very small random policy, a plain reference for it, and the engines that must agree with both.

`subject` is what every engine implementation is held to: another one joins by a new value of
`_served`'s parameter, serving the same weights. The SGLang engine is tested against a real server.
"""

import asyncio
import collections
import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from aiohttp import web
from flax import nnx
from PIL import Image

from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.loop_thread import LoopThread
from axpo_jax.engine.protocol import Engine, SampleRequest, SamplingParams
from axpo_jax.engine.settings import EmbeddedConfig, FleetConfig, PushConfig, SGLangConfig
from axpo_jax.engine.sglang.engine import SGLangEngine
from axpo_jax.engine.sglang.server import Sidecar, SidecarSpec
from axpo_jax.engine.sglang.server.spec import free_port
from axpo_jax.model import hf
from axpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from axpo_jax.model.images import ImageLimits, ImageProcessor, ProcessedImage
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision_inputs import mrope_positions, pack_images

PAD, START, END = 2, 0, 1
BANNED = (PAD, 3)  # no policy may draw image or video pads
LENGTH = 96  # tokens a row of the engine holds
CONFIG = ModelConfig(
  text=TextConfig(
    vocab_size=92, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
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

  def __init__(self, seed: int = 0, config: ModelConfig = CONFIG):
    def init():
      return Qwen3VL(config, rngs=nnx.Rngs(seed))

    self.config = config

    self.graphdef = nnx.graphdef(nnx.eval_shape(init))
    self.params = jax.jit(lambda: nnx.state(init()))()
    self._forward = jax.jit(self._logits)

  def _logits(self, params, tokens, positions, ends, vision, index):
    model = nnx.merge(self.graphdef, params)
    hidden, _ = model(tokens, positions, ends, vision=vision, image_index_BxT=index)
    return model.logits(hidden)[0]

  def with_params(self, params) -> "Reference":
    other = copy.copy(self)
    other.params = params
    return other

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
    ends = np.where(np.arange(LENGTH) < size, size, 0).astype(np.int32)[None]
    return np.asarray(self._forward(self.params, padded, at, ends, vision, index))[:size]

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
  """An engine under test with a cache that starts empty, and the reference it must agree with.

  Attributes:
    seeded: whether a sample depends on its seed alone.
    recomputed: prompt tokens that every sample computes although they are cached.
    batches_share: whether different prompts that arrive together share their beginnings.
  """

  engine: Engine
  reference: Reference
  seeded: bool = True
  recomputed: int = 0
  batches_share: bool = True
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


# Not for the session: two engines on one server would take turns in pushing their weights.
@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=pytest.mark.slow)])
def _served(request, reference):
  if request.param == "embedded":
    engine = EmbeddedEngine(CONFIG, reference.graphdef, reference.params, config=ENGINE)
    yield Subject(engine, reference)
    return
  connect, server = request.getfixturevalue("connect"), request.getfixturevalue("server")
  engine = connect(server.urls)
  # SGLang's CPU server has no deterministic inference, and always computes a prompt's last token.
  yield Subject(engine, reference, seeded=False, recomputed=1, batches_share=False)
  asyncio.run(engine.close())


@pytest.fixture(scope="session")
def start_servers(sidecar_python, reference, tmp_path_factory) -> Callable[..., Sidecar]:
  """start_servers(count): real SGLang servers of the reference's weights, not started yet."""
  checkpoint = tmp_path_factory.mktemp("served") / "checkpoint"
  hf.save_checkpoint_hf(checkpoint, reference.params, CONFIG)
  write_processor(checkpoint)

  def make(count: int = 1, **fields) -> Sidecar:
    spec = SidecarSpec(
      model=str(checkpoint), device="cpu", servers=count, port=0, context_length=128, max_running=8,
      max_total_tokens=4096, extra_env={"OMP_NUM_THREADS": "1"}, **fields)
    return Sidecar(spec, tmp_path_factory.mktemp("sidecar"))

  return make


@pytest.fixture(scope="session")
def server(start_servers):
  """One server that all tests share; they leave it running."""
  with start_servers() as sidecar:
    yield sidecar


@pytest.fixture(scope="module")
def proxy():
  """proxy(url): a Proxy in front of the server at `url`."""
  made = []

  def make(url: str) -> Proxy:
    made.append(Proxy(url))
    return made[-1]

  yield make
  for each in made:
    each.stop()


class Proxy:
  """Stands between an engine and a real server, and spoils what it is told to.

  Attributes:
    before: route -> function of the request's JSON, called before it is passed on; it returns None, a
      changed request, or a web.Response that is the answer.
    after: route -> function of the answer's JSON; it returns what is answered instead.
    seen: JSON of every request, by route.
  """

  def __init__(self, target: str):
    self.target, self.before, self.after = target, {}, {}
    self.seen = collections.defaultdict(list)
    self._loop = LoopThread("proxy")
    port = free_port("127.0.0.1")
    self.url = f"http://127.0.0.1:{port}"
    self._loop.start(self._serve(port)).result()

  def stop(self):
    self._loop.start(self._runner.cleanup()).result()
    self._loop.stop()

  async def _serve(self, port: int):
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{route:.*}", self._pass)
    self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await self._runner.setup()
    await web.TCPSite(self._runner, "127.0.0.1", port).start()

  async def _pass(self, request: web.Request) -> web.StreamResponse:
    route, body = request.path, await request.read()
    sent = json.loads(body) if body else None
    self.seen[route].append(sent)
    changed = self.before.get(route, lambda _: None)(sent)
    if isinstance(changed, web.StreamResponse):
      return changed
    try:
      async with (aiohttp.ClientSession() as session,
                  session.request(request.method, f"{self.target}{request.path_qs}",
                                  json=changed or sent) as answer):
        text, status = await answer.text(), answer.status
    except aiohttp.ClientError:  # the server died: so does this connection
      if request.transport is not None:
        request.transport.close()
      raise
    if status == 200 and route in self.after:
      text = self.after[route](json.loads(text))
      text = text if isinstance(text, str) else json.dumps(text)
    return web.Response(status=status, text=text, content_type="application/json")


@pytest.fixture(scope="session")
def connect(tmp_path_factory):
  """connect(urls, push={}, fleet={}, model=CONFIG, **fields): an SGLang engine."""
  def make(urls, push=None, fleet=None, model=CONFIG, **fields) -> SGLangEngine:
    push = PushConfig(**{"folder": str(tmp_path_factory.mktemp("push")), "dtype": "float32",
                         "shard_bytes": 50_000, **(push or {})})
    fleet = FleetConfig(**{"probe_s": 0.5, "deadline_s": 60.0, **(fleet or {})})
    return SGLangEngine(urls, model, SGLangConfig(push=push, fleet=fleet, length=LENGTH, **fields))

  return make


def write_processor(folder: pathlib.Path) -> None:
  """What a server needs beside the weights: a tokenizer of as many words, and image sizes."""
  special = {"<|vision_start|>": START, "<|vision_end|>": END, "<|image_pad|>": PAD, "<|video_pad|>": 3}
  words = {f"w{i}": i for i in range(CONFIG.text.vocab_size) if i not in special.values()} | special
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w9"))
  tokenizer.add_special_tokens(list(special))
  tokenizer.save(str(folder / "tokenizer.json"))
  files = {
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                              "chat_template": "{{ messages[0]['content'] }}"},
    "preprocessor_config.json": {
      "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "temporal_patch_size": 2,
      "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
      "size": {"shortest_edge": 64, "longest_edge": 65536}},
  }
  for name, fields in files.items():
    (folder / name).write_text(json.dumps(fields))


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
  """image(seed, h, w): random pixels on an h x w grid of patches."""
  processor = ImageProcessor(4, 2, 2, [0.5] * 3, [0.5] * 3)

  def make(seed: int, h: int = 4, w: int = 6) -> ProcessedImage:
    pixels = np.random.default_rng([seed, h, w]).integers(0, 256, (4 * h, 4 * w, 3), np.uint8)
    return processor(Image.fromarray(pixels), ImageLimits(16, 16 * h * w))

  return make


@pytest.fixture(scope="session")
def picture() -> tuple[int, ...]:
  """How an image stands in a prompt."""
  return START, PAD, END


@pytest.fixture(scope="session")
def text():
  """text(seed, count): random text ids, without any id that means something."""
  def make(seed: int, count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(10, 91, count))

  return make


@pytest.fixture(scope="session")
def ask():
  """ask(ids, images, max_new, seeds=..., **params): a SampleRequest; pads are always banned."""
  def make(ids, images=(), max_new=8, *, seeds=(0,), banned_ids=(), session="", **params
           ) -> SampleRequest:
    params = SamplingParams(max_new, banned_ids=(*BANNED, *banned_ids), **params)
    return SampleRequest(tuple(ids), tuple(images), params, tuple(seeds), session)

  return make


@pytest.fixture
def other_params(reference):
  """Parameters of the same shapes that say something else."""
  return jax.tree.map(lambda x: jnp.flip(x, -1), reference.params)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
  return CONFIG
