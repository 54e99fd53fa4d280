"""What every test stands on: 8 simulated CPU devices, exact float32 products, one thread a worker, no network.

The compilation cache is shared by the workers and kept between runs. Entries are compressed and checksummed, so one
that another worker is still writing (or never finished) is compiled again, with a warning; `make clean` empties it.

XLA compiles without LLVM's optimisations, in half the time, which is most of what tiny models take. `XLA_FLAGS= make
test` tests the code as users run it, and must pass too.
"""

from __future__ import annotations

import os
from pathlib import Path

# Read once, when jax and transformers are first imported: hence before any other import, and inherited by subprocesses.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    JAX_DEFAULT_MATMUL_PRECISION="highest",
    JAX_COMPILATION_CACHE_DIR=str(Path(__file__).parent.parent / ".cache" / "jax"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # torch and numpy: one thread a worker, as the workers already fill the cores
)

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from absl import flags

if not flags.FLAGS.is_parsed():  # grain's worker processes read a flag, and pytest parses none
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session", autouse=True)
def _platform() -> None:
    """A plugin that imported jax before this file would silently undo its settings."""
    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8
    assert jax.config.jax_default_matmul_precision == "highest"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The recorded cases of the original programs; ``MGPT4_GOLDEN=DIR`` runs the same tests on another set."""
    return Path(os.environ.get("MGPT4_GOLDEN", Path(__file__).parent / "golden" / "data"))
