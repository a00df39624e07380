"""What tools/bench_kernels.py measures of FP8: rows, products, attention."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.kernels import fp8_gelu, fp8_modulate, fp8_residual, fp8_rows
from longlive_jax.kernels.fp8_gelu import gelu_rows
from longlive_jax.kernels.fp8_modulate import modulate_rows
from longlive_jax.kernels.fp8_residual import residual_rows
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.kernels.launch import Launcher
from longlive_jax.kernels.norm_rope import norm_rope, norm_rope_call
from longlive_jax.kernels.rows import Walk
from longlive_jax.kernels.shapes import Sizes
from longlive_jax.layers.fp8_attention import fp8_attention
from longlive_jax.quant import fp8

Array = jax.Array
Case = tuple[dict[str, Any], Callable[..., Any], Callable[[Array], tuple]]


@dataclasses.dataclass(frozen=True)
class RowKernel:
  """A kernel that walks over rows.

  Attributes:
    name, shape, labels: of the case.
    function: the public one. call: the same as a launch.Call, with a walk.
    arguments: key -> what both take.
  """

  name: str
  shape: tuple[int, ...]
  function: Callable[..., Any]
  call: Callable[..., Any]
  arguments: Callable[[Array], tuple]
  labels: dict[str, Any] = dataclasses.field(default_factory=dict)


def row_kernels(sizes: Sizes) -> Iterator[RowKernel]:
  """At the shapes of a chunk."""
  x_shape, (frames, tokens, dim) = sizes.activations, sizes.activations
  rows, wide, eps = frames * tokens, sizes.ffn_dim, 1e-6
  yield RowKernel(
    "fp8_rows", x_shape, quantise_rows, fp8_rows.rows_call,
    lambda key: (numbers(key, x_shape),),
  )  # fmt: skip
  yield RowKernel(
    "fp8_modulate", x_shape,
    functools.partial(modulate_rows, eps=eps),
    lambda *arrays, walk: fp8_modulate.modulate_call(*arrays, eps, walk),
    lambda key: (numbers(key, x_shape), *numbers(key, (2, frames, 1, dim))),
  )  # fmt: skip
  for gated in (True, False):  # behind self-attention, and behind cross-attention

    def residual_arguments(key: Array, gated=gated) -> tuple[Array | None, ...]:
      row, one = (frames, 1, dim), (dim,)
      # A gate and a norm for all, or no gate and a norm for each frame.
      return (
        *numbers(key, (2, *x_shape)), jnp.ones((frames, tokens, 1)), jnp.ones(dim),
        numbers(key, one), numbers(key, row) if gated else None,
        *numbers(key, (2, *(one if gated else row))),
      )  # fmt: skip

    yield RowKernel(
      "fp8_residual", x_shape,
      functools.partial(residual_rows, eps=eps),
      lambda *arrays, walk: fp8_residual.residual_call(arrays, eps, walk),
      residual_arguments,
      {"gated": gated},
    )  # fmt: skip
  yield RowKernel(
    "fp8_gelu", (rows, wide), gelu_rows, fp8_gelu.gelu_call,
    lambda key: (
      numbers(key, (rows, wide)), jnp.ones((rows, 1)), jnp.ones(wide),
      numbers(key, (wide,)),
    ),
  )  # fmt: skip
  for rotated, dtype in (
    (True, jnp.bfloat16), (True, jnp.float8_e4m3fn), (False, jnp.bfloat16)
  ):  # fmt: skip

    def arguments(key: Array, rotated=rotated) -> tuple[Array | None, ...]:
      turns = jax.random.normal(key, (2, rows, sizes.head_dim // 2))
      return (
        numbers(key, (rows, dim)), *numbers(key, (2, dim)),
        *(turns if rotated else (None, None)), jnp.ones((rows, 1)), jnp.ones(dim),
      )  # fmt: skip

    yield RowKernel(
      "norm_rope", (rows, dim),
      functools.partial(norm_rope, eps=eps, dtype=dtype),
      lambda *arrays, walk, dtype=dtype: norm_rope_call(
        arrays, eps, jnp.dtype(dtype), walk
      ),
      arguments,
      {"rotated": rotated, "dtype": jnp.dtype(dtype).name},
    )  # fmt: skip


def sweep(sizes: Sizes, run: Launcher) -> Iterator[Case]:
  """Each kernel that walks over rows, with each of its walks."""
  for kernel in row_kernels(sizes):
    usual = Walk().warps(kernel.shape[-1])
    for warps, rows in itertools.product((usual // 2, usual, 2 * usual), (1, 2, 4)):
      walk = Walk(rows, warps)

      def function(*arrays, call=kernel.call, walk=walk):
        return run(call(*arrays, walk=walk))

      labels = {"kernel": kernel.name, "shape": list(kernel.shape), **kernel.labels}
      labels |= {"implementation": "triton", "walk": dataclasses.asdict(walk)}
      yield labels, function, kernel.arguments


def numbers(key: Array, shape: tuple[int, ...]) -> Array:
  return jax.random.normal(key, shape, jnp.bfloat16)


def cases(sizes: Sizes, implementation: str) -> Iterator[Case]:
  """(labels, function, key -> its arguments)."""
  use = {"implementation": implementation}
  rows = sizes.frames * sizes.tokens

  def case(kernel, shape, function, arguments, **labels) -> Case:
    labels = {"kernel": kernel, "shape": list(shape), **labels, **use}
    return labels, function, arguments

  for kernel in row_kernels(sizes):
    function = functools.partial(kernel.function, **use)
    yield case(kernel.name, kernel.shape, function, kernel.arguments, **kernel.labels)

  def codes(key: Array, shape: tuple[int, ...]) -> fp8.FP8Array:
    return fp8.quantise(numbers(key, shape))

  for layer, shape in sizes.weights.items():
    for dtype in (jnp.bfloat16, jnp.float32):
      for function in (fp8.sums, fp8.product):
        yield case(
          "fp8_matmul", (rows, *shape),
          lambda x, weight, function=function, dtype=dtype: function(x, weight, dtype),
          lambda key, shape=shape: (
            fp8.Rows(codes(key, (rows, shape[1])), jnp.bfloat16), codes(key, shape)
          ),
          layer=layer, sums=jnp.dtype(dtype).name, scaled=function is fp8.product,
        )  # fmt: skip

  attention = "cudnn" if implementation == "triton" else "plain"
  q_shape = (1, rows, sizes.heads, sizes.head_dim)
  kv_shape = (1, sizes.window * sizes.tokens, sizes.heads, sizes.head_dim)
  yield case(
    "fp8_attention", (rows, kv_shape[1], sizes.heads, sizes.head_dim),
    lambda q, k, v: fp8_attention(q, k, v, implementation=attention),
    lambda key: (numbers(key, q_shape), *numbers(key, (2, *kv_shape))),
    attention=attention,
  )  # fmt: skip
