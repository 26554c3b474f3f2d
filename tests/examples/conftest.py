"""What any module of the examples' tests may ask for by name."""

import jax
import pytest


@pytest.fixture(scope="module")
def little_optimization():
    """These programs run for less time than it takes to optimize them."""
    from examples.training import engine

    engine._compile.cache_clear()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    engine._compile.cache_clear()
