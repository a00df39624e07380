"""Weights in 4 or 8 bits for inference, and how a network's weights become such.

A weight is a pytree that stands where the array (out, in) stood. Networks do not know:
`layers.linear.matmul` has a rule for every type. Stacked blocks have stacked weights
(l, out, in), every layer with scales of its own, so a scan over layers hands out
single ones.

  mode          type         activations            product
  w4a16         NVFP4Array   as they are            in their dtype, of dequantised or,
                                                    for few rows, of packed weights
  w4a4          W4A4         NVFP4, along `in`      in 4 bits, simulated
  w4a4_native   W4A4         NVFP4, along `in`      in 4 bits, by Blackwell's units
  w8a16         FP8Array     as they are            in their dtype, of dequantised
  fp8           W8A8         FP8, a scale a token   in 8 bits
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from longlive_jax.kernels import launch
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.kernels.nvfp4_matmul import NATIVE, matmul_w4a4, matmul_w4a16
from longlive_jax.kernels.nvfp4_quantise import quantise
from longlive_jax.quant import fp8, nvfp4
from longlive_jax.quant.fp8 import FP8Array
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array
from longlive_jax.quant.product import product, scaled, tensor_factor

Array = jax.Array

FP8_MODES = ("w8a16", "fp8")
MODES = ("w4a16", "w4a4", "w4a4_native", *FP8_MODES)
# Types that are quantised arrays, and what their bytes are reported as.
PACKED = {NVFP4Array: "nvfp4", FP8Array: "float8_e4m3fn"}
# SPEC 9: all linear layers inside blocks. Embeddings, time and head stay.
BLOCK_LINEARS = ("blocks/*_attn/[qkvo]", "blocks/*ffn/fc[12]")


class Matrix(nnx.Param):
  """The weight of a linear layer: the kind of parameter that may be quantised."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class W4A4:
  """A quantised weight whose activations are quantised, too.

  Attributes:
    weight: (..., out, in).
    rule: static, of nvfp4.RULES, for activations.
    per_sample: static. One tensor scale for each index of the first axis of the
      activations, so that no video of a batch changes another. False: one for all, as
      the reference has it.
    native: static. The product may use the FP4 instructions of a Blackwell data-centre
      GPU; the numbers are those of the simulation but for the order of float32 sums.
    mesh_axes: static. Inside shard_map, those over which activations that share a
      tensor scale are spread, see `spread`.
  """

  weight: NVFP4Array
  rule: str = dataclasses.field(metadata={"static": True})
  per_sample: bool = dataclasses.field(default=True, metadata={"static": True})
  native: bool = dataclasses.field(default=False, metadata={"static": True})
  mesh_axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class W8A8:
  """An FP8 weight whose activations are quantised, too, with a scale for every token.

  Attributes:
    weight: (..., out, in), with a scale for every output.
  """

  weight: FP8Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape


QUANTISED = (*PACKED, W4A4, W8A8)  # what stands where a weight stood


def quantise_weights(
  model: Any,
  patterns: Sequence[str] = BLOCK_LINEARS,
  *,
  mode: str = "w4a16",
  rule: str = "mse",
  activation_rule: str = "mse",
  tiles: bool = False,
) -> Any:
  """The network with the weights of some linear layers in NVFP4 or FP8.

  Works on abstract trees, too: `jax.eval_shape(quantise_weights, abstract)`.

  Args:
    model: a network, or any pytree of networks.
    patterns: of layers' paths, such as "blocks/self_attn/q", by fnmatch, where * also
      matches a slash.
    mode: of MODES; see the table above.
    rule, activation_rule: of nvfp4.RULES; without effect in FP8, as tiles.
    tiles: one scale for 16 x 16 weights instead of 1 x 16, as training may have it.

  Raises:
    ValueError: unknown mode or rule; a pattern that matches no linear layer; a layer
      that is quantised or has a LoRA already, or whose inputs are no multiple of 16;
      native arithmetic on a device without it.
  """
  check_mode(mode)
  for name in (rule, activation_rule):
    nvfp4.rule_of(name)

  def convert(path: str, weight: Array) -> NVFP4Array | W4A4 | FP8Array | W8A8:
    if mode in FP8_MODES:
      rows = _quantise_each(fp8.quantise, weight)
      return rows if mode == "w8a16" else W8A8(rows)
    packed = _quantise_each(nvfp4.quantise, weight, rule=rule, tiles=tiles)
    if mode == "w4a16":
      return packed
    return W4A4(packed, activation_rule, native=mode == "w4a4_native")

  return map_matrices(model, patterns, convert)


def check_mode(mode: str) -> None:
  """Raises ValueError for a mode that is unknown or that this machine cannot run."""
  if mode not in MODES:
    raise ValueError(f"mode={mode!r} is unknown; use {', '.join(MODES)}")
  # Asked as the kernel asks: elsewhere the product would quietly be the simulation.
  if mode == "w4a4_native" and launch.compute_capability() not in NATIVE:
    raise ValueError(
      f"mode={mode!r} needs a Blackwell data-centre GPU (B200 or B300, of compute "
      f"capability 10), not {launch.device_kind()}; use 'w4a4' for the same "
      "numbers, or 'w4a16', which is the faster on other devices"
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("rule", "tiles"))
def _quantise_each(
  quantise_one: Callable[..., Any], weight: Array, **settings: Any
) -> NVFP4Array | FP8Array:
  """(..., out, in), each matrix on its own."""
  if weight.ndim == 2:
    return quantise_one(weight, **settings)
  # One after the other: the float32 intermediates of all layers at once are several
  # times the network.
  return lax.map(lambda one: _quantise_each(quantise_one, one, **settings), weight)


def map_matrices(
  model: Any, patterns: Sequence[str], convert: Callable[[str, Array], Any]
) -> Any:
  """Replaces the weights of linear layers whose path fits one of the patterns.

  Args:
    convert: (path, weight (..., out, in)) -> what takes its place.

  Raises:
    ValueError: a pattern that matches nothing, a weight that is no plain array, or one
      whose inputs are no multiple of 16.
  """
  chosen = choose_layers(matrices(model), patterns)

  def visit(path: tuple[Any, ...], node: Any) -> Any:
    name = layer_path(path)
    if not is_matrix(node) or name not in chosen:
      return node
    weight = node.get_value()
    _check_plain(name, weight)
    return node.replace(convert(name, weight))

  return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_matrix)


def matrices(model: Any) -> dict[str, Any]:
  """The weights of linear layers, of any type, by layer: "blocks/self_attn/q"."""
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_matrix)
  return {layer_path(p): node.get_value() for p, node in leaves if is_matrix(node)}


def choose_layers(names: Collection[str], patterns: Sequence[str]) -> set[str]:
  """The layers whose path fits one of the patterns.

  Raises:
    ValueError: no pattern, or one that matches nothing.
  """
  if isinstance(patterns, str):
    raise ValueError(f"patterns={patterns!r} must be a list; use [{patterns!r}]")
  found = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
  unused = [pattern for pattern, fitting in found.items() if not fitting]
  if unused or not found:
    raise ValueError(
      f"patterns={list(patterns)}: {unused or 'an empty list'} matches no linear "
      f"layer; there are {', '.join(sorted(names)) or 'none'}"
    )
  return set().union(*found.values())


def is_matrix(node: Any) -> bool:
  """Whether a node of a tree is the weight of a linear layer."""
  return isinstance(node, Matrix)


def layer_path(path: tuple[Any, ...]) -> str:
  """The layer of a `Matrix`, by the path of that in the tree: "blocks/self_attn/q"."""
  return jax.tree_util.keystr(path[:-1], simple=True, separator="/")


def _check_plain(name: str, weight: Any) -> None:
  if isinstance(weight, QUANTISED):
    raise ValueError(f"{name} is quantised already; start from float weights")
  if not isinstance(weight, Array | np.ndarray):
    raise ValueError(
      f"{name} holds a {type(weight).__name__}, no plain array; merge a LoRA into the "
      "weights before they are quantised"
    )
  if weight.shape[-1] % BLOCK:
    raise ValueError(
      f"{name} has {weight.shape[-1]} inputs, which must be a multiple of {BLOCK}; "
      "choose patterns that leave it out"
    )


def spread(
  model: Any, token_axes: tuple[str, ...], batch_axes: tuple[str, ...] = ()
) -> Any:
  """The network for use inside shard_map; weights are whole on every device.

  Args:
    token_axes: mesh axes over which the tokens of a sample are spread.
    batch_axes: those over which samples are.
  """

  def visit(weight: Any) -> Any:
    if not isinstance(weight, W4A4):
      return weight
    axes = token_axes if weight.per_sample else (*batch_axes, *token_axes)
    return dataclasses.replace(weight, mesh_axes=axes)

  return jax.tree.map(visit, model, is_leaf=lambda node: isinstance(node, W4A4))


def is_packed(node: Any) -> bool:
  """Whether a node of a tree is a quantised array."""
  return isinstance(node, tuple(PACKED))


def weight_bytes(model: Any) -> dict[str, int]:
  """Bytes of a network by precision, largest first: {"nvfp4": ..., "bfloat16": ...}.

  Quantised arrays go by their names in PACKED, scales as part of the numbers they
  belong to. An array that stands in two places counts once (not as its mere shape: the
  tree may be abstract).
  """
  found: dict[str, int] = {}
  leaves = jax.tree.leaves(model, is_leaf=is_packed)
  # By their codes: whoever maps over a tree makes quantised arrays anew around these.
  apart = {id(leaf.codes if is_packed(leaf) else leaf): leaf for leaf in leaves}
  for leaf in apart.values():
    packed = is_packed(leaf)
    name = PACKED[type(leaf)] if packed else leaf.dtype.name
    size = leaf.nbytes if packed else leaf.size * leaf.dtype.itemsize
    found[name] = found.get(name, 0) + size
  return dict(sorted(found.items(), key=lambda item: -item[1]))


@jax.custom_vjp
def quantised_product(x: Array, weight: W4A4) -> Array:
  """`x @ weight.T` of x quantised along its last axis; in the dtype of x.

  The gradient of x takes the rounding of x for the identity; the weight gets none.

  Args:
    x: (..., in).
    weight: (out, in).

  Returns:
    (..., out).
  """
  batch_axes = int(weight.per_sample and x.ndim > 1)
  amax = None
  if weight.mesh_axes:
    amax = nvfp4.largest(x, batch_axes, weight.mesh_axes)
  packed = quantise(x, rule=weight.rule, batch_axes=batch_axes, amax=amax)
  multiply = native_product if weight.native else product
  return multiply(packed, weight.weight).astype(x.dtype)


def native_product(a: NVFP4Array, b: NVFP4Array) -> Array:
  """`product` by the FP4 instructions of a Blackwell GPU; elsewhere as `product`."""
  # The kernel knows one tensor scale: it gets one that is 1, and those of `a` follow.
  unit = dataclasses.replace(a, amax=jnp.float32(a.span))
  return scaled(matmul_w4a4(unit, b, dtype=jnp.float32), tensor_factor(a))


@jax.custom_vjp
def packed_product(x: Array, weight: NVFP4Array) -> Array:
  """`x @ weight.T`, weights unpacked inside the product; the weight gets no gradient.

  Args:
    x: (..., in), few rows.
    weight: (out, in).

  Returns:
    (..., out) in the dtype of x. The tensor scale multiplies the sum: not the bits of
    a product with dequantised weights, but nearer to the exact one.
  """
  return matmul_w4a16(x, weight)


@jax.custom_vjp
def fp8_product(x: Array, weight: FP8Array) -> Array:
  """`x @ weight.T` of x quantised by rows: `fp8.product`, in the dtype of x.

  The gradient of x takes its rounding for the identity; the weight gets none.

  Args:
    x: (..., in).
    weight: (out, in), a scale for every row.

  Returns:
    (..., out).
  """
  return fp8.product(quantise_rows(x), weight)


def _backward(weight: NVFP4Array | FP8Array, gradient: Array) -> tuple[Array, None]:
  codec = fp8 if isinstance(weight, FP8Array) else nvfp4
  return gradient @ codec.dequantise(weight, gradient.dtype), None


quantised_product.defvjp(lambda x, w: (quantised_product(x, w), w.weight), _backward)
packed_product.defvjp(lambda x, w: (packed_product(x, w), w), _backward)
fp8_product.defvjp(lambda x, w: (fp8_product(x, w), w), _backward)
