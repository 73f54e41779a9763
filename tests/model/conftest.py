"""One random checkpoint in two implementations: transformers' PyTorch Qwen3-VL, and ours.

The sizes are odd on purpose, and every norm and bias is random, so that no term of the model hides
behind a one or a zero.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from axpo_jax.model import hf
from axpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision_inputs import VisionInputs, mrope_positions, pack_images

CONFIG = ModelConfig(
  text=TextConfig(
    vocab_size=140, hidden_size=72, intermediate_size=90, num_layers=5, num_heads=6,
    num_kv_heads=2, head_dim=32, mrope_section=(8, 4, 4), rope_theta=10_000.0,
    tie_word_embeddings=False, max_positions=4096,
  ),
  vision=VisionConfig(
    depth=6, hidden_size=48, intermediate_size=70, out_hidden_size=72, num_heads=4, patch_size=6,
    num_position_embeddings=49, deepstack_layers=(0, 2, 3),
  ),
  image_token_id=130, video_token_id=131, vision_start_token_id=132, vision_end_token_id=133,
  dtype="float32",
)  # fmt: skip


@dataclasses.dataclass
class Reference:
  """The same random weights twice, and the Hugging Face folder they were exchanged through."""

  config: ModelConfig
  torch: Any  # transformers' model, imported where it is made
  graphdef: nnx.GraphDef
  params: nnx.State
  folder: object

  def model(self, params=None) -> Qwen3VL:
    return nnx.merge(self.graphdef, self.params if params is None else params)

  def configured(self, **changes) -> Qwen3VL:
    """The same weights under other options (remat, attention_chunk, dtype)."""
    config = dataclasses.replace(self.config, **changes)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, self.params)


@dataclasses.dataclass
class Case:
  """One sequence for both implementations; batch size one."""

  ids_T: np.ndarray
  positions_Tx3: np.ndarray
  index_T: np.ndarray
  vision: VisionInputs | None
  pixels: np.ndarray | None
  grids: np.ndarray | None
  config: ModelConfig

  def run(self, model: Qwen3VL, function="__call__", **changes):
    """model(...) with this case's arguments; `changes` replace keyword arguments."""
    kwargs = {}
    if self.vision is not None:
      kwargs = {"vision": self.vision, "image_index_BxT": self.index_T[None]}
    kwargs |= {"positions_BxTx3": self.positions_Tx3[None]} | changes
    ends = np.full((1, len(self.ids_T)), len(self.ids_T), np.int32)
    return getattr(model, function)(self.ids_T[None], ends_BxT=ends, **kwargs)

  def logits(self, model: Qwen3VL, **changes) -> jax.Array:
    return model.logits(self.run(model, **changes)[0])[0]

  def torch_kwargs(self) -> dict:
    import torch

    ids = torch.tensor(self.ids_T[None].astype(np.int64))
    kwargs = {"input_ids": ids}
    if self.pixels is not None:
      kwargs["pixel_values"] = torch.tensor(self.pixels)
      kwargs["image_grid_thw"] = torch.tensor(self.grids)
      kwargs["mm_token_type_ids"] = (ids == self.config.image_token_id).int()
    return kwargs


def random_torch_model(config: ModelConfig, seed: int = 0):
  import torch
  import transformers

  kind = "Qwen3VLMoe" if config.text.experts else "Qwen3VL"
  raw = getattr(transformers, f"{kind}Config")(**config.to_hf())
  model = getattr(transformers, f"{kind}ForConditionalGeneration")(raw).float().eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if value.ndim == 1:
        value.copy_(0.3 * noise + float("norm" in name and name.endswith("weight")))
      elif "embed" in name and "proj" not in name:
        value.copy_(noise)
      else:
        value.copy_(noise / value[0].numel() ** 0.5)
  return model


def make_reference(config: ModelConfig, folder) -> Reference:
  model = random_torch_model(config)
  model.save_pretrained(folder)
  loaded = dataclasses.replace(ModelConfig.from_hf(folder), dtype="float32")
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(loaded, rngs=nnx.Rngs(0))))
  return Reference(loaded, model, graphdef, hf.load_params(folder, loaded), folder)


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Reference:
  return make_reference(CONFIG, tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Reference:
  config = dataclasses.replace(
    CONFIG, text=dataclasses.replace(CONFIG.text, tie_word_embeddings=True)
  )
  return make_reference(config, tmp_path_factory.mktemp("tied"))


@pytest.fixture(params=["tied", "untied"])
def reference(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def random_image():
  """image(h, w, seed): a processed image of h x w patches, by transformers' own processor."""
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

  vision = CONFIG.vision
  processor = Qwen2VLImageProcessorPil(
    patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size,
    merge_size=vision.spatial_merge_size, do_resize=False,
  )  # fmt: skip

  def image(h: int, w: int, seed: int = 0):
    rng = np.random.default_rng([h, w, seed])
    p = vision.patch_size
    pixels = rng.integers(0, 256, (h * p, w * p, 3), dtype=np.uint8)
    out = processor(images=[Image.fromarray(pixels)], return_tensors="np")
    assert out["image_grid_thw"].tolist() == [[1, h, w]]
    patches = out["pixel_values"].astype(np.float32)
    return SimpleNamespace(patches=lambda: patches, patch_dim=vision.patch_dim, grid_hw=(h, w))

  return image


@pytest.fixture(scope="session")
def make_case(random_image):
  """make_case(grids): `text` tokens, each image followed by at most `text` tokens, `tail` more."""

  def make(grids=(), seed: int = 0, text: int = 5, tail: int = 0, **pack_options) -> Case:
    rng = np.random.default_rng([seed, 7])
    images = [random_image(h, w, seed + i) for i, (h, w) in enumerate(grids)]
    merged = [(h // 2, w // 2) for h, w in grids]
    ids = [*rng.integers(0, 130, text)]
    spans = []
    for h, w in merged:
      spans.append((len(ids) + 1, h * w))
      ids += [CONFIG.vision_start_token_id, *[CONFIG.image_token_id] * (h * w)]
      ids += [CONFIG.vision_end_token_id, *rng.integers(0, 130, rng.integers(1, text + 1))]
    ids = np.asarray([*ids, *rng.integers(0, 130, tail)], np.int32)
    index = np.full(len(ids), -1, np.int32)
    vision, pixels = None, None
    if images:
      vision, offsets = pack_images(images, CONFIG.vision, **pack_options)
      pixels = np.concatenate([i.patches() for i in images])
      for (start, size), offset in zip(spans, offsets, strict=True):
        index[start : start + size] = offset + np.arange(size)
    positions = mrope_positions(ids, merged, CONFIG.image_token_id, CONFIG.video_token_id)
    thw = np.asarray([(1, h, w) for h, w in grids], np.int64) if grids else None
    return Case(ids, positions, index, vision, pixels, thw, CONFIG)

  return make
