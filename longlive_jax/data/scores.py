"""Toy videos as a test: what is asked for, and how much of it detectors find.

A generated video is a list of `Detection`, one a shot; its scene says what should be
there. Scores are shares, 0 to 1, but for `drift` and PIXELS.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from longlive_jax.data import detectors
from longlive_jax.data.detectors import Detection
from longlive_jax.data.toy_world import Scene
from longlive_jax.generate import storyboard

PIXELS = "motion, pixels a frame"


def scene_prompts(scene: Scene) -> list[str]:
  """One prompt a chunk, cuts marked by the prefix."""
  return storyboard.spread_shots(
    [shot.caption for shot in scene.shots],
    scene.chunks,
    durations=[shot.chunks for shot in scene.shots],
  )


def score_last_shot(
  scenes: Sequence[Scene], found: Sequence[Sequence[Detection]]
) -> dict[str, float]:
  """Shares of right attributes in the last shot (of single-shot videos, the only)."""
  right = [
    detectors.matches(row[-1], scene.subject, scene.shots[-1])
    for scene, row in zip(scenes, found, strict=True)
  ]
  scores = {name: share(r[name] for r in right) for name in right[0]}
  scores["all four"] = share(all(r.values()) for r in right)
  scores["drift"] = float(np.mean([row[-1].drift for row in found]))
  return scores


def score_all_shots(
  scenes: Sequence[Scene], found: Sequence[Sequence[Detection]]
) -> dict[str, float]:
  """Shares of right attributes over all shots of all scenes."""
  right = [
    detectors.matches(detection, scene.subject, shot)
    for scene, row in zip(scenes, found, strict=True)
    for shot, detection in zip(scene.shots, row, strict=True)
  ]
  return {name: share(r[name] for r in right) for name in right[0]}


def score_identity(found: Sequence[Sequence[Detection]]) -> dict[str, float]:
  """How often every later shot shows the subject of the first one."""
  shape, colour, both = [], [], []
  for first, *later in found:
    both.append(all(detectors.same_identity(first, other) for other in later))
    seen = min(d.found for d in (first, *later)) >= 0.5
    shape.append(seen and all(first.shape == other.shape for other in later))
    colour.append(seen and all(first.colour == other.colour for other in later))
  return {
    "subject kept": share(both),
    "shape kept": share(shape),
    "colour kept": share(colour),
  }


def score_subject(found: Sequence[Sequence[Detection]]) -> dict[str, float]:
  """How often the last shot shows the subject of the first one."""
  return {
    "subject kept": share(detectors.same_identity(row[0], row[-1]) for row in found)
  }


def score_later_shots(
  scenes: Sequence[Scene], found: Sequence[Sequence[Detection]]
) -> dict[str, float]:
  """Shares of later shots whose background and motion are those of their caption."""
  later = [dataclasses.replace(scene, shots=scene.shots[1:]) for scene in scenes]
  right = score_all_shots(later, [row[1:] for row in found])
  return {f"later {name}": right[name] for name in ("background", "motion")}


def motion_of(found: Sequence[Sequence[Detection]]) -> dict[str, float]:
  """How far subjects move a frame: a small movement can still follow the right law."""
  return {PIXELS: detectors.motion_amount(itertools.chain(*found))}


def share(values: Iterable[bool]) -> float:
  """How many of them are true, 0 to 1."""
  return float(np.mean(list(values)))
