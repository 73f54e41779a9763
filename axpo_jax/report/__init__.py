"""One HTML page about a run, or several: `python -m axpo_jax.report RUN [RUN ...]`.

In: run folders (metrics.jsonl, dumps of rollouts, evaluation shards). Out: a page that needs nothing
but itself: curves, tables, the census, and every trajectory. See docs/report.md.
"""
