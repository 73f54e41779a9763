"""The environment of the runs that tests start: as many devices as asked for, and no torch.

Users need no torch, and transformers takes seconds to import it where there is one.
"""

import os
import pathlib

from tests import xla

_WITHOUT_TORCH = str(pathlib.Path(__file__).parent / "without_torch")


def environment(devices: int, *flags: str) -> dict[str, str]:
  """For `subprocess`; `flags` are further XLA_FLAGS."""
  path = os.pathsep.join(filter(None, (_WITHOUT_TORCH, os.environ.get("PYTHONPATH"))))
  return {**os.environ, "XLA_FLAGS": " ".join((xla.flags(devices), *flags)), "PYTHONPATH": path}
