"""The processes that model-written code runs in. Nothing here imports jax or the rest of axpo_jax."""
