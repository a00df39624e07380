"""Commands from strangers: read exactly, or refused in one plain line."""

import base64
import io
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image as Pictures

from longlive_jax.generate import commands, recache
from longlive_jax.generate.commands import (
  Branch,
  Cut,
  Image,
  Pause,
  Prompt,
  Resume,
  Rewind,
  Save,
  parse,
)
from longlive_jax.generate.recache import Recache


def encoded(pixels: np.ndarray, kind: str = "PNG") -> str:
  file = io.BytesIO()
  Pictures.fromarray(pixels).save(file, kind)
  return base64.b64encode(file.getvalue()).decode()


PICTURE = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)


@pytest.mark.parametrize(
  ("message", "command"),
  [
    ({"kind": "prompt", "text": "A star."}, Prompt("A star.", recache.DEFAULT)),
    (
      {"kind": "prompt", "text": "星 ☆", "recache": "last:2"},
      Prompt("星 ☆", Recache("last", 2)),
    ),
    (
      {"kind": "prompt", "text": "x", "recache": "window+sinks"},
      Prompt("x", Recache("window+sinks")),
    ),
    ({"kind": "cut", "text": "A star."}, Cut("A star.")),
    ({"kind": "pause"}, Pause()),
    ({"kind": "resume"}, Resume()),
    ({"kind": "save"}, Save()),
    ({"kind": "rewind", "chunk": 0}, Rewind(0)),
    ({"kind": "branch"}, Branch(None)),
    ({"kind": "branch", "chunk": 3}, Branch(3)),
  ],
)
def test_what_is_a_command(message, command):
  assert parse(message) == command


def test_a_picture_is_read():
  found = parse({"kind": "image", "text": "A star.", "image": encoded(PICTURE)})
  assert isinstance(found, Image) and found.text == "A star."
  np.testing.assert_array_equal(found.frame, PICTURE)
  assert parse({"kind": "image", "text": "x", "image": encoded(PICTURE, "JPEG")})


def bomb() -> str:
  """A PNG that says that it has 60,000 x 60,000 pixels."""
  def part(name: bytes, data: bytes) -> bytes:
    checked = name + data
    return struct.pack(">I", len(data)) + checked + struct.pack(
      ">I", zlib.crc32(checked)
    )

  header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
  data = part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"0")) + part(b"IEND", b"")
  return base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


@pytest.mark.parametrize(
  ("message", "error"),
  [
    (None, "a command is an object, not NoneType"),
    ([], "a command is an object, not list"),
    ({}, "kind=None is unknown; use one of"),
    ({"kind": "explode"}, "kind='explode' is unknown"),
    ({"kind": ["prompt"]}, "kind=list is unknown"),
    ({"kind": "x" * 10**6}, r"kind='x{36}\.\.\. is unknown"),
    ({"kind": "prompt"}, "kind='prompt' needs the field 'text'"),
    ({"kind": "pause", "path": "../x"}, "kind='pause' has no field 'path'"),
    ({"kind": "prompt", "text": 3}, "text must be a string, not int"),
    ({"kind": "prompt", "text": ""}, "text is empty"),
    ({"kind": "cut", "text": " \u00a0 "}, "text is empty"),
    ({"kind": "cut", "text": "x" * 2001}, "text has 2001 characters; use at most 2000"),
    ({"kind": "cut", "text": "a\x1b[2Jb"}, r"control character U\+001B at 1"),
    ({"kind": "cut", "text": "a\nb"}, r"control character U\+000A at 1"),
    ({"kind": "cut", "text": "a\x00"}, r"control character U\+0000 at 1"),
    ({"kind": "cut", "text": "\ud800"}, r"control character U\+D800 at 0"),
    ({"kind": "cut", "text": "x\u202ey"}, r"control character U\+202E at 1"),
    ({"kind": "prompt", "text": "x", "recache": 2}, "recache must be a string"),
    ({"kind": "prompt", "text": "x", "recache": "all"}, "recache='all' is unknown"),
    ({"kind": "prompt", "text": "x", "recache": "\n" * 10**6}, "is unknown"),
    ({"kind": "prompt", "text": "x", "recache": "last"}, "has 0 chunks; use 1 to 16"),
    ({"kind": "prompt", "text": "x", "recache": "last:17"}, "use 1 to 16"),
    ({"kind": "prompt", "text": "x", "recache": "last:-1"}, "must be KIND or KIND:NUM"),
    ({"kind": "prompt", "text": "x", "recache": "last:" + "9" * 9999}, "must be KIND"),
    ({"kind": "prompt", "text": "x", "recache": "last:٣"}, "must be KIND or KIND:NUM"),
    ({"kind": "prompt", "text": "x", "recache": "none:1"}, "'none' takes no number"),
    ({"kind": "rewind", "chunk": True}, "chunk must be a whole number, not True"),
    ({"kind": "rewind", "chunk": 1.0}, "chunk must be a whole number, not 1.0"),
    ({"kind": "rewind", "chunk": -1}, "chunk=-1 must be between 0 and"),
    ({"kind": "rewind", "chunk": 10**5000}, "chunk=a huge number must be between 0"),
    ({"kind": "rewind", "chunk": None}, "chunk must be a whole number, not None"),
    ({"kind": "image", "text": "x", "image": b"1"}, "file in base64, not bytes"),
    ({"kind": "image", "text": "x", "image": "*"}, "image is not base64"),
    ({"kind": "image", "text": "x", "image": "QUJD"}, "no readable PNG, JPEG or WebP"),
    ({"kind": "image", "text": "x", "image": "A" * 2**24}, "image is too large"),
    ({"kind": "image", "text": "x", "image": bomb()}, "no readable PNG"),
    (
      {"kind": "image", "text": "x", "image": encoded(PICTURE)[:-40]},
      "no readable PNG",
    ),
    ({"kind": "image", "text": "x", "image": encoded(PICTURE, "GIF")}, "no readable"),
  ],
  ids=range(38),
)  # fmt: skip
def test_what_is_none_is_refused_in_one_plain_line(message, error):
  with pytest.raises(ValueError, match=error) as raised:
    parse(message)
  text = str(raised.value)
  assert len(text) < 300 and text.isprintable()


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
FIELDS = st.sampled_from(["text", "recache", "chunk", "image", "path", ""])
KINDS = st.sampled_from([*commands._READERS, "x"])


@hypothesis.given(kind=KINDS, fields=st.dictionaries(FIELDS, JSON, max_size=3))
@hypothesis.settings(max_examples=300, deadline=None)
def test_nothing_but_a_command_or_a_refusal_comes_of_anything(kind, fields):
  try:
    found = parse({**fields, "kind": kind})
  except ValueError as error:
    assert len(str(error)) < 300 and str(error).isprintable()
  else:
    assert isinstance(found, commands.Command)


def test_rules_are_written_as_they_are_read():
  for text in ("none", "last:1", "last:16", "window", "window+sinks", "blend:3"):
    assert str(recache.parse(text)) == text


def test_which_chunks_a_rule_computes_again():
  def chunks(text, shot_start=4, sinks=1):
    remembered = [9, 0, 4, 7, 8, 3]  # global sink, shot sink, the end of the last shot
    rule = recache.parse(text)
    return recache.chunks_to_rewrite(rule, remembered, shot_start, sinks)

  assert chunks("none") == chunks("blend:2") == []
  assert chunks("last:2") == [8, 9]
  assert chunks("last:9") == [4, 7, 8, 9]
  assert chunks("window") == [7, 8, 9]
  assert chunks("window+sinks") == [4, 7, 8, 9]
  assert chunks("window", sinks=0) == [4, 7, 8, 9]
