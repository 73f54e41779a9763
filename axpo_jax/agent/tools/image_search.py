"""`image_search`: pages that show the question's image, from a cache that comes with the data.

FVQA-style data ship the results of a reverse image search by question: a JSON file
`{question id: {"tool_returned_web_title": [...], "cached_images_path": [... or null]}}`, with the
thumbnails' paths relative to the file. The tool is meant for generalisation studies: a run offers it
where its config names it, and evaluation may offer it where training does not.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from etils import epath

from axpo_jax import paths
from axpo_jax.agent.tools.base import EpisodeState, Observation, Tool, failure
from axpo_jax.agent.tools.search import SEARCH_ERROR
from axpo_jax.data.question import load_image

SCHEMA = {"type": "function", "function": {
    "name": "image_search",
    "description": "Finds web pages that show the question's image: their titles and pictures.",
    "parameters": {"type": "object", "required": [], "properties": {}}}}


class ImageCacheError(ValueError):
  """A cache that cannot be read; the message names the file or the question."""


class ImageSearch(Tool):
  """The tool.

  Args:
    path: the cache.
    max_results: pages that are shown; the first are the best.
    max_side: thumbnails are shrunk to this many pixels.

  Raises:
    ImageCacheError: the cache has another form.
  """

  name = "image_search"
  scope = "network"
  schema = SCHEMA

  def __init__(self, path: str | os.PathLike, *, max_results: int = 5, max_side: int = 448):
    self._folder = epath.Path(path).parent
    self._max_results, self._max_side = max_results, max_side
    cache = _load(pathlib.Path(path))
    if not isinstance(cache, dict):
      raise ImageCacheError(f"{path} is not an object of question ids")
    self._pages = {str(question): _pages(question, entry) for question, entry in cache.items()}

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Lists the pages of the episode's question and shows their pictures."""
    pages = self._pages.get(episode.question_id)
    if not pages:
      return failure(SEARCH_ERROR, "the image search found nothing for this question")
    lines, images = [], []
    for number, (title, picture) in enumerate(pages[:self._max_results], 1):
      image = self._picture(picture)
      where = "" if image is None else f" (image {len(episode.images) + len(images)})"
      lines.append(f"[{number}] {title}{where}")
      if image is not None:
        images.append(image)
    return Observation("\n".join(lines), tuple(images))

  def _picture(self, picture: str | None):
    if not picture:
      return None
    try:
      image = load_image(paths.within(self._folder, picture))
    # Thumbnails are often missing, and a cache names its own alone: the title is worth showing all the same.
    except (ValueError, TypeError):
      return None
    image.thumbnail((self._max_side, self._max_side))
    return image


def _load(path: pathlib.Path) -> Any:
  try:
    content = path.read_bytes()
    if content[:1] != b"\x80":  # how a pickle begins
      return json.loads(content)
  except (OSError, ValueError, RecursionError) as error:
    raise ImageCacheError(f"{path}: {error}") from error
  raise ImageCacheError(f"{path} is a pickle, which runs code when it is read; convert it to JSON where "
                        "that does no harm: docs/tools.md, image_search")


def _pages(question: str, entry: Any) -> list[tuple[str, str | None]]:
  try:
    titles, pictures = entry["tool_returned_web_title"], entry["cached_images_path"]
    return [(str(title), picture) for title, picture in zip(titles, pictures, strict=True)]
  except (TypeError, KeyError, ValueError) as error:
    raise ImageCacheError(
      f"the image cache's entry of question {question!r} needs lists tool_returned_web_title and "
      f"cached_images_path of one length: {error}") from error
