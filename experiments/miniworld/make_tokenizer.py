r"""Makes the tokenizer of the miniature model: `axpo_jax/assets/tiny_tokenizer/`.

  python -m experiments.miniworld.make_tokenizer --out axpo_jax/assets/tiny_tokenizer

A byte-level BPE with every special token of Qwen3-VL, in Qwen's order, behind a base vocabulary
that is learned from a seeded corpus. The corpus is written here and does not import the miniature
world: when the world's wording changes, the asset (and every checkpoint trained with it) must not.
Byte-level BPE loses nothing, so new wording costs a few more tokens and no more.

The same code and the same version of `tokenizers` give the same bytes. `chat_template.jinja` and
`preprocessor_config.json` in the folder are written by hand and stay as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1408  # specials included; a multiple of 128 keeps the embedding easy to shard
SEED = 0

# Qwen3-VL's added tokens in the order of their ids; the flag is Qwen's `special`.
ADDED_TOKENS = (
  ("<|endoftext|>", True),
  ("<|im_start|>", True),
  ("<|im_end|>", True),
  ("<|object_ref_start|>", True),
  ("<|object_ref_end|>", True),
  ("<|box_start|>", True),
  ("<|box_end|>", True),
  ("<|quad_start|>", True),
  ("<|quad_end|>", True),
  ("<|vision_start|>", True),
  ("<|vision_end|>", True),
  ("<|vision_pad|>", True),
  ("<|image_pad|>", True),
  ("<|video_pad|>", True),
  ("<tool_call>", False),
  ("</tool_call>", False),
  ("<|fim_prefix|>", False),
  ("<|fim_middle|>", False),
  ("<|fim_suffix|>", False),
  ("<|fim_pad|>", False),
  ("<|repo_name|>", False),
  ("<|file_sep|>", False),
  ("<tool_response>", False),
  ("</tool_response>", False),
  ("<think>", False),
  ("</think>", False),
)

# Where words end. Each line is one alternative, tried in this order. A JSON key with the
# punctuation around it is one word, and so is a coordinate: a whole zoom call costs about twenty
# tokens, and a policy of a million parameters spends its few layers on pointing, not on spelling.
WORDS = "|".join((
  r'[\]}"]{0,3}(?:, )?\{?"[\p{L}_][\p{L}\p{N}_-]{0,31}": ?[\["{]?',  # ], "label": "
  r"\\\\?[a-z]+\{",                                 # \boxed{
  r'\\[nt"\\]',                                     # escapes inside a JSON string
  r"</?[a-z_]+>",                                   # <answer>
  r"'(?:s|t|re|ve|m|ll|d)\b",
  r"\s?\p{N}+",                                     # a number, with one space before it
  r" ?[\p{L}_][\p{L}\p{M}\p{N}_]*(?:-[\p{L}]+)*",   # a word, an identifier, tavily-search
  r' ?"[\]}),.;:]*',                               # a quote and what closes with it
  r' ?[^\s\p{L}\p{N}"]+',                           # other punctuation
  r"[\r\n]+",
  r"\s+(?!\S)",
  r"\s+",
))

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink", "brown", "white",
           "black", "grey")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "box")
PLACES = ("top left", "top right", "bottom left", "bottom right", "centre", "middle", "left",
          "right", "top", "bottom")
GLYPHS = string.ascii_uppercase + string.digits
GRID = range(0, 1001, 20)  # coordinates are multiples of 20 on a scale of 0 to 1000
NAMES = ("Arden", "Belmor", "Corvel", "Dunmere", "Elsin", "Farrow", "Galden", "Harlow", "Ister",
         "Jorun", "Kelda", "Lorne", "Marden", "Nerith", "Osmer", "Pellan", "Quill", "Rovan",
         "Selby", "Torvin", "Ulmer", "Varden", "Wexley", "Yarrow", "Zanth")
RELATIONS = ("capital", "river", "founder", "mayor", "teacher", "author", "colour", "year",
             "mountain", "king", "queen", "painter", "bridge", "harbour", "language", "museum")

TOOLS = (
  {"type": "function", "function": {
    "name": "python",
    "description": "Runs Python code in a notebook kernel that lives as long as the conversation.",
    "parameters": {"type": "object", "properties": {
      "code": {"type": "string", "description": "The code to run."},
      "timeout": {"type": "integer", "description": "Seconds.", "default": 12}},
      "required": ["code"]}}},
  {"type": "function", "function": {
    "name": "image_zoom_in",
    "description": "Crops a region from the full-resolution image, magnifies it and returns it as a "
                   "new image.",
    "parameters": {"type": "object", "properties": {
      "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                  "description": "The region [x1, y1, x2, y2], relative: 0 to 1000 from the left or top "
                                 "edge to the right or bottom one."},
      "label": {"type": "string", "description": "What the region shows."},
      "img_idx": {"type": "number", "description": "Which image, from 0, earlier crops included.", "default": 0}},
      "required": ["bbox_2d", "label"]}}},
  {"type": "function", "function": {
    "name": "tavily-search",
    "description": "Searches the web for text.",
    "parameters": {"type": "object", "properties": {
      "query": {"type": "string", "description": "What to search for."},
      "max_results": {"type": "integer", "description": "Number of results.", "default": 5}},
      "required": ["query"]}}},
)

SYSTEM_TEXTS = (
  "Think before each call and reflect on its result. Zoom in on what is too small to read, search "
  "for what you do not know, compute with python. End with:\n<answer>\n\\boxed{...}\n</answer>",
  "You are a helpful assistant that can look at images and use tools. Think step by step before "
  "each tool call and reflect on the result. Do not give up: if a call fails or shows nothing "
  "useful, try again with other arguments. To look closer at an image, prefer image_zoom_in to "
  "cropping by code. When you lack knowledge, search, and cross-check the sources. Put the final "
  "answer in this format:\n<answer>\n\\boxed{your answer}\n</answer>",
  "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
  "with function signatures within <tools></tools> XML tags:\n<tools>\n</tools>\n\nFor each function "
  "call, return a json object with function name and arguments within XML tags:\n"
  '{"name": <function-name>, "arguments": <args-json-object>}',
  "system\n", "user\n", "assistant\n",
)

COMMON_WORDS = """
the be to of and a in that have it for not on with he as you do at this but his by from they we say
her she or an will my one all would there their what so up out if about who get which go me when make
can like time no just him know take people into year your good some could them see other than then now
look only come its over think also back after use two how our work first well way even new want because
any these give day most us is are was were has had been did does said made found shown between before
after under above below where while during each both few more much many such very same own too still
three four five six seven eight nine ten zero hundred thousand large small high low long short old young
left right top bottom near far inside outside next last again number name letter word line page city
country river town house street water land sea world state place part side point end start value values
table chart bar bars row column label title axis total sum mean median average product difference ratio
maximum minimum larger smaller largest smallest highest lowest equal count how many percent price sales
born built wrote founded discovered invented located lived died called known capital population length
height area author book novel poem song film painter painting museum bridge tower castle island lake
mountain king queen president mayor teacher student company school university language century war
search query result results source sources page answer question read see check compute code run error
image crop region box mark marks list picture centre middle corner should must am sure enough
"""

# General English and code, so that rare words are not spelled byte by byte.
GENERAL_TEXTS = (
  "The quick brown fox jumps over the lazy dog. How many of them are there? There were more than "
  "one hundred people in the room, and none of them could say what the answer is.",
  "First, I should check which value is larger. Then I compare it with the sum of the other values. "
  "The difference between the two is small, so the result must be correct.",
  "We need to find the value of x that makes both sides equal. This means that the total number "
  "is not known yet, but it can be computed from the table and the chart.",
  "Let me think about it again. That was wrong. Wait, it should be the second one because the first "
  "does not fit. I am not sure about this, so I will use a tool to check it.",
  "import numpy as np\nimport math\nfrom PIL import Image\nvalues = [3, 1, 4, 1, 5]\n"
  "print(sum(values) / len(values))\nfor i in range(10):\n  if i % 2 == 0:\n    print(i, max(values))\n",
  "def solve(x, y):\n  return x * y + x - y\n\nresult = solve(12, 7)\nprint(result)\nprint(round(result, 2))\n",
  "Traceback (most recent call last):\nNameError: name 'x' is not defined\nTypeError\nValueError\n"
  "SyntaxError: invalid syntax\nKeyError\nIndexError: list index out of range\n",
  "data = {'a': 1, 'b': 2}\nprint(sorted(data.items(), key=lambda item: item[1])[-1])\n",
)


def build_tokenizer() -> Tokenizer:
  """Trains the tokenizer.

  Raises:
    ValueError: the corpus does not hold enough merges for `VOCAB_SIZE`.
  """
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE - len(ADDED_TOKENS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(corpus(), trainer)
  tokenizer.add_tokens([
    AddedToken(text, special=special, normalized=False) for text, special in ADDED_TOKENS
  ])
  if tokenizer.get_vocab_size() != VOCAB_SIZE:
    raise ValueError(
      f"the corpus gives {tokenizer.get_vocab_size()} tokens and VOCAB_SIZE is {VOCAB_SIZE}: "
      "extend the corpus or lower VOCAB_SIZE"
    )
  return tokenizer


def corpus() -> Iterator[str]:
  """Texts to learn merges from, without special tokens; the same on every call."""
  rng = random.Random(SEED)
  # Coordinates and single characters are tokens by design, so each occurs more often than anything
  # that merges could prefer to it.
  for x in GRID:
    yield from (f"[{x}, {x}, {x}, {x}]",) * 60
  for glyph in GLYPHS:
    yield from (f"\\boxed{{{glyph}}} {glyph}",) * 60
  yield from SYSTEM_TEXTS * 20
  yield from GENERAL_TEXTS * 3
  for word in COMMON_WORDS.split():  # enough to be learned, after what the miniature world says often
    yield f" {word}" * 16
  for tool in TOOLS:
    yield from (json.dumps(tool),) * 20
  for colour in COLOURS:
    for shape in SHAPES:
      yield from _perception_texts(rng, colour, shape)
  for name in NAMES:
    yield from _search_texts(rng, name)
  for _ in range(60):
    yield from _reasoning_texts(rng)


def _perception_texts(rng: random.Random, colour: str, shape: str) -> Iterator[str]:
  mark = f"{colour} {shape}"
  glyph, place = rng.choice(GLYPHS), rng.choice(PLACES)
  x1, y1, x2, y2 = (rng.choice(GRID) for _ in range(4))
  box = f"[{x1}, {y1}, {x2}, {y2}]"
  yield f"What is written in the {mark}?\nWhere is the {mark}? Where is the {colour} mark?\nWhat is at {box}?\nWhat is written here?"
  yield f"Which letter is in the {mark}? List the marks. What colour is the {shape}? Read this crop."
  yield f"The mark is too small to read. I will zoom in on the {mark}.\n\n"
  # Each sentence both at the start of a line and inside one.
  yield f"I can read it directly. It is {glyph}.\nThe crop shows {glyph}.\nNothing is readable here."
  yield f"Nothing is readable here. The crop shows {glyph}. I can read it directly.\nIt is {glyph}."
  yield f"The {mark} is at the {place}, at {box}. There are {rng.randrange(7)} marks in the image."
  yield f"I see a {mark}. The zoom missed it, so I look again with a larger box."
  yield "\n" + call("image_zoom_in", bbox_2d=[x1, y1, x2, y2], label=mark,
                    img_idx=rng.randrange(3)) + "\n"
  yield f"\n<answer>\n\\boxed{{{glyph}}}\n</answer>\n<answer>\n\\boxed{{{mark}}}\n</answer>"
  yield f"\n<answer>\n\\boxed{{{mark} {box}; {mark} {box}}}\n</answer>\n\\boxed{{{box}}}"
  yield f"Image {rng.randrange(1, 6)}: zoomed from image {rng.randrange(3)}."
  yield (f"Error: image_zoom_in: bbox_2d {box} is empty: it needs x1 < x2 and y1 < y2. "
         "Error: not valid JSON: at character 3. Error: missing argument, there is no tool.")


def _search_texts(rng: random.Random, name: str) -> Iterator[str]:
  other, relation, second = rng.choice(NAMES), *rng.sample(RELATIONS, 2)
  yield f"What is the {relation} of {name}? Who is the {second} of the {relation} of {name}?"
  yield f"The {relation} of {name} is {other}. I do not know this. I will search for it."
  yield f"The search found it. Now I search for the {second} of {other}. The result says {name}."
  yield "\n" + call("tavily-search", query=f"{relation} of {name}", max_results=3) + "\n"
  yield f"[1] {name}: The {relation} of {name} is {other}.\n[2] {other}\nNo results were found."
  yield f"\n<answer>\n\\boxed{{{other}}}\n</answer>"


def _reasoning_texts(rng: random.Random) -> Iterator[str]:
  numbers = [rng.randrange(100) for _ in range(rng.randrange(3, 7))]
  word = rng.choice(("sum", "mean", "product", "difference", "maximum", "total"))
  yield f"What is the {word} of the values in the chart? The table shows {numbers}."
  yield f"The values are {', '.join(map(str, numbers))}. I compute the {word} with python."
  code = f"import numpy as np\nvalues = {numbers}\nprint({rng.choice(('sum', 'max', 'min', 'len'))}(values))"
  yield "\n" + call("python", code=code) + "\n"
  yield f"{sum(numbers)}\n<answer>\n\\boxed{{{sum(numbers)}}}\n</answer>\nThe bars are {numbers}."


def call(name: str, **arguments: object) -> str:
  """A tool call as the model writes it between its tags."""
  return json.dumps({"name": name, "arguments": arguments})


def write(folder: Path) -> None:
  """Writes `tokenizer.json` and `tokenizer_config.json` into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  build_tokenizer().save(str(folder / "tokenizer.json"))
  config = {
    # Not Qwen2Tokenizer: that class would replace the pre-tokenizer by its own.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 262144,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
  parser = argparse.ArgumentParser(description="Makes the miniature model's tokenizer.")
  parser.add_argument("--out", type=Path, required=True, help="folder to write to")
  write(parser.parse_args().out)


if __name__ == "__main__":
  main()
