"""What processes need of each other. More of it, with two of them: engine/test_weight_push.py and
stages/test_processes.py."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from axpo_jax import processes
from axpo_jax.engine.sglang.server.spec import free_port
from tests import children


@pytest.mark.parametrize("size", [0, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 3 * 2**40 + 7])
def test_sizes_have_64_bits(size):
  """JAX keeps 32 bits of what NumPy gives it in 64."""
  on_device = jax.device_put(processes.size_words(size))
  assert processes.size_of(on_device) == size
  if size >= 2**32:
    assert int(jax.device_put(np.uint64(size))) != size


def test_alone_nothing_is_shared():
  assert processes.on_all(lambda: 3) == [3]
  assert processes.share(processes.attempt(int, "4")) == 4
  with pytest.raises(ValueError, match="invalid literal"):
    processes.on_all(int, "x")
  processes.barrier()
  with pytest.raises(KeyError), processes.ending_together():
    raise KeyError("x")


class Picky(Exception):
  """Cannot be made again from its arguments, as some libraries' errors."""

  def __init__(self, code, reason):
    super().__init__(f"{code}: {reason}")


def test_errors_that_cannot_travel_go_as_text():
  for error, text in ((Picky(4, "full"), "Picky: 4: full"), (OSError(lambda: 0), "OSError: <function")):
    result, found = processes.pickle.loads(processes._pickled((None, error)))
    assert result is None and isinstance(found, RuntimeError) and str(found).startswith(text)
  found = processes.pickle.loads(processes._pickled((None, OSError(28, "disk full"))))[1]
  assert isinstance(found, OSError) and found.errno == 28


# The main process waits for one that fails without a word.
ALONE = """
import sys
import jax
port, rank, repo = sys.argv[1:]
sys.path.insert(0, repo)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank), shutdown_timeout_seconds=20)
from axpo_jax import processes
processes._EVERY, processes._GRACE = 0.2, 0.5
with processes.ending_together():
  if rank == "1":
    raise MemoryError("no room")
  processes.barrier()
"""


def test_who_fails_alone_ends_the_others():
  port = str(free_port("127.0.0.1"))
  pair = [subprocess.Popen([sys.executable, "-c", ALONE, port, str(rank), str(children.REPO)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=children.environment(1)) for rank in range(2)]
  (main, _), (other, _) = [process.communicate(timeout=120) for process in pair]
  assert "MemoryError: no room" in other and pair[1].returncode
  assert "process 0 ends because process 1 failed: MemoryError: no room" in main
  assert pair[0].returncode == 1
