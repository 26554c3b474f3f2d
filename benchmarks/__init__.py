"""Benchmarks of what caution costs, in memory traffic, memory and time.

The commands are ``python -m benchmarks.tpu``, ``cpu``, ``growth``, ``tracing``,
``peers``, ``training_step`` and ``llama``. ``docs/performance.md`` reports the results.
"""
