"""How kernels are run and compiled in tests."""

import functools

import jax
import numpy as np
import pytest
from triton_interpreter import DTYPES

from longlive_jax.kernels import launch

CPU = jax.devices("cpu")[0]
on_gpu = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not on_gpu, reason="no GPU")


@functools.cache
def jitted(function, static):
  return jax.jit(functools.partial(function, **dict(static)))


def compiled(function, *args, **settings):
  """function(*args, **settings), jitted; settings that are no arrays are static."""
  arrays = {k: v for k, v in settings.items() if isinstance(v, jax.Array)}
  static = tuple((k, v) for k, v in settings.items() if k not in arrays)
  return jitted(function, static)(*args, **arrays)


def expected(function, *args, **settings):
  """On the CPU, whatever the default: its divisions are known to round correctly."""
  args, settings = jax.tree.map(
    lambda x: jax.device_put(x, CPU) if isinstance(x, jax.Array) else x,
    (args, settings),
  )
  return jax.tree.map(np.asarray, compiled(function, *args, **settings))


def compile_offline(call: launch.Call, capability: int):
  """Triton's compilation for a GPU that need not be there, with ptxas at the end."""
  triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource

  pointers = {
    name: "*" + DTYPES[array.dtype.name]
    for name, array in zip(
      call.kernel.arg_names, (*call.inputs, *call.outputs), strict=False
    )
  }
  source = ASTSource(
    call.kernel,
    {**pointers, **dict.fromkeys(call.constants, "constexpr")},
    dict(call.constants),
    {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
  )
  options = {
    "num_warps": call.num_warps,
    "num_stages": call.num_stages,
    "enable_fp_fusion": False,
  }
  target = GPUTarget("cuda", capability, 32)
  return triton.compile(source, target=target, options=options)
