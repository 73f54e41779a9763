"""What arXiv 2605.28774 reports, where the miniature has something to set beside it.

Values of its Table 1 (8B, average over nine benchmarks), of its tool-use table and figures of training,
and of its ablation table (8B, mean of four benchmarks), all in per cent.
"""

from __future__ import annotations

# Pass@1, Pass@4 after SFT and GRPO, and what AXPO has instead.
TABLE_1 = {"sft": (58.5, 72.2), "grpo": (60.5, 74.0), "axpo": (62.3, 75.8)}
# Share of rollouts with tools at evaluation.
TOOL_RATE = {"grpo": 69.0, "axpo": 82.9}
# AXPO against GRPO in training: all-wrong rate of the tool subgroup, counted after resampling, in
# points; and the share of all-wrong subgroups that a step recovers.
ALL_WRONG_AFTER, RECOVERED = -17.0, 12.0
# Pass@1, Pass@4 on the four benchmarks of the ablation table.
ABLATIONS = {
  "axpo": (53.9, 70.2),
  "no_prefix_fix": (52.1, 69.1),
  "resample_no_tool": (51.7, 65.9),
  "random_prefix": (51.0, 65.8),
  "no_prefix_credit": (51.4, 67.7),
  "merged_group": (51.2, 67.0),
  "grpo": (51.9, 68.3),
  "grpo_x2": (52.4, 68.2),
  "tool_bonus": (50.8, 65.6),
  "tool_penalty": (46.0, 59.1),
  "cispo": (47.8, 62.2),
}
