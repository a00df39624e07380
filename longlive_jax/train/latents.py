"""Clips encoded once into memory, and batches of training sequences from them.

A toy clip of 12 chunks is 96 latent frames of 8 x 8 x 24 numbers: 590 KB in float32
against 19 MB of pixels. So a frozen VAE needs to run only once, before training.
"""

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clip import Chunking
from longlive_jax.data.clips import ClipSource, clip_batches, load_clips, stack
from longlive_jax.models.pixels import to_unit
from longlive_jax.models.text import Tokenizer
from longlive_jax.models.vae import (
  EncoderState,
  VideoVAE,
  encode,
  encode_chunk,
  init_encoder_state,
)
from longlive_jax.parallel import halo
from longlive_jax.parallel import mesh as meshes
from longlive_jax.train.context import draw_view

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LatentClips:
  """A set of clips of equal length, on the host.

  Attributes:
    latents: (n, f, y, x, c) float32.
    cuts: (n, chunks) bool.
    valid: (n,) int32, chunks from the start that are the clip's own.
    prompts: n tuples of `chunks` strings.
    names: n strings.
  """

  latents: np.ndarray
  cuts: np.ndarray
  valid: np.ndarray
  prompts: tuple[tuple[str, ...], ...]
  names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.latents)

  def captions(self) -> list[str]:
    """Every prompt that occurs, once, in order of first use."""
    return list(dict.fromkeys(p for prompts in self.prompts for p in prompts))


@dataclasses.dataclass(frozen=True)
class ViewSettings:
  """How sequences are cut out of clips; see train/context.py.

  Attributes:
    window: chunks of a sequence, and of the cache at generation.
    plain, no_sink, at_cut: probabilities of `draw_view`.
    sink, multi_shot_sink: rules of `window_chunks`.
    clean_recache: probability of that rule: generation may use it or not.
    caption_dropout: probability that a sequence gets the empty prompt throughout,
      which classifier-free guidance needs.
  """

  window: int = 4
  plain: float = 0.15
  no_sink: float = 0.1
  at_cut: float = 0.4
  sink: bool = True
  multi_shot_sink: bool = True
  clean_recache: float = 0.5
  caption_dropout: float = 0.1

  def draw(
    self, cuts: Sequence[bool], rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    return draw_view(
      cuts,
      rng,
      self.window,
      plain=self.plain,
      no_sink=self.no_sink,
      at_cut=self.at_cut,
      sink=self.sink,
      multi_shot_sink=self.multi_shot_sink,
      clean_recache=rng.random() < self.clean_recache,
    )


def encode_clips(
  source: ClipSource,
  vae: VideoVAE,
  chunking: Chunking,
  *,
  batch: int = 8,
  threads: int = 8,
) -> LatentClips:
  """Reads and encodes every readable clip of a folder.

  Args:
    source: the folder; of latents they are only read.
    vae: the frozen VAE, in the dtype it should compute in.
    chunking: what is taken of each clip; shorter ones are skipped.
    batch: clips encoded in one call.
    threads: clips read at a time.

  Raises:
    ValueError: no clip of the folder could be used, or they differ in size.
  """
  run = _encoder(chunking.frames_per_chunk)
  pieces, found = [], []
  for start in range(0, len(source), batch):
    part = ClipSource(source[start : start + batch])
    clips = load_clips(part, chunking, threads=threads)
    source.skipped.update(part.skipped)
    if not clips:
      continue
    if "latents" in clips[0]:
      pieces.append(stack(clips, "latents"))
      _check_channels(pieces[-1], vae)
    else:
      frames = stack(clips, "frames")
      # The last batch is filled up: one shape, one program.
      short = batch - len(frames)
      frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
      # Not fetched yet: the device encodes while the next clips are read.
      pieces.append(run(vae, frames)[: len(clips)])
    for clip in clips:
      found.append((clip["cuts"], clip["valid"], tuple(clip["prompts"]), clip["name"]))
    if (start // batch) % 50 == 0:
      _log.info("encoded %d of %d clips", len(found), len(source))
  if not found:
    raise ValueError(
      f"none of {len(source)} clips has {chunking.chunks} chunks of "
      f"{chunking.frames_per_chunk} latent frames; use a smaller chunks"
    )
  latents = np.concatenate([np.asarray(piece, np.float32) for piece in pieces])
  cuts, valid, prompts, names = zip(*found, strict=True)
  return LatentClips(latents, np.stack(cuts), np.stack(valid), prompts, names)


def cached_clips(
  folder: Path | None, identity: str, encode: Callable[[], LatentClips]
) -> LatentClips:
  """What `encode` returns, kept in a folder for the next run.

  A run that resumes must read the same bytes: encoding again may round differently,
  because a GPU chooses its convolution algorithms by timing them.

  Args:
    folder: of the cache; None keeps nothing.
    identity: changes when the clips or the VAE do; another one encodes again.
    encode: called if the cache does not fit.
  """
  if folder is None:
    return encode()
  record = folder / "about.json"
  try:
    about = json.loads(record.read_text())
    if about["identity"] == identity:
      prompts = tuple(tuple(row) for row in about["prompts"])
      cuts, valid = np.array(about["cuts"], bool), np.array(about["valid"], np.int32)
      names = tuple(about["names"])
      return LatentClips(np.load(folder / "latents.npy"), cuts, valid, prompts, names)
  except (OSError, ValueError, KeyError, TypeError):  # absent or half written
    pass
  clips = encode()
  folder.mkdir(parents=True, exist_ok=True)
  record.unlink(missing_ok=True)  # written last: with it, the cache is whole
  np.save(folder / "latents.npy", clips.latents)
  about = {
    "identity": identity,
    "cuts": clips.cuts.tolist(),
    "valid": clips.valid.tolist(),
    "prompts": clips.prompts,
    "names": clips.names,
  }
  record.write_text(json.dumps(about))
  return clips


def _check_channels(latents: np.ndarray, vae: VideoVAE) -> None:
  if latents.shape[-1] != vae.config.z_dim:
    raise ValueError(
      f"the folder's latents have {latents.shape[-1]} channels, those of the VAE "
      f"{vae.config.z_dim}; encode them again with this VAE (tools/encode_latents.py)"
    )


@jax.jit
def _next_latents(vae: VideoVAE, state: EncoderState, frames: jax.Array):
  return encode_chunk(vae, state, to_unit(frames))


def encode_video(
  vae: VideoVAE, frames: np.ndarray, frames_per_call: int
) -> np.ndarray:
  """One clip, uint8 (t, h, w, 3), to latents (f, y, x, c) float32.

  A program that is compiled once serves clips of all lengths.

  Args:
    frames: 4 f - 3 of them, f a multiple of frames_per_call.
  """
  scale, each = vae.config.spatial_factor, vae.config.temporal_factor * frames_per_call
  _, height, width, _ = frames.shape
  state = init_encoder_state(vae, 1, height // scale, width // scale)
  padded = np.pad(frames, ((-len(frames) % each, 0), (0, 0), (0, 0), (0, 0)))
  pieces = []
  for piece in np.split(padded, len(padded) // each):
    latents, state = _next_latents(vae, state, piece[None])
    pieces.append(latents[0])
  return np.concatenate(jax.device_get(pieces))


def encode_frames(vae: VideoVAE, frames: jax.Array, frames_per_call: int) -> jax.Array:
  """uint8 frames (b, t, h, w, 3) to latents (b, f, y, x, c) float32."""
  dtype = jax.tree.leaves(vae)[0].dtype
  video = to_unit(frames).astype(dtype)
  return encode(vae, video, frames_per_call).astype(jnp.float32)


def _encoder(frames_per_call: int) -> Callable[[VideoVAE, np.ndarray], jax.Array]:
  return jax.jit(lambda vae, frames: encode_frames(vae, frames, frames_per_call))


class Prompts:
  """Tokens of known prompts, by number; the last one is the empty prompt."""

  def __init__(self, tokenizer: Tokenizer, captions: Sequence[str]):
    self._number = {caption: i for i, caption in enumerate(captions)}
    self._ids, self._mask = tokenizer([*captions, ""])

  def rows(self, prompts: Sequence[str], dropped: bool) -> dict[str, np.ndarray]:
    """ids and text_mask (len(prompts), k) int32; `dropped` gives the empty prompt."""
    rows = [-1 if dropped else self._number[prompt] for prompt in prompts]
    return {"ids": self._ids[rows], "text_mask": self._mask[rows]}


class EncodedBatches:
  """Endless random batches of training sequences; the state resumes exactly.

  The latents lie on the device, and the host sends only which chunks of which clips a
  batch is made of. A set that is too large for the device is for `StreamedBatches`
  (data.encode_once=False). Clips are drawn with replacement.

  Each batch, with w = views.window chunks a sequence:
    latents (b, w * frames_per_chunk, y, x, c) float32
    mask (b, w * frames_per_chunk) float32, 1 where the loss counts
    ids, text_mask (b, w, k) int32, the tokens of each chunk's prompt

  Attributes:
    clips: names of the clips of the last batch.
  """

  def __init__(
    self,
    clips: LatentClips,
    tokenizer: Tokenizer,
    batch_size: int,
    views: ViewSettings,
    *,
    frames_per_chunk: int,
    seed: int,
  ):
    n = frames_per_chunk
    prompts = Prompts(tokenizer, clips.captions())

    # A whole batch is one element of grain's data set: it spends 0.4 ms on each, which
    # for one element a sequence was longer than a training step.
    def draw_batch(step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
      del step  # `rng` is already its own
      numbers = rng.integers(len(clips), size=batch_size)
      rows = [draw_sequence(number, rng) for number in numbers]
      return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def draw_sequence(number: int, rng: np.random.Generator) -> dict[str, Any]:
      chunks, counts = views.draw(clips.cuts[number][: clips.valid[number]], rng)
      dropped = rng.random() < views.caption_dropout
      return {
        "clip": np.int32(number),
        "frames": (chunks[:, None] * n + np.arange(n, dtype=np.int32)).ravel(),
        "mask": np.repeat(counts, n),
        **prompts.rows([clips.prompts[number][c] for c in chunks], dropped),
      }

    batches = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(draw_batch)
    self._batches = iter(batches.to_iter_dataset(grain.ReadOptions(8, 32)))
    self._latents, self._names = jax.device_put(clips.latents), clips.names
    self.clips: list[str] = []

  def get_state(self) -> dict[str, Any]:
    return self._batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._batches.set_state(state)

  def __next__(self) -> dict[str, Any]:
    batch = dict(next(self._batches))
    clip, frames = batch.pop("clip"), batch.pop("frames")
    self.clips = [self._names[number] for number in clip]
    return {"latents": _take_frames(self._latents, clip, frames), **batch}


@jax.jit
def _take_frames(latents: jax.Array, clip: jax.Array, frames: jax.Array) -> jax.Array:
  return latents[clip[:, None], frames]


class StreamedBatches:
  """Such batches with clips read and encoded as they come: for sets beyond memory.

  Clips come in epochs, every one once in each. On a mesh every device encodes its span
  of a clip (parallel/halo.py), and every process reads only the clips of its devices'
  samples, and of them only the frames that some of its devices encode.

  Attributes:
    clips: names of the clips that this process has of the last batch.
  """

  def __init__(
    self,
    source: ClipSource,
    vae: VideoVAE,
    tokenizer: Tokenizer,
    batch_size: int,
    views: ViewSettings,
    chunking: Chunking,
    *,
    seed: int,
    threads: int = 8,
    mesh: Mesh | None = None,
  ):
    self._rows = meshes.own_parts(batch_size, mesh)
    self._spans = halo.make_spans(
      vae,
      latents=chunking.chunks * chunking.frames_per_chunk,
      devices=1 if mesh is None else mesh.shape[meshes.SEQUENCE],
      frames_per_call=chunking.frames_per_chunk,
    )
    # Ascending: of the spans of this process's devices and their halos.
    self._frames = self._spans.frames_of(
      meshes.own_parts(self._spans.devices, mesh, meshes.SEQUENCE)
    )
    self._clips = clip_batches(
      source,
      batch_size,
      chunking,
      seed=seed,
      rows=self._rows,
      frames=self._frames,
      threads=threads,
    )
    self._vae, self._mesh = meshes.replicate(vae, mesh), mesh
    self._tokenizer, self._views, self._batch_size = tokenizer, views, batch_size
    self._frames_per_chunk, self._seed = chunking.frames_per_chunk, seed
    self._count, self.clips = 0, []

  def get_state(self) -> dict[str, Any]:
    return {"clips": self._clips.get_state(), "count": self._count}

  def set_state(self, state: dict[str, Any]) -> None:
    self._clips.set_state(state["clips"])
    self._count = state["count"]

  def __next__(self) -> dict[str, Any]:
    clips = next(self._clips)
    columns = [
      self._draw(row, cuts[:valid], prompts)
      for row, cuts, valid, prompts in zip(
        self._rows, clips["cuts"], clips["valid"], clips["prompts"], strict=True
      )
    ]
    self._count += 1
    stacked = {key: stack(columns, key) for key in columns[0]}
    batch = meshes.spread_rows(stacked, self._batch_size, self._mesh)
    if "latents" in clips:
      _check_channels(clips["latents"], self._vae)
      # Whole on each device of a sample: their frames need not divide.
      latents = meshes.spread_rows(
        clips["latents"], self._batch_size, self._mesh, P(meshes.DATA)
      )
    else:
      latents = self._encode(clips["frames"])
    self.clips = clips["name"]
    return {"latents": _take(latents, batch.pop("frames"), self._mesh), **batch}

  def _encode(self, video: np.ndarray) -> jax.Array:
    """Latents of all clips, of this process's frames, uint8 (rows, t, h, w, 3)."""
    place_of = {row: i for i, row in enumerate(self._rows)}

    def read(rows: range, start: int, stop: int) -> np.ndarray:
      first, last = np.searchsorted(self._frames, (start, stop))
      return video[[place_of[row] for row in rows], first:last]

    frames = halo.spread_frames(
      read,
      self._spans,
      self._mesh,
      batch=self._batch_size,
      height=video.shape[2],
      width=video.shape[3],
    )
    return halo.encode_spans(self._vae, frames, self._spans, self._mesh)

  def _draw(
    self, row: int, cuts: np.ndarray, prompts: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """Which frames a sample is made of, which count, and the tokens of its chunks."""
    # A generator of its own for each sample: nothing to save but the count, and no
    # matter which process draws.
    rng = np.random.default_rng((self._seed, self._count, row))
    chunks, counts = self._views.draw(cuts, rng)
    dropped = rng.random() < self._views.caption_dropout
    ids, text_mask = self._tokenizer(["" if dropped else prompts[c] for c in chunks])
    n = self._frames_per_chunk
    return {
      "frames": (chunks[:, None] * n + np.arange(n, dtype=np.int32)).ravel(),
      "mask": np.repeat(counts, n),
      "ids": ids,
      "text_mask": text_mask,
    }


@functools.partial(jax.jit, static_argnums=2)
def _take(latents: jax.Array, frames: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Latents (b, f, ...) of these frames (b, g)."""
  taken = jnp.take_along_axis(latents, frames[:, :, None, None, None], axis=1)
  return meshes.constrain(taken, meshes.CLIPS, mesh)
