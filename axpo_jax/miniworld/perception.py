"""Perception family: coloured marks on a canvas, each with a glyph that may be too small to read.

In: (seed, split, index, PerceptionConfig). Out: a `Question`, a pure function of them. The canvas is
rendered at `cell_px` pixels a cell and shown to the policy at `shown_cell_px`. At that size colour, shape,
position and a LARGE glyph can be seen, and a SMALL one cannot. The zoom tool crops from the original pixels,
where the small glyph can be read. Coordinates are the tool's: integers in 0..1000 relative to
the image, here always multiples of 20 so that each is one token.

Scaling down alone does not hide a glyph from a learner: one of 14 px shown as 3 pixels is still classified
without error by comparing it with a thousand examples. So a mark's fill has noise, of one shown pixel in size. In
a crop the thin ink is visible against it; in the shown canvas the ink is as faint as the noise (nearest neighbour
after alignment: 29 % right, in a crop 100 %).

Besides `read` (the family's question) there are dense perception tasks for the warm start. Their answers are
what a policy needs before it can point: positions, names and readings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from axpo_jax.data.question import Question

# name -> fill. Light enough for black ink, and as far apart as six colours can then be when shown.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (255, 80, 70),
    "green": (70, 215, 90),
    "blue": (95, 135, 255),
    "yellow": (250, 225, 50),
    "pink": (240, 115, 225),
    "cyan": (60, 215, 230),
}
INK = "black"
GLYPHS = ("A", "C", "E", "H", "K", "M", "R", "T", "X", "2", "4", "7")
COORDINATE_STEP = 20
SPLITS = {"train": 0, "rl": 1, "eval": 2}

# shape -> (corners, centre of the glyph, cap height of a large glyph), in cells about the cell's
# centre. The glyph has to lie inside the mark: black ink on the grey ground is harder to read.
_SHAPES = {
    "square": (((-.37, -.37), (.37, -.37), (.37, .37), (-.37, .37)), (0., 0.), .50),
    "circle": (((-.40, -.40), (.40, .40)), (0., 0.), .50),
    "triangle": (((0., -.46), (.46, .38), (-.46, .38)), (0., .13), .40),
    "diamond": (((0., -.48), (.48, 0.), (0., .48), (-.48, 0.)), (0., 0.), .44),
}
SHAPES = tuple(_SHAPES)

READ_MIX = (("read", 1.0),)
WARM_START_MIX = (
    ("where", .30), ("what_at", .20), ("list", .15), ("read_crop", .20), ("read_large", .15))
QUESTION_KINDS = ("read", "where", "what_at", "list", "read_crop", "read_large")


@dataclasses.dataclass(frozen=True)
class PerceptionConfig:
  """Numbers of the perception family.

  Attributes:
    mix: (kind, weight) pairs; `READ_MIX` for RL and evaluation, `WARM_START_MIX` for warm starts.
    grids: (rows, columns) of the canvases, drawn uniformly.
    cell_px, shown_cell_px: side of a cell in the original and as shown, in pixels.
    marks: least and greatest number of marks on a canvas.
    jitter: greatest shift of a mark from the centre of its cell, in cells.
    shrink: marks are drawn at a uniform scale in [1 - shrink, 1].
    large_share: probability that a glyph is large.
    small_px: least and greatest cap height of a small glyph, in original pixels.
    grain: greatest deviation of a mark's fill, per channel and shown pixel, in levels of 255.
    crop_min_pixels, crop_max_pixels, crop_factor, crop_min_side: the zoom tool's limits, used for
      `read_crop`; keep them equal to the tool's.
    crop_slack: probability that an edge of a `read_crop` box is off by one coordinate step.
    noise: greatest deviation of the background, per pixel, in levels of 255.
  """

  mix: tuple[tuple[str, float], ...] = READ_MIX
  grids: tuple[tuple[int, int], ...] = ((5, 5),)
  cell_px: int = 80
  shown_cell_px: int = 16
  marks: tuple[int, int] = (2, 4)
  jitter: float = 0.0
  shrink: float = 0.0
  large_share: float = 0.5
  small_px: tuple[int, int] = (10, 11)
  grain: int = 55
  crop_min_pixels: int = 48 * 48
  crop_max_pixels: int = 72 * 72  # with factor 16, a cell of any of the grids becomes 64 x 64
  crop_factor: int = 16
  crop_min_side: int = 32
  crop_slack: float = 0.2
  noise: int = 16

  def __post_init__(self):
    unknown = sorted({kind for kind, _ in self.mix} - set(QUESTION_KINDS))
    if unknown:
      raise ValueError(f"mix names unknown kinds {unknown}; known: {QUESTION_KINDS}")
    low, high = self.marks
    cells = min(rows * columns for rows, columns in self.grids)
    if not 1 <= low <= high <= min(len(COLOURS), cells):
      raise ValueError(f"marks={self.marks} must satisfy 1 <= low <= high <= "
                       f"{min(len(COLOURS), cells)} (one colour and one cell a mark)")
    for rows, columns in self.grids:
      # One pixel budget serves all canvases, so a much smaller grid would be shown too large.
      scale = math.sqrt(self.shown_max_pixels / (rows * columns)) / self.shown_cell_px
      if (int(rows * scale), int(columns * scale)) != (rows, columns):
        raise ValueError(f"grid {(rows, columns)} would not be shown at {self.shown_cell_px} px a "
                         f"cell under the largest grid's budget; use grids of similar area")

  @property
  def shown_max_pixels(self) -> int:
    """`max_pixels` of the limits that show every canvas at `shown_cell_px` a cell."""
    return max(rows * columns for rows, columns in self.grids) * self.shown_cell_px**2

  @property
  def shown_min_pixels(self) -> int:
    """`min_pixels` of those limits: nothing the world makes is ever magnified by them."""
    return min(self.crop_min_pixels, self.shown_cell_px**2)


@dataclasses.dataclass(frozen=True)
class Mark:
  """One mark: `bbox_2d` is its cell in 0..1000, `cell` = (row, column)."""

  colour: str
  shape: str
  glyph: str
  size: str  # "large" | "small"
  cell: tuple[int, int]
  bbox_2d: tuple[int, int, int, int]

  @property
  def name(self) -> str:
    return f"{self.colour} {self.shape}"


def make_question(
    seed: int, index: int, config: PerceptionConfig, split: str = "train") -> Question:
  """Makes question `index` of a split's stream.

  Args:
    seed: of the world; streams of different seeds or splits are independent.
    index: of the question in the stream, from 0.
    config: numbers of the family.
    split: "train", "rl" or "eval"; folded into the seed, so that splits are disjoint streams.

  Returns:
    A question of category "perception" with one rendered RGB image. `meta` holds the target's
    `bbox_2d`, `colour`, `shape`, `size`, `glyph`, the `difficulty` ("easy": can be answered from
    the canvas as shown, "hard": needs a crop), the `task` (its kind of question), the `grid` and
    all `marks`.

  Raises:
    ValueError: for an unknown split.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r} is not one of {tuple(SPLITS)}")
  rng = np.random.default_rng((seed, SPLITS[split], index))
  kinds, weights = zip(*config.mix)
  task = kinds[weighted_index(rng, weights)]
  grid = config.grids[rng.integers(len(config.grids))]
  marks = _place_marks(rng, grid, config)
  target = marks[0]
  if task == "read_large":
    target = dataclasses.replace(target, size="large")
    marks = (target, *marks[1:])
  image = render(rng, grid, marks, config)
  if task == "read_crop":
    image = zoom_crop(image, _slack_box(rng, target.bbox_2d, config), config)
  text, answer = _ask(task, target, marks)
  hard = task == "read" and target.size == "small"
  meta = {
      "task": task, "bbox_2d": target.bbox_2d, "colour": target.colour, "shape": target.shape,
      "size": target.size, "glyph": target.glyph, "difficulty": "hard" if hard else "easy",
      "grid": grid, "marks": marks,
  }
  return Question(
      id=f"perception-{split}-{seed}-{index}", text=text, images=(image,), answers=(answer,),
      kind="text", category="perception", source="miniworld", meta=meta)


def cell_bbox(cell: Sequence[int], grid: Sequence[int]) -> tuple[int, int, int, int]:
  """Box [x1, y1, x2, y2] of a (row, column) in 0..1000, rounded to `COORDINATE_STEP`."""
  (row, column), (rows, columns) = cell, grid
  return (_on_step(column / columns), _on_step(row / rows),
          _on_step((column + 1) / columns), _on_step((row + 1) / rows))


def format_bbox(bbox_2d: Sequence[int]) -> str:
  return "[" + ", ".join(str(value) for value in bbox_2d) + "]"


def zoom_crop(
    image: PIL.Image.Image, bbox_2d: Sequence[int], config: PerceptionConfig) -> PIL.Image.Image:
  """The crop that the zoom tool makes of a box: the same geometry, under the world's limits.

  It is written again here because `data` may not import `agent`; a test holds the two together.

  Args:
    image: original pixels.
    bbox_2d: [x1, y1, x2, y2] in 0..1000, with x1 < x2 and y1 < y2.
    config: gives the limits.

  Returns:
    The crop, resized bicubically to multiples of `crop_factor` within the pixel limits.
  """
  left, right = _grown(bbox_2d[0], bbox_2d[2], image.width, config.crop_min_side)
  top, bottom = _grown(bbox_2d[1], bbox_2d[3], image.height, config.crop_min_side)
  crop = image.crop((left, top, right, bottom))
  return crop.resize(_fit(crop.width, crop.height, config), PIL.Image.Resampling.BICUBIC)


def _grown(low: float, high: float, extent: int, min_side: int) -> tuple[int, int]:
  """A side in pixels, clamped to the image; a short one grows about its centre to `min_side`."""
  low = max(0.0, min(low / 1000 * extent, extent))
  high = max(0.0, min(high / 1000 * extent, extent))
  if high - low < min_side:
    side = min(min_side, extent)
    low = min(max((low + high - side) / 2, 0.0), extent - side)
    high = low + side
  return round(low), round(high)


def _fit(width: int, height: int, config: PerceptionConfig) -> tuple[int, int]:
  """Qwen's smart_resize: multiples of the factor whose product is within the pixel limits."""
  factor = config.crop_factor
  fitted = [max(factor, round(side / factor) * factor) for side in (width, height)]
  if math.prod(fitted) > config.crop_max_pixels:
    scale = math.sqrt(config.crop_max_pixels / (width * height))
    fitted = [max(factor, math.floor(side * scale / factor) * factor) for side in (width, height)]
  elif math.prod(fitted) < config.crop_min_pixels:
    scale = math.sqrt(config.crop_min_pixels / (width * height))
    fitted = [math.ceil(side * scale / factor) * factor for side in (width, height)]
  return fitted[0], fitted[1]


def weighted_index(rng: np.random.Generator, weights: Sequence[float]) -> int:
  """Draws an index with the given weights (Generator.choice takes ten times as long)."""
  cumulative = np.cumsum(weights)
  return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def _on_step(share: float) -> int:
  return math.floor(share * 1000 / COORDINATE_STEP + 0.5) * COORDINATE_STEP


def _place_marks(
    rng: np.random.Generator, grid: tuple[int, int], config: PerceptionConfig) -> tuple[Mark, ...]:
  rows, columns = grid
  count = int(rng.integers(config.marks[0], config.marks[1] + 1))
  cells = rng.permutation(rows * columns)[:count]
  colours = rng.permutation(len(COLOURS))[:count]
  names = tuple(COLOURS)
  marks = []
  for cell_number, colour in zip(cells, colours, strict=True):
    cell = divmod(int(cell_number), columns)
    marks.append(Mark(
        colour=names[colour], shape=SHAPES[rng.integers(len(SHAPES))],
        glyph=GLYPHS[rng.integers(len(GLYPHS))],
        size="large" if rng.random() < config.large_share else "small",
        cell=cell, bbox_2d=cell_bbox(cell, grid)))
  return tuple(marks)


def _slack_box(
    rng: np.random.Generator, bbox_2d: Sequence[int], config: PerceptionConfig) -> list[int]:
  off = rng.choice((-COORDINATE_STEP, COORDINATE_STEP), 4) * (rng.random(4) < config.crop_slack)
  return [int(min(max(value + shift, 0), 1000)) for value, shift in zip(bbox_2d, off, strict=True)]


def _ask(task: str, target: Mark, marks: Sequence[Mark]) -> tuple[str, str]:
  """Question text and gold answer."""
  if task == "where":
    return f"Where is the {target.colour} mark?", format_bbox(target.bbox_2d)
  if task == "what_at":
    return f"What is at {format_bbox(target.bbox_2d)}?", target.name
  if task == "list":
    return "List the marks.", "; ".join(_listed(marks))
  if task == "read_crop":
    return "What is written here?", target.glyph
  return f"What is written in the {target.name}?", target.glyph


def _listed(marks: Sequence[Mark]) -> Iterator[str]:
  for mark in sorted(marks, key=lambda mark: mark.cell):  # reading order
    yield f"{mark.name} {format_bbox(mark.bbox_2d)}"


def render(
    rng: np.random.Generator, grid: tuple[int, int], marks: Sequence[Mark],
    config: PerceptionConfig) -> PIL.Image.Image:
  """Draws a canvas of `grid` cells with the marks on it, in original pixels."""
  rows, columns = grid
  size = (rows * config.cell_px, columns * config.cell_px)
  ground = 128 + rng.integers(-config.noise, config.noise, size, dtype=np.int16, endpoint=True)
  image = PIL.Image.fromarray(ground.astype(np.uint8)).convert("RGB")
  draw = PIL.ImageDraw.Draw(image)
  for mark in marks:
    row, column = mark.cell
    left, top = column * config.cell_px, row * config.cell_px
    place = _Place.draw(rng, mark, config)
    image.paste(_grained(rng, COLOURS[mark.colour], config), (left, top), place.outline(mark, config))
    x, y = place.pixel(*_SHAPES[mark.shape][1])
    _draw_glyph(draw, (left + x, top + y), mark.glyph, _cap_px(rng, mark, place, config))
  return image


def _grained(
    rng: np.random.Generator, fill: tuple[int, int, int],
    config: PerceptionConfig) -> PIL.Image.Image:
  """A cell of a colour, with one random deviation per channel and pixel of the shown canvas."""
  shape = (config.shown_cell_px, config.shown_cell_px, 3)
  deviation = rng.integers(-config.grain, config.grain, shape, dtype=np.int16, endpoint=True)
  shown = np.clip(np.int16(fill) + deviation, 0, 255).astype(np.uint8)
  cell = (config.cell_px, config.cell_px)
  return PIL.Image.fromarray(shown).resize(cell, PIL.Image.Resampling.NEAREST)


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a mark lies in its cell: its centre in pixels, and pixels per unit of its outline."""

  x: float
  y: float
  unit: float

  @classmethod
  def draw(cls, rng: np.random.Generator, mark: Mark, config: PerceptionConfig) -> _Place:
    corners = _SHAPES[mark.shape][0]
    scale = 1 - config.shrink * rng.random()
    x, y = (0.5 + _kept_inside(config.jitter * (2 * rng.random() - 1), corners, axis, scale)
            for axis in (0, 1))
    return cls(x * config.cell_px, y * config.cell_px, scale * config.cell_px)

  def outline(self, mark: Mark, config: PerceptionConfig) -> PIL.Image.Image:
    """A mask of the cell: 255 inside the mark."""
    mask = PIL.Image.new("L", (config.cell_px, config.cell_px))
    draw = PIL.ImageDraw.Draw(mask)
    points = [self.pixel(*corner) for corner in _SHAPES[mark.shape][0]]
    if mark.shape == "circle":
      draw.ellipse(points, fill=255)
    else:
      draw.polygon(points, fill=255)
    return mask

  def pixel(self, x: float, y: float) -> tuple[float, float]:
    return self.x + self.unit * x, self.y + self.unit * y


def _cap_px(rng: np.random.Generator, mark: Mark, place: _Place, config: PerceptionConfig) -> int:
  """Cap height of a mark's glyph in original pixels."""
  if mark.size == "large":
    return round(_SHAPES[mark.shape][2] * place.unit)
  return int(rng.integers(config.small_px[0], config.small_px[1] + 1))


def _kept_inside(
    shift: float, corners: Sequence[Sequence[float]], axis: int, scale: float) -> float:
  """The jitter of a mark, cut so that no mark leaves its cell."""
  places = [scale * corner[axis] for corner in corners]
  return min(max(shift, -0.5 - min(places)), 0.5 - max(places))


def _draw_glyph(
    draw: PIL.ImageDraw.ImageDraw, centre: tuple[float, float], glyph: str, cap_px: int) -> None:
  font, stroke = _font(cap_px)
  left, top, right, bottom = font.getbbox(glyph, stroke_width=stroke)
  place = (round(centre[0] - (left + right) / 2), round(centre[1] - (top + bottom) / 2))
  draw.text(place, glyph, fill=INK, font=font, stroke_width=stroke)


@functools.lru_cache(maxsize=64)
def _font(cap_px: int) -> tuple[PIL.ImageFont.FreeTypeFont, int]:
  """Pillow's embedded font at a cap height, with a stroke that makes large glyphs bold."""
  stroke = max(1, round(cap_px / 20)) if cap_px >= 20 else 0
  for size in range(cap_px, 2 * cap_px + 4):
    font = PIL.ImageFont.load_default(size)
    _, top, _, bottom = font.getbbox("H", stroke_width=stroke)
    if bottom - top >= cap_px:
      return font, stroke
  raise ValueError(f"the built-in font has no size with a cap height of {cap_px} px")
