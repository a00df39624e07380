"""Single instructions of an NVIDIA GPU, good to the last bit but one or so.

Triton's own functions also serve numbers below 2**-126, at five more instructions each:
a fifth of a kernel that is bound by them. Here such numbers count as 0.
"""

from __future__ import annotations

from longlive_jax.kernels.launch import jit, tl


@jit
def power_of_two(x):
  """2**x of float32 x."""
  return tl.inline_asm_elementwise(
    "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
  )


@jit
def reciprocal(x):
  """1 / x of float32 x."""
  return tl.inline_asm_elementwise(
    "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
  )
