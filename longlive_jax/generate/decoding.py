"""From latents to frames on the host: where the VAE's decoder runs, and waiting for it.

The decoder runs where its state is, which `place` decides together with its weights:
latents are sent there. Nothing here waits before `Frames.fetch`, so that one chunk is
decoded and copied while the next is denoised.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models import pixels, vae
from longlive_jax.models.vae_bands import WHOLE, Band
from longlive_jax.parallel import mesh as meshes

Array = jax.Array

SPACE = "space"


@dataclasses.dataclass(frozen=True)
class Frames:
  """Frames that may still be in the making.

  Attributes:
    padded: uint8 (b, t, h, w, 3) on the decoder's device, placeholders in front; one
      array for every call of the decoder.
    dropped: int32 (b,) beside each, how many placeholders; the same for all videos.
  """

  padded: tuple[Array, ...]
  dropped: tuple[Array, ...]

  def fetch(self) -> np.ndarray:
    """Waits for the frames, uint8 (b, t, h, w, 3) on the host."""
    padded, dropped = meshes.to_host((self.padded, self.dropped))
    pieces = zip(padded, dropped, strict=True)
    return np.concatenate([frames[:, int(n[0]) :] for frames, n in pieces], axis=1)


def placement(decode_on: str, mesh: Mesh | None, y: int, x: int) -> Sharding:
  """Where to decode, for `place`.

  Args:
    decode_on: 'same', where the transformer is; with several devices each has some of
      the videos. 'other', on the next device. 'split', every picture over all devices
      of the transformer, each with a band of its rows, or of its columns where rows do
      not divide (vae_bands.py).
    mesh: devices of the transformer; None for the first one.
    y, x: rows and columns of the latents.

  Returns:
    The sharding of latents, frames and histories: all are (b, t, rows, columns, c).

  Raises:
    ValueError: unknown; no device is left; neither rows nor columns divide.
  """
  devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
  if decode_on == "same":
    if mesh is None:
      return SingleDeviceSharding(devices[0])
    return meshes.sharding(mesh, P(meshes.DATA))
  if decode_on == "other":
    left = [device for device in jax.devices() if device not in devices]
    if not left:
      raise ValueError(
        f"decode_on='other' needs a device beside the {len(devices)} of the "
        "transformer, but there is none; use decode_on='same'"
      )
    return SingleDeviceSharding(left[0])
  if decode_on != "split":
    raise ValueError(f"decode_on={decode_on!r} is unknown; use same, other or split")
  count = len(devices)
  if y % count and x % count:
    fit = [n for n in range(1, jax.device_count() + 1) if y % n == 0 or x % n == 0]
    raise ValueError(
      f"decode_on='split' cannot share {y} rows or {x} columns of latents evenly among "
      f"devices={count}; use one of {fit}, or decode_on='same'"
    )
  space = Mesh(np.array(devices), (SPACE,), axis_types=(AxisType.Auto,))
  rows, columns = P(None, None, SPACE), P(None, None, None, SPACE)
  return meshes.sharding(space, columns if y % count else rows)


def place(
  video_vae: vae.VideoVAE, state: vae.DecoderState, where: Sharding
) -> tuple[vae.VideoVAE, vae.DecoderState]:
  """Weights and state moved to where the decoder is to run; shapes are told so."""
  state = vae.DecoderState(
    meshes.place(state.started, _leading(where, 1)),
    meshes.place(state.history, where),
  )
  return meshes.place(video_vae, _leading(where, 0)), state


def decode(
  video_vae: vae.VideoVAE | None,
  state: vae.DecoderState | None,
  latents: Array,
  frames_per_call: int = 1,
  tiles: int = 1,
) -> tuple[Frames | None, vae.DecoderState | None]:
  """Starts to decode the next latents of a clip, where its state is.

  Args:
    video_vae: weights, on the same devices as the state.
    state: its memory is reused. None decodes nothing.
    latents: (b, f, y, x, z), anywhere.
    frames_per_call: latent frames at a time at most.
    tiles: of `vae.decode_chunk`.
  """
  if state is None:
    return None, None
  where = state.history[0].sharding
  latents = jax.device_put(latents, where)
  count = _divisor(latents.shape[1], frames_per_call)
  found = []
  # Not a scan: inside of a loop XLA's convolutions on a CPU take several times longer.
  for first in range(0, latents.shape[1], count):
    *frames, state = _decode(
      video_vae, state, latents, np.int32(first), count, tiles, where
    )
    for array in frames:
      array.copy_to_host_async()
    found.append(frames)
  return Frames(*map(tuple, zip(*found, strict=True))), state


def compile_ahead(
  video_vae: vae.VideoVAE,
  state: vae.DecoderState,
  latents: jax.ShapeDtypeStruct,
  frames_per_call: int = 1,
  tiles: int = 1,
) -> jax.stages.Compiled:
  """Compiles what `decode` will run; arguments as there, with shapes for arrays.

  Returns:
    The program of one call: (video_vae, state, latents, int32 () of them that are
    decoded already) -> frames and dropped as in `Frames`, and the state.
  """
  where = state.history[0].sharding
  latents = meshes.place(latents, where)
  count = _divisor(latents.shape[1], frames_per_call)
  first = np.int32(0)
  lowered = _decode.lower(video_vae, state, latents, first, count, tiles, where)
  return lowered.compile()


def frames_remembered(config: vae.VAEConfig) -> int:
  """Latent frames after which a decoder's state depends on nothing that was before.

  It is the inputs of causal convolutions, all of kernel 3 in time: each looks two
  frames back, at its own rate. So the state can be had again, bit for bit, by decoding
  so many latent frames from any state: 3.2 GB that need not be kept at full size.
  """
  per_block, rate = 2 * 2, 1
  total = 2 + 2 * per_block  # conv1 and the middle
  for doubles in (*config.temporal_downsample[::-1], False):
    total += (config.num_res_blocks + 1) * per_block / rate
    if doubles:
      total += 2 / rate
      rate *= 2
  # The head; and a first frame, for which a decoder skips its time convolutions.
  return math.ceil(total + 2 / rate) + 1


@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=1)
def _decode(video_vae, state, latents, first, count, tiles, where):
  """Decodes latents[:, first : first + count].

  Returns frames uint8 (b, t, h, w, 3), placeholders included, their number, the state.
  """

  def own(video_vae, state, latents, first):
    piece = jax.lax.dynamic_slice_in_dim(latents, first, count, axis=1)
    frames, dropped, state = vae.decode_chunk(video_vae, state, piece, tiles, band)
    return pixels.to_uint8(frames), dropped, state

  band = _band(where)
  if not isinstance(where, NamedSharding):
    return own(video_vae, state, latents, first)
  # Each device runs its own part: XLA would gather what goes into a kernel of ours, and
  # it exchanges more between bands than they need.
  videos = _leading(where, 1).spec
  states = vae.DecoderState(videos, where.spec)
  # check_vma: JAX cannot know that a kernel's outputs differ between devices.
  return jax.shard_map(
    own,
    mesh=where.mesh,
    in_specs=(P(), states, where.spec, P()),
    out_specs=(where.spec, videos, states),
    check_vma=False,
  )(video_vae, state, latents, first)


def compiled_programs() -> int:
  """How many programs decoding has compiled so far."""
  return _decode._cache_size()


def _band(where: Sharding) -> Band:
  """What a device has of each picture."""
  axes = tuple(where.spec) if isinstance(where, NamedSharding) else ()
  if SPACE not in axes:
    return WHOLE
  return Band(where.mesh.shape[SPACE], SPACE, axes.index(SPACE))


def _leading(where: Sharding, axes: int) -> Sharding:
  """The sharding of arrays that have only the first axes, as programs return it."""
  if isinstance(where, NamedSharding):
    return meshes.sharding(where.mesh, P(*where.spec[:axes]))
  return where


def _divisor(frames: int, most: int) -> int:
  """The largest divisor of `frames` that is at most `most`."""
  return next(d for d in range(max(1, min(most, frames)), 0, -1) if frames % d == 0)
