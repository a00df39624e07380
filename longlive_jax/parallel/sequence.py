"""One video on several devices: who has which tokens, heads and rows (Ulysses).

Outside of self-attention a device works on its tokens, an equal part of every latent
frame; inside of it on all tokens of its heads. So the cached keys and values of a head
never move, and the network itself knows nothing of devices:

  latents --split--> tokens --q, k, v--> to_heads --attend--> to_tokens --> ... --join

These run inside `jax.shard_map` over the axes of `mesh.generation_mesh`. A frame's
tokens that do not divide are filled up with copies of the last one, which change no
maximum over tokens; they are dropped wherever all tokens come together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels.nvfp4_dequantise import dequantise
from longlive_jax.kernels.nvfp4_quantise import quantise
from longlive_jax.layers.projection import Projection, numbers
from longlive_jax.parallel.mesh import BRANCH, DATA, SEQUENCE
from longlive_jax.quant import fp8, nvfp4

Array = jax.Array

FORMATS = ("", "fp8", "nvfp4")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Over how many devices each video is spread. Static.

  Attributes:
    sequence: devices that share its tokens and heads.
    branch: devices that share its rows with and without prompt.
    data: devices, or groups of them, that have other videos.
  """

  sequence: int = 1
  branch: int = 1
  data: int = 1

  @property
  def axes(self) -> tuple[str, ...]:
    """Mesh axes that tokens or heads are spread over."""
    return (SEQUENCE,) if self.sequence > 1 else ()

  def everywhere(self, flag: Array) -> Array:
    """Whether a flag, bool (), is set on all devices: they must not take two ways."""
    sizes = {DATA: self.data, BRANCH: self.branch, SEQUENCE: self.sequence}
    axes = tuple(name for name, size in sizes.items() if size > 1)
    return lax.pmin(flag.astype(jnp.int32), axes) > 0 if axes else flag

  # ---------------------------------------------------------------- rows
  def own_rows(self, x: Array) -> Array:
    """This device's rows of all rows of the network's batch (rows, ...)."""
    return x if self.branch == 1 else _own(x, BRANCH, self.branch, axis=0)

  def all_rows(self, x: Array) -> Array:
    """The inverse of `own_rows`."""
    return x if self.branch == 1 else lax.all_gather(x, BRANCH, tiled=True)

  # ---------------------------------------------------------------- tokens
  def split(self, latents: Array, patch: int) -> Array:
    """This device's tokens of latents (b, f, y, x, c), as latents one token high.

    Returns:
      (b, f, patch, p / N * patch, c).
    """
    if self.sequence == 1:
      return latents
    b, f, y, x, c = latents.shape
    tokens = latents.reshape(b, f, y // patch, patch, x // patch, patch, c)
    tokens = tokens.swapaxes(3, 4).reshape(b, f, -1, patch, patch, c)
    own = _own(self._filled_up(tokens), SEQUENCE, self.sequence, axis=2)
    return own.swapaxes(2, 3).reshape(b, f, patch, -1, c)

  def join(self, latents: Array, patch: int, y: int, x: int) -> Array:
    """The inverse of `split`: (b, f, patch, p / N * patch, c) -> (b, f, y, x, c)."""
    if self.sequence == 1:
      return latents
    b, f, _, _, c = latents.shape
    own = latents.reshape(b, f, patch, -1, patch, c).swapaxes(2, 3)
    rows, columns = y // patch, x // patch
    tokens = lax.all_gather(own, SEQUENCE, axis=2, tiled=True)[:, :, : rows * columns]
    tokens = tokens.reshape(b, f, rows, columns, patch, patch, c)
    return tokens.swapaxes(3, 4).reshape(b, f, y, x, c)

  # ---------------------------------------------------------------- exchange
  def exchanged(
    self, attend: Callable[..., Any], frames: int, tokens: int, format: str = ""
  ) -> Callable[..., Any]:
    """`attend` of all tokens and own heads, for callers with own tokens and all heads.

    Args:
      attend: see dit.Attend.
      frames, tokens: latent frames of the chunk, and tokens of each.
      format: of FORMATS, in which keys and values travel. What is attended is made of
        that, on a single device, too: numbers do not depend on how many there are.
    """

    if self.sequence == 1 and not format:
      return attend

    def around(
      layer: Any, q: Array | Projection, k: Array | Projection, v: Array
    ) -> tuple[Array, Any]:
      b, q, k = len(v), numbers(q), numbers(k)  # the norm is over all heads
      q, k, v = (a.reshape(b, frames, -1, *a.shape[2:]) for a in (q, k, v))
      arrived = (
        self.to_heads(q, tokens),
        _TRAVEL[format](self, k, tokens, smooth=True),
        _TRAVEL[format](self, v, tokens, smooth=False),
      )
      flat = (a.reshape(b, frames * tokens, *a.shape[3:]) for a in arrived)
      out, handed_out = attend(layer, *flat)
      if self.sequence == 1:
        return out, handed_out
      out = out.reshape(b, frames, tokens, *out.shape[2:])
      out = jax.tree.map(self.to_tokens, out)  # numbers, or codes and scales
      return out.reshape(b, -1, *out.shape[3:]), handed_out

    return around

  def to_heads(self, x: Array, tokens: int) -> Array:
    """(b, f, p / N, n, ...) -> (b, f, p, n / N, ...), p = tokens of a frame."""
    if self.sequence == 1:
      return x
    return lax.all_to_all(x, SEQUENCE, 3, 2, tiled=True)[:, :, :tokens]

  def to_tokens(self, x: Array) -> Array:
    """The inverse of `to_heads`: (b, f, p, n / N, ...) -> (b, f, p / N, n, ...)."""
    if self.sequence == 1:
      return x
    return lax.all_to_all(self._filled_up(x), SEQUENCE, 2, 3, tiled=True)

  def _filled_up(self, x: Array) -> Array:
    """(b, f, p, ...), p up to a multiple of the devices."""
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, -x.shape[2] % self.sequence)
    return jnp.pad(x, widths, mode="edge")

  def token_mean(self, x: Array, tokens: int) -> Array:
    """Mean over all tokens of own ones (b, f, p / N, ...): float32 (b, f, ...)."""
    x = x.astype(jnp.float32)
    if self.sequence == 1:
      return jnp.mean(x, axis=2)
    own = x.shape[2]
    real = lax.axis_index(SEQUENCE) * own + jnp.arange(own) < tokens
    total = jnp.sum(x, axis=2, where=real.reshape(-1, *[1] * (x.ndim - 3)))
    return lax.psum(total, SEQUENCE) / tokens


SINGLE = Layout()


def check_format(name: str) -> None:
  """Raises ValueError for an unknown exchange_format."""
  if name not in FORMATS:
    raise ValueError(
      f"exchange_format={name!r} is unknown; use '' (plain), 'fp8' or 'nvfp4'"
    )


def _own(x: Array, mesh_axis: str, parts: int, axis: int) -> Array:
  size = x.shape[axis] // parts
  start = lax.axis_index(mesh_axis) * size
  return lax.dynamic_slice_in_dim(x, start, size, axis)


# ------------------------------------------------------------------ formats


def _plain(layout: Layout, x: Array, tokens: int, smooth: bool) -> Array:
  """Keys (smooth) or values (b, f, p / N, n, d) -> (b, f, p, n / N, d)."""
  return layout.to_heads(x, tokens)


def _fp8(layout: Layout, x: Array, tokens: int, smooth: bool) -> Array:
  # A scale for every token and head: nothing to agree on.
  packed = jax.tree.map(lambda a: layout.to_heads(a, tokens), fp8.quantise(x))
  return fp8.dequantise(packed, x.dtype)


def _nvfp4(layout: Layout, x: Array, tokens: int, smooth: bool) -> Array:
  # Smoothed as an NVFP4 cache does it, see layers/kv_slots.py; the mean stays float32,
  # as every device makes it for itself.
  mean, settings, rest = None, {}, x
  if smooth:
    mean = layout.token_mean(x, tokens)
    settings = {"front": "token_mean", "mean": mean}
    rest = x.astype(jnp.float32) - mean[:, :, None]
  amax = nvfp4.largest(rest, 2, layout.axes)
  packed = quantise(x, batch_axes=2, amax=amax, **settings)
  packed = dataclasses.replace(
    packed,
    codes=layout.to_heads(packed.codes, tokens),
    scales=layout.to_heads(packed.scales, tokens),
  )
  if smooth and layout.sequence > 1:
    mean = _own(mean, SEQUENCE, layout.sequence, axis=2)
  return dequantise(packed, dtype=x.dtype, mean=mean)


_TRAVEL = {"": _plain, "fp8": _fp8, "nvfp4": _nvfp4}
