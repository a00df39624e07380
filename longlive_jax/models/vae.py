"""The Wan2.2 video VAE (SPEC 10), its light variants, and the toy one.

Video (b, t, h, w, 3) in [-1, 1] <-> latents (b, f, y, x, z), normalised per channel.
16 pixels a latent row or column; the first latent frame is one video frame, every
later one is four.

There is one way through the network: `decode_chunk` and `encode_chunk` take any
number of latent frames (of groups of four video frames) and a state. A whole clip is
one call from the zero state; a stream is many. A call always gives four video frames
a latent frame: at the start of a clip the first three are placeholders, which the
caller drops (see vae_blocks.py for what keeps them from mattering). So shapes and
state never change, and each sample of a batch may start its clip at its own time.

Parameter names here and in the published checkpoint (gamma is flat (c,) here, and
kernels have other axes, see `vae_blocks.Conv`):
  conv1., conv2., encoder.conv1., decoder.conv1.   the same
  encoder.downsamples.I.blocks.J.      encoder.downsamples.I.downsamples.J.
  encoder.downsamples.I.resample.      encoder.downsamples.I.downsamples.N.resample.1.
  encoder.downsamples.I.time_conv.     encoder.downsamples.I.downsamples.N.time_conv.
  decoder.upsamples.I.                 the same with `upsamples` twice
  middle.block0. attention. block1.    middle.0. 1. 2.
  norm1. conv1. norm2. conv2.          residual.0. 2. 3. 6. (of a residual block)
  head.norm. head.conv.                head.0. head.2.
with N = the number of blocks of the stage (2 in the encoder, 3 in the decoder).
`latent_mean` and `latent_std` are in no published checkpoint.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from longlive_jax.models import vae_tiles
from longlive_jax.models.pixels import fold_pixels, unfold_pixels
from longlive_jax.models.vae_bands import WHOLE, Band
from longlive_jax.models.vae_blocks import (
  Conv,
  DownStage,
  Head,
  Middle,
  UpStage,
  causal_conv,
  keep_mask,
  pointwise,
  run_up_stages,
)

# Latent statistics of the published model, channel by channel.
WAN_LATENT_MEAN = (
  *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
  *(-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
  *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
  *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
  *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748),
  *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN_LATENT_STD = (
  *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013),
  *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
  *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
  *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
  *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
  *(0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Widths and depth.

  Attributes:
    dim: encoder width before the multipliers.
    dec_dim: decoder width before the multipliers.
    z_dim: latent channels.
    dim_mult: width multiplier of each stage, from pixels to latents.
    num_res_blocks: residual blocks of an encoder stage; a decoder stage has one more.
    temporal_downsample: for every stage but the last, whether it halves time.
  """

  dim: int
  dec_dim: int
  z_dim: int
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)

  def __post_init__(self):
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise ValueError(
        f"temporal_downsample={self.temporal_downsample} must have one entry for "
        f"every stage but the last of dim_mult={self.dim_mult}"
      )

  @property
  def temporal_factor(self) -> int:
    """Video frames a latent frame."""
    return 2 ** sum(self.temporal_downsample)

  @property
  def spatial_factor(self) -> int:
    """Pixels a latent row or column; the outermost 2 is the folding of pixels."""
    return 2 ** len(self.dim_mult)

  @property
  def encoder_widths(self) -> tuple[int, ...]:
    return tuple(self.dim * m for m in (1, *self.dim_mult))

  @property
  def decoder_widths(self) -> tuple[int, ...]:
    return tuple(self.dec_dim * m for m in (self.dim_mult[-1], *self.dim_mult[::-1]))


VAE_SIZES = {
  "wan2.2": VAEConfig(dim=160, dec_dim=256, z_dim=48),
  "wan2.2-light": VAEConfig(dim=40, dec_dim=64, z_dim=48),
  "toy": VAEConfig(dim=16, dec_dim=20, z_dim=24),
  "test": VAEConfig(dim=8, dec_dim=8, z_dim=8),
}


def vae_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
  """Reads the configuration off a checkpoint, full or light.

  Args:
    shapes: parameter path (this module's names) -> shape, here or in PyTorch: only
      the first axis is read, (out,) in both.

  Raises:
    ValueError: a parameter that the reading needs is missing.
  """
  stages = 1 + max(_indices(shapes, "encoder.downsamples."), default=-1)
  blocks = 1 + max(_indices(shapes, "encoder.downsamples.0.blocks."), default=-1)
  widths = [f"encoder.downsamples.{i}.blocks.0.conv1.weight" for i in range(stages)]
  needed = ["encoder.conv1.weight", "decoder.conv1.weight", "conv2.weight", *widths]
  missing = [name for name in needed if name not in shapes]
  if missing or not stages or not blocks:
    raise ValueError(
      f"checkpoint is not a whole Wan2.2 video VAE: missing {missing or 'all stages'}; "
      "give the file that holds encoder and decoder"
    )
  dim = shapes["encoder.conv1.weight"][0]
  dim_mult = tuple(shapes[name][0] // dim for name in widths)
  return VAEConfig(
    dim=dim,
    dec_dim=shapes["decoder.conv1.weight"][0] // dim_mult[-1],
    z_dim=shapes["conv2.weight"][0],
    dim_mult=dim_mult,
    num_res_blocks=blocks,
    temporal_downsample=tuple(
      f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in range(stages - 1)
    ),
  )


def _indices(shapes: Mapping[str, Any], prefix: str) -> list[int]:
  return [int(k[len(prefix) :].split(".")[0]) for k in shapes if k.startswith(prefix)]


class Encoder(nnx.Module):
  """Folded pixels (b, t, h/2, w/2, 12) -> moments (b, f, y, x, 2 z)."""

  def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    widths = config.encoder_widths
    options = {"dtype": dtype, "rngs": rngs}
    self.conv1 = Conv(12, widths[0], (3, 3, 3), **options)
    self.downsamples = nnx.List(
      [
        DownStage(
          widths[i],
          widths[i + 1],
          config.num_res_blocks,
          space=i < len(config.dim_mult) - 1,
          time=(*config.temporal_downsample, False)[i],
          **options,
        )
        for i in range(len(config.dim_mult))
      ]
    )
    self.middle = Middle(widths[-1], **options)
    self.head = Head(widths[-1], 2 * config.z_dim, **options)
    self.per_latent = config.temporal_factor

  def parts(self) -> tuple[slice, ...]:
    """Layers (of conv1, the stages, middle and head) that have the same frame rate."""
    halving = [i + 2 for i, s in enumerate(self.downsamples) if s.time_conv is not None]
    ends = itertools.pairwise([0, *halving, len(self.downsamples) + 3])
    return tuple(itertools.starmap(slice, ends))

  def zero_history(self, batch: int, y: int, x: int):
    """Zeros for a latent grid of y rows and x columns; an entry for every layer."""
    scale = 2 ** (len(self.downsamples) - 1)
    histories = [self.conv1.zero_history(batch, y * scale, x * scale)]
    for stage in self.downsamples:
      histories.append(stage.zero_history(batch, y * scale, x * scale))
      scale = max(scale // 2, 1)
    histories += [m.zero_history(batch, y, x) for m in (self.middle, self.head)]
    return tuple(histories)

  def __call__(
    self, x: jax.Array, history, started: jax.Array, part: slice = slice(None)
  ):
    """Runs some of the layers; x is what the one before gave, `history` is theirs."""

    def masked(layer, rate: int):
      return lambda x, past: layer(x, past, keep_mask(started, rate - 1, x.shape[1]))

    rate = self.per_latent
    layers = [masked(functools.partial(causal_conv, self.conv1), rate)]
    for stage in self.downsamples:
      layers.append(functools.partial(stage, started=started, per_latent=rate))
      rate //= 1 if stage.time_conv is None else 2
    layers += [masked(self.middle, rate), masked(self.head, rate)]
    new = []
    for layer, past in zip(layers[part], history, strict=True):
      x, past = layer(x, past)
      # Fused with the next layer it would keep bits that it loses between parts.
      x = lax.optimization_barrier(x)
      new.append(past)
    return x, tuple(new)


class Decoder(nnx.Module):
  """Latents (b, f, y, x, z) -> folded pixels (b, 4 f, h/2, w/2, 12)."""

  def __init__(self, config: VAEConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
    widths = config.decoder_widths
    options = {"dtype": dtype, "rngs": rngs}
    self.conv1 = Conv(config.z_dim, widths[0], (3, 3, 3), **options)
    self.middle = Middle(widths[0], **options)
    self.upsamples = nnx.List(
      [
        UpStage(
          widths[i],
          widths[i + 1],
          config.num_res_blocks + 1,
          space=i < len(config.dim_mult) - 1,
          time=(*config.temporal_downsample[::-1], False)[i],
          **options,
        )
        for i in range(len(config.dim_mult))
      ]
    )
    self.head = Head(widths[-1], 12, **options)

  def zero_history(self, batch: int, y: int, x: int):
    """Zeros for a latent grid of y rows and x columns."""
    first = self.conv1.zero_history(batch, y, x)
    middle = self.middle.zero_history(batch, y, x)
    stages = []
    for i, stage in enumerate(self.upsamples):
      stages.append(stage.zero_history(batch, y * 2**i, x * 2**i))
    scale = 2 ** (len(self.upsamples) - 1)
    head = self.head.zero_history(batch, y * scale, x * scale)
    return first, middle, tuple(stages), head

  def __call__(
    self, z: jax.Array, history, started: jax.Array, tiles: int = 1, band: Band = WHOLE
  ):
    first, middle, stages, head = history
    latents = z.shape[1]
    keep = keep_mask(started, 0, latents)
    h, first = causal_conv(self.conv1, z, first, keep, band=band)
    h, middle = self.middle(h, middle, keep, band)
    whole, tiled = vae_tiles.split_stages(self.upsamples)
    before = stages[: len(whole)]
    h, before = run_up_stages(whole, h, before, started, latents, band)

    def finish(h, past):
      h, after = run_up_stages(tiled, h, past[0], started, latents, band)
      keep = keep_mask(started, h.shape[1] // latents - 1, h.shape[1])
      h, head = self.head(h, past[1], keep, band)
      return h, (after, head)

    past = stages[len(whole) :], head
    halo = vae_tiles.halo(tiled, self.head)
    h, (after, head) = vae_tiles.in_tiles(finish, h, past, tiles, halo)
    return h, (first, middle, before + after, head)


class VideoVAE(nnx.Module):
  """Encoder, decoder and the statistics of the latents.

  Activations have the dtype of the parameters. `latent_mean` and `latent_std` (z,)
  are always float32 and not trained: those of the published model where there are 48
  channels, else 0 and 1 until training has measured them.
  """

  def __init__(
    self, config: VAEConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
  ):
    z = config.z_dim
    self.config = config
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
    self.conv1 = Conv(2 * z, 2 * z, (1, 1, 1), dtype=dtype, rngs=rngs)
    self.conv2 = Conv(z, z, (1, 1, 1), dtype=dtype, rngs=rngs)
    self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
    published = z == len(WAN_LATENT_MEAN)
    mean = jnp.array(WAN_LATENT_MEAN) if published else jnp.zeros(z)
    std = jnp.array(WAN_LATENT_STD) if published else jnp.ones(z)
    self.latent_mean = nnx.Param(mean.astype(jnp.float32))
    self.latent_std = nnx.Param(std.astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
  """What decoding remembers between calls.

  Attributes:
    started: (b,) bool, whether the sample's clip began in an earlier call.
    history: nested tuples of arrays (b, 2, rows, columns, c), an input tail for every
      causal convolution, in the order of the layers.
  """

  started: jax.Array
  history: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderState:
  """What encoding remembers between calls; fields as in DecoderState."""

  started: jax.Array
  history: Any


def init_decoder_state(model: VideoVAE, batch: int, y: int, x: int) -> DecoderState:
  """The state before a clip, for latents of y rows and x columns: zeros."""
  history = model.decoder.zero_history(batch, y, x)
  return DecoderState(jnp.zeros((batch,), bool), history)


def init_encoder_state(
  model: VideoVAE, batch: int, y: int, x: int, part: slice = slice(None)
) -> EncoderState:
  """The state before a clip, for latents of y rows and x columns: zeros."""
  history = model.encoder.zero_history(batch, y, x)[part]
  return EncoderState(jnp.zeros((batch,), bool), history)


def decode_chunk(
  model: VideoVAE,
  state: DecoderState,
  latents: jax.Array,
  tiles: int = 1,
  band: Band = WHOLE,
) -> tuple[jax.Array, jax.Array, DecoderState]:
  """Decodes the next latent frames of a clip.

  Args:
    model: the VAE.
    state: from `init_decoder_state` or the call before. Donate it under jit: at
      704x1280 it holds 3.2 GB.
    latents: (b, f, y, x, z), normalised, f >= 1.
    tiles: how many the last stages run in, one after the other: the same frames from
      less memory (vae_tiles.py).
    band: inside `jax.shard_map`, what this device has of the picture (vae_bands.py);
      y, x and the state are those of the band.

  Returns:
    frames: (b, 4 f, 16 y, 16 x, 3), not clamped, in the dtype of the parameters.
    dropped: (b,) int32, how many leading frames are placeholders: 3 at the start of
      a sample's clip, else 0.
    state: for the next call.

  Raises:
    ValueError: tiles of a band, or those of `vae_tiles.in_tiles`.
  """
  if tiles != 1 and band.devices != 1:
    raise ValueError(
      f"tiles={tiles} must be 1 where {band.devices} devices share the picture: each "
      "of them has a part already"
    )
  dtype = model.conv2.weight.dtype
  mean, std = lax.stop_gradient((model.latent_mean[...], model.latent_std[...]))
  z = (latents.astype(jnp.float32) * std + mean).astype(dtype)
  z = pointwise(model.conv2, z)
  h, history = model.decoder(z, state.history, state.started, tiles, band)
  placeholders = model.config.temporal_factor - 1
  dropped = jnp.where(state.started, 0, placeholders).astype(jnp.int32)
  state = DecoderState(jnp.ones_like(state.started), history)
  return unfold_pixels(h), dropped, state


def decode(
  model: VideoVAE, latents: jax.Array, frames_per_call: int | None = None
) -> jax.Array:
  """Decodes whole clips.

  Args:
    model: the VAE.
    latents: (b, f, y, x, z), normalised.
    frames_per_call: latent frames decoded at a time, to bound memory; None: all.

  Returns:
    (b, 1 + 4 (f - 1), 16 y, 16 x, 3) in [-1, 1].
  """
  b, f, y, x, _ = latents.shape
  state = init_decoder_state(model, b, y, x)
  if frames_per_call is None:
    frames, _, _ = decode_chunk(model, state, latents)
  else:

    def step(state, piece):
      frames, _, state = decode_chunk(model, state, piece)
      return state, frames

    _, frames = lax.scan(step, state, _pieces(latents, frames_per_call))
    frames = _join(frames)
  factor = model.config.temporal_factor
  return jnp.clip(frames[:, factor - 1 : factor * f], -1.0, 1.0)


def posterior(
  model: VideoVAE, state: EncoderState, frames: jax.Array
) -> tuple[jax.Array, jax.Array, EncoderState]:
  """Mean and log-variance of the next latents, float32, before normalisation.

  Arguments as `encode_chunk`; the log-variance is clipped to [-30, 20].
  """
  x = fold_pixels(frames.astype(model.conv1.weight.dtype))
  h, history = model.encoder(x, state.history, state.started)
  mean, logvar = _moments(model, h)
  state = EncoderState(jnp.ones_like(state.started), history)
  return mean, jnp.clip(logvar, -30.0, 20.0), state


def encode_chunk(
  model: VideoVAE, state: EncoderState, frames: jax.Array, part: slice | None = None
) -> tuple[jax.Array, EncoderState]:
  """Encodes the next video frames of a clip.

  Args:
    model: the VAE.
    state: from `init_encoder_state` or the call before.
    frames: (b, 4 f, 16 y, 16 x, 3) in [-1, 1]. At the start of a sample's clip its
      first three frames are placeholders of any value and the fourth is frame 0.
    part: one of `Encoder.parts`, for which `state` then is. Any but the first takes
      the features that the one before returned. None: all of them at once.

  Returns:
    latents: (b, f, y, x, z) float32, normalised means; features (b, t, rows, columns,
      c) of any part but the last.
    state: for the next call.
  """
  parts = model.encoder.parts()
  part = part or slice(0, parts[-1].stop)
  if part.start == 0:
    frames = fold_pixels(frames.astype(model.conv1.weight.dtype))
  h, history = model.encoder(frames, state.history, state.started, part)
  state = EncoderState(jnp.ones_like(state.started), history)
  if part.stop < parts[-1].stop:
    return h, state
  mean, _ = _moments(model, h)
  centre, std = lax.stop_gradient((model.latent_mean[...], model.latent_std[...]))
  return (mean - centre) / std, state


def _moments(model: VideoVAE, h: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.split(pointwise(model.conv1, h).astype(jnp.float32), 2, axis=-1)


def encode(
  model: VideoVAE, video: jax.Array, frames_per_call: int | None = None
) -> jax.Array:
  """Encodes whole clips.

  Args:
    model: the VAE.
    video: (b, 1 + 4 k, h, w, 3) in [-1, 1]; further frames are ignored.
    frames_per_call: latent frames encoded at a time, to bound memory; None: all.

  Returns:
    (b, 1 + k, h / 16, w / 16, z) float32, normalised.

  Raises:
    ValueError: height or width is not a multiple of 16.
  """
  groups = with_placeholders(model.config, video)
  b, t, height, width, _ = groups.shape
  factor = model.config.temporal_factor
  scale = model.config.spatial_factor
  state = init_encoder_state(model, b, height // scale, width // scale)
  if frames_per_call is None:
    latents, _ = encode_chunk(model, state, groups)
    return latents

  def step(state, piece):
    latents, state = encode_chunk(model, state, piece)
    return state, latents

  _, latents = lax.scan(step, state, _pieces(groups, frames_per_call * factor))
  return _join(latents)[:, : t // factor]


def with_placeholders(config: VAEConfig, video: jax.Array) -> jax.Array:
  """(b, 1 + 4 k, h, w, 3) -> (b, 4 + 4 k, h, w, 3): whole groups from the clip start.

  Raises:
    ValueError: height or width is not a multiple of the VAE's.
  """
  factor, scale = config.temporal_factor, config.spatial_factor
  for name, value in zip(("height", "width"), video.shape[2:4], strict=True):
    if value % scale:
      raise ValueError(
        f"{name}={value} must be a multiple of {scale}; "
        f"use {max(value // scale, 1) * scale}"
      )
  used = (video.shape[1] - 1) // factor * factor + 1
  return jnp.pad(video[:, :used], ((0, 0), (factor - 1, 0), (0, 0), (0, 0), (0, 0)))


def _pieces(x: jax.Array, length: int) -> jax.Array:
  """(b, t, ...) -> (n, b, length, ...), zeros at the end: nothing looks ahead."""
  b, t = x.shape[:2]
  n = math.ceil(t / length)
  x = jnp.pad(x, ((0, 0), (0, n * length - t)) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(b, n, length, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
  """(n, b, length, ...) -> (b, n length, ...)."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
