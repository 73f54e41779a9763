"""Every test sees eight CPU devices, so that sharded code runs on any machine.

The variables must be set before jax is first imported, which is why they are set here and why this
file imports nothing that imports jax.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
