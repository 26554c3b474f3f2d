"""The evidence: whether caution helps once both sides are tuned, and how much.

``python -m benchmarks.study run`` trains what is missing in ``docs/results/*.csv``;
``python -m benchmarks.study draw`` makes ``docs/results.md`` and its figures from them.
"""
