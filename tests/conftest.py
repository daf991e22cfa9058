"""Shared by all tests: compiled programs; the trained digits network, made once per process; a process that does not run out of memory maps."""

import gc
import os
import pathlib
import tempfile

import jax
import pytest

from brecq_jax.models import train_digits

# Most of the suite's time is compilation, and many programs have been compiled before by another test, by the other worker or by a
# process that a test started: whoever comes first keeps them for this run, in a folder that the others find by its variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory()
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    jax.config.update("jax_compilation_cache_dir", COMPILED.name)  # jax reads variables when it is imported
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

MAPS, LIMIT = (pathlib.Path("/proc") / name for name in ("self/maps", "sys/vm/max_map_count"))


@pytest.fixture(scope="session")
def digits():
    """A small trained network with its data."""
    return train_digits()


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Every program that XLA compiles for a CPU maps memory, and at Linux's limit the next compilation is a segmentation fault."""
    yield
    if MAPS.exists() and 2 * len(MAPS.read_bytes().splitlines()) > int(LIMIT.read_text()):
        jax.clear_caches()
        gc.collect()
