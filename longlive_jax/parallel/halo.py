"""Encoding a clip by parts: every device reads and encodes a span of the video.

A latent frame depends on its own video frames and on those before them, as far back as
the encoder's causal convolutions reach: 109 video frames, so 28 latent frames, in the
Wan2.2 VAE. A device that reads this *halo* in front of its span and throws the halo's
latents away has the latents of the whole clip, and no device ever holds all of it. (The
reference takes 28 without saying why; it is exact, and 27 is not.)

  spans = make_spans(video_vae, latents=96, devices=4, frames_per_call=8)
  frames = spread_frames(read, spans, mesh, batch=2, height=704, width=1280)
  latents = encode_spans(video_vae, frames, spans, mesh)

The mesh is that of `mesh.training_mesh`: the devices along DATA have other samples.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models import vae
from longlive_jax.models.pixels import to_unit
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.mesh import CLIPS, SEQUENCE

Array = jax.Array
# read(rows, start, stop) -> uint8 (rows, stop - start, h, w, 3), these frames of these
# samples of the batch
Read = Callable[[range, int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Spans:
  """How a clip is cut; lengths in latent frames. Static.

  Attributes:
    latents: of the clip.
    devices: that share it.
    length: of a span, a multiple of frames_per_call. The last spans may reach beyond
      the clip, or lie beyond it.
    halo: latent frames encoded in front of a span, a multiple of frames_per_call; 0
      for a device that has the whole clip.
    frames_per_call: encoded at a time.
    factor: video frames a latent frame.
  """

  latents: int
  devices: int
  length: int
  halo: int
  frames_per_call: int
  factor: int

  @property
  def padded_frames(self) -> int:
    """Video frames that a device encodes, placeholders included."""
    return self.factor * (self.halo + self.length)

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


def halo_latents(model: vae.VideoVAE) -> int:
  """How many latent frames back the encoder looks, from its layers.

  Counted from the latents to the pixels: a convolution looks back by the input frames
  that it keeps, and what halves time doubles the frames that are needed.
  """

  def kept(history) -> int:
    return sum(leaf.shape[1] for leaf in jax.tree.leaves(history))

  size = model.config.spatial_factor
  first, stages, middle, head = jax.eval_shape(
    lambda: model.encoder.zero_history(1, size, size)
  )
  frames = kept(head) + kept(middle)
  for blocks, time in reversed(stages):
    if kept(time):
      frames = 2 * frames + kept(time)
    frames += kept(blocks)
  return -(-(frames + kept(first)) // model.config.temporal_factor)


def make_spans(
  model: vae.VideoVAE, *, latents: int, devices: int, frames_per_call: int = 1
) -> Spans:
  """Cuts a clip of so many latent frames into one span a device.

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

  def whole(count: int) -> int:
    return -(-count // frames_per_call) * frames_per_call

  return Spans(
    latents=latents,
    devices=devices,
    length=whole(-(-latents // devices)),
    halo=whole(halo_latents(model)) if devices > 1 else 0,
    frames_per_call=frames_per_call,
    factor=model.config.temporal_factor,
  )


def encode_span(
  model: vae.VideoVAE, frames: Array, first: Array | int, spans: Spans
) -> Array:
  """Latents of one span.

  Args:
    frames: uint8 (b, spans.padded_frames, h, w, 3), see `Spans.pad`.
    first: int32 (), the span's first latent frame, a multiple of frames_per_call.

  Returns:
    float32 (b, spans.length, y, x, z), normalised.
  """
  b, _, height, width, _ = frames.shape
  scale, n = model.config.spatial_factor, spans.frames_per_call
  clip_start = vae.init_encoder_state(model, b, height // scale, width // scale)

  def step(state, inputs):
    piece, number = inputs
    # The clip may begin within the halo; what came before are placeholders.
    state = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), clip_start, state)
    latents, state = vae.encode_chunk(model, state, to_unit(piece))
    return state, latents

  pieces = frames.reshape(b, -1, spans.factor * n, *frames.shape[2:]).swapaxes(0, 1)
  numbers = first - spans.halo + n * jnp.arange(len(pieces))
  amid = dataclasses.replace(clip_start, started=jnp.ones((b,), bool))
  _, latents = lax.scan(step, amid, (pieces, numbers))  # (pieces, b, n, y, x, z)
  latents = latents[spans.halo // n :].swapaxes(0, 1)
  return latents.reshape(b, spans.length, *latents.shape[3:])


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
