"""Batches of storyboards for distillation, which needs no videos: prompts and cuts.

For image-to-video every story has a first frame besides.
"""

import sys
from typing import Any

import grain
import jax
import numpy as np

from longlive_jax.generate.storyboard import StoryboardArrays
from longlive_jax.models.vae import VideoVAE
from longlive_jax.train.distill import Stories
from longlive_jax.train.latents import encode_frames


class StoryBatches:
  """Endless random batches of `Stories` on the host; the state resumes exactly.

  Stories are drawn with replacement. A batch has one length, drawn from a range: each
  story's first chunks.

  Args:
    arrays: of a storyboard whose samples are the stories to draw from.
    embeddings: of arrays.prompts, (prompts, k, text_dim).
    given: first frames (stories, g, y, x, c); g = 0 is text-to-video.
    lengths: least and most chunks.
  """

  def __init__(
    self,
    arrays: StoryboardArrays,
    embeddings: np.ndarray,
    given: np.ndarray,
    batch_size: int,
    lengths: tuple[int, int],
    seed: int,
  ):
    self._arrays, self._embeddings, self._given = arrays, embeddings, given
    least, most = lengths

    def draw_batch(step: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
      del step  # `rng` is already its own
      numbers = rng.integers(arrays.cut.shape[1], size=batch_size)
      return numbers, int(rng.integers(least, most + 1))

    batches = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(draw_batch)
    self._batches = iter(batches.to_iter_dataset(grain.ReadOptions(1, 2)))

  def get_state(self) -> dict[str, Any]:
    return self._batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._batches.set_state(state)

  def __next__(self) -> Stories:
    numbers, chunks = next(self._batches)
    return Stories(
      text=self._embeddings[self._arrays.prompt_index[:chunks, numbers].T],
      cuts=self._arrays.cut[:chunks, numbers].T,
      given=self._given[numbers],
    )


def encode_images(
  video_vae: VideoVAE, images: np.ndarray, batch: int = 8
) -> np.ndarray:
  """First frames uint8 (n, h, w, 3) as latents (n, 1, y, x, c) float32."""
  run = jax.jit(encode_frames, static_argnums=2)
  # The last batch is filled up: one shape, one program.
  short = -len(images) % batch
  frames = np.concatenate([images, np.repeat(images[-1:], short, axis=0)])[:, None]
  pieces = [
    np.asarray(run(video_vae, frames[i : i + batch], 1))
    for i in range(0, len(frames), batch)
  ]
  return np.concatenate(pieces)[: len(images)]
