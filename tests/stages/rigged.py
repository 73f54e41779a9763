"""A policy that nobody trained and that yet calls tools, fails, and is sometimes right; and questions
for it. For tests of whole runs.

Its weights are rigged: each token says how the next one is drawn.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

import axpo_jax
from axpo_jax.model import hf_names
from axpo_jax.model.chat import Chat
from axpo_jax.model.presets import PRESETS

TOKENIZER = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"

# Token -> the tokens that may follow and their probabilities. Every other token is followed by any.
NEXT = {
  "\n": {"</think>": 0.8, "T": 0.2},
  "T": {"</think>": 1.0},
  "</think>": {"<tool_call>": 0.45, "\\boxed{": 0.55},
  "<tool_call>": {"</tool_call>": 0.6, "T": 0.1, "\\boxed{": 0.3},
  "</tool_call>": {"<|im_end|>": 0.8, "\\boxed{": 0.2},
  "\\boxed{": {"A": 0.5, "B": 0.5},
  "A": {"}": 1.0},
  "B": {"}": 1.0},
  "}": {"<|im_end|>": 1.0},
}
SURE = 14.0  # logit above all other tokens
STRENGTH = 8.0  # of a token's own direction in its embedding; makes the norm 1 at width 64


def model_config(chat: Chat, layers: int = 2):
  """Widths that two devices can share. As many layers in the vision tower."""
  tiny = PRESETS["tiny"]
  text = dataclasses.replace(
    tiny.text, vocab_size=chat.vocab_size, hidden_size=64, intermediate_size=96, num_layers=layers,
    num_heads=4, num_kv_heads=2, head_dim=16, mrope_section=(4, 2, 2), tie_word_embeddings=False)
  vision = dataclasses.replace(
    tiny.vision, depth=layers, hidden_size=32, intermediate_size=48, out_hidden_size=64, num_heads=2,
    deepstack_layers=(0,))
  return dataclasses.replace(
    tiny, text=text, vision=vision, image_token_id=chat.image_pad_id,
    video_token_id=chat.video_pad_id, vision_start_token_id=chat.vision_start_id,
    vision_end_token_id=chat.vision_end_id)


def rig(embedding, head, chat: Chat, rng, follow=None) -> None:
  """Sets both tables (float arrays [vocab, width]) so that `follow`, or else NEXT, holds."""
  def token(text):
    (only,) = chat.encode(text)
    return only

  embedding[:] = rng.normal(size=embedding.shape, scale=0.05)
  head[:] = rng.normal(size=head.shape, scale=0.01)
  for place, (text, follows) in enumerate((follow or NEXT).items()):
    embedding[token(text), place] = STRENGTH
    for following, probability in follows.items():
      head[token(following), place] = (SURE + np.log(probability)) / STRENGTH


def write_policy(folder: pathlib.Path, layers: int = 2, follow=None) -> pathlib.Path:
  """A Hugging Face folder with the tiny tokenizer. Random matrices; norms are one, biases zero."""
  chat = Chat.from_pretrained(TOKENIZER)
  config, rng, tensors = model_config(chat, layers), np.random.default_rng(0), {}
  for entry in sorted(hf_names.name_table(config), key=lambda entry: entry.name):
    if len(entry.shape) > 1:
      tensors[entry.name] = rng.normal(size=entry.shape, scale=0.05).astype(np.float32)
    else:
      tensors[entry.name] = np.full(entry.shape, entry.name.endswith("weight"), np.float32)
  rig(tensors["model.language_model.embed_tokens.weight"], tensors["lm_head.weight"], chat, rng, follow)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  for file in TOKENIZER.iterdir():
    shutil.copy(file, folder)
  (folder / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "float32"}))
  return folder


def write_questions(folder: pathlib.Path) -> pathlib.Path:
  """A file of twelve questions with an image each, as JSON lines."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  lines = []
  for i in range(12):
    name = f"{i}.png"
    Image.fromarray(rng.integers(0, 256, (48, 32, 3), np.uint8)).save(folder / name)
    lines.append({"id": f"q{i}", "question": f"Read the mark {i}.", "answer": "AB"[i % 2],
                  "images": [name]})
  path = folder / "questions.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def write(folder: pathlib.Path) -> None:
  """The policy and the questions, in subfolders."""
  write_policy(folder / "policy")
  write_questions(folder / "data")


def flags(folder) -> list[str]:
  """Of a run with what `write` left in a folder, or in its copy on a store."""
  questions = folder / "data" / "questions.jsonl"
  return [f"--config.model.checkpoint={folder / 'policy'}", f"--config.data.path={questions}",
          f"--config.data.eval_path={questions}"]


def untimed(lines):
  """Metrics without seconds and memory, which are the machine's."""
  return [{name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
          for line in lines]
