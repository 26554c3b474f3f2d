"""Fixtures shared by the tests of the examples, which need no network."""

import os

# Otherwise, the datasets library sends the Hub a request when it reads a local file.
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"

import jax
import pytest


@pytest.fixture(scope="module")
def little_optimization():
    """Disable most optimizations, as they take longer than running these programs."""
    from examples.training import engine

    engine._compile.cache_clear()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    engine._compile.cache_clear()
