"""Settings of all tests."""

import jax

# Tests compare numbers: a GPU would multiply float32 in TF32, with 10 bits.
jax.config.update("jax_default_matmul_precision", "highest")
