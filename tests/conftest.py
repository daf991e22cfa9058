"""Shared by all tests: the trained digits network, made once per process; a process that does not run out of memory maps."""

import gc
import pathlib

import jax
import pytest

from brecq_jax.models import train_digits

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
