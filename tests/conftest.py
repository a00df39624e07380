"""Settings of all tests."""

from collections.abc import Iterator

import jax
import pytest

# Tests compare numbers: a GPU would multiply float32 in TF32, with 10 bits.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
  """Frees what a file compiled: all tests together compile enough programs to use up
  the 65,530 memory maps that Linux gives a process, and XLA then crashes."""
  yield
  jax.clear_caches()
