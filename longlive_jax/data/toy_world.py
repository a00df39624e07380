"""The toy world: rendered clips of one subject in several shots, with captions.

A clip shows one subject (shape, colour, size, texture) in one or more shots; every
shot has a background and a motion law, and a hard cut separates shots. Everything
can be read back from frames by `detectors.py`, so quality is a number.

Later shots are captioned four times in five by a back reference ("the same subject
slides from side to side on the sand") that names neither shape nor colour: the
model can then draw the right subject only from what it remembers of earlier shots.

One combination in ten of (shape, colour, background, motion), chosen by a hash, is
held out: it never appears in a training clip and makes up the evaluation prompts.

Write a training set (videos/<id>.mp4, caption/<id>/0.json ..., shot_durations.txt):

  python -m longlive_jax.data.toy_world --out DIR --clips 4000 --workers 16
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longlive_jax.data.toy_render import (
  AMPLITUDE,
  BACKGROUNDS,
  COLOURS,
  IMAGE_SIZE,
  MOTIONS,
  REACH,
  SHAPES,
  SIZES,
  TEXTURES,
  background_image,
  coverage,
  motion_offset,
  texture_shade,
)
from longlive_jax.data.video import VideoWriter

FPS = 24
FRAMES_PER_CHUNK = 32  # video frames of 8 latent frames; the first chunk has 29

# The first wording of every list is the plain one; the others are paraphrases.
# The size is sometimes left out, as people do.
SIZE_WORDS = {"small": ("small ", "little ", ""), "large": ("large ", "big ", "")}
TEXTURE_WORDS = {
  "solid": ("",),
  "striped": ("striped ",),
  "dotted": ("dotted ", "spotted "),
}
MOTION_WORDS = {
  "slide": ("slides from side to side", "glides left and right"),
  "bounce": ("bounces up and down", "moves up and down"),
  "circle": ("circles around", "moves in circles"),
  "diagonal": ("moves along a diagonal", "drifts diagonally"),
}
BACKGROUND_WORDS = {
  "night sky": ("in the night sky", "under a starry night sky"),
  "sand": ("on the sand", "over a sandy desert"),
  "grass": ("on the grass", "over a meadow"),
  "brick wall": ("in front of a brick wall", "over a brick wall"),
  "checkerboard": ("on a checkerboard", "over a checkered floor"),
  "water": ("on the water", "over gentle waves"),
  "wood": ("on wooden planks", "over a wooden floor"),
  "curtain": ("in front of a curtain", "before a heavy curtain"),
}
BACK_REFERENCES = ("the same subject", "the same object", "it")


@dataclass(frozen=True)
class Subject:
  shape: str  # of SHAPES
  colour: str  # of COLOURS
  size: str  # of SIZES
  texture: str  # of TEXTURES


@dataclass(frozen=True)
class Shot:
  """`chunks` chunks of one background and one motion."""

  background: str  # of BACKGROUNDS
  motion: str  # of MOTIONS
  centre: tuple[float, float]  # x, y in pixels that the motion goes around
  phase: float  # radians at the shot's first frame
  chunks: int
  caption: str


@dataclass(frozen=True)
class Scene:
  """One clip. Every shot shows the same subject."""

  subject: Subject
  shots: tuple[Shot, ...]

  @property
  def chunks(self) -> int:
    return sum(shot.chunks for shot in self.shots)


# ---------------------------------------------------------------- what may appear


def is_held_out(shape: str, colour: str, background: str, motion: str) -> bool:
  """True for the tenth of all combinations that training never shows."""
  key = f"{shape}|{colour}|{background}|{motion}".encode()
  return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 10 == 0


@functools.cache
def held_out_combinations() -> tuple[tuple[str, str, str, str], ...]:
  """All held-out (shape, colour, background, motion)."""
  return tuple(
    (shape, colour, background, motion)
    for shape in SHAPES
    for colour in COLOURS
    for background in BACKGROUNDS
    for motion in MOTIONS
    if is_held_out(shape, colour, background, motion)
  )


# ---------------------------------------------------------------- captions


def describe(
  subject: Subject,
  background: str,
  motion: str,
  *,
  back_reference: bool = False,
  rng: np.random.Generator | None = None,
) -> str:
  """The caption of one shot, e.g. "A large striped red circle circles around on
  the sand."; with `rng` a random paraphrase, without it the plain wording."""

  def pick(options):
    return options[0] if rng is None else options[rng.integers(len(options))]

  if back_reference:
    who = pick(BACK_REFERENCES)
  else:
    size, texture = pick(SIZE_WORDS[subject.size]), pick(TEXTURE_WORDS[subject.texture])
    what = f"{size}{texture}{subject.colour} {subject.shape}"
    who = f"an {what}" if what[0] in "aeiou" else f"a {what}"
  does, where = pick(MOTION_WORDS[motion]), pick(BACKGROUND_WORDS[background])
  place_first = rng is not None and rng.random() < 0.25
  text = f"{where}, {who} {does}" if place_first else f"{who} {does} {where}"
  return text[0].upper() + text[1:] + "."


# ---------------------------------------------------------------- scenes


def training_scene(seed: int, chunks: int = 12) -> Scene:
  """A random clip of `chunks` chunks without any held-out combination.

  One clip in five is a single shot; the others have shots of 1 to 4 chunks.
  """
  rng = np.random.default_rng((seed, 0))
  subject = _random_subject(rng)
  shots: list[Shot] = []
  left = chunks
  single = rng.random() < 0.2
  while left:
    length = left if single else min(left, int(rng.integers(1, 5)))
    while True:
      background, motion = _choice(rng, BACKGROUNDS), _choice(rng, MOTIONS)
      repeats = bool(shots) and background == shots[-1].background
      held_out = is_held_out(subject.shape, subject.colour, background, motion)
      if not repeats and not held_out:
        break
    back_reference = bool(shots) and rng.random() < 0.8
    shots.append(_shot(rng, subject, background, motion, length, back_reference))
    left -= length
  return Scene(subject, tuple(shots))


def heldout_scene(
  seed: int, shot_chunks: tuple[int, ...] = (1,), *, back_references: bool = True
) -> Scene:
  """A clip for evaluation: its first shot is a held-out combination.

  Later shots (one per entry of `shot_chunks`, its length in chunks) are captioned by
  back references only, or by full descriptions if `back_references` is False, and have
  any other background and motion.
  """
  rng = np.random.default_rng((seed, 1))
  combinations = held_out_combinations()
  shape, colour, background, motion = combinations[rng.integers(len(combinations))]
  subject = Subject(shape, colour, _choice(rng, tuple(SIZES)), _choice(rng, TEXTURES))
  shots = [_shot(rng, subject, background, motion, shot_chunks[0], False)]
  for length in shot_chunks[1:]:
    others = tuple(name for name in BACKGROUNDS if name != shots[-1].background)
    background, motion = _choice(rng, others), _choice(rng, MOTIONS)
    shots.append(_shot(rng, subject, background, motion, length, back_references))
  return Scene(subject, tuple(shots))


def heldout_prompts(n: int, seed: int = 0) -> list[Scene]:
  """`n` single-shot scenes of held-out combinations, the prompt in
  `scene.shots[0].caption`; they go through all combinations before any repeats."""
  rng = np.random.default_rng((seed, 2))
  combinations = held_out_combinations()
  scenes: list[Scene] = []
  while len(scenes) < n:
    for index in rng.permutation(len(combinations))[: n - len(scenes)]:
      shape, colour, background, motion = combinations[index]
      size, texture = _choice(rng, tuple(SIZES)), _choice(rng, TEXTURES)
      subject = Subject(shape, colour, size, texture)
      shot = _shot(rng, subject, background, motion, 1, False)
      scenes.append(Scene(subject, (shot,)))
  return scenes


def _choice(rng: np.random.Generator, options) -> str:
  return options[rng.integers(len(options))]


def _random_subject(rng: np.random.Generator) -> Subject:
  return Subject(
    _choice(rng, SHAPES),
    _choice(rng, tuple(COLOURS)),
    _choice(rng, tuple(SIZES)),
    _choice(rng, TEXTURES),
  )


def _shot(rng, subject, background, motion, chunks, back_reference) -> Shot:
  radius = math.ceil(REACH * SIZES[subject.size]) + 4.0
  reach_x = radius + (AMPLITUDE if motion != "bounce" else 0.0)
  reach_y = radius + (AMPLITUDE if motion != "slide" else 0.0)
  centre = (
    float(rng.uniform(reach_x, IMAGE_SIZE - reach_x)),
    float(rng.uniform(reach_y, IMAGE_SIZE - reach_y)),
  )
  phase = float(rng.uniform(0, 2 * np.pi))
  caption = describe(
    subject, background, motion, back_reference=back_reference, rng=rng
  )
  return Shot(background, motion, centre, phase, chunks, caption)


# ---------------------------------------------------------------- rendering


def shot_frames(first_chunk: int, chunks: int) -> int:
  """Video frames of a shot: the clip's first latent frame gives 1 frame, others 4."""
  return FRAMES_PER_CHUNK * chunks - (3 if first_chunk == 0 else 0)


def render(scene: Scene) -> np.ndarray:
  """The clip as uint8 (32 * chunks - 3, 128, 128, 3); cuts at frames 32 k - 3."""
  clips, first = [], 0
  for shot in scene.shots:
    clips.append(
      render_shot(scene.subject, shot, frames=shot_frames(first, shot.chunks))
    )
    first += shot.chunks
  return np.concatenate(clips)


def render_shot(subject: Subject, shot: Shot, frames: int) -> np.ndarray:
  """One shot, uint8 (frames, 128, 128, 3)."""
  t = np.arange(frames)
  centres = np.asarray(shot.centre) + motion_offset(shot.motion, t, shot.phase)
  video = np.repeat(background_image(shot.background)[None], frames, axis=0)
  # Only the box around the subject is drawn, at its subpixel place in each frame.
  radius = SIZES[subject.size]
  half = math.ceil(REACH * radius) + 2
  corners = np.floor(centres).astype(np.int64) - half  # (t, 2) as x, y
  grid = np.arange(2 * half + 1)
  x = (grid + corners[:, :1] - centres[:, :1])[:, None, :]  # (t, 1, side)
  y = (grid + corners[:, 1:] - centres[:, 1:])[:, :, None]
  x, y = np.broadcast_arrays(x.astype(np.float32), y.astype(np.float32))
  alpha = coverage(subject.shape, x, y, radius)  # (t, side, side)
  shade = texture_shade(subject.texture, x, y)
  colour = np.asarray(COLOURS[subject.colour], np.float32) * shade[..., None]
  side = len(grid)
  for i, (left, top) in enumerate(corners):  # a box may reach over the border
    up, along = max(top, 0), max(left, 0)
    box = video[i, up : max(top + side, 0), along : max(left + side, 0)]
    part = (i, slice(up - top, None), slice(along - left, None))
    height, width = box.shape[:2]
    mix = alpha[part][:height, :width, None]
    box[:] = np.rint(box + mix * (colour[part][:height, :width] - box))
  return video


# ---------------------------------------------------------------- writing a data set


def write_clip(out: str | Path, name: str, scene: Scene, video: bool = True) -> None:
  """Writes videos/<name>.mp4 (if `video`) and caption/<name>/ under `out`.

  shot_durations.txt comes last and at once: where it exists the clip is complete.
  """
  file = Path(out) / "videos" / f"{name}.mp4"
  captions = Path(out) / "caption" / name
  captions.mkdir(parents=True, exist_ok=True)
  if video:
    file.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(file, fps=FPS, crf=13, preset="superfast") as writer:
      writer.append(render(scene))
  for i, shot in enumerate(scene.shots):
    (captions / f"{i}.json").write_text(json.dumps({"caption": shot.caption}) + "\n")
  durations = ", ".join(str(shot.chunks) for shot in scene.shots)
  partial = captions / "shot_durations.part"
  partial.write_text(durations + "\n")
  os.replace(partial, captions / "shot_durations.txt")


def write_dataset(
  out: str | Path,
  clips: int,
  *,
  chunks: int = 12,
  workers: int = 1,
  seed: int = 0,
  video: bool = True,
) -> int:
  """Writes `clips` training clips; returns how many were missing and so written.

  Clip i is `training_scene(seed * 1_000_000 + i)`, whatever the number of workers.
  Without `video` only captions are written, to a folder that is for captions only.
  """
  jobs = []
  for i in range(clips):
    name = f"{seed:03d}_{i:06d}"
    if not (Path(out) / "caption" / name / "shot_durations.txt").exists():
      jobs.append((str(out), name, seed * 1_000_000 + i, chunks, video))
  if workers <= 1:
    for job in jobs:
      _write_job(job)
    return len(jobs)
  # spawn: forking a process that runs JAX's threads can deadlock.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    for _ in pool.map(_write_job, jobs, chunksize=4):
      pass
  return len(jobs)


def _write_job(job: tuple[str, str, int, int, bool]) -> None:
  out, name, seed, chunks, video = job
  write_clip(out, name, training_scene(seed, chunks), video)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m longlive_jax.data.toy_world",
    description="Write a training set of the toy world; resumes where it stopped.",
  )
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument("--clips", type=int, default=4000)
  parser.add_argument("--chunks", type=int, default=12, help="chunks of a clip")
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--captions", action="store_true", help="no videos, for launch/distill.py"
  )
  args = parser.parse_args(argv)
  for name in ("clips", "chunks", "workers"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1")
  began = time.perf_counter()
  written = write_dataset(
    args.out, args.clips, chunks=args.chunks, workers=args.workers, seed=args.seed,
    video=not args.captions,
  )  # fmt: skip
  seconds = time.perf_counter() - began
  sys.stdout.write(
    f"{written} clips written, {args.clips - written} already there, "
    f"{seconds:.1f} s, {written / seconds:.1f} clips/s\n"
  )


if __name__ == "__main__":
  main()
