"""The VAE's decoder in 8 bits: `quantise_decoder(video_vae)`.

The 3x3x3 convolutions of the decoder's residual blocks, nine tenths of its operations,
multiply FP8 codes (E4M3). What they read is the SiLU of a `ChannelNorm`, which cannot
be larger than sqrt(c) * max |gamma|: the scale of the inputs follows from the weights,
and nothing has to be calibrated. It is a power of two, so it rounds nothing. Weights
have a scale for every output.

Codes are what a convolution keeps of earlier frames, what devices that share a picture
send each other, and what it reads: half of the bytes, also of a decoder's state. On
Hopper and newer GPUs kernels/fp8_conv.py multiplies them. All else stays as it is: the
first and the last convolution, those that resample, whose inputs have no bound, and the
encoder.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from longlive_jax.kernels import fp8_conv
from longlive_jax.models.vae import VideoVAE
from longlive_jax.models.vae_blocks import (
  ResidualBlock,
  convolve,
  convolved,
  read_by,
  side_by_side,
)
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import FP8Array

Array = jax.Array

PRECISIONS = ("", "fp8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvW8A8:
  """The weight of a causal convolution that multiplies codes.

  Attributes:
    weight: (o, ky, kx, kt, i), a scale for every output.
    input_scale: float32 (), a power of two; input = code * input_scale.
  """

  weight: FP8Array
  input_scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def dtype(self) -> jnp.dtype:
    """Of the codes, also those of earlier inputs."""
    return self.weight.codes.dtype


def check(precision: str) -> None:
  """Raises ValueError for a precision that a decoder cannot have."""
  if precision not in PRECISIONS:
    raise ValueError(
      f"vae_precision={precision!r} is unknown; use 'fp8', or '' for none"
    )


def apply(model: VideoVAE, precision: str) -> VideoVAE:
  """The VAE with its decoder in one of PRECISIONS.

  Raises:
    ValueError: an unknown one.
  """
  check(precision)
  return quantise_decoder(model) if precision else model


def precision_of(model: VideoVAE) -> str:
  """Which of PRECISIONS the decoder has."""
  values = (block.conv1.weight.get_value() for block in _blocks(model))
  return "fp8" if any(isinstance(value, ConvW8A8) for value in values) else ""


def quantise_decoder(model: VideoVAE) -> VideoVAE:
  """The VAE with the residual blocks of its decoder in FP8.

  Works on abstract trees, too: `jax.eval_shape(quantise_decoder, abstract)`. Every
  device computes with the codes: Hopper and newer in 8 bits (convolutions of a multiple
  of 128 channels), others, and CPUs, in the dtype of the network: the same numbers, but
  for how exactly they are summed.

  Raises:
    ValueError: the decoder is quantised already.
  """
  model = jax.tree.map(lambda leaf: leaf, model)  # a copy whose parts may be replaced
  for block in _blocks(model):
    for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
      weight = conv.weight.get_value()
      if isinstance(weight, ConvW8A8):
        raise ValueError("the decoder is quantised already; start from float weights")
      conv.weight = conv.weight.replace(quantise(weight, norm.gamma[...]))
  return model


def _blocks(model: VideoVAE) -> list[ResidualBlock]:
  nodes = jax.tree.leaves(model.decoder, is_leaf=_is_block)
  return [node for node in nodes if _is_block(node)]


def _is_block(node: object) -> bool:
  return isinstance(node, ResidualBlock)


@jax.jit
def quantise(weight: Array, gamma: Array) -> ConvW8A8:
  """Weight (o, ky, kx, kt, i), of inputs from a norm with gamma (i,)."""
  bound = math.sqrt(gamma.shape[0]) * jnp.max(jnp.abs(gamma.astype(jnp.float32)))
  _, exponent = jnp.frexp(bound / fp8.LARGEST)
  scale = jnp.ldexp(jnp.float32(1), exponent)  # at least the quotient
  return ConvW8A8(fp8.quantise(weight, batch_axes=1), scale)


@read_by.register
def _(weight: ConvW8A8, x: Array) -> Array:
  return fp8.cast(x * (1 / weight.input_scale).astype(x.dtype))


@convolved.register
def _(
  weight: ConvW8A8, x: Array, sides: tuple[int, int], stride: int, dtype: jnp.dtype
) -> Array:
  o, ky, kx, kt, i = weight.shape
  scale = weight.weight.scale.reshape(o)
  if stride == 1 and fp8_conv.runs_here(weight.weight.codes):
    return fp8_conv.causal_convolve(
      x, weight.weight.codes, scale * weight.input_scale, dtype=dtype, sides=sides
    )
  kernel = weight.weight.codes.reshape(o, ky, kx, kt * i).astype(dtype)

  def convolve_codes(frames: Array) -> Array:
    frames = frames.astype(dtype) * weight.input_scale.astype(dtype)
    return (convolve(frames, kernel, sides) * scale).astype(dtype)

  return side_by_side(x, kt, stride, convolve_codes)
