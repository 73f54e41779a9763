"""The kernel: IPython's shell, running the cells of one episode.

IPython is the part of ipykernel that runs code: last expressions, magics, `await`, tracebacks. The
other part, ZeroMQ over TCP, does not fit here: its threads do not survive the fork that makes a
kernel in milliseconds, and the sandbox has no network. So cells come over a socket pair instead.

In: messages {"op": "run", "code", "images": [[width, height], ...]} with the new images of the
episode as raw RGB. Out: {"failed", "figures": [[width, height], ...]} with raw RGB. Text goes to
the descriptors 1 and 2, whoever prints it.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import socket
import sys
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from IPython.core.displayhook import DisplayHook
from IPython.core.history import HistoryManager
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from axpo_jax.agent.tools.sandbox import wire
from axpo_jax.agent.tools.sandbox.wire import MOST_FIGURES, MOST_PIXELS
from axpo_jax.model.pictures import to_rgb


class Kernel:
  """The shell and the pictures that the running cell has shown.

  Made once, in the fork server; every kernel is a fork of it.
  """

  def __init__(self):
    # No thread and no database: both would have to survive a fork.
    HistoryManager.enabled = False
    InteractiveShell.colors = "nocolor"
    InteractiveShell.xmode = "Plain"
    _Display.kernel = self
    InteractiveShell.displayhook_class = _Display
    self.shell = InteractiveShell.instance()
    if sys.version_info >= (3, 13):
      # IPython compiles with a flag by which Python 3.13 calls an open bracket an
      # _IncompleteInputError, a name that no policy knows, instead of a SyntaxError.
      self.shell.compile.reset_compiler_flags()
    self.shell.system = self.shell.system_raw  # the other one wants a terminal
    self.shown: list[PIL.Image.Image] = []
    self.images: list[PIL.Image.Image] = []
    matplotlib.use("Agg")
    plt.show = self.show_figures
    self.shell.push({"_pil_images": self.images, "_images": self.images,
                     "display": self.display}, interactive=False)

  def serve(self, sock: socket.socket) -> None:
    """Runs cells until the other side is gone."""
    sys.stdout = _text_stream(1)
    sys.stderr = _text_stream(2)
    # Every kernel begins alike, so that replaying an episode's cells gives the same values.
    random.seed(0)
    np.random.seed(0)
    while True:
      message, payloads = wire.receive(sock)
      self.images += [PIL.Image.frombytes("RGB", tuple(size), data)
                      for size, data in zip(message["images"], payloads)]
      failed = self.run(message["code"])
      stop_others()
      pixels = [image.tobytes() for image in self.shown]
      wire.send(sock, {"failed": failed, "figures": [image.size for image in self.shown]}, pixels)
      self.shown.clear()

  def run(self, code: str) -> bool:
    """Runs one cell; returns whether it raised."""
    try:
      result = self.shell.run_cell(code, store_history=False)
      self.show_figures()
      failed = not result.success
    except BaseException as error:  # a cell's KeyboardInterrupt, or a traceback that fails itself
      print(f"{type(error).__name__}: {error}", file=sys.stderr)
      failed = True
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):  # the cell closed it
        stream.flush()
    return failed

  def display(self, *values: Any) -> None:
    """Shows pictures as pictures and everything else as text."""
    for value in values:
      if isinstance(value, PIL.Image.Image):
        self._show(value)
      elif isinstance(value, Figure):
        self._show_figure(value)
      else:
        print(repr(value))

  def show_figures(self, *args: Any, **kwargs: Any) -> None:
    """`plt.show`: draws all open figures, shows and closes them. Runs at a cell's end too."""
    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    for figure in figures:
      self._show_figure(figure)

  def _show_figure(self, figure: Figure) -> None:
    try:
      width, height = figure.get_size_inches()
      dpi = min(figure.dpi, (MOST_PIXELS / max(width * height, 1e-9)) ** 0.5)
      buffer = io.BytesIO()
      figure.savefig(buffer, format="png", dpi=dpi)
      self._show(PIL.Image.open(buffer))
    except Exception as error:  # the cell itself has run
      print(f"a figure cannot be drawn: {type(error).__name__}: {error}", file=sys.stderr)

  def _show(self, image: PIL.Image.Image) -> None:
    if len(self.shown) >= MOST_FIGURES:
      print(f"a figure is left out: at most {MOST_FIGURES} are shown a cell", file=sys.stderr)
      return
    try:
      image = to_rgb(image).copy()
      scale = (MOST_PIXELS / (image.width * image.height)) ** 0.5
      if scale < 1:
        image.thumbnail([max(int(side * scale), 1) for side in image.size])
      if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
      self.shown.append(image)
    except Exception as error:
      print(f"an image cannot be shown: {type(error).__name__}: {error}", file=sys.stderr)


class _Display(DisplayHook):
  """The value of a cell's last expression: pictures are shown, others printed."""

  kernel: Kernel

  def __call__(self, result: Any = None) -> None:
    if result is not None and not self.quiet():
      self.shell.user_ns["_"] = result
      self.kernel.display(result)


def _text_stream(descriptor: int) -> io.TextIOWrapper:
  """Line by line, so that a cell that is killed has said what it printed."""
  raw = io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False))
  return io.TextIOWrapper(raw, "utf-8", "replace", line_buffering=True)


def stop_others() -> None:
  """Kills what a cell left running. Only in a process namespace of its own, as process 2.

  The check is here because the same call elsewhere would kill every process of the user.
  """
  if os.getpid() == 2 and os.getppid() == 1:
    with contextlib.suppress(ProcessLookupError):
      os.kill(-1, signal.SIGKILL)
