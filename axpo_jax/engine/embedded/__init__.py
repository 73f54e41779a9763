"""The engine in the trainer's process: JAX programs over a pool of cached prefixes."""
