"""What all tests share: one compilation cache, so that nothing is compiled twice on one machine."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.fixture(scope="session")
def data():
    """The folder of real data sets; tests that need it are skipped without."""
    from anabranch.data import root

    try:
        return root()
    except FileNotFoundError as error:
        pytest.skip(str(error))
