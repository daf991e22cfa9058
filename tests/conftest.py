"""Shared by all tests: the trained digits network, made once per process."""

import pytest

from brecq_jax.models import train_digits


@pytest.fixture(scope="session")
def digits():
    """A small trained network with its data."""
    return train_digits()
