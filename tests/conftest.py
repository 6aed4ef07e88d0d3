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


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct with room for 256 tokens, and its vocabulary; skipped where it has not been fetched."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    from anabranch.models import weights
    from anabranch.models.llama import Decoder
    from anabranch.models.tokens import Tokens

    try:
        file = weights.smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return Decoder(weights.load(file), 256), Tokens.of(file)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Forget compiled programs once they have filled some gigabytes; those worth keeping are in the cache on disk."""
    yield
    import gc

    import jax
    import psutil

    if psutil.Process().memory_info().rss > 3e9:
        jax.clear_caches()
        gc.collect()
