"""Encoding a clip by parts: every device reads and encodes a span of the video.

A latent frame depends on its own video frames and on those before them, as far back as
the encoder's causal convolutions reach: 109 video frames, so 28 latent frames, in the
Wan2.2 VAE. What lies in front of a span, its *halo*, has to pass through the encoder,
too, and what comes out of the halo is thrown away. But the layers that work on many
frames of many pixels reach least far, and those that reach far are a twentieth of the
work. So the encoder is cut behind every layer that halves time, where features are
small, and each part has a halo of its own:

  part    operations   looks back    its halo comes from
  1            77 %     5 latents    the video
  2            18 %     5 latents    features of the devices before
  3             5 %    18 latents    features of the devices before

A device takes its span through one part after the other. The features of a span have
come out of the part before as those of the whole clip would have, so the latents are
those of the whole clip, and no device ever holds all of it. (The reference encodes all
28 latents with all layers, without saying why; that is exact, and 27 is not.) Halos are
28% more operations where 4 devices share 96 latent frames, and 7% of 384 (`halo_cost`);
through all layers they were 133% and 33%.

  spans = make_spans(video_vae, latents=96, devices=4, frames_per_call=8)
  frames = spread_frames(read, spans, mesh, batch=2, height=704, width=1280)
  latents = encode_spans(video_vae, frames, spans, mesh)

The mesh is that of `mesh.training_mesh`: the devices along DATA have other samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models import vae
from longlive_jax.models.pixels import to_unit
from longlive_jax.parallel import costs
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.mesh import CLIPS, SEQUENCE

Array = jax.Array
# read(rows, start, stop) -> uint8 (rows, stop - start, h, w, 3), these frames of these
# samples of the batch
Read = Callable[[range, int, int], np.ndarray]
# Most latent frames a call of devices that share a clip: halos are multiples of it. At
# 704 x 1280 the convolutions that take the time run few frames at a time anyway.
SHARED_CALL = 2


@dataclasses.dataclass(frozen=True)
class Spans:
  """How a clip is cut; lengths in latent frames. Static.

  Attributes:
    latents: of the clip.
    devices: that share it.
    length: of a span, a multiple of frames_per_call. The last spans may reach beyond
      the clip, or lie beyond it.
    halos: for each part of the encoder, the latent frames that pass through it in front
      of a span, a multiple of frames_per_call. A device that has the whole clip has one
      part and no halo.
    frames_per_call: encoded at a time.
    factor: video frames a latent frame.
  """

  latents: int
  devices: int
  length: int
  halos: tuple[int, ...]
  frames_per_call: int
  factor: int

  @property
  def padded_frames(self) -> int:
    """Video frames that a device encodes, placeholders included."""
    return self.factor * (self.halos[0] + self.length)

  def video_frames(self, device: int) -> tuple[int, int]:
    """The clip's frames [start, stop) that a device reads; the same twice if none."""
    # Latent frame 0 is video frame 0 alone, behind factor - 1 placeholders.
    total = self.factor * (self.latents - 1) + 1
    end = self.factor * self.length * (device + 1) - self.factor + 1
    return min(max(end - self.padded_frames, 0), total), min(end, total)

  def frames_of(self, devices: Sequence[int]) -> np.ndarray:
    """The clip's frames that some of the devices read, ascending, each once."""
    return np.unique(
      np.concatenate([np.arange(*self.video_frames(device)) for device in devices])
    )

  def pad(self, frames: np.ndarray, device: int) -> np.ndarray:
    """What a device read, with placeholders before and behind the clip.

    Args:
      frames: (b, t, h, w, 3), those of `video_frames(device)`.

    Returns:
      (b, padded_frames, h, w, 3).
    """
    end = self.factor * self.length * (device + 1) - self.factor + 1
    start, stop = self.video_frames(device)
    front = self.padded_frames - (end - start)
    return np.pad(frames, ((0, 0), (front, end - stop), (0, 0), (0, 0), (0, 0)))


def halo_latents(model: vae.VideoVAE) -> tuple[int, ...]:
  """How many latent frames back each part of the encoder looks, from its layers.

  A convolution looks back by the input frames that it keeps. All those of a part have
  the frame rate of its input: what halves time is its last layer.
  """
  size, rate = model.config.spatial_factor, model.config.temporal_factor
  histories = jax.eval_shape(lambda: model.encoder.zero_history(1, size, size))
  halos = []
  for part in model.encoder.parts():
    kept = sum(leaf.shape[1] for leaf in jax.tree.leaves(histories[part]))
    halos.append(-(-kept // rate))
    rate //= 2
  return tuple(halos)


def make_spans(
  model: vae.VideoVAE, *, latents: int, devices: int, frames_per_call: int = 1
) -> Spans:
  """Cuts a clip of so many latent frames into one span a device.

  Args:
    frames_per_call: encoded at a time by a device alone; several take a divisor of it,
      at most SHARED_CALL.

  Raises:
    ValueError: a number below 1.
  """
  for name, value in (
    ("latents", latents),
    ("devices", devices),
    ("frames_per_call", frames_per_call),
  ):
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  n = frames_per_call if devices == 1 else math.gcd(frames_per_call, SHARED_CALL)
  length = -(-latents // (devices * n)) * n
  # Nothing is before the clip: no halo is longer than what all but one device have.
  before = (devices - 1) * length
  halos = tuple(min(-(-halo // n) * n, before) for halo in halo_latents(model))
  return Spans(
    latents=latents,
    devices=devices,
    length=length,
    halos=halos if devices > 1 else (0,),
    frames_per_call=n,
    factor=model.config.temporal_factor,
  )


def halo_cost(config: vae.VAEConfig, spans: Spans, y: int, x: int) -> tuple[float, ...]:
  """Operations on the halo of each part, over all on a span without any.

  Args:
    y, x: rows and columns of a latent frame.
  """
  flops = costs.encoder_part_flops(config, y, x)
  span = spans.length * sum(flops)
  # Not strict: a device that has the whole clip has one part.
  return tuple(h * part / span for h, part in zip(spans.halos, flops, strict=False))


def encode_span(
  model: vae.VideoVAE, frames: Array, first: Array | int, spans: Spans
) -> Array:
  """Latents of one span; of several devices in shard_map, over SEQUENCE.

  Args:
    frames: uint8 (b, spans.padded_frames, h, w, 3), see `Spans.pad`.
    first: int32 (), the span's first latent frame, a multiple of frames_per_call.

  Returns:
    float32 (b, spans.length, y, x, z), normalised.
  """
  b, _, *picture = frames.shape
  y, x = (side // model.config.spatial_factor for side in picture[:2])
  n, parts = spans.frames_per_call, model.encoder.parts()
  if spans.devices == 1:  # nothing to exchange, so no features have to wait
    parts = (slice(0, parts[-1].stop),)
  pieces = frames.reshape(b, -1, spans.factor * n, *picture).swapaxes(0, 1)
  for part, halo in zip(parts, spans.halos, strict=True):
    if part.start:
      pieces = _with_halo(pieces, halo // n, spans.devices)
    clip_start = vae.init_encoder_state(model, b, y, x, part)
    numbers = first - halo + n * jnp.arange(len(pieces))
    pieces = _stream(model, part, clip_start, pieces, numbers)[halo // n :]
  return pieces.swapaxes(0, 1).reshape(b, spans.length, *pieces.shape[3:])


def _stream(
  model: vae.VideoVAE,
  part: slice,
  clip_start: vae.EncoderState,
  pieces: Array,
  numbers: Array,
) -> Array:
  """Takes pieces (count, b, t, ...) through a part of the encoder, one by one.

  Args:
    numbers: (count,) the first latent frame of each; below 0 are placeholders.
  """

  def step(state, inputs):
    piece, number = inputs
    # The clip may begin within the halo; what came before are placeholders.
    state = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), clip_start, state)
    if part.start == 0:
      piece = to_unit(piece)
    features, state = vae.encode_chunk(model, state, piece, part)
    return state, features

  amid = dataclasses.replace(clip_start, started=jnp.ones_like(clip_start.started))
  return lax.scan(step, amid, (pieces, numbers))[1]


def _with_halo(pieces: Array, count: int, devices: int) -> Array:
  """Puts in front of a device's pieces the last `count` of the devices before.

  The first devices have zeros there, for what lies before the clip.
  """
  length, halo = len(pieces), []
  for hop in range(1, -(-count // length) + 1):  # to the next device, to the one after
    last = pieces[max(hop * length - count, 0) :]
    pairs = [(i, i + hop) for i in range(devices - hop)]
    halo.append(lax.ppermute(last, SEQUENCE, pairs))
  return jnp.concatenate([*halo[::-1], pieces])


def spread_frames(
  read: Read, spans: Spans, mesh: Mesh | None, *, batch: int, height: int, width: int
) -> Array:
  """Puts every device's frames on it; a process reads for its own devices only.

  Args:
    mesh: None is one device.

  Returns:
    uint8 (batch, devices * padded_frames, height, width, 3), sharded as CLIPS.

  Raises:
    ValueError: spans for another number of devices; a size that the VAE cannot take is
      found by `encode_spans`.
  """
  _check(spans, mesh)
  count = spans.padded_frames
  shape = (batch, spans.devices * count, height, width, 3)

  def part(index: tuple[slice, ...]) -> np.ndarray:
    device = (index[1].start or 0) // count
    frames = read(range(batch)[index[0]], *spans.video_frames(device))
    return spans.pad(frames, device)

  if mesh is None:
    return jnp.asarray(part((slice(None),) * 2))
  return jax.make_array_from_callback(shape, meshes.sharding(mesh, CLIPS), part)


@functools.partial(jax.jit, static_argnums=(2, 3))
def encode_spans(
  model: vae.VideoVAE, frames: Array, spans: Spans, mesh: Mesh | None
) -> Array:
  """Encodes clips, every device its own spans.

  Args:
    model: on every device of the mesh.
    frames: from `spread_frames`.

  Returns:
    float32 (b, devices * length, y, x, z), normalised, sharded as CLIPS; those from
    spans.latents on lie beyond the clip.

  Raises:
    ValueError: spans for another number of devices, or a height or width that is no
      multiple of the VAE's.
  """
  _check(spans, mesh)
  scale = model.config.spatial_factor
  for name, value in zip(("height", "width"), frames.shape[2:4], strict=True):
    if value % scale:
      raise ValueError(f"{name}={value} must be a multiple of {scale}")
  if mesh is None:
    return encode_span(model, frames, 0, spans)

  def one(model, frames):
    first = lax.axis_index(SEQUENCE) * spans.length
    return encode_span(model, frames, first, spans)

  # check_vma: the zero state of the scan is the same on all devices, what follows not.
  return jax.shard_map(
    one, mesh=mesh, in_specs=(P(), CLIPS), out_specs=CLIPS, check_vma=False
  )(model, frames)


def _check(spans: Spans, mesh: Mesh | None) -> None:
  found = 1 if mesh is None else mesh.shape[SEQUENCE]
  if found != spans.devices:
    raise ValueError(
      f"spans are for devices={spans.devices}, but the mesh has {found} that share a "
      "clip"
    )
