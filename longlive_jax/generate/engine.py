"""What all sessions of a device share: networks, how to sample, text to embeddings.

  engine = load_engine(config)        # of configs/generate.py, as launch/generate.py
  engine.embed("A red star ...")      # float32 (k, text_dim), kept for the next time
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from longlive_jax.generate import decoding, networks, request, sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import text, vae

EMBEDDINGS = 64  # kept: 8 MB each at full size


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """Everything about sessions that does not change while they run.

  Attributes:
    model, video_vae: networks, committed to the first device.
    sampling: how; static under jit.
    embed: a prompt -> float32 (k, text_dim).
    negative: embedding of the negative prompt (k, text_dim); None if unguided.
    height, width: of the picture, in pixels.
    fps: video frames a second when played.
    decode_frames, decode_tiles: of `decoding.decode`.
    history_chunks: how many chunks a session can be rewound. Each costs host memory:
      `session.bytes_of`.

  Raises:
    ValueError: a picture or a number that cannot be; sampling with a first frame of
      its own, or with the reference's cache.
  """

  model: sampler.Model
  video_vae: vae.VideoVAE
  sampling: Sampling
  embed: Callable[[str], np.ndarray]
  negative: np.ndarray | None
  height: int
  width: int
  fps: float = 24.0
  decode_frames: int = 1
  decode_tiles: int = 1
  history_chunks: int = 8

  def __post_init__(self):
    if self.height % self._scale or self.width % self._scale:
      raise ValueError(
        f"height={self.height} and width={self.width} must be multiples of "
        f"{self._scale}"
      )
    _check(self.sampling, self.history_chunks)
    if self.sampling.branches == 2 and self.negative is None:
      raise ValueError(f"guidance={self.sampling.guidance} needs Engine.negative")

  @property
  def _scale(self) -> int:
    return self.video_vae.config.spatial_factor

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(y, x, c)."""
    scale, channels = self._scale, self.model.config.in_channels
    return self.height // scale, self.width // scale, channels

  @property
  def chunk_seconds(self) -> float:
    """How long a chunk plays."""
    frames = self.sampling.frames_per_chunk * self.video_vae.config.temporal_factor
    return frames / self.fps

  @property
  def decoder_chunks(self) -> int:
    """Chunks after which the decoder has forgotten what was before."""
    frames = decoding.frames_remembered(self.video_vae.config)
    return -(-frames // self.sampling.frames_per_chunk)

  @property
  def sink_chunks(self) -> int:
    """How many chunks at the start of the video are sinks; one, of a later shot."""
    return -(-self.sampling.sink_frames // self.sampling.frames_per_chunk)

  def picture_latents(self, frame: np.ndarray, *, first: bool) -> np.ndarray:
    """The latent frame (1, 1, y, x, c) of a picture.

    Args:
      frame: uint8 (h, w, 3), scaled to cover the video's and cropped at the centre.
      first: the video's first frame is a latent by itself; any other latent frame is
        that of the picture standing still.
    """
    still = request.cover(frame, self.height, self.width)
    frames = 1 + self.video_vae.config.temporal_factor
    video = request.to_model_range(np.broadcast_to(still, (1, frames, *still.shape)))
    latents = np.asarray(_encode(self.video_vae, video))
    return latents[:, :1] if first else latents[:, 1:]


@jax.jit
def _encode(video_vae: vae.VideoVAE, video: np.ndarray) -> jax.Array:
  return vae.encode(video_vae, video, 1)


def _check(sampling: Sampling, history_chunks: int) -> None:
  if history_chunks < 0:
    raise ValueError(f"history_chunks={history_chunks} must not be negative")
  for name in ("independent_first_frame", "reference"):
    if getattr(sampling, name):
      raise ValueError(f"{name}=True cannot be had in a session; use False")


def load_engine(config: Mapping[str, Any], *, history_chunks: int = 8) -> Engine:
  """The engine of a generate config (configs/generate.py).

  The text encoder stays in memory: prompts come at any time.

  Raises:
    ValueError: settings that are impossible; found before any network is read.
  """
  alone = {"devices": 1, "guidance_devices": 1, "sequence_devices": 1,
           "decode_on": "same"}  # fmt: skip
  for name, value in alone.items():
    if config[name] != value:
      raise ValueError(
        f"{name}={config[name]!r} must be {value!r}: sessions share one device"
      )
  sampling = sampler.Sampling(**networks.pick(sampler.Sampling, config))
  _check(sampling, history_chunks)
  sources = networks.find_all(
    networks.Choice(**networks.pick(networks.Choice, config))
  )
  request.check_picture(config["height"], config["width"], config["fps"])
  dtype = config["dtype"]
  embed = _embedder(sources, dtype)
  return Engine(
    model=networks.load(sources.dit, dtype),
    video_vae=networks.load(sources.vae, dtype),
    sampling=sampling,
    embed=embed,
    negative=embed(config["negative_prompt"]) if sampling.branches == 2 else None,
    history_chunks=history_chunks,
    **{name: config[name] for name in ("height", "width", "fps", "decode_frames",
                                       "decode_tiles")},
  )  # fmt: skip


def _embedder(sources: networks.Sources, dtype: str) -> Callable[[str], np.ndarray]:
  if sources.tokenizer is None:
    encode = functools.partial(networks.random_embeddings, source=sources.text)
  else:
    encoder = networks.load(sources.text, dtype)
    encode = functools.partial(
      text.embed_prompts, tokenizer=sources.tokenizer, load_encoder=lambda: encoder
    )

  @functools.lru_cache(maxsize=EMBEDDINGS)
  def embed(prompt: str) -> np.ndarray:
    return encode([prompt])[0]

  return embed
