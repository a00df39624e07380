"""What the slots of a KV cache are made of: plain numbers, E4M3, FP8 or NVFP4.

A slot holds one latent frame of one layer: (p, n, d), tokens, heads, head dim. Plain
slots are an array (..., slots, p, n, d), in the dtype of the network or in E4M3, which
is what attention in FP8 multiplies; an `FP8Array` with one scale a slot, or
`NVFP4Slots`, stand in the same place. Every leaf of each begins with the same axes,
layers, batch and slots, so the cache updates, selects and shards them with one
`jax.tree.map`.

  slots = zeros(format, shape, dtype)   empty
  encode(slots, x)      new frames as the slots would store them (clean pass)
  read(slots, dtype)    numbers again
  attended_dtype(...)   in which they meet new frames
  specs(slots, ...)     how they are spread over the devices of a mesh
  own(slots, x)         new frames as they themselves are attended while new

Keys have a large common offset, which spends the few levels of a 4-bit block on what
all tokens share. `token_mean` subtracts from a slot's keys their mean over tokens, one
vector a head, keeps it in 16 bits and adds it back on reading: the numbers are those
of the keys, with a smaller error. `channel_mean` is what the reference does (SPEC 9):
the new chunk's keys are attended less their mean over channels, which changes the
attention, and are stored as they are. (Before rotation where keys are stored unrotated,
that is with relative RoPE, which the reference does not have together with this.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.kernels.nvfp4_dequantise import dequantise
from longlive_jax.kernels.nvfp4_quantise import quantise
from longlive_jax.quant import fp8, nvfp4

Array = jax.Array

NAMES = ("", "e4m3", "fp8", "nvfp4")
SMOOTHINGS = ("token_mean", "channel_mean", "none")


@dataclasses.dataclass(frozen=True)
class KVFormat:
  """How slots store numbers. Static.

  Attributes:
    name: '' for plain numbers in the network's dtype, 'e4m3' for float8_e4m3fn without
      a scale, 'fp8' with one for every slot, or 'nvfp4'; what follows is for the
      latter, and without effect on the others.
    smoothing: of keys: 'token_mean', 'channel_mean' or 'none'.
    rule: of `nvfp4.RULES`.
    chunk_amax: one tensor scale for all frames of a chunk, as in the reference,
      instead of one for each frame. The stored shapes are the same.
  """

  name: str = ""
  smoothing: str = "token_mean"
  rule: str = "mse"
  chunk_amax: bool = False

  def __post_init__(self):
    if self.name not in NAMES:
      raise ValueError(
        f"kv_format={self.name!r} is unknown; use '' (plain), 'e4m3', 'fp8' or 'nvfp4'"
      )
    if self.smoothing not in SMOOTHINGS:
      raise ValueError(
        f"kv_smoothing={self.smoothing!r} is unknown; use {', '.join(SMOOTHINGS)}"
      )
    nvfp4.rule_of(self.rule)


PLAIN = KVFormat()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4Slots:
  """Slots in 4 bits and a half a number.

  Attributes:
    array: codes (..., slots, p, n, d / 2), scales, and an amax for every slot.
    mean: bfloat16 (..., slots, n, d), added on reading; None without it.
    smooth_own: subtract the channel mean from new keys while they are attended.
    format: static.
  """

  array: nvfp4.NVFP4Array
  mean: Array | None
  smooth_own: bool = dataclasses.field(metadata={"static": True})
  format: KVFormat = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape


Slots = Array | fp8.FP8Array | NVFP4Slots


def zeros(
  format: KVFormat, shape: tuple[int, ...], dtype: jnp.dtype, *, keys: bool
) -> Slots:
  """Empty slots of shape (l, b, slots, p, n, d); smoothing is for keys only.

  Raises:
    ValueError: NVFP4 with a head dim that is no multiple of 16.
  """
  if format.name in ("", "e4m3"):
    return jnp.zeros(shape, dtype if not format.name else jnp.float8_e4m3fn)
  if format.name == "fp8":
    scale = jnp.ones((*shape[:3], 1, 1, 1), jnp.float32)
    return fp8.FP8Array(jnp.zeros(shape, jnp.float8_e4m3fn), scale)
  if shape[-1] % nvfp4.BLOCK:
    raise ValueError(
      f"head_dim={shape[-1]} must be a multiple of {nvfp4.BLOCK} for "
      f"kv_format={format.name!r}; use kv_format=''"
    )
  *lead, d = shape
  mean = None
  if keys and format.smoothing == "token_mean":
    mean = jnp.zeros((*lead[:3], lead[4], d), jnp.bfloat16)
  array = nvfp4.NVFP4Array(
    codes=jnp.zeros((*lead, d // 2), jnp.uint8),
    scales=jnp.zeros((*lead, d // nvfp4.BLOCK), jnp.float8_e4m3fn),
    amax=jnp.zeros(lead[:3], jnp.float32),
    span=nvfp4.rule_of(format.rule).span,
  )
  smooth_own = keys and format.smoothing == "channel_mean"
  return NVFP4Slots(array, mean, smooth_own, format)


@functools.singledispatch
def encode(slots: Slots, x: Array, mesh_axes: Sequence[str] = ()) -> Slots:
  """New frames x (b, f, p, n, d) in the type of `slots`.

  Args:
    mesh_axes: inside shard_map, those over which heads are spread.
  """
  return fp8.as_dtype(x, slots.dtype)


@encode.register
def _(
  slots: fp8.FP8Array, x: Array, mesh_axes: Sequence[str] = ()
) -> fp8.FP8Array:
  return fp8.quantise(x, batch_axes=2, mesh_axes=mesh_axes)


@encode.register
def _(slots: NVFP4Slots, x: Array, mesh_axes: Sequence[str] = ()) -> NVFP4Slots:
  settings = {"rule": slots.format.rule, "batch_axes": 2}
  mean = None
  if slots.mean is not None:
    mean = jnp.mean(x.astype(jnp.float32), axis=2).astype(jnp.bfloat16)  # (b, f, n, d)
  rest = x
  if mean is not None:
    rest = x.astype(jnp.float32) - mean[:, :, None].astype(jnp.float32)
  if slots.format.chunk_amax:  # as in the reference, which the kernel does not follow
    amax = nvfp4.largest(rest, 1, mesh_axes)[:, None]
    amax = jnp.broadcast_to(amax, x.shape[:2])
    array = nvfp4.quantise(rest, amax=amax, reference=True, **settings)
  else:
    front = "none" if mean is None else "token_mean"
    amax = nvfp4.largest(rest, 2, mesh_axes) if mesh_axes else None
    array = quantise(x, front=front, mean=mean, amax=amax, **settings)
  return dataclasses.replace(slots, array=array, mean=mean)


@functools.singledispatch
def read(slots: Slots, dtype: jnp.dtype) -> Array:
  """The numbers (..., slots, p, n, d)."""
  return slots.astype(dtype)


@read.register
def _(slots: fp8.FP8Array, dtype: jnp.dtype) -> Array:
  return fp8.dequantise(slots, dtype)


@read.register
def _(slots: NVFP4Slots, dtype: jnp.dtype) -> Array:
  # The kernel: XLA's own fusion made a chunk of the 5B model 7% slower on an H200.
  return dequantise(slots.array, dtype=dtype, mean=slots.mean)


@functools.singledispatch
def attended_dtype(
  slots: Slots, dtype: jnp.dtype, wanted: jnp.dtype
) -> jnp.dtype:
  """In which slots and new frames are put together, to be attended in `wanted`.

  That itself where slots store it, so that they are moved as they are; else `dtype`,
  that of the numbers.
  """
  return wanted if slots.dtype == wanted else dtype


@attended_dtype.register(fp8.FP8Array | NVFP4Slots)
def _(
  slots: fp8.FP8Array | NVFP4Slots, dtype: jnp.dtype, wanted: jnp.dtype
) -> jnp.dtype:
  return dtype


@functools.singledispatch
def specs(slots: Slots, rows: Any, heads: Any) -> Any:
  """PartitionSpecs of slots (l, b, slots, p, n, d), in their own tree.

  Args:
    rows, heads: mesh axes over which the batch and the heads are spread.
  """
  return P(None, rows, None, None, heads)


@specs.register
def _(slots: fp8.FP8Array, rows: Any, heads: Any) -> fp8.FP8Array:
  return fp8.FP8Array(P(None, rows, None, None, heads), P(None, rows))


@specs.register
def _(slots: NVFP4Slots, rows: Any, heads: Any) -> NVFP4Slots:
  each = P(None, rows, None, None, heads)
  array = dataclasses.replace(
    slots.array, codes=each, scales=each, amax=P(None, rows)
  )
  mean = None if slots.mean is None else P(None, rows, None, heads)
  return dataclasses.replace(slots, array=array, mean=mean)


@functools.singledispatch
def own(slots: Slots, x: Array) -> Array:
  """New frames x (b, f, p, n, d) as they are attended before they are stored."""
  return x


@own.register
def _(slots: NVFP4Slots, x: Array) -> Array:
  if not slots.smooth_own:
    return x
  return x - jnp.mean(x, axis=-1, keepdims=True)
