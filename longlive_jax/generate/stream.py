"""A video as a stream: the chunk step driven from Python, decoded while it runs.

    state = init_state(model, vae, sampling, key=..., samples=..., y=44, x=80)
    for chunk in stream(model, vae, state, story, sampling):
      writer.append(chunk.frames[0])

Everything that persists between chunks is one pytree, `StreamState`. Saved, it resumes
to the same bytes; kept, it can be rewound to and branched from. There is one compiled
program for every chunk, whatever its prompt, its shot and the length of the video.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from longlive_jax.generate import decoding, on_mesh, sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers.kv_cache import KVCache
from longlive_jax.models import dit, vae
from longlive_jax.parallel import mesh as meshes

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
  """Where a stream of b videos stands.

  Attributes:
    cache: keys and values, b * sampling.branches rows.
    decoder: the VAE's state, or None when only latents are wanted.
    key: key data of the noise, uint32 (see jax.random.key_data).
    samples: int32 (b,), identity of each video for its noise.
    chunk: int32 (), number of the next new chunk.
    frame: int32 (), its first latent frame.
    finite: bool (), every latent so far was finite.
    latent_shape: (y, x, c), static.
  """

  cache: KVCache
  decoder: vae.DecoderState | None
  key: Array
  samples: Array
  chunk: Array
  frame: Array
  finite: Array
  latent_shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Story:
  """What happens when: the arrays of a storyboard with their embeddings.

  Attributes:
    embeddings: (prompts, k, text_dim).
    negative: embedding of the negative prompt (k, text_dim); None if unguided.
    prompt_index: int32 (chunks, b) into embeddings.
    cut: bool (chunks, b), the chunk starts a new shot.
    shot: int32 (chunks, b), number of the shot.
  """

  embeddings: np.ndarray
  negative: np.ndarray | None
  prompt_index: np.ndarray
  cut: np.ndarray
  shot: np.ndarray

  def __post_init__(self):
    if not self.prompt_index.shape == self.cut.shape == self.shot.shape:
      raise ValueError(
        f"prompt_index {self.prompt_index.shape}, cut {self.cut.shape} and shot "
        f"{self.shot.shape} must have one shape (chunks, b)"
      )

  @property
  def chunks(self) -> int:
    return self.prompt_index.shape[0]

  def at(self, index: int) -> "Moment":
    """What chunk `index` shows."""
    return Moment(
      text=self.embeddings[self.prompt_index[index]],
      negative=self.negative,
      cut=self.cut[index],
      shot=self.shot[index],
    )


@dataclasses.dataclass(frozen=True)
class Moment:
  """What the b videos show in one chunk.

  Attributes:
    text: prompt embeddings (b, k, text_dim).
    negative: (k, text_dim); None if unguided.
    cut: bool (b,), the chunk starts a new shot.
    shot: int32 (b,), number of the shot.
  """

  text: np.ndarray
  negative: np.ndarray | None
  cut: np.ndarray
  shot: np.ndarray


@dataclasses.dataclass(frozen=True)
class StreamedChunk:
  """One chunk of every video.

  Attributes:
    index: chunk number; None for latents that were given.
    latents: (b, f, y, x, c) on the device.
    decoded: its frames, which may still be in the making, on the decoder's device;
      None without a VAE.
  """

  index: int | None
  latents: Array
  decoded: decoding.Frames | None

  @property
  def frames(self) -> np.ndarray | None:
    """uint8 (b, t, h, w, 3) on the host, waited for; None without a VAE."""
    return self.decoded and self.decoded.fetch()


def init_state(
  model: sampler.Model,
  video_vae: vae.VideoVAE | None,
  sampling: Sampling,
  *,
  key: Array,
  samples: np.ndarray,
  y: int,
  x: int,
  mesh: jax.sharding.Mesh | None = None,
) -> StreamState:
  """The state before the first chunk of len(samples) videos of y x x latents.

  Args:
    mesh: of `mesh.generation_mesh`; every device makes its own part. None is the first
      device.

  Raises:
    ValueError: when y or x is odd (a token is 2 x 2).
  """
  patch = model.config.patch
  for name, value in (("height", y), ("width", x)):
    if value % patch:
      raise ValueError(f"{name} of {value} latents must be a multiple of {patch}")
  batch = len(samples)

  def build() -> StreamState:
    return StreamState(
      cache=sampler.init_cache(model, sampling, batch, y, x),
      decoder=vae.init_decoder_state(video_vae, batch, y, x) if video_vae else None,
      key=jax.random.key_data(key),
      samples=jnp.asarray(samples, jnp.int32),
      chunk=jnp.int32(0),
      frame=jnp.int32(0),
      finite=jnp.bool_(True),
      latent_shape=(y, x, model.config.in_channels),
    )

  if mesh is None:
    # Committed, as what the steps return is: else the second chunk compiles again.
    return jax.device_put(build(), jax.local_devices()[0])
  # Never whole on one device: the caches of all videos would not fit there.
  spread = shard_state(jax.eval_shape(build), mesh)
  return jax.jit(build, out_shardings=jax.tree.map(lambda a: a.sharding, spread))()


def shard_state(state: StreamState, mesh: jax.sharding.Mesh | None) -> StreamState:
  """Spreads a stream over the devices of `mesh.generation_mesh`.

  Args:
    state: arrays, or shapes, which get a sharding: what to load a saved state as.
  """
  whole, videos = P(), P(meshes.DATA)
  specs = StreamState(
    cache=on_mesh.cache_specs(state.cache),
    decoder=videos,
    key=whole,
    samples=videos,
    chunk=whole,
    frame=whole,
    finite=whole,
    latent_shape=state.latent_shape,
  )
  return meshes.spread(state, specs, mesh)


def copy_state(state: StreamState) -> StreamState:
  """A copy to come back to: the stream reuses the memory of the original."""
  return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=1)
def _denoise(model, cache, chunk, sampling, mesh):
  latents, cache = on_mesh.denoise_chunk(model, cache, chunk, sampling, mesh)
  return latents, jnp.all(jnp.isfinite(latents)), cache


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def _remember(model, cache, latents, chunk, sampling, mesh):
  return on_mesh.clean_pass(model, cache, latents, chunk, sampling, mesh)


@functools.partial(jax.jit, static_argnums=3)
def _noise(key, samples, frames, shape):
  key = jax.random.wrap_key_data(key)
  return sampler.frame_noise(key, samples, frames, shape)


def compiled_programs() -> dict[str, int]:
  """How many programs the stream has compiled so far, by step."""
  steps = {"denoise": _denoise, "remember": _remember}
  programs = {name: step._cache_size() for name, step in steps.items()}
  return programs | {"decode": decoding.compiled_programs()}


def compile_ahead(
  model: sampler.Model,
  video_vae: vae.VideoVAE | None,
  state: StreamState,
  story: Story,
  sampling: Sampling,
  *,
  decode_frames: int = 1,
  decode_tiles: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  decode_on: jax.sharding.Sharding | None = None,
) -> None:
  """Compiles the steps that `stream` will take, so that it finds them compiled.

  What a step returns is described to the next one, as in the stream itself. Steps for
  given latents are left out.

  Args:
    model, video_vae, state: shapes for arrays, which will be committed to the first
      device, or be spread over the mesh: for arrays elsewhere `stream` compiles again.
    story, sampling, decode_frames, decode_tiles, mesh: as for `stream`.
    decode_on: from `decoding.placement`; None decodes where everything else is.
  """
  if mesh is None:
    model, state = meshes.place((model, state), jax.local_devices()[0])
  else:
    model, state = meshes.replicate(model, mesh), shard_state(state, mesh)
  decoder = state.decoder
  if decoder is not None:
    y, x, _ = state.latent_shape
    decode_on = decode_on or decoding.placement("same", mesh, y, x)
    video_vae, decoder = decoding.place(video_vae, decoder, decode_on)
  b, n = state.samples.shape[0], sampling.frames_per_chunk
  for length in [1, n] if sampling.independent_first_frame else [n]:
    frames = meshes.shard_batch(_frame_numbers(b, 0, length), mesh)
    noise = _outputs(_noise, state.key, state.samples, frames, state.latent_shape)
    chunk = chunk_inputs(model.config, sampling, story.at(0), 0, noise, mesh=mesh)
    latents, _, _ = _outputs(_denoise, model, state.cache, chunk, sampling, mesh)
    if decoder is not None:
      decoding.compile_ahead(video_vae, decoder, latents, decode_frames, decode_tiles)


def _outputs(step: Callable, *arguments) -> tuple[Array, ...]:
  """Compiles a step for abstract arguments; what it returns, abstract and in place."""
  lowered = step.lower(*arguments)
  return jax.tree.map(
    meshes.place, lowered.out_info, lowered.compile().output_shardings
  )


def stream(
  model: sampler.Model,
  video_vae: vae.VideoVAE | None,
  state: StreamState,
  story: Story,
  sampling: Sampling,
  *,
  image: Array | None = None,
  given: Array | None = None,
  decode_frames: int = 1,
  decode_tiles: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  should_stop: Callable[[], bool] = lambda: False,
  on_state: Callable[[int, StreamState], None] | None = None,
) -> Iterator[StreamedChunk]:
  """Generates the story's chunks from `state.chunk` on.

  A chunk is handed out when the next one is already under way and its own latents are
  known to be finite; its frames are waited for where they are asked for. So there is
  never more than one chunk ahead of the caller. The memory of `state` is reused: keep
  `copy_state(state)` to branch.

  Args:
    model, video_vae: networks; without a VAE only latents come out.
    state: from init_state, a saved state, or `copy_state` of one.
    story: of state.samples' videos.
    sampling: static.
    image: latents (b, m, y, x, c) that the first m frames are held to, m at most a
      chunk: image-to-video. Only looked at while state.chunk is 0.
    given: latents (b, f, y, x, c) that the video starts with; they are remembered,
      decoded and handed out first. Only looked at while state.frame is 0.
    decode_frames: latent frames that the VAE decodes at a time.
    decode_tiles: in how many tiles; see `vae.decode_chunk`.
    mesh: of `mesh.generation_mesh`, spreads the work over devices; the state must be
      sharded alike.
    should_stop: asked before each chunk; what is under way is still handed out.
    on_state: called with the number of chunks done and the state, before the next
      chunk reuses its memory; copy or save it there.

  Yields:
    StreamedChunk, given latents first.

  Raises:
    ValueError: given latents, image or story that do not fit.
    FloatingPointError: a latent is not finite; names the chunk.
  """
  n = sampling.frames_per_chunk
  _check(state, story, sampling, image, given)
  inputs = functools.partial(chunk_inputs, model.config, sampling, mesh=mesh)

  index, frame = int(state.chunk), int(state.frame)
  pending = None
  if given is not None and frame == 0:
    for length in _lengths(given.shape[1], n, sampling.independent_first_frame):
      piece = np.asarray(given[:, frame : frame + length], np.float32)
      piece = jnp.asarray(meshes.shard_batch(piece, mesh))
      first = story.at(0)
      chunk = inputs(
        dataclasses.replace(first, cut=np.zeros_like(first.cut)), frame, piece
      )
      cache = _remember(model, state.cache, piece, chunk, sampling, mesh)
      decoded, decoder = decoding.decode(
        video_vae, state.decoder, piece, decode_frames, decode_tiles
      )
      frame += length
      state = dataclasses.replace(
        state, cache=cache, decoder=decoder, frame=state.frame + length
      )
      yield StreamedChunk(None, piece, decoded)

  while index < story.chunks and not should_stop():
    alone = sampling.independent_first_frame and frame == 0 and image is None
    length = 1 if alone else n
    noise = chunk_noise(state, frame, length, mesh=mesh)
    known = image if index == 0 else None
    chunk = inputs(story.at(index), frame, noise, known)
    latents, finite, decoded, state = step(
      model,
      video_vae,
      state,
      chunk,
      sampling,
      decode_frames=decode_frames,
      decode_tiles=decode_tiles,
      mesh=mesh,
    )
    index, frame = index + 1, frame + length
    if pending is not None:
      yield _checked(*pending)
    pending = (index - 1, latents, finite, decoded)
    if on_state is not None:
      on_state(index, state)
  if pending is not None:
    yield _checked(*pending)


def _check(state, story, sampling, image, given) -> None:
  """Raises ValueError for inputs that do not fit the stream."""
  b, n = state.samples.shape[0], sampling.frames_per_chunk
  if story.prompt_index.shape[1] != b:
    raise ValueError(
      f"the story is for {story.prompt_index.shape[1]} videos, the state for {b}"
    )
  if sampling.branches == 2 and story.negative is None:
    raise ValueError(f"guidance={sampling.guidance} needs Story.negative")
  for name, latents in (("image", image), ("given", given)):
    if latents is None:
      continue
    want = (b, latents.shape[1], *state.latent_shape)
    if latents.shape != want:
      raise ValueError(f"{name} has shape {latents.shape}; must be {want}")
  if image is not None and image.shape[1] > n:
    raise ValueError(
      f"image has {image.shape[1]} latent frames; at most frames_per_chunk={n}"
    )
  if given is not None:
    first = 1 if sampling.independent_first_frame else 0
    if given.shape[1] < 1 or (given.shape[1] - first) % n:
      raise ValueError(
        f"given has {given.shape[1]} latent frames; must be {first} plus a multiple "
        f"of frames_per_chunk={n}"
      )


def _frame_numbers(b: int, first: int, length: int) -> np.ndarray:
  """int32 (b, length)."""
  return np.tile(np.arange(first, first + length, dtype=np.int32), (b, 1))


def chunk_noise(
  state: StreamState, frame: int, length: int, *, mesh: jax.sharding.Mesh | None = None
) -> Array:
  """The noise of `length` latent frames from `frame` on, (b, length, y, x, c)."""
  numbers = _frame_numbers(state.samples.shape[0], frame, length)
  numbers = meshes.shard_batch(numbers, mesh)
  return _noise(state.key, state.samples, numbers, state.latent_shape)


def chunk_inputs(
  config: dit.WanConfig,
  sampling: Sampling,
  moment: Moment,
  frame: int,
  noise: Array | jax.ShapeDtypeStruct,
  known: Array | None = None,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> sampler.ChunkInputs:
  """Inputs of a chunk at latent frame `frame`; `known` latents are its first frames."""
  b, f = noise.shape[:2]
  frames = _frame_numbers(b, frame, f)
  fixed = np.zeros((b, f), bool)
  held = np.zeros(noise.shape, np.float32)
  if known is not None:
    fixed[:, : known.shape[1]] = True
    held[:, : known.shape[1]] = known
  negative = None
  if sampling.branches == 2:
    negative = np.broadcast_to(moment.negative, moment.text.shape)
  chunk = sampler.ChunkInputs(
    noise=noise,
    text=moment.text,
    negative=negative,
    frames=frames,
    temporal=sampler.chunk_temporal(config, sampling, frames, moment.shot),
    cut=moment.cut,
    known=fixed,
    given=held,
  )
  return meshes.shard_batch(chunk, mesh)


def step(
  model: sampler.Model,
  video_vae: vae.VideoVAE | None,
  state: StreamState,
  chunk: sampler.ChunkInputs,
  sampling: Sampling,
  *,
  decode_frames: int = 1,
  decode_tiles: int = 1,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Array, Array, decoding.Frames | None, StreamState]:
  """Generates, remembers and decodes one chunk; waits for nothing.

  Args:
    chunk: from `chunk_inputs`, at `state.frame`. The rest is as for `stream`.

  Returns:
    latents (b, f, y, x, c), whether they are finite, bool (), the frames, and the
    state after the chunk, which took over the memory of `state`.
  """
  latents, finite, cache = _denoise(model, state.cache, chunk, sampling, mesh)
  decoded, decoder = decoding.decode(
    video_vae, state.decoder, latents, decode_frames, decode_tiles
  )
  state = dataclasses.replace(
    state,
    cache=cache,
    decoder=decoder,
    chunk=state.chunk + 1,
    frame=state.frame + latents.shape[1],
    finite=state.finite & finite,
  )
  return latents, finite, decoded, state


def _lengths(frames: int, n: int, first_alone: bool) -> list[int]:
  """Chunk lengths that make up a number of given frames."""
  return [1] * first_alone + [n] * ((frames - first_alone) // n)


def _checked(index, latents, finite, decoded) -> StreamedChunk:
  """Waits for the latents of a chunk."""
  if not bool(finite):
    raise FloatingPointError(
      f"chunk={index} has latents that are not finite; the weights or the guidance "
      "scale are likely at fault"
    )
  return StreamedChunk(index, latents, decoded)
