"""Attention in 8 bits: products of E4M3 codes, by cuDNN on Hopper and newer GPUs.

cuDNN takes neither lengths nor a mask here, and one scale for each of its tensors.
These are constants: E4M3 keeps 4 significant bits from 2**-6 to 448, so that a scale
only moves that range.

  q, k, v   scale 1. RMS norm bounds rotated keys by sqrt(2 * 3,072) = 78 times the
            norm's weight; values have no bound, and what is beyond 448 is cut off.
  weights   times 256, of the exponentials, the largest of which is 1.
  output    times 4: up to 112.

What rounds: q, k and v to E4M3; the product of two codes is exact, its sum float32,
and so is the exponential. This is E4M3 where it multiplies values, but not where it
adds up to the divisor. The quotient is E4M3. (So says cuDNN's graph; where it rescales
running sums is its own.)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from longlive_jax.kernels import launch
from longlive_jax.layers.attention import attention
from longlive_jax.quant import fp8

Array = jax.Array

WEIGHT_SCALE = 256.0  # times a weight is its code
OUTPUT_SCALE = 4.0
IMPLEMENTATIONS = ("cudnn", "jnp", "plain", None)


def fp8_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> fp8.Rows | Array:
  """softmax(q k^T / sqrt(d)) v in 8 bits.

  Args:
    q: (b, q, n, d). k, v: (b, k, n, d); all keys are attended. Numbers or, but for
      'plain', float8_e4m3fn, see `operand_dtype`.
    dtype: of the numbers that the output stands for; by default that of q.
    implementation: 'cudnn'; 'jnp', the same numbers anywhere, with all logits in
      memory; 'plain', attention in the dtype of q; None: 'jnp' on CPU, else cuDNN. With
      None, where cuDNN cannot, it is 'plain', and a line in the log says why.

  Returns:
    (b, q, n, d): codes with one scale, in Rows, which the layer behind may multiply as
    they are; 'plain' gives an array.

  Raises:
    ValueError: an unknown implementation.
    NotImplementedError: under differentiation, but for 'plain'.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} is unknown; use 'cudnn', 'jnp' or 'plain'"
    )
  if implementation is None:
    implementation = default_implementation(q.shape[-1])
  if implementation == "plain":
    return attention(q, k, v)
  function = reference if implementation == "jnp" else _cudnn
  function = functools.partial(function, dtype=q.dtype if dtype is None else dtype)
  instead = "use attention_format='' for what is differentiated"
  return launch.without_derivative("fp8_attention", function, instead)(q, k, v)


def by_format(
  name: str, dtype: jnp.dtype | None = None
) -> Callable[..., fp8.Rows | Array]:
  """Attention to whole keys by `attention_format`: '' in the dtype of q, or 'fp8'.

  Args:
    dtype: of the numbers that the output of 'fp8' stands for.

  Raises:
    ValueError: another name.
  """
  formats = {"": attention, "fp8": functools.partial(fp8_attention, dtype=dtype)}
  if name not in formats:
    raise ValueError(f"attention_format={name!r} is unknown; use '' or 'fp8'")
  return formats[name]


def operand_dtype(name: str, dtype: jnp.dtype, head_dim: int) -> jnp.dtype:
  """In which attention by format reads q, k and v, of numbers in `dtype`.

  Whoever makes them in it spares a pass that casts them.
  """
  if name != "fp8" or default_implementation(head_dim) == "plain":
    return dtype
  return jnp.dtype(jnp.float8_e4m3fn)


def default_implementation(head_dim: int) -> str:
  """'jnp' on CPU, 'cudnn' where it can do it, else 'plain', and a line in the log."""
  if jax.default_backend() == "cpu" and not launch.on_triton(None):
    return "jnp"
  if launch.compute_capability() < 90:
    missing = "needs a Hopper or newer NVIDIA GPU"
  elif head_dim % 16 or head_dim > 256:
    missing = f"head_dim={head_dim} is no multiple of 16 up to 256"
  elif _entry() is None:
    missing = f"jax {jax.__version__} has no private cuDNN attention in FP8"
  else:
    return "cudnn"
  logging.log_first_n(
    logging.WARNING, "attention_format='fp8': %s; attention is in 16 bits", 1, missing
  )
  return "plain"


def reference(q: Array, k: Array, v: Array, dtype: jnp.dtype) -> fp8.Rows:
  """`fp8_attention` in jnp: what is computed from what."""
  codes_q, codes_k, codes_v = (fp8.cast(x).astype(jnp.float32) for x in (q, k, v))
  logits = jnp.einsum("bqnd,bknd->bnqk", codes_q, codes_k) * q.shape[-1] ** -0.5
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  divisor = jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)[..., None]  # (b, q, n, 1)
  codes = fp8.cast(weights * WEIGHT_SCALE).astype(jnp.float32)
  total = jnp.einsum("bnqk,bknd->bqnd", codes, codes_v) / WEIGHT_SCALE
  return _rows(fp8.cast(total / divisor * OUTPUT_SCALE), dtype)


def _cudnn(q: Array, k: Array, v: Array, dtype: jnp.dtype) -> fp8.Rows:
  def scalar(value: float) -> Array:
    return jnp.full((1, 1, 1, 1), value, jnp.float32)

  # It wants all parameters, also those of a backward pass that there is none of.
  scales = {name: scalar(1) for name in _names()}
  scales |= {
    "scale_s": scalar(WEIGHT_SCALE),
    "descale_s": scalar(1 / WEIGHT_SCALE),
    "scale_o": scalar(OUTPUT_SCALE),
    "descale_o": scalar(1 / OUTPUT_SCALE),
  }
  codes, *_ = _entry()(
    *(fp8.cast(x) for x in (q, k, v)),
    fp8_params=scales,
    scale=q.shape[-1] ** -0.5,
    qkv_layout="BTNH",
    use_fp8=True,
  )
  return _rows(codes, dtype)


def _rows(codes: Array, dtype: jnp.dtype) -> fp8.Rows:
  """(b, q, n, d) with the one scale, as rows have it."""
  scale = jnp.full((*codes.shape[:-1], 1), 1 / OUTPUT_SCALE, jnp.float32)
  return fp8.Rows(fp8.FP8Array(codes, scale), dtype)


# ------------------------------------------------------------------ JAX's private part


def _private() -> Any:
  try:
    from jax._src.cudnn import fused_attention_stablehlo
  except ImportError:
    return None
  return fused_attention_stablehlo


def _names() -> list[str]:
  return list(_private().FP8Params.__annotations__)


def _entry() -> Callable[..., Any] | None:
  """JAX's function that calls cuDNN in FP8, which is private; None if it is gone."""
  entry = getattr(_private(), "dot_product_attention", None)
  if entry is None or not hasattr(_private(), "FP8Params"):
    return None
  wanted = {"fp8_params", "scale", "qkv_layout", "use_fp8"}
  return entry if wanted <= set(inspect.signature(entry).parameters) else None
