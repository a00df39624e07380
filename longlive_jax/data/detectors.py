"""Read the toy world back from frames: shape, colour, background, motion, drift.

Classical template matching against the renderer's own pictures; nothing is learnt.
For the frames of one shot, in this order:

  background  the template that most pixels agree with (median distance: the subject
              covers less than half of the picture)
  colour      vote of the pixels that differ most from that background
  subject     per pixel, how far it lies on the way from background to that colour
  shape, size the subject mask, centred and averaged over frames, correlated with
              every shape at many radii and sharpnesses
  motion      principal axes of the path of the mask's centroid: round or straight,
              and in which direction

  detection = detect(frames)                 # uint8 (t, 128, 128, 3) of one shot
  matches(detection, subject, shot)          # dict of bool per attribute
  same_identity(detect(a), detect(b))        # same shape and colour?
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from longlive_jax.data.toy_render import (
  BACKGROUNDS,
  COLOURS,
  IMAGE_SIZE,
  SHAPES,
  SIZES,
  TEXTURE_SHADE,
  background_image,
  coverage,
)

_SAMPLED_FRAMES = 12  # of a shot, for background, colour and shape
_GRID = 32  # half side of the centred mask, in pixels
_RADII = np.arange(11.0, 30.0, 1.0)
# Pixels. Against sharp templates alone every blurred shape looks most like a circle.
_BLURS = (0.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Detection:
  """What one shot shows. Confidences are 0 to 1, larger is surer.

  Attributes:
    size: the name of SIZES nearest to `radius` (pixels).
    shape_score: correlation of the mask with its best template.
    colour_score: share of subject pixels that voted for the colour.
    background_error: median distance to the background template, 0 to 1 per channel.
    drift: mean absolute difference to the background outside the subject, 0 to 1.
    found: share of frames in which a subject is visible.
    path: float (t, 2), centroid x, y in pixels, NaN where no subject is visible.
  """

  shape: str
  colour: str
  background: str
  motion: str
  size: str
  radius: float
  shape_score: float
  colour_score: float
  background_error: float
  drift: float
  found: float
  path: np.ndarray


def detect(frames: np.ndarray) -> Detection:
  """Detects everything in the frames of one shot.

  Args:
    frames: (t, 128, 128, 3), uint8, or float in [-1, 1]. At least 24 frames (half a
      period) for the motion to be sure.

  Raises:
    ValueError: another size or dtype.
  """
  video = _unit_range(frames)
  few = video[np.linspace(0, len(video) - 1, _SAMPLED_FRAMES).round().astype(int)]
  background, background_error = _find_background(few)
  picture = _background(background)
  colour, colour_score = _find_colour(few, picture)
  masks = _subject_masks(video, picture, colour)
  path = _centroids(masks)
  visible = np.isfinite(path[:, 0])
  shape, radius, shape_score = _find_shape(masks, path)
  outside = ndimage.maximum_filter(masks, (1, 7, 7)) <= 0.2
  drift = np.abs(video - picture).mean(-1)[outside].mean() if outside.any() else 1.0
  return Detection(
    shape=shape,
    colour=colour,
    background=background,
    motion=_find_motion(path[visible]),
    size=min(SIZES, key=lambda name: abs(SIZES[name] - radius)),
    radius=radius,
    shape_score=shape_score,
    colour_score=colour_score,
    background_error=background_error,
    drift=float(drift),
    found=float(visible.mean()),
    path=path,
  )


def matches(detection: Detection, subject, shot) -> dict[str, bool]:
  """Whether shape, colour, background and motion are those of a `Scene`'s shot.

  A subject that is visible in less than half of the frames counts as wrong.
  """
  seen = detection.found >= 0.5
  return {
    "shape": seen and detection.shape == subject.shape,
    "colour": seen and detection.colour == subject.colour,
    "background": detection.background == shot.background,
    "motion": seen and detection.motion == shot.motion,
  }


def same_identity(first: Detection, other: Detection) -> bool:
  """Whether two shots show the same subject: its shape and its colour."""
  return (
    min(first.found, other.found) >= 0.5
    and first.shape == other.shape
    and first.colour == other.colour
  )


def motion_amount(found: Iterable[Detection]) -> float:
  """Pixels that the subject moves a frame, over all shots where it is visible."""
  speeds = [np.linalg.norm(np.diff(shot.path, axis=0), axis=1) for shot in found]
  return float(np.nanmean(np.concatenate(speeds)))


def _unit_range(frames: np.ndarray) -> np.ndarray:
  size = (IMAGE_SIZE, IMAGE_SIZE, 3)
  if frames.ndim != 4 or frames.shape[1:] != size or not len(frames):
    raise ValueError(f"frames are {frames.shape}; the toy world has (t, *{size})")
  if frames.dtype == np.uint8:
    return frames.astype(np.float32) / 255
  if not np.issubdtype(frames.dtype, np.floating):
    raise ValueError(f"frames are {frames.dtype}; give uint8 or float in [-1, 1]")
  return np.clip(frames.astype(np.float32) * 0.5 + 0.5, 0, 1)


@functools.cache
def _background(name: str) -> np.ndarray:
  return background_image(name).astype(np.float32) / 255


@functools.cache
def _palette() -> tuple[np.ndarray, tuple[str, ...]]:
  """Colours and their darker shade of the textures: (2 c, 3) and their names."""
  bright = np.asarray(list(COLOURS.values()), np.float32) / 255
  return np.concatenate([bright, bright * TEXTURE_SHADE]), tuple(COLOURS) * 2


def _find_background(video: np.ndarray) -> tuple[str, float]:
  errors = {
    name: float(np.median(np.abs(video - _background(name)).mean(-1)))
    for name in BACKGROUNDS
  }
  best = min(errors, key=errors.__getitem__)
  return best, errors[best]


def _find_colour(video: np.ndarray, picture: np.ndarray) -> tuple[str, float]:
  palette, names = _palette()
  # The mean over 3 x 3 pixels removes noise and single pixels but keeps the subject.
  smooth = ndimage.uniform_filter(video - picture, (0, 3, 3, 0))
  residual = np.linalg.norm(smooth, axis=-1)
  strong = residual > max(0.15, 0.6 * float(np.quantile(residual, 0.995)))
  pixels = video[strong]  # (n, 3)
  if not len(pixels):
    return names[0], 0.0
  distance = np.linalg.norm(pixels[:, None] - palette, axis=-1)
  votes = np.bincount(distance.argmin(-1) % len(COLOURS), minlength=len(COLOURS))
  return names[int(votes.argmax())], float(votes.max() / votes.sum())


def _subject_masks(video: np.ndarray, picture: np.ndarray, colour: str) -> np.ndarray:
  """Share of the subject in each pixel, (t, h, w), 0 to 1."""
  target = np.asarray(COLOURS[colour], np.float32) / 255 * (1 + TEXTURE_SHADE) / 2
  way = target - picture  # (h, w, 3)
  share = ((video - picture) * way).sum(-1) / (way * way).sum(-1)
  # A pixel that lies off the way belongs to neither: artefacts, other colours.
  off = np.linalg.norm(video - picture - share[..., None] * way, axis=-1)
  share = np.where(off < 0.35, share, 0)
  return np.clip(share, 0, 1)


def _centroids(masks: np.ndarray) -> np.ndarray:
  """Centre x, y of the mask of every frame, (t, 2); NaN if there is hardly any."""
  solid = np.where(masks > 0.45, masks, 0)
  solid = np.where(ndimage.uniform_filter(solid, (0, 3, 3)) > 0.3, solid, 0)
  weight = solid.sum((1, 2))
  grid = np.arange(masks.shape[1])
  with np.errstate(invalid="ignore", divide="ignore"):
    x = (solid.sum(1) * grid).sum(1) / weight
    y = (solid.sum(2) * grid).sum(1) / weight
  path = np.stack([x, y], -1)
  path[weight < 60] = np.nan  # the smallest subject covers about 230 pixels
  return path


@functools.cache
def _templates() -> tuple[np.ndarray, tuple[tuple[str, float], ...]]:
  """Every shape, radius and blur around its own centroid, unit norm: (n, side^2)."""
  axis = np.arange(-_GRID, _GRID + 1, dtype=np.float32)
  x, y = np.meshgrid(axis, axis)
  labels = tuple(
    (shape, float(r)) for shape in SHAPES for r in _RADII for _ in _BLURS
  )
  rows = []
  for shape, radius in labels[:: len(_BLURS)]:
    mask = coverage(shape, x, y, radius)
    dx, dy = (mask * x).sum() / mask.sum(), (mask * y).sum() / mask.sum()
    mask = coverage(shape, x + dx, y + dy, radius)
    for blur in _BLURS:
      soft = ndimage.gaussian_filter(mask, blur)
      rows.append(soft.ravel() / np.linalg.norm(soft))
  return np.stack(rows), labels


def _find_shape(masks: np.ndarray, path: np.ndarray) -> tuple[str, float, float]:
  visible = np.flatnonzero(np.isfinite(path[:, 0]))
  if not len(visible):
    return SHAPES[0], 0.0, 0.0
  few = visible[np.linspace(0, len(visible) - 1, _SAMPLED_FRAMES).round().astype(int)]
  axis = np.arange(-_GRID, _GRID + 1)
  total = np.zeros((len(axis), len(axis)))
  for i in few:
    x, y = path[i]
    rows, columns = np.meshgrid(y + axis, x + axis, indexing="ij")
    total += ndimage.map_coordinates(masks[i], [rows, columns], order=1)
  mean = (total / len(few)).ravel()
  templates, labels = _templates()
  scores = templates @ mean / max(float(np.linalg.norm(mean)), 1e-6)
  best = int(scores.argmax())
  return *labels[best], float(scores[best])


def _find_motion(path: np.ndarray) -> str:
  """The law of a path (t, 2): by the axes of the cloud of its points."""
  if len(path) < 3:
    return "none"
  smooth = ndimage.uniform_filter1d(path, 3, axis=0, mode="nearest")
  spread, axes = np.linalg.eigh(np.cov(smooth.T))  # ascending
  minor, major = np.sqrt(np.maximum(spread, 0))
  if major < 3.0:  # pixels; a whole swing has 17
    return "none"
  if minor > 0.3 * major:
    return "circle"
  x, y = np.abs(axes[:, 1])
  angle = np.degrees(np.arctan2(y, x))
  return "slide" if angle < 22.5 else "bounce" if angle > 67.5 else "diagonal"
