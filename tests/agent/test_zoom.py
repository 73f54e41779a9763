"""image_zoom_in: geometry, indices, and an observation for every mistake."""

import asyncio

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.zoom import BoxError, ImageZoomIn, pixel_box
from axpo_jax.miniworld import perception
from axpo_jax.model.images import ImageLimits

SMALL = ImageLimits(48 * 48, 48 * 48)


def picture(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return PIL.Image.fromarray(pixels)


def call(arguments, images, tool=None, name="image_zoom_in"):
  box = ToolBox([tool or ImageZoomIn(SMALL, factor=16)], ["read_image"])
  return asyncio.run(box.call(name, arguments, EpisodeState("q", images)))


@pytest.mark.parametrize("box, size, expected", [
    ((0, 0, 1000, 1000), (640, 480), (0, 0, 640, 480)),
    ((250, 500, 750, 1000), (640, 480), (160, 240, 480, 480)),
    ((-50, -1e9, 500, 2000), (640, 480), (0, 0, 320, 480)),  # clamped
    ((500, 500, 501, 501), (1000, 1000), (484, 484, 516, 516)),  # grows about 500.5 to 32
    ((0, 0, 1, 500), (1000, 1000), (0, 0, 32, 500)),  # only the short side; shifted inside
    ((990, 0, 1000, 500), (1000, 1000), (968, 0, 1000, 500)),
    ((400, 0, 600, 1000), (20, 100), (0, 0, 20, 100)),  # an image shorter than 32
])
def test_pixel_box(box, size, expected):
  assert pixel_box(list(box), *size) == expected


@settings(max_examples=200, deadline=None)
@given(box=st.tuples(*[st.floats(-100, 1100)] * 4), width=st.integers(1, 3000),
       height=st.integers(1, 3000))
def test_a_pixel_box_lies_inside_and_is_never_short(box, width, height):
  try:
    left, top, right, bottom = pixel_box(list(box), width, height)
  except BoxError:
    x1, y1, x2, y2 = box
    assert x1 >= x2 or y1 >= y2 or x2 <= 0 or y2 <= 0 or x1 >= 1000 or y1 >= 1000
    return
  assert 0 <= left < right <= width and 0 <= top < bottom <= height
  assert right - left >= min(32, width) and bottom - top >= min(32, height)


@pytest.mark.parametrize("size, box, expected", [
    ((4000, 3000), [0, 0, 100, 100], (608, 448)),  # 400 x 300 grown to at least 262,144 pixels
    ((4000, 3000), [0, 0, 1000, 1000], (4000, 3008)),  # inside the limits: only rounded
])
def test_real_sizes(size, box, expected):
  """By hand, Qwen's rule: beta = sqrt(262144 / (400 * 300)) = 1.478; ceil(591.2 / 32) * 32 = 608,
  ceil(443.4 / 32) * 32 = 448. And round(3000 / 32) * 32 = 3008."""
  crop = ImageZoomIn().magnify(picture(*size), box)
  assert crop.size == expected
  assert 262_144 <= crop.width * crop.height <= 12_845_056


def test_the_crop_is_bicubic_from_the_original():
  image = picture(512, 512)
  observation = call({"bbox_2d": [250, 250, 500, 500], "label": "box"}, [image])
  expected = image.crop((128, 128, 256, 256)).resize((48, 48), PIL.Image.Resampling.BICUBIC)
  assert observation.error is None
  assert np.array_equal(np.asarray(observation.images[0]), np.asarray(expected))


def test_a_crop_of_the_right_size_keeps_its_pixels():
  image = picture(480, 480)
  observation = call({"bbox_2d": [100, 100, 200, 200], "label": ""}, [image])
  assert np.array_equal(np.asarray(observation.images[0]), np.asarray(image)[48:96, 48:96])


def test_indices_run_over_all_images_and_the_text_tells_the_next():
  images = [picture(480, 480, 0), picture(480, 480, 1)]
  observation = call({"bbox_2d": [0, 0, 100, 100], "label": "x", "img_idx": 1}, images)
  assert np.array_equal(np.asarray(observation.images[0]), np.asarray(images[1])[:48, :48])
  assert observation.text == "Image 2: zoomed from image 1."


def test_aliases():
  images = [picture(480, 480, 0), picture(480, 480, 1)]
  usual = call({"bbox_2d": [0, 0, 100, 100], "label": "x", "img_idx": 1}, images)
  other = call({"bbox": [0, 0, 100, 100], "label": "x", "image_index": 1.0}, images,
               name="image_zoom_in_tool")
  assert other.text == usual.text and other.error is None
  assert other.images[0].tobytes() == usual.images[0].tobytes()


def test_the_miniature_worlds_crops_are_those_of_the_tool():
  """The world makes training crops without the agent's code; they must be the same pixels."""
  config = perception.PerceptionConfig()
  tool = ImageZoomIn(ImageLimits(config.crop_min_pixels, config.crop_max_pixels),
                     factor=config.crop_factor, min_side=config.crop_min_side)
  rng = np.random.default_rng(0)
  for size in ((512, 512), (500, 331)):
    image = picture(*size)
    for _ in range(50):
      x, y = np.sort(rng.choice(51, (2, 2), replace=False), axis=1) * 20
      box = [int(x[0]), int(y[0]), int(x[1]), int(y[1])]
      expected = tool.magnify(image, box)
      assert perception.zoom_crop(image, box, config).tobytes() == expected.tobytes()


@pytest.mark.parametrize("change, says", [
    ({"bbox_2d": [500, 0, 500, 10]}, "x1 < x2"),
    ({"bbox_2d": [0, 10, 500, 9]}, "y1 < y2"),
    ({"bbox_2d": [1100, 0, 1200, 10]}, "outside"),
    ({"bbox_2d": [1, 2, 3]}, "4 items, got 3"),
    ({"bbox_2d": [1, 2, 3, "4"]}, "bbox_2d[3] must be a finite number"),
    ({"bbox_2d": [0, 0, float("nan"), 4]}, "finite"),
    ({"bbox_2d": [0, 0, float("inf"), 4]}, "finite"),
    ({"bbox_2d": [0, 0, True, 4]}, "finite number"),
    ({"bbox_2d": [0, 0, 10**400, 4]}, "finite number"),
    ({"bbox_2d": "[0, 0, 1, 1]"}, "must be an array"),
    ({"bbox_2d": None}, "must be an array"),
    ({"label": 3}, "label must be a string"),
    ({"label": ...}, "missing argument 'label'"),
    ({"bbox_2d": ...}, "missing argument 'bbox_2d'"),
    ({"zoom": 2}, "unknown argument 'zoom'"),
    ({"bbox": [0, 0, 1, 1]}, "given twice"),
    ({"img_idx": 1}, "img_idx 1 is out of range; images: 0 to 0"),
    ({"img_idx": -1}, "out of range"),
    ({"img_idx": 0.5}, "out of range"),
    ({"img_idx": "0"}, "img_idx must be a finite number"),
])
def test_malformed_calls_are_told_what_is_wrong(change, says):
  arguments = {"bbox_2d": [0, 0, 100, 100], "label": "x"} | change
  arguments = {name: value for name, value in arguments.items() if value is not ...}
  observation = call(arguments, [picture(64, 64)])
  assert observation.error == "bad_arguments" and not observation.images
  assert says in observation.text and observation.text.startswith("Error: ")


def test_no_images_at_all():
  assert "images: none" in call({"bbox_2d": [0, 0, 9, 9], "label": "x"}, []).text


def test_too_thin_a_region():
  observation = call({"bbox_2d": [0, 0, 1000, 1], "label": "x"}, [picture(7000, 40)])
  assert observation.error == "bad_arguments" and "too long and thin" in observation.text


@settings(max_examples=200, deadline=None)
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                          lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(), x,
                                                                              max_size=3)),
       where=st.sampled_from(["bbox_2d", "label", "img_idx", "other"]))
def test_no_argument_whatever_raises(value, where):
  arguments = {"bbox_2d": [0, 0, 100, 100], "label": "x"} | {where: value}
  observation = call(arguments, [picture(64, 64)])
  assert (observation.error is None) == bool(observation.images)
  assert observation.error in (None, "bad_arguments")
