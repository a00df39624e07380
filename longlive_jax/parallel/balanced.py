"""A training clip on several devices: Balanced SP, and the plain way beside it.

A teacher-forced clip is there twice, clean and noisy. In Balanced SP a device holds the
clean *and* the noisy chunks of one span of frames:

  device r   [clean span r, noisy span r]     latents, timesteps, RoPE, prompts, tokens
  attention  [clean 0, noisy 0, clean 1, ...] all tokens, 1/R of the heads

so text, times and positions of a span are needed on one device, and every device has
the same work in every layer. In plain SP the sequence [all clean, all noisy] is cut
evenly, and a device has tokens of clean or of noisy frames. Both exchange heads for
tokens around attention (Ulysses), and nothing else: the order of tokens that arrives is
that of `ClipLayout` with R ranks, or with one.

`train_forward` maps global arrays to global arrays. Noise is drawn and the loss is
reduced outside of it, as if there were one device.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.layers import rope, teacher_forcing
from longlive_jax.layers.projection import Projection
from longlive_jax.models import dit
from longlive_jax.parallel import sharded_weights
from longlive_jax.parallel.mesh import CLIPS, DATA, SEQUENCE

Array = jax.Array

LAYOUTS = ("balanced", "plain")


def check(
  frames: int, frames_per_chunk: int, heads: int, devices: int, layout: str
) -> None:
  """Raises ValueError for a clip that so many devices cannot share; says which can."""
  if layout not in LAYOUTS:
    raise ValueError(f"sp_layout={layout!r} is unknown; use {' or '.join(LAYOUTS)}")
  if devices < 1 or heads % devices:
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    raise ValueError(
      f"sequence_devices={devices} must divide the {heads} heads of the transformer; "
      f"use one of {fitting}"
    )
  unit = devices * frames_per_chunk
  if frames % unit:
    below, above = frames // unit * unit, -(-frames // unit) * unit
    would_do = f"{below} or {above}" if below else f"{above}"
    raise ValueError(
      f"frames={frames} must be a multiple of sequence_devices={devices} x "
      f"frames_per_chunk={frames_per_chunk} = {unit}; use {would_do} frames"
    )


def train_forward(
  model: dit.CausalDiT,
  noisy: Array,
  time: Array,
  text: Array,
  *,
  mesh: Mesh | None,
  frames_per_chunk: int,
  clean: Array | None = None,
  clean_time: Array | None = None,
  valid_frames: Array | None = None,
  layout: str = "balanced",
  remat: str = "none",
) -> Array:
  """`dit.train_forward` over a mesh of `mesh.training_mesh`.

  Args:
    model: weights may live anywhere; those of linear layers are used best where
      `mesh.last_axis_specs` has them.
    noisy, time, text, clean, clean_time, valid_frames, remat: as there. The batch is
      split over the DATA axis.
    mesh: None is one device.
    layout: of LAYOUTS; without `clean` they are the same.

  Returns:
    velocity (b, f, y, x, c) float32 of the noisy frames.

  Raises:
    ValueError: what `check` refuses; a batch or prompts that do not divide.
  """
  b, f, y, x, _ = noisy.shape
  devices = 1 if mesh is None else mesh.shape[SEQUENCE]
  check(f, frames_per_chunk, model.config.heads, devices, layout)
  if mesh is None:
    return dit.train_forward(
      model, noisy, time, text, frames_per_chunk=frames_per_chunk, clean=clean,
      clean_time=clean_time, valid_frames=valid_frames, remat=remat,
    )  # fmt: skip
  if b % mesh.shape[DATA]:
    raise ValueError(f"batch={b} must be a multiple of devices={mesh.shape[DATA]}")
  forced = clean is not None
  ranks = devices if forced and layout == "balanced" else 1
  order = ClipLayout.of_frames(
    f,
    frames_per_chunk,
    model.config.tokens_per_frame(y, x),
    teacher_forced=forced,
    ranks=ranks,
  )
  if forced and clean_time is None:
    clean_time = dit.time_features(np.zeros((b, f)), model.config.freq_dim)
  positions = np.broadcast_to(np.arange(f), (b, f))
  temporal = rope.temporal_rotation(positions, model.config.head_dim)
  text = _prompts_per_device(text, f, devices)

  def both(clean: Array | None, noisy: Array) -> Array:
    return interleaved(clean, noisy, ranks) if forced else jnp.asarray(noisy)

  inputs = (
    both(clean, noisy),
    both(clean_time, time),
    rope.Rotation(*(both(part, part) for part in temporal)),
    both(text, text),
  )
  lengths = None
  if valid_frames is not None:
    lengths = valid_frames * model.config.tokens_per_frame(y, x)

  def forward(model: dit.CausalDiT, inputs: tuple, lengths: Array | None) -> Array:
    latents, time, temporal, text = inputs
    attend = attend_spread(model.rotation(temporal, y, x), order, lengths)
    return model(latents, time, model.embed_text(text), attend, remat=remat)[0]

  forward = sharded_weights.over(mesh, forward, (CLIPS, P(DATA)))
  velocity = forward(model, inputs, lengths)
  return noisy_half(velocity, ranks) if forced else velocity


def attend_spread(
  rotation: rope.Rotation, order: ClipLayout, lengths: Array | None
) -> dit.Attend:
  """Attention in a clip's order for a device that has its own tokens and all heads."""

  def attend(
    layer: None, q: Projection, k: Projection, v: Array
  ) -> tuple[Array, None]:
    q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
    q, k, v = (lax.all_to_all(a, SEQUENCE, 2, 1, tiled=True) for a in (q, k, v))
    out = teacher_forcing.attention(q, k, v, order, lengths)  # (b, s, n / R, d)
    return lax.all_to_all(out, SEQUENCE, 1, 2, tiled=True), None

  return attend


def interleaved(clean: Array, noisy: Array, ranks: int) -> Array:
  """(b, f, ...) twice -> (b, 2 f, ...): [clean 0, noisy 0, clean 1, ...]."""
  spans = [jnp.reshape(a, (len(a), ranks, -1, *a.shape[2:])) for a in (clean, noisy)]
  both = jnp.concatenate(spans, axis=2)
  return both.reshape(len(both), -1, *both.shape[3:])


def noisy_half(x: Array, ranks: int) -> Array:
  """The noisy frames of `interleaved`: (b, 2 f, ...) -> (b, f, ...)."""
  spans = x.reshape(len(x), ranks, 2, -1, *x.shape[2:])[:, :, 1]
  return spans.reshape(len(x), -1, *x.shape[2:])


def _prompts_per_device(text: Array, frames: int, devices: int) -> Array:
  """Prompts (b, segments, ...), repeated until every device has the same number.

  Raises:
    ValueError: when a prompt would be for a part of a frame.
  """
  segments = text.shape[1]
  count = math.lcm(segments, devices)
  if frames % count:
    raise ValueError(
      f"text has {segments} prompts for frames={frames}, which sequence_devices="
      f"{devices} cut into {count} parts; use one prompt, or one for each chunk"
    )
  return jnp.repeat(text, count // segments, axis=1)
