"""A random checkpoint of the real model's layout and vocabulary, whose policy calls a tool.

Out: a Hugging Face folder: config.json, sharded safetensors in bfloat16 with an index, a tokenizer of
151,669 words, the chat template and preprocessor_config.json. Nothing is downloaded: the tokenizer is
the miniature's, with Qwen3-VL's ids for the special tokens and made-up words in between.

A random policy draws from 151,936 words alike, so it would never call a tool. This one has a Markov chain
written into its weights. For every word of the chain one neuron of the first layer's MLP detects the
word's embedding and adds the embeddings of the words that may follow it. The output head is tied to the
embedding, so these words come next, with the shares that they are given; all else is noise. Nothing
but the weights knows of it: the sampler, the parser and the tools do what they always do.

  <think>\n ─▶ 8 words of thinking, one of two each ─▶ </think> ─┬▶ <tool_call> ─▶ a zoom ─▶ <|im_end|>
                                                                 └▶ an answer, one of two ─▶ <|im_end|>

Legend: D width of the text model, V its vocabulary.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import math
import pathlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from axpo_jax.config import ASSETS
from axpo_jax.model import hf, hf_names
from axpo_jax.model.config import ModelConfig, TextConfig, VisionConfig
from axpo_jax.model.presets import PRESETS
from experiments.miniworld.make_tokenizer import ADDED_TOKENS

FIRST_ADDED = 151_643  # the id of <|endoftext|>; the other added tokens follow in their order
SHARD_BYTES = 1 << 30

# The same vocabulary, head size and patches at every size, so that all run the same code.
_SMALL = ModelConfig(
  text=TextConfig(vocab_size=151_936, hidden_size=256, intermediate_size=512, num_layers=4,
                  num_heads=4, num_kv_heads=2, tie_word_embeddings=True),
  vision=VisionConfig(depth=4, hidden_size=128, intermediate_size=256, out_hidden_size=256,
                      num_heads=4, deepstack_layers=(0, 1, 2)),
)
SIZES: dict[str, ModelConfig] = {
  "small": _SMALL,
  "2b-4layers": dataclasses.replace(
    PRESETS["2b"], text=dataclasses.replace(PRESETS["2b"].text, num_layers=4)),
  "2b": PRESETS["2b"],
}

# Texts of the chain's words: each is one word of this tokenizer.
_THOUGHTS = [(f" think{i}a", f" think{i}b") for i in range(8)]
_CALL = [
  ('\n{"name": "image_zoom_in", "arguments": {"bbox_2d": [',),
  ("100, 100, ", "200, 100, "),
  ("600, 700", "800, 900"),
  ('], "label": "the mark"}}\n',),
]
ANSWERS = ("\n\n<answer>\n\\boxed{red}\n</answer>", "\n\n<answer>\n\\boxed{blue}\n</answer>")

# Norm of a row of the embedding times the norm of the final hidden state (sqrt(D)): the logit of a word
# whose embedding the hidden state points at. The 151,936 words of noise weigh as much as one word with 12.
_LOGIT = 44.0
_NOISE = 0.2   # norm of what a layer adds at random, in norms of an embedding
_CHAIN = 9.0   # norm of what the chain adds, likewise


def write(folder: pathlib.Path, config: ModelConfig, seed: int = 0) -> int:
  """Makes the checkpoint, one shard in memory at a time; returns its bytes."""
  folder.mkdir(parents=True)
  vocabulary = write_tokenizer(folder)
  table = hf_names.name_table(config)
  dtype = np.dtype(ml_dtypes.bfloat16)
  shards = hf.plan_shards(table, dtype, min(SHARD_BYTES, _bytes(table) // 3))
  planted = _planted(config, chain(vocabulary))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:  # NumPy draws without the interpreter's lock
    for file, entries in shards.items():
      tensors = pool.map(lambda entry: _tensor(entry, config, planted, seed), entries)
      save_file(dict(zip([entry.name for entry in entries], tensors, strict=True)), folder / file,
                metadata={"format": "pt"})
  index = {"metadata": {"total_size": _bytes(table)},
           "weight_map": {entry.name: file for file, group in shards.items() for entry in group}}
  (folder / hf.INDEX_FILE).write_text(json.dumps(index, indent=2))
  raw = {**config.to_hf(), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
  (folder / "config.json").write_text(json.dumps(raw, indent=2))
  return _bytes(table)


def write_tokenizer(folder: pathlib.Path) -> dict[str, int]:
  """Writes tokenizer, chat template and preprocessor_config.json; returns the ids of all texts."""
  source = ASSETS / "tiny_tokenizer"
  raw = json.loads((source / "tokenizer.json").read_text())
  words = raw["model"]["vocab"]
  own = [text for options in (*_THOUGHTS, *_CALL, ANSWERS) for text in options]
  for text in own:
    words[_byte_level(text)] = len(words)
  while len(words) < FIRST_ADDED:
    words[f"Ġword{len(words)}"] = len(words)
  added = {text: FIRST_ADDED + i for i, (text, _) in enumerate(ADDED_TOKENS)}
  for token in raw["added_tokens"]:
    token["id"] = added[token["content"]]
  (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))
  for name in ("tokenizer_config.json", "chat_template.jinja"):
    shutil.copy(source / name, folder / name)
  images = json.loads((source / "preprocessor_config.json").read_text())
  (folder / "preprocessor_config.json").write_text(json.dumps(images | {"patch_size": 16}, indent=2))
  return {**added, **{text: words[_byte_level(text)] for text in (*own, "\n")}}


def chain(ids: Mapping[str, int]) -> dict[int, dict[int, float]]:
  """The words that may follow a word, with their shares, by ids."""
  thinking = [("\n",), *_THOUGHTS, ("</think>",)]
  call = [("<tool_call>",), *_CALL, ("</tool_call>",), ("<|im_end|>",)]
  following: dict[str, dict[str, float]] = {}
  for path in (thinking, call, [ANSWERS, ("<|im_end|>",)]):
    for now, then in itertools.pairwise(path):
      following |= {text: dict.fromkeys(then, 1 / len(then)) for text in now}
  following["</think>"] = {"<tool_call>": 0.6, **dict.fromkeys(ANSWERS, 0.2)}
  return {ids[now]: {ids[text]: share for text, share in then.items()}
          for now, then in following.items()}


def _byte_level(text: str) -> str:
  return text.replace(" ", "Ġ").replace("\n", "Ċ")


def _bytes(table: Sequence[hf_names.Entry]) -> int:
  return 2 * sum(math.prod(entry.shape) for entry in table)


def _tensor(entry: hf_names.Entry, config: ModelConfig, planted: Mapping[str, tuple[Any, np.ndarray]],
            seed: int) -> np.ndarray:
  """One tensor in bfloat16: norms are one, biases zero, the rest normal."""
  leaf = entry.name.rsplit(".", 1)[-1]
  if len(entry.shape) == 1:
    values = np.full(entry.shape, float("norm" in entry.name and leaf == "weight"), np.float32)
  else:
    values = _normal(entry, seed) * np.float32(_deviation(entry, config.text))
  if entry.name in planted:
    where, rows = planted[entry.name]
    values[where] = rows
  return values.astype(ml_dtypes.bfloat16)


def _normal(entry: hf_names.Entry, seed: int) -> np.ndarray:
  rng = np.random.default_rng([seed, zlib.crc32(entry.name.encode())])
  return rng.standard_normal(entry.shape, np.float32)


def _deviation(entry: hf_names.Entry, text: TextConfig) -> float:
  """So that a layer's inner values are about one, and what it adds to the text is _NOISE."""
  embedding = _LOGIT / text.hidden_size  # sqrt(D) of them have the norm _LOGIT / sqrt(D)
  inputs = math.prod(entry.shape[1:])
  if "embed_tokens" in entry.name:
    return embedding
  if entry.layer is not None and "language_model" in entry.name and (
      "o_proj" in entry.name or "down_proj" in entry.name):
    return _NOISE * embedding / inputs**0.5
  return inputs**-0.5


def _planted(config: ModelConfig, following: Mapping[int, Mapping[int, float]]
             ) -> dict[str, tuple[Any, np.ndarray]]:
  """Where and what is written over the noise of four tensors, so that they make up the chain."""
  width = config.text.hidden_size
  norm = _LOGIT / width**0.5  # of an embedding
  words = sorted({*following, *(then for share in following.values() for then in share)})
  # At right angles, so that each word has the share that it was given.
  unit_WxD = np.linalg.qr(np.random.default_rng(0).standard_normal((width, len(words))))[0].T
  unit = dict(zip(words, unit_WxD, strict=True))
  # The input's norm is sqrt(D) and points at the word: gate and up both come out near 8.
  detectors = np.stack([unit[word] for word in following]) * (8 / width**0.5)

  def sum_of(shares):
    # Their logits differ by the logarithms of their shares.
    many = len(shares)
    total = sum(unit[then] * (many**-0.5 + math.log(share * many) / _LOGIT)
                for then, share in shares.items())
    return total * (_CHAIN * norm / 64)

  neurons = slice(len(following))
  layer = "model.language_model.layers.0.mlp.{}_proj.weight".format
  return {
    "model.language_model.embed_tokens.weight": (words, unit_WxD * norm),
    layer("gate"): (neurons, detectors), layer("up"): (neurons, detectors),
    layer("down"): ((slice(None), neurons), np.stack(list(map(sum_of, following.values()))).T)}
