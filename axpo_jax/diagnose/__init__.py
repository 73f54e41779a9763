"""Thinking and acting of any agent, from its logs: `python -m axpo_jax.diagnose TRACES`.

In: files of rollouts in one of many formats (docs/diagnose.md). Out: shares with intervals, over
time, and warnings. Needs numpy (and rich for coloured tables), no JAX and no GPU.
"""
