"""AXPO (arXiv 2605.28774) in JAX: train vision-language models that act."""
