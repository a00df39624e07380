"""What a running video can be told, and reading it from whoever sends it.

  parse({"kind": "prompt", "text": "A red star bounces.", "recache": "last:2"})
  parse({"kind": "cut", "text": "The night sky."})
  parse({"kind": "image", "text": "...", "image": "<base64 of a PNG or JPEG>"})
  parse({"kind": "pause"}), "resume", "save"
  parse({"kind": "rewind", "chunk": 12})
  parse({"kind": "branch"}), or with "chunk"

Nothing here trusts its input: what is not exactly a command is a ValueError that says
what is wrong, in one line without control characters.
"""

import base64
import binascii
import dataclasses
import io
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image as Pictures

from longlive_jax.generate import recache
from longlive_jax.generate.recache import Recache
from longlive_jax.models.text import clean_text

MOST_CHARACTERS = 2000  # of a prompt
MOST_IMAGE_BYTES = 8 * 2**20  # of the file
MOST_PIXELS = 2**25  # of the picture in it: a small file can unpack to gigabytes
MOST_CHUNK = 2**31 // 64

# They turn the direction of what stands around them: a log line would lie.
_DIRECTIONS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Another prompt, from the next chunk on, in the same shot."""

  text: str
  recache: Recache = recache.DEFAULT


@dataclasses.dataclass(frozen=True)
class Cut:
  """The next chunk starts a new shot."""

  text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
  """The next chunk starts a new shot, from a picture, uint8 (h, w, 3)."""

  frame: np.ndarray
  text: str


@dataclasses.dataclass(frozen=True)
class Pause:
  pass


@dataclasses.dataclass(frozen=True)
class Resume:
  pass


@dataclasses.dataclass(frozen=True)
class Rewind:
  """Back to when so many chunks were done; what was told since is forgotten."""

  chunk: int


@dataclasses.dataclass(frozen=True)
class Branch:
  """Another session that goes on from here, or from `chunk` chunks."""

  chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Save:
  pass


Command = Prompt | Cut | Image | Pause | Resume | Rewind | Branch | Save


def parse(message: Any) -> Command:
  """Reads a command from decoded JSON.

  Raises:
    ValueError: no mapping; unknown kind; fields that are missing, too many, of a wrong
      type, too long or out of range; a prompt that is empty or has control characters;
      a picture that cannot be read.
  """
  if not isinstance(message, Mapping):
    raise ValueError(f"a command is an object, not {type(message).__name__}")
  kind = message.get("kind")
  if not isinstance(kind, str) or kind not in _READERS:
    raise ValueError(f"kind={_brief(kind)} is unknown; use one of {sorted(_READERS)}")
  make, readers, required = _READERS[kind]
  fields = {name: value for name, value in message.items() if name != "kind"}
  for name in fields:
    if name not in readers:
      raise ValueError(
        f"kind={kind!r} has no field {_brief(name)}; it has {sorted(readers)}"
      )
  for name in required:
    if name not in fields:
      raise ValueError(f"kind={kind!r} needs the field {name!r}")
  return make(**{_FIELDS.get(n, n): readers[n](n, v) for n, v in fields.items()})


def check_prompt(text: Any, name: str = "text") -> str:
  """The prompt itself, if a model can be given it.

  Raises:
    ValueError: no string, too long, empty, or with control characters.
  """
  if not isinstance(text, str):
    raise ValueError(f"{name} must be a string, not {type(text).__name__}")
  if len(text) > MOST_CHARACTERS:
    raise ValueError(
      f"{name} has {len(text)} characters; use at most {MOST_CHARACTERS}"
    )
  for place, character in enumerate(text):
    if unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS:
      raise ValueError(
        f"{name} has the control character U+{ord(character):04X} at {place}; "
        "write plain text in one line"
      )
  if not clean_text(text):
    raise ValueError(f"{name} is empty; write what the video should show")
  return text


def _rule(name: str, value: Any) -> Recache:
  if not isinstance(value, str):
    raise ValueError(f"{name} must be a string as 'last:2', not {_brief(value)}")
  return recache.parse(value)


def _chunk(name: str, value: Any) -> int:
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(f"{name} must be a whole number, not {_brief(value)}")
  if not 0 <= value <= MOST_CHUNK:
    raise ValueError(f"{name}={_brief(value)} must be between 0 and {MOST_CHUNK}")
  return value


def _picture(name: str, value: Any) -> np.ndarray:
  if not isinstance(value, str):
    raise ValueError(f"{name} must be a file in base64, not {type(value).__name__}")
  if len(value) > MOST_IMAGE_BYTES * 4 // 3 + 4:
    raise ValueError(f"{name} is too large; use at most {MOST_IMAGE_BYTES} bytes")
  try:
    data = base64.b64decode(value, validate=True)
  except (binascii.Error, ValueError) as error:
    raise ValueError(f"{name} is not base64: {error}") from error
  return read_picture(data, name)


def read_picture(data: bytes, name: str = "image") -> np.ndarray:
  """A PNG, JPEG or WebP file as uint8 (h, w, 3); ValueError if it is none."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Pictures.DecompressionBombWarning)
      picture = Pictures.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
      if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(f"it has more than {MOST_PIXELS} pixels")
      return np.asarray(picture.convert("RGB"))
  # Pillow's readers raise what their parsers run into.
  except Exception as error:
    raise ValueError(f"{name} is no readable PNG, JPEG or WebP: {error}") from error


def _text(name: str, value: Any) -> str:
  return check_prompt(value, name)


_FIELDS = {"image": "frame"}
Reader = Callable[[str, Any], Any]
# kind -> (command, readers of its fields, those it must have)
_READERS: dict[str, tuple[type, dict[str, Reader], tuple[str, ...]]] = {
  "prompt": (Prompt, {"text": _text, "recache": _rule}, ("text",)),
  "cut": (Cut, {"text": _text}, ("text",)),
  "image": (Image, {"text": _text, "image": _picture}, ("text", "image")),
  "pause": (Pause, {}, ()),
  "resume": (Resume, {}, ()),
  "rewind": (Rewind, {"chunk": _chunk}, ("chunk",)),
  "branch": (Branch, {"chunk": _chunk}, ()),
  "save": (Save, {}, ()),
}


def _brief(value: Any) -> str:
  """A value for a message: short, in ASCII, whatever it is."""
  if isinstance(value, int) and abs(value) > 10**20:
    return "a huge number"  # its digits would take minutes to print
  plain = isinstance(value, str | int | float | None)
  text = ascii(value) if plain else type(value).__name__
  return text if len(text) <= 40 else text[:37] + "..."
