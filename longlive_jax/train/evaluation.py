"""Videos of the same prompts, made now and then while training goes on, and scores.

  task = find_task(settings, from_image=False)
  evaluation = Evaluation(task, settings, sampling, video_vae, tokenizer, ...)
  scores = evaluation(*generating(state.ema, base, "bfloat16"), step)

The programs are those of generation (generate/stream.py); they compile for the first
evaluation. Nothing of a training's state is changed, and none of its draws are made.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.checkpoint.lora import attach_lora
from longlive_jax.data import detectors, scores, toy_render, toy_world
from longlive_jax.data.toy_world import Scene
from longlive_jax.data.video import VideoWriter
from longlive_jax.generate import report, request, storyboard
from longlive_jax.generate import stream as streams
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit, text, umt5, vae
from longlive_jax.parallel import mesh as meshes
from longlive_jax.train import state as train_state

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Which videos are made, and when.

  Attributes:
    every: steps from one evaluation to the next; 0 is never.
    prompts: text file or folder of captions, with first frames a folder of images and
      texts, as launch/generate.py reads them. '' takes held-out scenes of the toy
      world, whose videos are scored.
    videos: how many, at most.
    batch: videos that are generated together.
    chunks: length of a video.
    negative_prompt: what guidance leads away from.
    seed: of noise and scenes.
  """

  every: int = 0
  prompts: str = ""
  videos: int = 8
  batch: int = 8
  chunks: int = 4
  negative_prompt: str = ""
  seed: int = 0

  def __post_init__(self):
    if self.every < 0:
      raise ValueError(f"eval.every={self.every} must not be negative; 0 is never")
    for name in ("videos", "batch", "chunks"):
      if getattr(self, name) < 1:
        raise ValueError(f"eval.{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Task:
  """What is to be seen.

  Attributes:
    board: prompts and cuts, and images if videos start from those of a folder.
    scenes: of the toy world, one a video; none for other prompts.
    from_image: videos start from a first frame.
  """

  board: storyboard.Storyboard
  scenes: tuple[Scene, ...]
  from_image: bool

  def check_picture(self, height: int, width: int) -> None:
    """Raises ValueError for scenes of the toy world in another size than theirs."""
    size = toy_render.IMAGE_SIZE
    if self.scenes and (height, width) != (size, size):
      raise ValueError(
        f"eval.prompts='' are scenes of the toy world, {size} x {size} pixels, but "
        f"clips have {height} x {width}; give a file or folder of prompts"
      )

  def first_frames(self, height: int, width: int) -> np.ndarray | None:
    """uint8 (videos, h, w, 3); None for text to video."""
    if not self.from_image:
      return None
    if not self.scenes:
      return request.first_frames(self.board, height, width)
    shots = [toy_world.render_shot(s.subject, s.shots[0], 1) for s in self.scenes]
    return np.concatenate(shots)


def find_task(settings: EvalSettings, *, from_image: bool) -> Task:
  """Reads the prompts, or draws the scenes: two shots each, as far as chunks allow.

  Raises:
    ValueError: as `request.build_storyboard`.
  """
  if settings.prompts:
    kind = "images" if from_image else "prompts"
    board = request.build_storyboard(
      **{kind: settings.prompts}, chunks=settings.chunks
    )
    board = storyboard.Storyboard(board.samples[: settings.videos])
    return Task(board, (), from_image)
  second = settings.chunks // 2
  lengths = (settings.chunks - second, second) if second else (settings.chunks,)
  first = settings.seed * 1_000_000
  numbers = range(first, first + settings.videos)
  scenes = tuple(toy_world.heldout_scene(number, lengths) for number in numbers)
  prompts = [scores.scene_prompts(scene) for scene in scenes]
  return Task(storyboard.from_prompt_lists(prompts), scenes, from_image)


@functools.partial(jax.jit, static_argnums=1)
def _cast(networks: dict[str, Any], dtype: str) -> dict[str, Any]:
  return train_state.cast(networks, dtype)


def generating(
  ema: dict[str, Any], base: dict[str, Any], dtype: str
) -> tuple[dit.CausalDiT, umt5.UMT5Encoder]:
  """Transformer and text encoder as generation has them, on the first device.

  Args:
    ema: averages of what is trained; base: what it stands on, see `step.make_loss`. In
      a run of several processes all have to ask.
  """
  # Not the base under jit, which would copy what has the dtype already: all of it.
  found = {**train_state.cast(base, dtype), **_cast(ema, dtype)}
  found = meshes.on_first_device(found)
  model = found["dit"]
  if "lora" in found:
    model = attach_lora(model, found["lora"])
  return model, found["text"]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
  """Makes the videos of a task, always with the same noise.

  Attributes:
    task, settings: what; `settings.every` is for the caller.
    sampling: how.
    video_vae: on the first device.
    tokenizer: of the text encoder.
    folder: videos go to folder/<step>.
    given: latents of first frames (videos, 1, y, x, c); None for text to video.
    latent_shape: (y, x).
    fps: of the files.
    decode_frames: latent frames decoded at a time.
  """

  task: Task
  settings: EvalSettings
  sampling: Sampling
  video_vae: vae.VideoVAE
  tokenizer: text.Tokenizer
  folder: Path
  given: np.ndarray | None
  latent_shape: tuple[int, int]
  fps: float = 24.0
  decode_frames: int = 8

  def __call__(
    self,
    networks: Callable[[], tuple[dit.CausalDiT, umt5.UMT5Encoder]],
    step: int,
  ) -> dict[str, float]:
    """Writes video_<number>.mp4, shots.png and scores.json; returns the scores.

    What cannot be generated or written, also for lack of memory, is reported and never
    ends a training.

    Args:
      networks: gives transformer and text encoder, see `generating`.
    """
    folder = self.folder / str(step)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      found = self._make_videos(*networks(), folder)
      measured = score(self.task.scenes, found) if self.task.scenes else {}
      prompts = [sample.prompts for sample in self.task.board.samples]
      content = {"step": step, "scores": measured, "prompts": prompts}
      report.write_json(folder / "scores.json", content)
    except (OSError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
      log.warning("no evaluation of step %d: %s", step, error)
      return {}
    return {f"eval_{name.replace(' ', '_')}": v for name, v in measured.items()}

  def _make_videos(
    self, model: dit.CausalDiT, encoder: umt5.UMT5Encoder, folder: Path
  ) -> list[list[detectors.Detection]]:
    """Generates and writes all videos; what is in each shot of scenes."""
    board, sheet = self.task.board, report.ContactSheet()
    arrays = board.arrays()
    embeddings = text.embed_prompts(
      [*arrays.prompts, self.settings.negative_prompt], self.tokenizer, lambda: encoder
    )
    found = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for first in range(0, board.batch, self.settings.batch):
        # The last batch is filled up: one shape, one program.
        rows = np.arange(first, first + self.settings.batch) % board.batch
        chunks = self._generate(model, embeddings, arrays, rows)
        for i, number in enumerate(rows[: board.batch - first]):
          shots = arrays.shot[:, number]
          with VideoWriter(folder / f"video_{number:03d}.mp4", fps=self.fps) as writer:
            for frames, shot in zip(chunks, shots, strict=True):
              writer.append(frames[i])
              sheet.add(number, int(shot), frames[i])
          if self.task.scenes:
            pieces = [
              np.concatenate([chunks[c][i] for c in np.flatnonzero(shots == shot)])
              for shot in np.unique(shots)
            ]
            found.append([pool.submit(detectors.detect, piece) for piece in pieces])
      sheet.save(folder / "shots.png")
      return [[future.result() for future in row] for row in found]

  def _generate(
    self,
    model: dit.CausalDiT,
    embeddings: np.ndarray,
    arrays: storyboard.StoryboardArrays,
    rows: np.ndarray,
  ) -> list[np.ndarray]:
    """Some of the videos as one batch: uint8 (b, t, h, w, 3) a chunk."""
    story = streams.Story(
      embeddings=embeddings[:-1],
      negative=embeddings[-1] if self.sampling.branches == 2 else None,
      prompt_index=arrays.prompt_index[:, rows],
      cut=arrays.cut[:, rows],
      shot=arrays.shot[:, rows],
    )
    y, x = self.latent_shape
    state = streams.init_state(
      model,
      self.video_vae,
      self.sampling,
      key=jax.random.key(self.settings.seed),
      samples=rows,
      y=y,
      x=x,
    )
    chunks = streams.stream(
      model,
      self.video_vae,
      state,
      story,
      self.sampling,
      image=None if self.given is None else self.given[rows],
      decode_frames=self.decode_frames,
    )
    return [chunk.frames for chunk in chunks]


def score(
  scenes: Sequence[Scene], found: Sequence[Sequence[detectors.Detection]]
) -> dict[str, float]:
  """What is right in the last shots, and whether they show the first ones' subjects."""
  measured = scores.score_last_shot(scenes, found)
  several = len(scenes[0].shots) > 1
  return measured | scores.score_subject(found) if several else measured
