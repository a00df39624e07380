"""nvfp4/*: the codec, blocks of the cache, linear layers forward and backward.

Whole generations with a quantised cache are in generation.py.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.layers.linear import add_bias, matmul
from longlive_jax.quant import layout, nvfp4
from longlive_jax.quant.product import product
from longlive_jax.quant.training import TrainingSettings, TrainingWeight
from longlive_jax.quant.weights import W4A4
from parity_runners.common import Arrays, Case, Result

Array = jax.Array
ROWS, COLUMNS = 128, 64  # the reference pads matrices with zeros to multiples of these


# ---------------------------------------------------------------------- the codec
def matrices(case: Case, tiles: bool) -> Result:
  """Every input under every rule: `<input>.<rule>.<what>`."""
  values = {}
  for name, rule in _prefixes(case.outputs):
    x = jnp.asarray(case.inputs[name])
    values |= _record(f"{name}.{rule}", x, rule, tiles=tiles)
  return _asked(case, values)


def rotated(case: Case) -> Result:
  """Transposed first, then rotated: `<variant>.<rule>.<what>`."""
  x = jnp.asarray(case.inputs["x"])
  rows, columns = x.shape
  values = {"rotated": nvfp4.hadamard(_pad(x))[:rows, :columns]}
  for variant, rule in _prefixes(case.outputs):
    y = x.T if "transpose" in variant else x
    shape = y.shape
    y = nvfp4.hadamard(_pad(y)) if "rht" in variant else y
    values |= _record(f"{variant}.{rule}", y, rule, shape=shape)
  matrix = case.inputs["hadamard_matrix"].astype(np.float32)
  same = bool((matrix == nvfp4.hadamard_matrix()).all())
  return Result(_asked(case, values).values, checks={"Hadamard matrix": same})


def cache_blocks(case: Case) -> Result:
  """Keys and values in blocks of tokens: `<rule>.<k or v>...`."""
  count = case.record["block_tokens"]
  values = {}
  for name in case.inputs:
    rule = name.rpartition(".")[0]
    x = jnp.asarray(case.inputs[name])  # (1, tokens, heads, d)
    parts = []
    for i, start in enumerate(range(0, x.shape[1], count)):
      block = x[0, start : start + count]
      stored = _record(f"{name}.block{i}", block.reshape(-1, x.shape[-1]), rule)
      parts.append(stored[f"{name}.block{i}.dequant"].reshape(block.shape))
      values |= stored
    values[f"{name}_roundtrip"] = np.concatenate(parts)[None]
    values[f"{name}_smoothed"] = x - x.mean(-1, keepdims=True)
  return _asked(case, values)


# ---------------------------------------------------------------------- linear layers
def linear(case: Case) -> Result:
  """W4A4 with one tensor scale for all activations."""
  rule = case.record["rule"]
  weights = case.weights()
  x, weight = jnp.asarray(case.inputs["x"]), jnp.asarray(weights["weight"])
  rows = x.reshape(-1, x.shape[-1])
  quantise = functools.partial(nvfp4.quantise, rule=rule, reference=True)
  packed_rows, packed = (quantise(_pad_columns(m)) for m in (rows, weight))
  y = matmul(_pad_columns(x), W4A4(packed, rule, per_sample=False))
  values = _record("weight", weight, rule) | _record("x", rows, rule)
  values["y_nobias_float32"] = product(packed_rows, packed)
  values["y"] = _plus_bias(y, weights)
  return _asked(case, values)


def training(case: Case) -> Result:
  """Forward and backward, gradients rounded to nearest."""
  settings = TrainingSettings(
    stochastic=False, tiles=case.record.get("weight_scale_2d", False), centre=0
  )
  weights = {name: jnp.asarray(array) for name, array in case.weights().items()}

  def forward(x: Array, weights: dict[str, Array]) -> Array:
    y = matmul(x, TrainingWeight(weights["weight"], jax.random.key(0), settings))
    return _plus_bias(y, weights)

  y, backward = jax.vjp(forward, jnp.asarray(case.inputs["x"]), weights)
  grad_x, grad = backward(jnp.asarray(case.inputs["grad_y"]))
  values = {"y": y, "grad_input": grad_x}
  values |= {f"grad_{name}": array for name, array in grad.items()}
  return _asked(case, values)


# ---------------------------------------------------------------------- parts
def _record(
  name: str,
  x: Array,
  rule: str,
  *,
  tiles: bool = False,
  shape: tuple[int, int] | None = None,
) -> Arrays:
  """What the reference stores of a matrix, with names that begin with `name`.

  Args:
    shape: of the matrix without padding, if `x` has some already.
  """
  rows, columns = shape or x.shape
  array = _quantise(_pad(x), rule, tiles)
  bits = jax.lax.bitcast_convert_type(array.scales, jnp.uint8)
  record = {
    "packed": array.codes,
    "scales": array.scales.astype(jnp.float32),
    "scales_swizzled_bits": layout.swizzle_scales(bits),
    "amax": array.amax.reshape(1),
    "dequant": nvfp4.dequantise(array)[:rows, :columns],
    "dequant_bf16": nvfp4.dequantise(array, jnp.bfloat16)[:rows, :columns],
  }
  return {f"{name}.{what}": np.asarray(found) for what, found in record.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantise(x: Array, rule: str, tiles: bool) -> nvfp4.NVFP4Array:
  return nvfp4.quantise(x, rule=rule, tiles=tiles, reference=True)


def _pad(x: Array) -> Array:
  """Zeros up to multiples of 128 rows and 64 columns."""
  return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, -x.shape[1] % COLUMNS)))


def _pad_columns(x: Array) -> Array:
  """Zeros up to a multiple of 16 on the last axis: they add nothing to a product."""
  short = -x.shape[-1] % nvfp4.BLOCK
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])


def _plus_bias(y: Array, weights: dict[str, Array] | Arrays) -> Array:
  return add_bias(y, weights["bias"]) if "bias" in weights else y


def _prefixes(outputs: Iterable[str]) -> list[tuple[str, str]]:
  """All (name, rule) of outputs `<name>.<rule>.<what>`; names may have dots."""
  split = (output.rsplit(".", 2) for output in outputs)
  return sorted({(parts[0], parts[1]) for parts in split if len(parts) == 3})


def _asked(case: Case, values: dict[str, Array | np.ndarray]) -> Result:
  """Only what the case stores."""
  return Result({n: np.asarray(v) for n, v in values.items() if n in case.outputs})
