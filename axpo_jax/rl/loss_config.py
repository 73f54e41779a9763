"""The values of the loss. They need no JAX, so a config is checked before JAX is loaded."""

import dataclasses
import math

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
VARIANTS = ("grpo", "gspo", "gmpo", "cispo", "sapo", "dppo")
TIS_RULES = ("cap", "mask")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The loss. Hashable, so it can be a static argument of a jitted step.

  Attributes:
    variant: the surrogate, see `surrogates`: "grpo" (paper), "gspo", "gmpo", "cispo", "sapo" or "dppo".
    clip_low: epsilon_low (paper: 0.2); ratios below 1 - clip_low are clipped. In the unit of the surrogate: of
      "gmpo" a log-ratio, of "dppo" a probability; "cispo" and "sapo" have bounds of their own.
    clip_high: epsilon_high (paper: 0.4), likewise.
    kl_coef: beta of the KL to the reference (paper: 1e-3); 0 leaves it out.
    kl_cap: ours; the most that k3 of a token may be, in nats. A token beyond it has no gradient of
      the KL (the rule of verl and slime).
    dual_clip: ours; lower bound `dual_clip * A` for A < 0 (arXiv 1912.09729); None: off. Without it a
      bad token whose ratio has grown large has an unbounded gradient. No effect where the ratio is one.
    entropy_coef: ours; bonus per nat of policy entropy, 0 off.
    cispo_min_ratio: lower bound of CISPO's weight; 0 is none, as there.
    cispo_max_ratio: upper bound of CISPO's weight (5, as in arXiv 2510.13786).
    sapo_tau_positive: SAPO's temperature for A > 0; larger closes the gate faster.
    sapo_tau_negative: the same for A <= 0, a little larger there.
    tis_cap: ours; cap of the token importance weight exp(old_logp - behaviour_logp) between trainer
      and sampler; None trusts the sampler and leaves the weight out.
    tis_rule: what becomes of a weight beyond the cap: "cap" cuts it to the cap (truncated importance sampling),
      "mask" makes it 0, and one below `tis_floor` too (IcePop, arXiv 2510.18855).
    tis_floor: lower bound of "mask"; "cap" has none.
    tis_mask: ours; a sequence whose geometric mean of those ratios is above this, or below one over
      it, leaves the update: its policy loss, its KL and its part of the divisor (`weights.drifted`).
      Must be above 1 (2 is lenient); None: off.
    aggregation: ours; "token_mean" over every unmasked token of the step; "sequence_mean": the mean
      over sequences of their token means; "sequence_sum": the mean over sequences of their token
      sums, each divided by `sum_length`.
    sum_length: tokens that a sequence's sum is divided by: 1, or Dr.GRPO's constant length; in a config, 0
      takes the response limit of the run's episodes.
    balance_coef: of the load-balancing loss of a mixture of experts (arXiv 2101.03961), 0 off.
    resampled_weight: ours; None puts resampled tokens into one mean with all others; a number is
      lambda of the paper's sum, see `weights`.
  """

  variant: str = "grpo"
  clip_low: float = 0.2
  clip_high: float = 0.4
  kl_coef: float = 1e-3
  kl_cap: float = 10.0
  dual_clip: float | None = 3.0
  entropy_coef: float = 0.0
  cispo_min_ratio: float = 0.0
  cispo_max_ratio: float = 5.0
  sapo_tau_positive: float = 1.0
  sapo_tau_negative: float = 1.05
  tis_cap: float | None = 2.0
  tis_rule: str = "cap"
  tis_floor: float = 0.0
  tis_mask: float | None = None
  aggregation: str = "token_mean"
  sum_length: float = 1.0
  balance_coef: float = 0.0
  resampled_weight: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"loss.{field.name}={value}; it must be finite.")
    if self.variant not in VARIANTS:
      raise ValueError(f"loss.variant={self.variant!r}; choose one of {VARIANTS}.")
    if self.aggregation not in AGGREGATIONS:
      raise ValueError(f"loss.aggregation={self.aggregation!r}; choose one of {AGGREGATIONS}.")
    if self.tis_rule not in TIS_RULES:
      raise ValueError(f"loss.tis_rule={self.tis_rule!r}; choose one of {TIS_RULES}.")
    if self.tis_rule == "mask" and not 0 <= self.tis_floor < (self.tis_cap or 0):
      raise ValueError(f"loss.tis_rule='mask' needs 0 <= loss.tis_floor={self.tis_floor} < loss.tis_cap="
                       f"{self.tis_cap}.")
    if min(self.sapo_tau_positive, self.sapo_tau_negative) <= 0:
      raise ValueError(f"loss.sapo_tau_positive={self.sapo_tau_positive}, loss.sapo_tau_negative="
                       f"{self.sapo_tau_negative}; they must be > 0.")
    if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
      raise ValueError(
        f"loss.clip_low={self.clip_low}, loss.clip_high={self.clip_high}; need 0 <= low <= 1, "
        "high >= 0."
      )
    if self.kl_coef < 0 or self.kl_cap <= 0:
      raise ValueError(
        f"loss.kl_coef={self.kl_coef} must be >= 0 and loss.kl_cap={self.kl_cap} > 0."
      )
    if self.balance_coef < 0:
      raise ValueError(f"loss.balance_coef={self.balance_coef}; it must be >= 0.")
    if self.sum_length <= 0:
      raise ValueError(f"loss.sum_length={self.sum_length}; it must be > 0 tokens.")
    if self.resampled_weight is not None and self.resampled_weight < 0:
      raise ValueError(
        f"loss.resampled_weight={self.resampled_weight}; it must be >= 0, or None for one mean."
      )
    if self.dual_clip is not None and self.dual_clip <= 1:
      raise ValueError(f"loss.dual_clip={self.dual_clip}; it must be > 1, or None for off.")
    if self.tis_cap is not None and self.tis_cap <= 0:
      raise ValueError(f"loss.tis_cap={self.tis_cap}; it must be > 0, or None for off.")
    if self.tis_mask is not None and self.tis_mask <= 1:
      raise ValueError(f"loss.tis_mask={self.tis_mask}; it must be > 1, or None for off.")
    if not 0 <= self.cispo_min_ratio <= self.cispo_max_ratio:
      raise ValueError(
        f"loss.cispo_min_ratio={self.cispo_min_ratio}, loss.cispo_max_ratio="
        f"{self.cispo_max_ratio}; need 0 <= min <= max."
      )
