"""The study: whether caution helps once both sides are tuned, and how much.

``python -m benchmarks.study run`` trains the runs missing from ``docs/results/*.csv``;
``python -m benchmarks.study draw`` writes ``docs/results.md`` and its figures.
"""
