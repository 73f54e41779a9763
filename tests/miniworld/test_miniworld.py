"""The perception family: determinism, geometry, and what can and cannot be read."""

import collections
import dataclasses

import numpy as np
import PIL.Image
import pytest

from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.miniworld import perception
from axpo_jax.model.images import ImageLimits, ImageProcessor

CONFIG = perception.PerceptionConfig()
WARM_START = perception.PerceptionConfig(mix=perception.WARM_START_MIX)


def pixels(question):
  return np.asarray(question.images[0])


def shown(question):
  rows, columns = question.meta["grid"]
  return question.images[0].resize((16 * columns, 16 * rows), PIL.Image.Resampling.BICUBIC)


def only(task):
  return perception.PerceptionConfig(mix=((task, 1.0),))


@pytest.mark.parametrize("config", [CONFIG, WARM_START])
def test_a_question_is_a_function_of_seed_index_and_config(config):
  first, again = (perception.make_question(3, 17, config) for _ in range(2))
  assert dataclasses.replace(first, images=()) == dataclasses.replace(again, images=())
  np.testing.assert_array_equal(pixels(first), pixels(again))


def test_no_question_stands_in_two_splits_or_twice_in_one():
  def fingerprint(seed, split, index):
    question = perception.make_question(seed, index, CONFIG, split)
    return question.meta["marks"], pixels(question).tobytes()

  streams = [(seed, split) for seed in (0, 1) for split in perception.SPLITS]
  seen = [fingerprint(*stream, index) for stream in streams for index in range(25)]
  assert len(set(seen)) == len(seen)
  ids = {perception.make_question(s, i, CONFIG, split).id for s, split in streams for i in range(3)}
  assert len(ids) == 18


def test_unknown_splits_and_kinds_are_errors():
  with pytest.raises(ValueError, match="split 'test'"):
    perception.make_question(0, 0, CONFIG, "test")
  with pytest.raises(ValueError, match="unknown kinds \\['raed'\\]"):
    only("raed")
  with pytest.raises(ValueError, match="marks="):
    perception.PerceptionConfig(marks=(3, 7))
  with pytest.raises(ValueError, match="would not be shown at 16 px"):
    perception.PerceptionConfig(grids=((5, 5), (3, 3)))


def test_marks_are_told_apart_by_their_colour_and_cell():
  for index in range(100):
    marks = perception.make_question(0, index, CONFIG).meta["marks"]
    assert CONFIG.marks[0] <= len(marks) <= CONFIG.marks[1]
    assert len({mark.colour for mark in marks}) == len({mark.cell for mark in marks}) == len(marks)


def test_boxes_are_cells_on_the_grid_of_twenty():
  # 1000 / 5 = 200; 1000 / 4 = 250 -> 260 (half goes up); 1000 / 6 = 166.7 -> 160, 333.3 -> 340.
  assert perception.cell_bbox((2, 1), (5, 5)) == (200, 400, 400, 600)
  assert perception.cell_bbox((1, 1), (4, 6)) == (160, 260, 340, 500)
  assert perception.cell_bbox((5, 3), (6, 4)) == (760, 840, 1000, 1000)


def test_a_mark_is_drawn_in_its_cell_in_its_colour():
  for index in range(40):
    question = perception.make_question(1, index, CONFIG)
    cells = np.asarray(shown(question), np.float64)
    for mark in question.meta["marks"]:
      row, column = mark.cell
      cell = cells[16 * row:16 * row + 16, 16 * column:16 * column + 16]
      coloured = cell[np.ptp(cell, axis=-1) > 80]  # neither ground nor ink
      fills = {name: np.array(fill) for name, fill in perception.COLOURS.items()}
      nearest = min(fills, key=lambda name: np.abs(fills[name] - coloured.mean(0)).sum())
      assert nearest == mark.colour
    marked = {mark.cell for mark in question.meta["marks"]}
    for row, column in np.ndindex(*question.meta["grid"]):
      cell = cells[16 * row + 2:16 * row + 14, 16 * column + 2:16 * column + 14]
      assert (np.ptp(cell, axis=-1).max() > 80) == ((row, column) in marked)


@pytest.mark.parametrize("task, text, answer", [
    ("where", "Where is the {colour} mark?", "{box}"),
    ("what_at", "What is at {box}?", "{colour} {shape}"),
    ("read", "What is written in the {colour} {shape}?", "{glyph}"),
    ("read_large", "What is written in the {colour} {shape}?", "{glyph}"),
    ("read_crop", "What is written here?", "{glyph}"),
])
def test_questions_and_answers(task, text, answer):
  for index in range(10):
    question = perception.make_question(0, index, only(task))
    meta = dict(question.meta, box="[" + ", ".join(map(str, question.meta["bbox_2d"])) + "]")
    assert question.text == text.format(**meta)
    assert question.answers == (answer.format(**meta),)
    hard = task == "read" and meta["size"] == "small"
    assert meta["difficulty"] == ("hard" if hard else "easy")
    assert task != "read_large" or meta["size"] == "large"


def test_a_list_is_in_reading_order():
  question = perception.make_question(0, 5, only("list"))
  entries = question.answers[0].split("; ")
  marks = sorted(question.meta["marks"], key=lambda mark: (mark.bbox_2d[1], mark.bbox_2d[0]))
  assert entries == [f"{mark.colour} {mark.shape} {list(mark.bbox_2d)}" for mark in marks]


def test_the_mix_and_the_large_share_hold():
  n = 1500
  config = dataclasses.replace(WARM_START, cell_px=40, large_share=0.3)
  questions = [perception.make_question(0, index, config) for index in range(n)]
  counts = collections.Counter(question.meta["task"] for question in questions)
  for task, weight in perception.WARM_START_MIX:
    assert abs(counts[task] - n * weight) < 4.5 * np.sqrt(n * weight * (1 - weight))
  sizes = [mark.size for question in questions if question.meta["task"] != "read_large"
           for mark in question.meta["marks"]]
  assert abs(sizes.count("large") - 0.3 * len(sizes)) < 4.5 * np.sqrt(len(sizes) * 0.21)


def test_the_world_is_shown_at_one_token_a_cell_and_crops_as_they_are():
  processor = ImageProcessor(8, 2, 2, [0.5] * 3, [0.5] * 3)
  limits = ImageLimits(CONFIG.shown_min_pixels, CONFIG.shown_max_pixels)
  for index in range(30):
    question = perception.make_question(0, index, CONFIG)
    rows, columns = question.meta["grid"]
    assert processor(question.images[0], limits).num_tokens == rows * columns
    crop = perception.make_question(0, index, only("read_crop")).images[0]
    assert processor.resize(crop, limits).size == crop.size


def test_crops_are_the_zoom_tools():
  tool = ImageZoomIn(ImageLimits(CONFIG.crop_min_pixels, CONFIG.crop_max_pixels),
                     factor=CONFIG.crop_factor, min_side=CONFIG.crop_min_side)
  rng = np.random.default_rng(0)
  image = perception.make_question(0, 0, CONFIG).images[0]
  boxes = [(0, 0, 1000, 1000), (0, 0, 20, 20), (980, 500, 1000, 520)]
  for _ in range(100):
    (x1, x2), (y1, y2) = (sorted(20 * rng.choice(51, 2, replace=False)) for _ in range(2))
    boxes.append((int(x1), int(y1), int(x2), int(y2)))
  for box in boxes:
    crop = perception.zoom_crop(image, box, CONFIG)
    np.testing.assert_array_equal(crop, tool.magnify(image, list(box)), err_msg=str(box))


def ink_height(image, rows, columns):
  """Rows with black ink inside a part of a red mark's interior."""
  part = np.asarray(image, np.float64)[rows, columns]
  return int((part[..., 0] < 140).any(1).sum())


def test_a_small_glyph_is_really_magnified():
  # Cap height 10 to 11 px of 80: at most 2.2 px and a blurred row when shown, 8 of 64 in a crop.
  heights = []
  for index in range(400):
    question = perception.make_question(0, index, CONFIG)
    for mark in question.meta["marks"]:
      if (mark.colour, mark.shape, mark.size) != ("red", "square", "small"):
        continue
      row, column = mark.cell
      seen = ink_height(shown(question), slice(16 * row + 5, 16 * row + 12),
                        slice(16 * column + 5, 16 * column + 12))
      crop = perception.zoom_crop(question.images[0], mark.bbox_2d, CONFIG)
      heights.append((seen, ink_height(crop, slice(20, 44), slice(20, 44))))
  assert len(heights) > 20
  assert max(seen for seen, _ in heights) <= 3
  assert min(crop for _, crop in heights) >= 7


def windows(cell, mark, side, shifts):
  """How inky each pixel is (0 fill, 1 ink) about the glyph, at every shift: [shifts, side**2]."""
  fill = np.array(perception.COLOURS[mark.colour], np.float64)
  towards = -fill  # the ink is black
  inky = (np.asarray(cell, np.float64) - fill) @ towards / (towards @ towards)
  scale = inky.shape[0] // 16
  top = inky.shape[0] // 2 + (2 * scale if mark.shape == "triangle" else 0) - side // 2
  left = inky.shape[1] // 2 - side // 2
  return np.stack([inky[top + u:top + u + side, left + v:left + v + side].ravel()
                   for u in shifts for v in shifts])


def samples(count, split, shifted):
  """Windows and glyphs of (view, size), for the marks of `count` questions."""
  found = collections.defaultdict(lambda: ([], []))
  for index in range(count):
    question = perception.make_question(0, index, CONFIG, split)
    small_view = shown(question)
    for mark in question.meta["marks"]:
      row, column = mark.cell
      views = {
          "shown": small_view.crop((16 * column, 16 * row, 16 * column + 16, 16 * row + 16)),
          "crop": perception.zoom_crop(question.images[0], mark.bbox_2d, CONFIG)}
      for view, cell in views.items():
        reach = 1 if view == "shown" else 4
        side = {("shown", "small"): 5, ("shown", "large"): 8,
                ("crop", "small"): 15, ("crop", "large"): 32}[view, mark.size]
        xs, glyphs = found[view, mark.size]
        shifts = range(-reach, reach + 1, 2 if side == 32 else 1) if shifted else [0]
        xs.append(windows(cell, mark, side, shifts))
        glyphs.append(mark.glyph)
  return {key: (np.array(xs), np.array(glyphs)) for key, (xs, glyphs) in found.items()}


def test_a_small_glyph_needs_the_crop():
  """A nearest neighbour that knows place, colour and size reads all but the small glyph as shown.

  Scaled down alone it would read them all, so this holds the grain in place.
  """
  known, asked = samples(400, "train", False), samples(40, "eval", True)
  right = {}
  for key, (queries_NxSxC, glyphs) in asked.items():
    known_MxC, known_glyphs = known[key][0][:, 0], known[key][1]
    distance_NxSxM = ((queries_NxSxC**2).sum(-1)[..., None] + (known_MxC**2).sum(-1)
                      - 2 * queries_NxSxC @ known_MxC.T)
    right[key] = (known_glyphs[distance_NxSxM.min(1).argmin(1)] == glyphs).mean()
  assert right["shown", "small"] < 0.5
  assert right["shown", "large"] > 0.95
  assert right["crop", "small"] > 0.9
  assert right["crop", "large"] > 0.95
