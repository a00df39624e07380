"""What the toy world looks like: shapes, colours, textures, motions, backgrounds.

Pure picture functions and the vocabulary; scenes, captions and clips are in
`toy_world.py`. Shapes are signed distances, so their edges are antialiased at any
subpixel position.
"""

import functools

import numpy as np

IMAGE_SIZE = 128  # pixels, both sides
PERIOD = 48  # frames: every motion repeats after 2 seconds
AMPLITUDE = 24.0  # pixels from the centre of the motion

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
  "red": (225, 25, 30),
  "green": (20, 205, 45),
  "blue": (35, 60, 250),
  "yellow": (250, 235, 20),
  "purple": (180, 30, 230),
  "orange": (255, 125, 0),
  "cyan": (20, 225, 230),
  "white": (250, 250, 250),
}
SIZES = {"small": 16.0, "large": 24.0}  # radius in pixels
REACH = 1.1  # no point of a shape is further from its centre than 1.1 radii
TEXTURES = ("solid", "striped", "dotted")
TEXTURE_SHADE = 0.8  # stripes and dots are this much darker than the colour
MOTIONS = ("slide", "bounce", "circle", "diagonal")
BACKGROUNDS = (
  "night sky",
  "sand",
  "grass",
  "brick wall",
  "checkerboard",
  "water",
  "wood",
  "curtain",
)


def motion_offset(motion: str, t: np.ndarray, phase: float) -> np.ndarray:
  """Displacement (t, 2) in pixels (x right, y down) of a motion law at frames t."""
  angle = 2 * np.pi * np.asarray(t, np.float64) / PERIOD + phase
  sine, cosine, rest = np.sin(angle), np.cos(angle), np.zeros_like(angle)
  x, y = {
    "slide": (sine, rest),
    "bounce": (rest, sine),
    "circle": (cosine, sine),
    "diagonal": (sine, -sine),
  }[motion]
  return AMPLITUDE * np.stack([x, y], -1)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
  """How much of each pixel the shape covers, 0 to 1.

  x, y: offsets in pixels from the shape's centre, float32; any broadcast shape.
  """
  return np.clip(0.5 - _signed_distance(shape, x, y, radius), 0.0, 1.0)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
  """Distance to the outline in pixels, negative inside (exact near the edges)."""
  if shape == "circle":
    return np.hypot(x, y) - 0.95 * r
  if shape == "ring":
    return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
  if shape == "square":
    return np.maximum(np.abs(x), np.abs(y)) - 0.84 * r
  if shape == "triangle":
    # Three half planes of a triangle that points up.
    slope = np.abs(x) * np.float32(np.sqrt(0.75)) - y * np.float32(0.5)
    return np.maximum(slope, y) - 0.55 * r
  if shape == "cross":
    ax, ay = np.abs(x), np.abs(y)
    arm, length = 0.32 * r, r
    return np.minimum(
      np.maximum(ax - length, ay - arm), np.maximum(ay - length, ax - arm)
    )
  if shape == "star":
    # Fold into one tenth of the plane, then the line from tip to inner corner.
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.rint(angle / sector))
    distance = np.hypot(x, y)
    tip = 1.1 * r
    inner = 0.45 * tip
    ix, iy = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5)
    edge = np.hypot(ix, tip - iy)
    nx, ny = (tip - iy) / edge, ix / edge
    return (
      distance * (np.sin(angle) * np.float32(nx) + np.cos(angle) * np.float32(ny))
      - tip * ny
    )
  raise ValueError(f"shape={shape!r} is not one of {SHAPES}")


def texture_shade(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Brightness factor per pixel, TEXTURE_SHADE to 1, fixed to the subject."""
  if texture == "solid":
    return np.ones_like(x)
  if texture == "striped":  # diagonal stripes, 12 pixels apart
    dark = np.clip(0.5 + 2.0 * np.sin((x + y) * np.float32(2 * np.pi / 12)), 0, 1)
  else:  # dots 11 pixels apart
    pitch = np.float32(11.0)
    dx, dy = x - pitch * np.rint(x / pitch), y - pitch * np.rint(y / pitch)
    dark = np.clip(3.6 - np.hypot(dx, dy), 0, 1)
  return 1 - np.float32(1 - TEXTURE_SHADE) * dark


@functools.cache
def background_image(name: str) -> np.ndarray:
  """The picture of a background, uint8 (128, 128, 3), read-only."""
  y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float64)
  first, second, pattern = {
    "night sky": ((10, 12, 30), (105, 105, 125), _stars),
    "sand": ((140, 122, 96), (166, 148, 120), _dunes),
    "grass": ((34, 62, 34), (58, 88, 48), _tufts),
    "brick wall": ((112, 74, 66), (74, 62, 60), _bricks),
    "checkerboard": ((52, 52, 52), (104, 104, 104), _checks),
    "water": ((30, 58, 84), (58, 92, 118), _waves),
    "wood": ((84, 60, 38), (56, 40, 24), _planks),
    "curtain": ((62, 36, 62), (100, 66, 98), _folds),
  }[name]
  mix = np.clip(pattern(x, y), 0, 1)[..., None]
  image = np.rint(np.asarray(first) * (1 - mix) + np.asarray(second) * mix)
  image = image.astype(np.uint8)
  image.flags.writeable = False
  return image


def _stars(x, y):
  rng = np.random.default_rng(3)
  places = (np.stack(np.mgrid[:6, :6], -1) + rng.uniform(0.2, 0.8, (6, 6, 2))) * 21.3
  squared = [(x - px) ** 2 + (y - py) ** 2 for px, py in places.reshape(-1, 2)]
  return np.exp(-np.min(squared, axis=0) / 5.0)


def _dunes(x, y):
  return 0.5 + 0.5 * np.sin(2 * np.pi * (y / 32 + 0.35 * np.sin(2 * np.pi * x / 128)))


def _tufts(x, y):
  wave = np.sin(2 * np.pi * x / 21.3 + 2 * np.sin(2 * np.pi * y / 42.7))
  return 0.5 + 0.5 * wave * np.sin(2 * np.pi * y / 25.6)


def _bricks(x, y):
  row = np.floor(y / 16)
  along = (x + 16 * (row % 2)) % 32
  distance = np.minimum(np.minimum(along, 32 - along), np.minimum(y % 16, 16 - y % 16))
  return 2.0 - distance


def _checks(x, y):
  return (np.floor(x / 32) + np.floor(y / 32)) % 2


def _waves(x, y):
  return 0.5 + 0.5 * np.sin(2 * np.pi * (y / 18.3 + 0.2 * np.sin(2 * np.pi * x / 32)))


def _planks(x, y):
  distance = np.minimum(x % 25.6, 25.6 - x % 25.6)
  grain = 0.3 + 0.3 * np.sin(2 * np.pi * (y / 64 + np.floor(x / 25.6) * 0.37))
  return np.maximum(grain, 2.2 - distance)


def _folds(x, y):
  return 0.5 + 0.5 * np.sin(2 * np.pi * x / 16)
