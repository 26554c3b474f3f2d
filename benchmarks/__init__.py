"""What caution costs: by the TPU's compiler, on the CPU's clock, and beside others.

Each module is a program: ``python -m benchmarks.tpu``, ``cpu``, ``growth``, ``peers``,
``training_step`` and ``llama``. ``docs/performance.md`` says what they print.
"""
