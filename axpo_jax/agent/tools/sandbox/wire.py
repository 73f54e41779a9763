"""Messages between the trainer, the sandbox and the kernel in it: a JSON header and raw bytes.

A message is 4 bytes with the header's length, the header, and the payloads one after the other;
the header's "sizes" says how long each is. No pickle and no image format is read from the other
side: what comes out of the sandbox may be anything, so lengths are checked before they are read.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

HEADER = struct.Struct("!I")
MAX_HEADER = 8 << 20
MAX_PAYLOAD = 1 << 30  # bytes of all payloads; the episode's images go in as raw pixels
MOST_FIGURES = 8  # that a cell shows
MOST_PIXELS = 2_000_000  # of a figure; larger ones are drawn or scaled smaller


class WireError(RuntimeError):
  """The other side is gone, or what it sent is no message."""


def pack(message: dict[str, Any], payloads: Sequence[bytes] = ()) -> bytes:
  """A message in the form of the module docstring, without its payloads."""
  text = json.dumps({**message, "sizes": [len(payload) for payload in payloads]}).encode()
  return HEADER.pack(len(text)) + text


def header_length(data: bytes, most: int = MAX_HEADER) -> int:
  """Bytes of the header that follow these four; raises WireError for more than `most`."""
  (length,) = HEADER.unpack(data)
  if length > most:
    raise WireError(f"a header of {length} bytes; at most {most} are allowed")
  return length


def parse_header(data: bytes) -> dict[str, Any]:
  """The header, with "sizes" checked: whole numbers whose sum is at most MAX_PAYLOAD."""
  try:
    message = json.loads(data)
    sizes = message["sizes"]
    good = all(type(size) is int and size >= 0 for size in sizes) and sum(sizes) <= MAX_PAYLOAD
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise WireError(f"not a message: {error}") from error
  if not good:
    raise WireError(f"payloads of {str(sizes)[:80]} bytes; at most {MAX_PAYLOAD} are allowed")
  return message


def check_figures(message: dict[str, Any]) -> list[list[int]]:
  """Widths and heights of the figures whose raw pixels follow.

  Raises:
    WireError: they are too many or too large, or the pixels that follow are not theirs. Nothing was
      allocated yet: what a cell says of a figure may be a lie.
  """
  figures, sizes = message.get("figures"), message["sizes"]
  if not isinstance(figures, list) or len(figures) > MOST_FIGURES or len(figures) != len(sizes):
    raise WireError(f"{ascii(figures)[:80]} with {len(sizes)} payloads are not at most {MOST_FIGURES} "
                    "figures")
  for figure, size in zip(figures, sizes):
    if not (isinstance(figure, list) and len(figure) == 2
            and all(type(side) is int and 0 < side <= MOST_PIXELS for side in figure)
            and figure[0] * figure[1] <= MOST_PIXELS and size == 3 * figure[0] * figure[1]):
      raise WireError(f"{ascii(figure)[:80]} with {size} bytes is no figure")
  return figures


def send(sock: socket.socket, message: dict[str, Any], payloads: Sequence[bytes] = (),
         deadline: float | None = None) -> None:
  """Sends one message; blocks, until `deadline` on the monotonic clock (else the socket's timeout)."""
  try:
    for part in (pack(message, payloads), *payloads):
      _limit(sock, deadline)
      sock.sendall(part)
  except OSError as error:
    raise WireError(str(error)) from error


def receive(sock: socket.socket, deadline: float | None = None) -> tuple[dict[str, Any], list[bytes]]:
  """Reads one message; blocks as `send` does."""
  header = _exactly(sock, header_length(_exactly(sock, HEADER.size, deadline)), deadline)
  message = parse_header(header)
  return message, [_exactly(sock, size, deadline) for size in message["sizes"]]


def receive_result(sock: socket.socket, deadline: float) -> tuple[dict[str, Any], list[bytes]]:
  """`receive` for what a cell says: a small header and `check_figures`."""
  header = _exactly(sock, header_length(_exactly(sock, HEADER.size, deadline), 4096), deadline)
  message = parse_header(header)
  check_figures(message)
  return message, [_exactly(sock, size, deadline) for size in message["sizes"]]


def _limit(sock: socket.socket, deadline: float | None) -> None:
  # Before every read: a socket's own timeout begins anew with each byte.
  if deadline is not None:
    sock.settimeout(max(deadline - time.monotonic(), 0.001))


def _exactly(sock: socket.socket, size: int, deadline: float | None) -> bytes:
  data, view = bytearray(size), 0
  while view < size:
    try:
      _limit(sock, deadline)
      count = sock.recv_into(memoryview(data)[view:])
    except OSError as error:
      raise WireError(str(error)) from error
    if not count:
      raise WireError("the other side is gone")
    view += count
  return bytes(data)
