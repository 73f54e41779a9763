"""Messages between the trainer, the sandbox and the kernel in it: a JSON header and raw bytes.

A message is 4 bytes with the header's length, the header, and the payloads one after the other;
the header's "sizes" says how long each is. No pickle and no image format is read from the other
side: what comes out of the sandbox may be anything, so lengths are checked before they are read.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

HEADER = struct.Struct("!I")
MAX_HEADER = 8 << 20
MAX_PAYLOAD = 1 << 30  # bytes of one payload; the episode's images go in as raw pixels


class WireError(RuntimeError):
  """The other side is gone, or what it sent is no message."""


def pack(message: dict[str, Any], payloads: Sequence[bytes] = ()) -> bytes:
  """A message in the form of the module docstring, without its payloads."""
  text = json.dumps({**message, "sizes": [len(payload) for payload in payloads]}).encode()
  return HEADER.pack(len(text)) + text


def header_length(data: bytes) -> int:
  """Bytes of the header that follow these four; raises WireError for more than MAX_HEADER."""
  (length,) = HEADER.unpack(data)
  if length > MAX_HEADER:
    raise WireError(f"a header of {length} bytes")
  return length


def parse_header(data: bytes, most_payload: int = MAX_PAYLOAD) -> dict[str, Any]:
  """The header, with "sizes" checked: whole numbers whose sum is at most `most_payload`."""
  try:
    message = json.loads(data)
    sizes = message["sizes"]
    good = all(type(size) is int and size >= 0 for size in sizes) and sum(sizes) <= most_payload
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise WireError(f"not a message: {error}") from error
  if not good:
    raise WireError(f"payloads of {str(sizes)[:80]} bytes; at most {most_payload} are allowed")
  return message


def send(sock: socket.socket, message: dict[str, Any], payloads: Sequence[bytes] = ()) -> None:
  """Sends one message; blocks, within the socket's timeout."""
  try:
    sock.sendall(pack(message, payloads))
    for payload in payloads:
      sock.sendall(payload)
  except OSError as error:
    raise WireError(str(error)) from error


def receive(sock: socket.socket, most_payload: int = MAX_PAYLOAD
            ) -> tuple[dict[str, Any], list[bytes]]:
  """Reads one message; blocks, within the socket's timeout."""
  message = parse_header(_exactly(sock, header_length(_exactly(sock, HEADER.size))), most_payload)
  return message, [_exactly(sock, size) for size in message["sizes"]]


def _exactly(sock: socket.socket, size: int) -> bytes:
  data, view = bytearray(size), 0
  while view < size:
    try:
      count = sock.recv_into(memoryview(data)[view:])
    except OSError as error:
      raise WireError(str(error)) from error
    if not count:
      raise WireError("the other side is gone")
    view += count
  return bytes(data)
