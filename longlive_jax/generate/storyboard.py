"""Prompts and cuts: which text and which shot every chunk of a video belongs to.

SPEC 4. The readers turn inline prompts, a text file, a folder of captions or a folder
of images into one prompt per chunk; the first chunk of every later shot carries the
scene-cut prefix, and that prefix is what makes a chunk a cut. Each sample of a batch
has its own cuts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.models.text import clean_text

SCENE_CUT_PREFIX = "The scene transitions. "
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Sample:
  """One video: a prompt and a cut flag per chunk, and the image it starts from.

  Attributes:
    prompts: what the text encoder reads, scene-cut prefixes included.
    cuts: true where a chunk starts a new shot; never at chunk 0.
    image: first frame, or None.
  """

  prompts: tuple[str, ...]
  cuts: tuple[bool, ...]
  image: Path | None = None


@dataclasses.dataclass(frozen=True)
class StoryboardArrays:
  """What the generator consumes.

  Attributes:
    prompts: the distinct prompts; embed these.
    prompt_index: (chunks, b) int32 into `prompts`.
    cut: (chunks, b) bool, the chunk starts a new shot.
    shot: (chunks, b) int32, number of the shot, from 0.
  """

  prompts: tuple[str, ...]
  prompt_index: np.ndarray
  cut: np.ndarray
  shot: np.ndarray


@dataclasses.dataclass(frozen=True)
class Storyboard:
  """The samples of one batch, all with the same number of chunks.

  Raises:
    ValueError: no sample, unequal lengths, an empty prompt, or a cut at chunk 0.
  """

  samples: tuple[Sample, ...]

  def __post_init__(self):
    if not self.samples or not self.samples[0].prompts:
      raise ValueError("the storyboard has no prompt; give at least one")
    for b, sample in enumerate(self.samples):
      if not len(sample.prompts) == len(sample.cuts) == self.chunks:
        raise ValueError(
          f"sample {b} has {len(sample.prompts)} prompts and {len(sample.cuts)} cut "
          f"flags; both must be chunks={self.chunks}"
        )
      if sample.cuts[0]:
        raise ValueError(f"sample {b} has a cut at chunk 0; a video starts with a shot")
      for chunk, prompt in enumerate(sample.prompts):
        if not clean_text(prompt.removeprefix(SCENE_CUT_PREFIX.strip())):
          raise ValueError(
            f"prompt={prompt!r} of sample {b}, chunk {chunk}, is empty; write what the "
            "video should show"
          )

  @property
  def chunks(self) -> int:
    return len(self.samples[0].prompts)

  @property
  def batch(self) -> int:
    return len(self.samples)

  @property
  def images(self) -> tuple[Path, ...] | None:
    """First frame of every sample, or None if the videos start from text alone."""
    images = tuple(s.image for s in self.samples if s.image is not None)
    return images or None

  def continued(self, chunk: int, other: Storyboard, cut: bool) -> Storyboard:
    """The first `chunk` chunks of this storyboard, then another one.

    Args:
      chunk: length that is kept.
      other: of as many samples.
      cut: whether `other` begins with a new shot.

    Raises:
      ValueError: another number of samples, or nothing to keep.
    """
    if other.batch != self.batch:
      raise ValueError(
        f"the new storyboard has {other.batch} videos, the old one {self.batch}"
      )
    if not 0 < chunk <= self.chunks:
      raise ValueError(f"chunk={chunk} is outside the storyboard of {self.chunks}")
    joined = []
    for old, new in zip(self.samples, other.samples, strict=True):
      first = SCENE_CUT_PREFIX * cut + new.prompts[0]
      prompts = (*old.prompts[:chunk], first, *new.prompts[1:])
      joined.append(Sample(prompts, (*old.cuts[:chunk], cut, *new.cuts[1:]), old.image))
    return Storyboard(tuple(joined))

  def record(self) -> list[dict[str, Any]]:
    """The storyboard as JSON content; `from_record` reads it."""
    return [
      {
        "prompts": list(sample.prompts),
        "cuts": list(sample.cuts),
        "image": None if sample.image is None else str(sample.image),
      }
      for sample in self.samples
    ]

  def arrays(self) -> StoryboardArrays:
    """Table of distinct prompts and the arrays that say who uses which when."""
    prompts = tuple(dict.fromkeys(p for s in self.samples for p in s.prompts))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    index = [[number[p] for p in s.prompts] for s in self.samples]  # (b, chunks)
    cut = np.array([s.cuts for s in self.samples], bool).T
    return StoryboardArrays(
      prompts=prompts,
      prompt_index=np.array(index, np.int32).T,
      cut=cut,
      shot=np.cumsum(cut, axis=0, dtype=np.int32),
    )


def from_record(record: Sequence[dict[str, Any]]) -> Storyboard:
  """The storyboard that `Storyboard.record` wrote."""
  return Storyboard(
    tuple(
      Sample(
        prompts=tuple(sample["prompts"]),
        cuts=tuple(sample["cuts"]),
        image=Path(sample["image"]) if sample["image"] else None,
      )
      for sample in record
    )
  )


def is_shot_boundary(
  prompts: Sequence[str], chunk: int, prefix: str = SCENE_CUT_PREFIX
) -> bool:
  """Whether `chunk` starts a new shot: not the first, and its prompt has the prefix.

  An empty prefix marks nothing; a chunk beyond the list is no boundary.
  """
  inside = 0 < chunk < len(prompts)
  return bool(prefix) and inside and prompts[chunk].startswith(prefix)


def from_prompt_lists(
  prompt_lists: Sequence[Sequence[str]],
  *,
  images: Sequence[Path] | None = None,
  prefix: str = SCENE_CUT_PREFIX,
) -> Storyboard:
  """Storyboard of per-chunk prompts, one list a video; cuts read from the prefix.

  Raises:
    ValueError: as `Storyboard`, or `images` and `prompt_lists` differ in number.
  """
  if images is not None and len(images) != len(prompt_lists):
    raise ValueError(
      f"{len(images)} images for {len(prompt_lists)} videos; give one image each"
    )
  return Storyboard(
    tuple(
      Sample(
        prompts=tuple(prompts),
        cuts=tuple(is_shot_boundary(prompts, i, prefix) for i in range(len(prompts))),
        image=Path(images[b]) if images is not None else None,
      )
      for b, prompts in enumerate(prompt_lists)
    )
  )


def inline(
  shots: Sequence[str],
  chunks: int | None = None,
  durations: Sequence[int] | None = None,
  *,
  image: str | Path | None = None,
  prefix: str = SCENE_CUT_PREFIX,
) -> Storyboard:
  """One video whose shots were written on the command line.

  Args:
    shots: one prompt a shot.
    chunks: length of the video; default the sum of `durations`, else one a shot.
    durations: chunks of each shot; default an even split. The last shot is extended
      or shortened to the end of the video.
    image: first frame.

  Raises:
    ValueError: empty prompt, durations that are not one positive integer a shot, or
      a shot that would start outside the video.
  """
  for i, shot in enumerate(shots):
    if not clean_text(shot):
      raise ValueError(f"prompt {i} = {shot!r} is empty; write what it should show")
  if durations is not None:
    if len(durations) != len(shots) or min(durations, default=0) < 1:
      raise ValueError(
        f"durations={tuple(durations)} must be one positive number of chunks for each "
        f"of the {len(shots)} prompts"
      )
  if chunks is None:
    chunks = len(shots) if durations is None else sum(durations)
  if chunks < 1:
    raise ValueError(f"chunks={chunks} must be at least 1")
  starts = np.cumsum([0, *(durations or [1] * len(shots))[:-1]])
  if starts[-1] >= chunks:
    late = int(np.argmax(starts >= chunks))
    raise ValueError(
      f"shot {late} would be cut in at chunk {starts[late]}, outside the video of "
      f"chunks={chunks}; use chunks={starts[-1] + 1} or more, or fewer shots"
    )
  # A prefix typed by the user would be repeated in every chunk and cut at each.
  shots = [s.removeprefix(prefix) for s in shots]
  prompts = spread_shots(shots, chunks, durations=durations, prefix=prefix)
  images = None if image is None else [Path(image)]
  return from_prompt_lists([prompts], images=images, prefix=prefix)


def spread_shots(
  captions: Sequence[str],
  num_blocks: int,
  *,
  durations: Sequence[int] | None = None,
  chunks_per_shot: int | None = None,
  prefix: str = SCENE_CUT_PREFIX,
) -> list[str]:
  """One prompt per chunk from one caption per shot (SPEC 4).

  Lengths come from `durations`, else `chunks_per_shot`, else an even split whose
  remainder goes to the first shots. They are cut at `num_blocks`; what is missing
  goes to the last listed shot. Captions without a duration are dropped.
  """
  if durations:
    lengths = list(durations[: len(captions)])
  elif chunks_per_shot:
    lengths = [chunks_per_shot] * len(captions)
  else:
    share, rest = divmod(num_blocks, len(captions))
    lengths = [share + (i < rest) for i in range(len(captions))]
  lengths[-1] += max(0, num_blocks - sum(lengths))
  blocks: list[str] = []
  for shot, length in enumerate(lengths):
    first = prefix if shot else ""
    blocks += [(first if i == 0 else "") + captions[shot] for i in range(length)]
  return blocks[:num_blocks]


def read_text_prompts(
  path: str | Path,
  num_blocks: int,
  *,
  chunks_per_shot: int | None = None,
  scene_cut_prefix: str = SCENE_CUT_PREFIX,
  caption_field: str = "caption",
) -> list[list[str]]:
  """Per-chunk prompts of every video of a text file or a caption folder (SPEC 4).

  A text file has one video a line. A caption folder has one subfolder a video, with
  one JSON file a shot and, if wanted, `shot_durations.txt`.

  Returns:
    One list of `num_blocks` prompts a video.

  Raises:
    ValueError: the path does not exist.
  """
  path = Path(path)
  if path.is_file():
    return [[line] * num_blocks for line in read_lines(path) if line]
  if not path.is_dir():
    raise ValueError(
      f"prompts={path} does not exist; give a text file or a caption folder"
    )
  root = path / "caption" if (path / "caption").is_dir() else path
  folders = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.name)
  return [
    spread_shots(
      read_captions(folder, caption_field),
      num_blocks,
      durations=read_durations(folder / "shot_durations.txt"),
      chunks_per_shot=chunks_per_shot,
      prefix=scene_cut_prefix,
    )
    for folder in folders
  ]


def read_image_prompts(
  path: str | Path, num_blocks: int, *, scene_cut_prefix: str = SCENE_CUT_PREFIX
) -> list[tuple[Path, list[str]]]:
  """Images and per-chunk prompts: `images/` + `prompts/`, or both in one folder.

  The text of `<stem>.txt` belongs to the image; several lines are shots of even
  length.

  Raises:
    ValueError: the folder does not exist, or an image has no text.
  """
  path = Path(path)
  split = (path / "images").is_dir()
  image_root = path / "images" if split else path
  text_root = path / "prompts" if split else path
  if not image_root.is_dir():
    raise ValueError(f"image folder={path} does not exist")
  found = []
  for image in sorted(image_root.iterdir(), key=lambda p: p.name):
    if image.suffix.lower() not in IMAGE_SUFFIXES:
      continue
    text = text_root / f"{image.stem}.txt"
    shots = [s.strip() for s in read_lines(text) if s] if text.is_file() else []
    if not shots:
      raise ValueError(f"image={image} has no text; write its prompt to {text}")
    found.append((image, spread_shots(shots, num_blocks, prefix=scene_cut_prefix)))
  return found


def read_lines(path: str | Path) -> list[str]:
  """Lines of a text file without trailing white space; empty lines are kept.

  Raises:
    ValueError: the file is missing or not UTF-8.
  """
  try:
    with open(path, encoding="utf-8") as file:
      return [line.rstrip() for line in file]
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"prompts={path} cannot be read as UTF-8 text: {error}") from error


def read_captions(folder: Path, field: str = "caption") -> list[str]:
  """Captions of one video's shots, in order; [''] if there are none.

  Names that are no number come first, alphabetically; then numbers by value. A file
  that cannot be read, or lacks the field, is an empty caption.
  """
  files = [f for f in folder.glob("*.json") if f.name != "global.json"]
  words = sorted((f for f in files if not f.stem.isdecimal()), key=lambda f: f.stem)
  numbers = sorted((f for f in files if f.stem.isdecimal()), key=lambda f: int(f.stem))
  return [read_caption(file, field) for file in words + numbers] or [""]


def read_caption(file: Path, field: str = "caption") -> str:
  """The caption of one shot; empty if it cannot be read."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    content = None
  caption = content.get(field, "") if isinstance(content, dict) else ""
  return caption if isinstance(caption, str) else ""


def read_durations(file: Path) -> list[int] | None:
  """Chunks of each shot, separated by commas or blanks; None if unusable."""
  try:
    return [int(n) for n in file.read_text(encoding="utf-8").replace(",", " ").split()]
  except (OSError, ValueError):
    return None


def encoder_order(
  prompt_lists: Sequence[Sequence[str]], batch: int
) -> tuple[list[str], list[list[int]]]:
  """Flat list of all prompts, sample by sample, and each chunk's numbers in it.

  Returns:
    (prompts, indices[chunk][sample]).

  Raises:
    ValueError: not `batch` lists, no prompts, or lists of unequal length.
  """
  if len(prompt_lists) != batch:
    raise ValueError(
      f"{len(prompt_lists)} prompt lists for batch={batch}; give one a video"
    )
  lengths = {len(prompts) for prompts in prompt_lists}
  if len(lengths) != 1 or lengths == {0}:
    raise ValueError(
      f"prompt lists have lengths {sorted(lengths)}; all must be equal and not 0"
    )
  (chunks,) = lengths
  flat = [prompt for prompts in prompt_lists for prompt in prompts]
  return flat, [[b * chunks + i for b in range(batch)] for i in range(chunks)]
