"""What several processes of one run need of each other: to wait, to swap small values, to copy large
ones or deal them out, and to end together. With one process each of these is free.

Small values go through JAX's coordinator, on the host. Large ones go over the devices' own network.

Every function here is called by all processes, in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

T = TypeVar("T")
Outcome = tuple[Any, Exception | None]  # a result, or what was raised in its place

# Bytes that are broadcast or dealt out at once: they stand on every device.
_PIECE = 1 << 26
# Seconds that processes wait for each other: a step's rollouts, an evaluation.
_PATIENCE = 24 * 3600
# Seconds between two looks whether another process has failed, and those to end by itself after that.
_EVERY, _GRACE = 2.0, 10.0
_FAILED = "axpo_failed"
_numbers = itertools.count()
_exchanged: list[int] = []  # the last exchange, whose values the coordinator still holds


def is_main() -> bool:
  """Whether this process talks to tools, servers, files and the terminal."""
  return jax.process_index() == 0


def barrier() -> None:
  """Waits for all processes, on the host: devices do not wait, so it may take hours."""
  if jax.process_count() > 1:
    coordinator().wait_at_barrier(f"axpo_{next(_numbers)}", _PATIENCE * 1000)


def attempt(function: Callable[..., T], *args: Any) -> Outcome:
  """The result of function(*args) or what it raised: the others must not wait for it in vain.
  Alone, a process raises at once."""
  if jax.process_count() == 1:
    return function(*args), None
  try:
    return function(*args), None
  except Exception as error:
    return None, error


def on_all(function: Callable[..., T], *args: Any) -> list[T]:
  """function(*args) in every process; all get all results, in the order of the processes.

  For small results: they go through the coordinator.

  Raises:
    Exception: that of the first process in which it failed, in all of them.
  """
  outcome = attempt(function, *args)
  outcomes = _exchange(outcome) if jax.process_count() > 1 else [outcome]
  return [_result(outcome) for outcome in outcomes]


def share(outcome: Outcome | None) -> Any:
  """The main process's result, of any size, or its error, in all of them; the others give None."""
  return _result(_broadcast(outcome) if jax.process_count() > 1 else outcome)


def deal(make: Callable[[], Sequence[bytes]]) -> bytes:
  """Of what `make` returns in the main process, which alone calls it, each process gets the part with its
  number and nothing of the others'. Parts may have any size; the main process keeps its own.

  Over the devices' network, in rounds of a piece for each process.
  """
  parts, error = attempt(make) if is_main() else (None, None)
  sizes = share((parts and [len(part) for part in parts], error) if is_main() else None)
  me, count, out = jax.process_index(), jax.process_count(), bytearray()
  mesh, to_each, width = _dealer(_PIECE) if count > 1 else (None, None, 1)
  for start in range(0, max(sizes[1:], default=0), width):
    pieces = np.zeros((1, count, width), np.uint8)
    for i, part in enumerate(parts or ()):
      piece = part[start:start + width] if i else b""
      pieces[0, i, :len(piece)] = np.frombuffer(piece, np.uint8)
    sent = multihost_utils.host_local_array_to_global_array(pieces, mesh, _SENT)
    got = multihost_utils.global_array_to_host_local_array(to_each(sent), mesh, _GOT)
    if start < sizes[me] and not is_main():
      out += np.asarray(got).data
  return parts[0] if is_main() else bytes(out[:sizes[me]])


# Of bytes [from process, to process, n] and [to process, n]: devices of a process have a share of n each.
_SENT, _GOT = PartitionSpec("process", None, "device"), PartitionSpec("process", "device")


@functools.cache
def _dealer(together: int) -> tuple[Mesh, Callable[[jax.Array], jax.Array], int]:
  """The mesh of all devices by process, the function that sends each process its piece, and the bytes of
  one, which hold `together` bytes on all."""
  count, devices = jax.process_count(), jax.local_device_count()
  mesh = Mesh(np.array([[device for device in jax.devices() if device.process_index == i]
                        for i in range(count)]), ("process", "device"))

  @jax.jit
  @functools.partial(jax.shard_map, mesh=mesh, in_specs=_SENT, out_specs=_GOT, check_vma=False)
  def to_each(x_1xPxN):
    # Point to point: a broadcast or an all-to-all would take the same bytes to all.
    return sum(jax.lax.ppermute(x_1xPxN[:, i], "process", [(0, i)]) for i in range(1, count))

  return mesh, to_each, max(together // (count * devices), 1) * devices


def _result(outcome: Outcome) -> Any:
  result, error = outcome
  if error is not None:
    error.in_all_processes = True
    raise error
  return result


def _broadcast(outcome: Outcome | None) -> Outcome:
  data = memoryview(_pickled(outcome) if is_main() else b"")
  # Devices wait for each other for minutes at most, the host for as long as it takes.
  barrier()
  size = size_of(multihost_utils.broadcast_one_to_all(size_words(len(data))))
  received = bytearray(0 if is_main() else size)
  for start in range(0, size, _PIECE):
    stop = min(start + _PIECE, size)
    piece = (np.frombuffer(data[start:stop], np.uint8) if is_main()
             else np.zeros(stop - start, np.uint8))
    piece = multihost_utils.broadcast_one_to_all(piece)
    if not is_main():
      received[start:stop] = np.asarray(piece).data
  return outcome if is_main() else pickle.loads(received)


def _exchange(outcome: Outcome) -> list[Outcome]:
  """Every process's outcome."""
  client, number, me = coordinator(), next(_numbers), jax.process_index()
  client.key_value_set_bytes(f"axpo_{number}/{me}", _pickled(outcome))
  found = [pickle.loads(client.blocking_key_value_get_bytes(f"axpo_{number}/{i}", _PATIENCE * 1000))
           for i in range(jax.process_count())]
  # Whoever has begun this exchange has read all of the one before.
  if _exchanged:
    client.key_value_delete(f"axpo_{_exchanged.pop()}/{me}")
  _exchanged.append(number)
  return found


def _pickled(outcome: Outcome) -> bytes:
  """An error that cannot be pickled, or cannot be made again from it, travels as its text."""
  result, error = outcome
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    error = RuntimeError(f"{type(error).__name__}: {error}")
  return pickle.dumps((result, error))


def size_words(size: int) -> np.ndarray:
  """A number of bytes as two uint32, high and low: JAX cuts 64-bit integers to 32 without a word."""
  return np.array([size >> 32, size & 0xFFFF_FFFF], np.uint32)


def size_of(words: np.ndarray) -> int:
  """The inverse of `size_words`."""
  high, low = (int(word) for word in np.asarray(words))
  return high << 32 | low


# Ending together ---------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Within it, a process that fails ends the others too, unless they got the same error.

  They would wait in a collective operation, for minutes or for ever.
  """
  if jax.process_count() == 1:
    yield
    return
  ended = threading.Event()
  watch = threading.Thread(target=_watch, args=(coordinator(), ended), name="other-processes", daemon=True)
  watch.start()
  try:
    yield
  except BaseException as error:
    shared = any(getattr(e, "in_all_processes", False) for e in (error, error.__cause__))
    if not shared and not (isinstance(error, SystemExit) and not error.code):
      reason = "".join(traceback.format_exception_only(error)).strip()
      coordinator().key_value_set(_FAILED, f"{jax.process_index()} {reason}", allow_overwrite=True)
    raise
  finally:
    ended.set()
    watch.join()  # a thread within the coordinator's client would make the interpreter's end an abort


def _watch(client: Any, ended: threading.Event) -> None:
  while not ended.wait(_EVERY):
    try:
      number, _, reason = client.key_value_try_get(_FAILED).partition(" ")
    except jax.errors.JaxRuntimeError:  # nobody has failed; or the coordinator has, which jax notices
      continue
    if ended.wait(_GRACE):
      return
    print(f"process {jax.process_index()} ends because process {number} failed: {reason}",
          file=sys.stderr, flush=True)
    os._exit(1)  # nothing less ends a thread that waits in a collective operation


def coordinator() -> Any:
  # jax offers a wait among its devices only, and those give up after a while.
  from jax._src import distributed
  return distributed.global_state.client
