"""The values of the optimizer. They need no JAX, so a config is checked before JAX is loaded."""

import dataclasses

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer, its schedule and what it trains.

  Attributes:
    name: "adamw", or "muon" (optax.contrib.muon), for learning from scratch: orthogonalised momentum for
      the kernels of linear layers, scaled to AdamW's usual step so that learning rates carry over, and
      Adam with Nesterov momentum for the rest.
    learning_rate: the peak.
    schedule: "constant", or "cosine" to zero at `total_steps`.
    warmup: share of `total_steps` with a linearly rising rate. The first step already moves: step
      s of w warm-up steps has (s + 1) / w of the peak.
    total_steps: optimizer steps of the whole run.
    weight_decay: decoupled; on the kernels of linear layers only, not on norms, biases, position
      and token embeddings or the output head (tied to the embedding in the small sizes).
    b1, b2, eps: Adam's.
    clip_norm: largest global gradient norm; 0 = off.
    mu_dtype: of the first moment. The second is always float32.
    freeze_vision: the vision tower and its mergers get no gradient and no optimizer state.
    adapters: nothing but low-rank adapters gets gradients and optimizer state.
  """

  learning_rate: float
  total_steps: int
  name: str = "adamw"
  schedule: str = "constant"
  warmup: float = 0.0
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip_norm: float = 1.0
  mu_dtype: str = "float32"
  freeze_vision: bool = False
  adapters: bool = False

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(f"optimizer.schedule={self.schedule!r}; choose one of {SCHEDULES}")
    if self.name not in OPTIMIZERS:
      raise ValueError(f"optimizer.name={self.name!r}; choose one of {OPTIMIZERS}")
    if not 0 <= self.warmup <= 1:
      raise ValueError(f"optimizer.warmup={self.warmup} is a share of all steps: 0 to 1")
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
      raise ValueError(f"optimizer.b1={self.b1} and optimizer.b2={self.b2} must be in [0, 1), and eps={self.eps} "
                       "above 0")
    if self.total_steps < 1:
      raise ValueError(f"total_steps={self.total_steps} must be at least 1")
