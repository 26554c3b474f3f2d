"""The evidence: does caution help once both sides are tuned, how much, and where not?

``python -m benchmarks.study run`` trains what is missing in ``docs/results/*.csv``;
``python -m benchmarks.study draw`` makes ``docs/results.md`` and its figures from them.
"""
