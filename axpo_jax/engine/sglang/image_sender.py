"""Images on their way to a server: encoded once, the same bytes at every turn.

In: processed images. Out: what `image_data` takes, a data URL or the path of a file that the server
opens. A server's cache knows an image by its content, and the pixels are those that our own
processor cut into patches (PNG loses nothing), so that both sides see one picture.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import io
import pathlib
from collections.abc import Sequence

from PIL import Image

from axpo_jax.model.images import ProcessedImage


class ImageSender:
  """Encodes images and keeps what it encoded, by key, up to a limit.

  Args:
    folder: where files go; the servers see it under the same path. Empty: data URLs.
    limit: bytes kept, of URLs in memory or of files.
  """

  def __init__(self, folder: str, limit: int):
    self._folder = pathlib.Path(folder) if folder else None
    self._limit, self._size = limit, 0
    self._kept: collections.OrderedDict[str, tuple[str, int]] = collections.OrderedDict()
    self._running: dict[str, asyncio.Task] = {}
    if self._folder:
      self._folder.mkdir(parents=True, exist_ok=True)

  async def encode(self, images: Sequence[ProcessedImage]) -> list[str]:
    """One string an image, in order."""
    return list(await asyncio.gather(*map(self._one, images)))

  async def _one(self, image: ProcessedImage) -> str:
    if image.key in self._kept:
      self._kept.move_to_end(image.key)
      return self._kept[image.key][0]
    task = self._running.get(image.key)
    if task is None:
      task = self._running[image.key] = asyncio.create_task(self._encode(image))
    return await asyncio.shield(task)

  async def _encode(self, image: ProcessedImage) -> str:
    try:
      where, size = await asyncio.to_thread(self._make, image)
      self._kept[image.key] = where, size
      self._size += size
      if self._folder is None:  # files may be about to be read: see `trim`
        self.trim()
      return where
    finally:
      del self._running[image.key]

  def _make(self, image: ProcessedImage) -> tuple[str, int]:
    data = _png(image.picture())
    if self._folder is None:
      url = "data:image/png;base64," + base64.b64encode(data).decode()
      return url, len(url)
    file = self._folder / f"{image.key}.png"
    staging = file.with_suffix(".partial")
    staging.write_bytes(data)
    staging.rename(file)
    return str(file.absolute()), len(data)

  def trim(self) -> None:
    """Forgets the least recently used ones beyond the limit. Call it while no request runs."""
    while self._size > self._limit and len(self._kept) > 1:
      _, (where, size) = self._kept.popitem(last=False)
      self._size -= size
      if self._folder is not None:
        pathlib.Path(where).unlink(missing_ok=True)

  def close(self) -> None:
    """Removes the files."""
    self._limit = 0
    self.trim()
    if self._folder is not None and self._kept:
      pathlib.Path(next(iter(self._kept.values()))[0]).unlink(missing_ok=True)
    self._kept.clear()


def _png(image: Image.Image) -> bytes:
  out = io.BytesIO()
  image.save(out, "PNG", compress_level=1)
  return out.getvalue()
