"""What tools/bench_kernels.py measures of FP8: operands, products, attention."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.kernels.fp8_gelu import gelu_rows
from longlive_jax.kernels.fp8_modulate import modulate_rows
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.kernels.shapes import Sizes
from longlive_jax.layers.fp8_attention import fp8_attention
from longlive_jax.quant import fp8

Array = jax.Array
Case = tuple[dict[str, Any], Callable[..., Any], Callable[[Array], tuple]]


def cases(sizes: Sizes, implementation: str) -> Iterator[Case]:
  """(labels, function, key -> its arguments)."""
  use = {"implementation": implementation}
  x_shape, (frames, tokens, dim) = sizes.activations, sizes.activations
  rows, wide = frames * tokens, sizes.ffn_dim

  def case(kernel, shape, function, arguments, **labels) -> Case:
    labels = {"kernel": kernel, "shape": list(shape), **labels, **use}
    return labels, function, arguments

  def numbers(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16)

  yield case(
    "fp8_rows", x_shape,
    lambda x: quantise_rows(x, **use),
    lambda key: (numbers(key, x_shape),),
  )  # fmt: skip
  yield case(
    "fp8_modulate", x_shape,
    lambda x, factor, shift: modulate_rows(x, factor, shift, eps=1e-6, **use),
    lambda key: (numbers(key, x_shape), *numbers(key, (2, frames, 1, dim))),
  )  # fmt: skip
  yield case(
    "fp8_gelu", (rows, wide),
    lambda *inputs: gelu_rows(*inputs, **use),
    lambda key: (
      numbers(key, (rows, wide)), jnp.ones((rows, 1)), jnp.ones(wide),
      numbers(key, (wide,)),
    ),
  )  # fmt: skip

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
  kv_shape = (1, sizes.window * tokens, sizes.heads, sizes.head_dim)
  yield case(
    "fp8_attention", (rows, kv_shape[1], sizes.heads, sizes.head_dim),
    lambda q, k, v: fp8_attention(q, k, v, implementation=attention),
    lambda key: (numbers(key, q_shape), *numbers(key, (2, *kv_shape))),
    attention=attention,
  )  # fmt: skip
