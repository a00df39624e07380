"""Settings of all tests."""

import gc
from collections.abc import Iterator

import jax
import pytest

# Tests compare numbers: a GPU would multiply float32 in TF32, with 10 bits.
jax.config.update("jax_default_matmul_precision", "highest")

# After every 700 new objects Python looks for garbage, now and then among all that it
# has. Tracing makes millions of them that stay: looking took a fifth of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
  """Frees what a file compiled: all tests together compile enough programs to use up
  the 65,530 memory maps that Linux gives a process, and XLA then crashes."""
  yield
  jax.clear_caches()
  gc.collect()  # those in cycles, too


@pytest.fixture(scope="module")
def quick_compiling() -> Iterator[None]:
  """For files that ask how parts work together: they spend their time in XLA.

  Without LLVM's optimisations it compiles in 0.6 of the time. Files that compare the
  last bits of number formats keep them: they fuse products and sums, which rounds once
  where source code rounds twice.
  """
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
