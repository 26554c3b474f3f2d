"""Eight simulated devices, a compilation cache, Ctrl-C, a profile for Hypothesis."""

import os
import signal
from pathlib import Path

# A shell's background jobs ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# JAX reads these on import; subprocesses of the tests inherit them.
_CACHE = Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Small programs compile faster if they are not split for several threads.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_parallel_codegen_split_count=1"
)

import hypothesis  # noqa: E402

# No deadline: compilation makes the first example of each test slow.
hypothesis.settings.register_profile("jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jax")
