"""The sidecar: SGLang servers beside the trainer, in processes and an environment of their own."""

from axpo_jax.engine.sglang.server.sidecar import ServerStatus, Sidecar
from axpo_jax.engine.sglang.server.spec import SidecarError, SidecarSpec

__all__ = ["ServerStatus", "Sidecar", "SidecarError", "SidecarSpec"]
