"""The mathematics of GRPO and AXPO: pure functions on plain arrays. `algorithm` is where to begin."""
