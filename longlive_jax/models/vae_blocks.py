"""Layers of the causal video VAE (SPEC 10): everything takes (b, t, y, x, c).

A clip may arrive in any number of pieces. What a causal convolution needs from
earlier pieces is its `history`: the last frames of its own input, zeros at first.
Every layer maps `(x, history, ...) -> (y, history)` and `zero_history` gives the
start, so that shapes and structure never change. Where devices share a picture, `band`
says what each of them has (vae_bands.py); without it a layer has all.

The first latent frame of a clip stands for one video frame, every later one for
several. To keep shapes equal it is padded in FRONT with placeholder frames. They are
set to zero wherever time is mixed, which is what a causal convolution sees before a
clip anyway; the rest of the network treats them like any frame, and the last one
that leaves the decoder is dropped by the caller. `keep_mask` says which frames are
real.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from longlive_jax.models.vae_bands import WHOLE, Band

MOST_BYTES = 2**29  # what frames may take that are convolved together


class Conv(nnx.Module):
  """Weight (out, ky, kx, kt, in), or (out, ky, kx, in) without time; bias (out,).

  That is how convolutions read it, once (kt, in) are one axis. Any other order would
  be transposed in front of a loop over frames, into copies that live as long as it:
  1.1 GB in the decoder of full size. With time it may be of another type than an array,
  which then has the rules below (vae_fp8.py).
  """

  def __init__(
    self,
    c_in: int,
    c_out: int,
    kernel: tuple[int, ...],
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    bound = 1 / math.sqrt(c_in * math.prod(kernel))
    *time, ky, kx = kernel
    shape = (c_out, ky, kx, *time, c_in)
    weight = jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)
    self.weight = nnx.Param(weight)
    self.bias = nnx.Param(jnp.zeros((c_out,), dtype))

  def zero_history(self, batch: int, y: int, x: int, frames: int = 2) -> jax.Array:
    """The input frames before the clip: zeros (b, frames, y, x, in)."""
    c_in = self.weight.shape[-1]
    return jnp.zeros((batch, frames, y, x, c_in), self.weight.dtype)


def keep_mask(started: jax.Array, placeholders: int, frames: int) -> jax.Array:
  """True where a frame is real.

  Args:
    started: (b,) bool; False for a sample whose clip begins with this call.
    placeholders: how many leading frames are not real at the clip start.
    frames: length of the call at this depth of the network.

  Returns:
    (b, frames, 1, 1, 1) bool.
  """
  real = started[:, None] | (jnp.arange(frames) >= placeholders)
  return real[:, :, None, None, None]


def _conv2d(x: jax.Array, weight: jax.Array, stride: int, padding) -> jax.Array:
  return lax.conv_general_dilated(
    x, weight, (stride, stride), padding, dimension_numbers=("NHWC", "OHWI", "NHWC")
  )


@functools.singledispatch
def read_by(weight: Any, x: jax.Array) -> jax.Array:
  """Input x as a causal convolution with this weight keeps and reads it."""
  return x


@functools.singledispatch
def convolved(
  weight: Any, x: jax.Array, sides: tuple[int, int], stride: int, dtype: jnp.dtype
) -> jax.Array:
  """Convolution in time, without padding, and in space, padded with zeros.

  Args:
    weight: (o, ky, kx, kt, i).
    x: (b, n, y, x, i), as `read_by` gives them.
    sides: rows and columns of zeros on each side; half a kernel keeps y and x.
    stride: step in time.
    dtype: of what comes out.

  Returns:
    (b, (n - kt) // stride + 1, y + 2 sides[0] - ky + 1, x + 2 sides[1] - kx + 1, o).
  """
  o, ky, kx, kt, i = weight.shape
  kernel = weight.reshape(o, ky, kx, kt * i)
  return side_by_side(x, kt, stride, lambda frames: convolve(frames, kernel, sides))


def side_by_side(
  x: jax.Array, kt: int, stride: int, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """As one 2-D convolution over the frames of the time kernel side by side in the
  channels: 3-D convolution is 1.2 times slower on an H200 and 3 to 6 times slower in
  XLA on a CPU.

  Args:
    x: (b, n, y, x, i).
    function: (m, y, x, kt i) -> (m, ..., o).
  """
  b, total = x.shape[:2]
  t = (total - kt) // stride + 1
  count = frames_at_a_time(t, kt * (x.nbytes // total))
  parts = []
  for first in range(0, stride * t, stride * count):
    last = first + stride * (count - 1) + 1
    taps = [x[:, first + k : last + k : stride] for k in range(kt)]
    stacked = jnp.concatenate(taps, axis=-1)  # (b, count, y, x, kt i)
    y = function(stacked.reshape(b * count, *stacked.shape[2:]))
    parts.append(y.reshape(b, count, *y.shape[1:]))
  return jnp.concatenate(parts, axis=1)


def convolve(x: jax.Array, kernel: jax.Array, sides: tuple[int, int]) -> jax.Array:
  """(n, y, x, i) with `sides` of zeros, and kernel (o, ky, kx, i) -> (n, ..., o)."""
  return _conv2d(x, kernel, 1, [(side, side) for side in sides])


def causal_conv(
  conv: Conv,
  x: jax.Array,
  history: jax.Array,
  keep: jax.Array,
  stride: int = 1,
  band: Band = WHOLE,
) -> tuple[jax.Array, jax.Array]:
  """Convolution that looks back in time only, with zero padding in space.

  Args:
    conv: weight (o, k, k, kt, i), k odd.
    x: (b, t, y, x, i).
    history: (b, h, y, x, i), the input frames before x, as `read_by` gives them.
    keep: (b, t, 1, 1, 1) bool; other frames of x are replaced by zeros.
    stride: step in time.
    band: what this device has of the picture.

  Returns:
    y: (b, (h + t - kt) // stride + 1, y, x, o).
    history: the last h input frames.
  """
  weight = conv.weight.get_value()
  x = read_by(weight, jnp.where(keep, x, jnp.zeros((), x.dtype)))
  x = jnp.concatenate([history.astype(x.dtype), x], axis=1)
  _, ky, kx, _, _ = weight.shape
  wide, sides = band.with_halo(x, (ky // 2, kx // 2))
  y = convolved(weight, wide, sides, stride, conv.bias.dtype) + conv.bias[...]
  return y, x[:, x.shape[1] - history.shape[1] :]


def frames_at_a_time(frames: int, size: int) -> int:
  """How many of `frames`, a divisor, to convolve together if one needs `size` bytes.

  All where memory is no question. But the four frames that a 704 x 1280 latent frame
  becomes, each with its two predecessors, are 2.8 GB in the last stage of the decoder.
  One at a time they are convolved as fast (H200).
  """
  most = max(MOST_BYTES, size)
  return next(n for n in range(frames, 0, -1) if frames % n == 0 and n * size <= most)


def pointwise(conv: Conv, x: jax.Array) -> jax.Array:
  """1x1(x1) convolution of x (..., i) with weight (o, 1, ..., i)."""
  weight = conv.weight[...]
  weight = weight.reshape(weight.shape[0], -1)
  y = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=x.dtype)
  return y + conv.bias[...]


def downsample(conv: Conv, x: jax.Array) -> jax.Array:
  """3x3 convolution with stride 2, padded right and bottom: half the rows, columns."""
  b, t = x.shape[:2]
  frames = x.reshape(b * t, *x.shape[2:])
  y = _conv2d(frames, conv.weight[...], 2, ((0, 1), (0, 1)))
  return y.reshape(b, t, *y.shape[1:]) + conv.bias[...]


def upsample(conv: Conv, x: jax.Array, band: Band = WHOLE) -> jax.Array:
  """Nearest 2x in rows and columns, then a 3x3 convolution, in 4/9 of the work.

  Two of three neighbouring taps of the 3x3 kernel see the same low-resolution pixel.
  Output row 2r sees source rows (r-1, r, r), output row 2r+1 sees (r, r, r+1), so
  each of the four output phases is a 2x2 kernel of summed weights. The four run as
  one convolution with 4 times the outputs.
  """
  weight = conv.weight[...]
  o, i = weight.shape[0], weight.shape[-1]
  # Columns, then rows; summed in float32 and rounded once: (2, 2, o, 2, 2, i).
  kernel = _both_phases(_both_phases(weight.astype(jnp.float32))).astype(weight.dtype)
  b, t, rows, columns = x.shape[:4]
  x, sides = band.with_halo(x, (1, 1))
  frames = x.reshape(b * t, *x.shape[2:])
  y = convolve(frames, kernel.reshape(4 * o, 2, 2, i), sides)
  y = y.reshape(b * t, rows + 1, columns + 1, 2, 2, o)
  phases = [
    [y[:, p : p + rows, q : q + columns, p, q] for q in range(2)] for p in range(2)
  ]
  y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
  return y.reshape(b, t, 2 * rows, 2 * columns, o) + conv.bias[...]


def _both_phases(weight: jax.Array) -> jax.Array:
  """Axis 2 of three taps -> (2, ...) with two taps for each output phase."""
  a, b, c = jnp.split(weight, 3, axis=2)
  even = jnp.concatenate([a, b + c], axis=2)
  return jnp.stack([even, jnp.concatenate([a + b, c], axis=2)])


def average_down(
  x: jax.Array, c_out: int, time_factor: int, space_factor: int
) -> jax.Array:
  """Shortcut of a down stage: folds time and space into channels, then averages.

  Folded order is channel (slowest), time, row, column; an output channel is the mean
  of a run of consecutive folded entries. t must be a multiple of time_factor.
  """
  b, t, rows, columns, c = x.shape
  ft, fs = time_factor, space_factor
  x = x.reshape(b, t // ft, ft, rows // fs, fs, columns // fs, fs, c)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # (b, t, y, x, c, ft, fs, fs)
  return jnp.mean(x.reshape(*x.shape[:4], c_out, -1), axis=-1)


def repeat_up(
  x: jax.Array, c_out: int, time_factor: int, space_factor: int
) -> jax.Array:
  """Shortcut of an up stage: repeats channels, then unfolds them to time and space.

  A channel is repeated consecutively; the repeated channels are read as
  (channel, time, row, column).
  """
  b, t, rows, columns, c = x.shape
  ft, fs = time_factor, space_factor
  x = jnp.repeat(x, c_out * ft * fs * fs // c, axis=-1)
  x = x.reshape(b, t, rows, columns, c_out, ft, fs, fs)
  x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # (b, t, ft, y, fs, x, fs, c)
  return x.reshape(b, t * ft, rows * fs, columns * fs, c_out)


class ChannelNorm(nnx.Module):
  """x / ||x|| * sqrt(c) * gamma over the channels; the norm is taken in float32."""

  def __init__(self, c: int, *, dtype: jnp.dtype):
    self.gamma = nnx.Param(jnp.ones((c,), dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    h = x.astype(jnp.float32)
    square = jnp.sum(h * h, axis=-1, keepdims=True)
    # The floor is put on the square: the gradient of a norm at zero is not finite.
    h = h * lax.rsqrt(jnp.maximum(square, 1e-24)) * math.sqrt(x.shape[-1])
    return h.astype(x.dtype) * self.gamma[...]


class ResidualBlock(nnx.Module):
  """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), both convolutions 3x3x3."""

  def __init__(self, c_in: int, c_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    kernel = (3, 3, 3)
    self.norm1 = ChannelNorm(c_in, dtype=dtype)
    self.conv1 = Conv(c_in, c_out, kernel, dtype=dtype, rngs=rngs)
    self.norm2 = ChannelNorm(c_out, dtype=dtype)
    self.conv2 = Conv(c_out, c_out, kernel, dtype=dtype, rngs=rngs)
    self.shortcut = (
      None
      if c_in == c_out
      else Conv(c_in, c_out, (1, 1, 1), dtype=dtype, rngs=rngs)
    )

  def zero_history(self, batch: int, y: int, x: int):
    return tuple(c.zero_history(batch, y, x) for c in (self.conv1, self.conv2))

  def __call__(self, x: jax.Array, history, keep: jax.Array, band: Band = WHOLE):
    h = nnx.silu(self.norm1(x))
    h, first = causal_conv(self.conv1, h, history[0], keep, band=band)
    h = nnx.silu(self.norm2(h))
    h, second = causal_conv(self.conv2, h, history[1], keep, band=band)
    skip = x if self.shortcut is None else pointwise(self.shortcut, x)
    return skip + h, (first, second)


class FrameAttention(nnx.Module):
  """x + proj(attention(norm(x))): one head over the pixels of each frame."""

  def __init__(self, c: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.norm = ChannelNorm(c, dtype=dtype)
    self.to_qkv = Conv(c, 3 * c, (1, 1), dtype=dtype, rngs=rngs)
    self.proj = Conv(c, c, (1, 1), dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, band: Band = WHOLE) -> jax.Array:
    b, t, rows, columns, c = x.shape
    qkv = pointwise(self.to_qkv, self.norm(x)).reshape(b, t, rows * columns, 3 * c)
    q, k, v = jnp.split(qkv, 3, axis=-1)  # (b, t, s, c)
    k, v = band.gathered(k), band.gathered(v)
    logits = jnp.einsum("btqc,btkc->btqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(c), axis=-1).astype(x.dtype)
    h = jnp.einsum("btqk,btkc->btqc", weights, v)
    return x + pointwise(self.proj, h.reshape(x.shape))


class Middle(nnx.Module):
  """Residual block, attention within each frame, residual block."""

  def __init__(self, c: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.block0 = ResidualBlock(c, c, dtype=dtype, rngs=rngs)
    self.attention = FrameAttention(c, dtype=dtype, rngs=rngs)
    self.block1 = ResidualBlock(c, c, dtype=dtype, rngs=rngs)

  def zero_history(self, batch: int, y: int, x: int):
    return tuple(m.zero_history(batch, y, x) for m in (self.block0, self.block1))

  def __call__(self, x: jax.Array, history, keep: jax.Array, band: Band = WHOLE):
    x, first = self.block0(x, history[0], keep, band)
    x = self.attention(x, band)
    x, second = self.block1(x, history[1], keep, band)
    return x, (first, second)


class Head(nnx.Module):
  """conv(silu(norm(x))), the last layer of encoder and decoder."""

  def __init__(self, c_in: int, c_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.norm = ChannelNorm(c_in, dtype=dtype)
    self.conv = Conv(c_in, c_out, (3, 3, 3), dtype=dtype, rngs=rngs)

  def zero_history(self, batch: int, y: int, x: int):
    return self.conv.zero_history(batch, y, x)

  def __call__(self, x: jax.Array, history, keep: jax.Array, band: Band = WHOLE):
    return causal_conv(self.conv, nnx.silu(self.norm(x)), history, keep, band=band)


def _run_blocks(blocks, x: jax.Array, histories, keep: jax.Array, band: Band = WHOLE):
  new = []
  for block, history in zip(blocks, histories, strict=True):
    x, history = block(x, history, keep, band)
    new.append(history)
  return x, tuple(new)


class DownStage(nnx.Module):
  """Residual blocks, then half the rows and columns, then half the frames.

  `resample` is None in the last stage, `time_conv` where time stays as it is.
  """

  def __init__(
    self,
    c_in: int,
    c_out: int,
    blocks: int,
    *,
    space: bool,
    time: bool,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    options = {"dtype": dtype, "rngs": rngs}
    self.blocks = nnx.List(
      [ResidualBlock(c_out if i else c_in, c_out, **options) for i in range(blocks)]
    )
    self.resample = Conv(c_out, c_out, (3, 3), **options) if space else None
    self.time_conv = Conv(c_out, c_out, (3, 1, 1), **options) if time else None

  def zero_history(self, batch: int, y: int, x: int):
    blocks = tuple(block.zero_history(batch, y, x) for block in self.blocks)
    if self.time_conv is None:
      return blocks, ()
    # Stride 2 keeps one frame only: windows begin at the last frame of the call before.
    return blocks, self.time_conv.zero_history(batch, y // 2, x // 2, frames=1)

  def __call__(self, x: jax.Array, history, started: jax.Array, per_latent: int):
    """Maps per_latent frames a latent frame to per_latent or per_latent / 2."""
    blocks, time = history
    keep = keep_mask(started, per_latent - 1, x.shape[1])
    time_factor = 1 if self.time_conv is None else 2
    space_factor = 1 if self.resample is None else 2
    h, blocks = _run_blocks(self.blocks, x, blocks, keep)
    # Unlike elsewhere a placeholder counts here: the reference pads with zeros too.
    x = jnp.where(keep, x, jnp.zeros((), x.dtype))
    skip = average_down(x, h.shape[-1], time_factor, space_factor)
    if self.resample is not None:
      h = downsample(self.resample, h)
    if self.time_conv is not None:
      mixed, time = causal_conv(self.time_conv, h, time, keep, stride=2)
      # The clip's first frame goes past the time convolution.
      later = keep_mask(started, per_latent // 2, mixed.shape[1])
      h = jnp.where(later, mixed, h[:, 1::2])
    return h + skip, (blocks, time)


class UpStage(nnx.Module):
  """Residual blocks, then twice the frames, then twice the rows and columns.

  `resample` is None in the last stage, which then has no shortcut either;
  `time_conv` is None where time stays as it is.
  """

  def __init__(
    self,
    c_in: int,
    c_out: int,
    blocks: int,
    *,
    space: bool,
    time: bool,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    options = {"dtype": dtype, "rngs": rngs}
    self.blocks = nnx.List(
      [ResidualBlock(c_out if i else c_in, c_out, **options) for i in range(blocks)]
    )
    self.resample = Conv(c_out, c_out, (3, 3), **options) if space else None
    self.time_conv = Conv(c_out, 2 * c_out, (3, 1, 1), **options) if time else None

  def zero_history(self, batch: int, y: int, x: int):
    blocks = tuple(block.zero_history(batch, y, x) for block in self.blocks)
    if self.time_conv is None:
      return blocks, ()
    return blocks, self.time_conv.zero_history(batch, y, x)

  def __call__(
    self,
    x: jax.Array,
    history,
    started: jax.Array,
    per_latent: int,
    band: Band = WHOLE,
  ):
    """Maps per_latent frames a latent frame to per_latent or 2 per_latent."""
    blocks, time = history
    keep = keep_mask(started, per_latent - 1, x.shape[1])
    h, blocks = _run_blocks(self.blocks, x, blocks, keep, band)
    if self.time_conv is not None:
      # The clip's first frame goes past the time convolution and is no history of it.
      later = keep_mask(started, per_latent, h.shape[1])
      mixed, time = causal_conv(self.time_conv, h, time, later)
      even, odd = jnp.split(mixed, 2, axis=-1)
      pair = jnp.stack([jnp.where(later, even, h), jnp.where(later, odd, h)], axis=2)
      h = pair.reshape(h.shape[0], -1, *h.shape[2:])  # (b, 2 t, y, x, c)
    if self.resample is None:
      return h, (blocks, time)
    time_factor = 1 if self.time_conv is None else 2
    skip = repeat_up(x, h.shape[-1], time_factor, 2)
    return upsample(self.resample, h, band) + skip, (blocks, time)


def run_up_stages(
  stages,
  x: jax.Array,
  histories,
  started: jax.Array,
  latents: int,
  band: Band = WHOLE,
):
  """Up stages one after the other, of `latents` latent frames."""
  new = []
  for stage, history in zip(stages, histories, strict=True):
    x, history = stage(x, history, started, x.shape[1] // latents, band)
    new.append(history)
  return x, tuple(new)
