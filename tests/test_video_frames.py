"""Frames of a video by their numbers: those of the whole file, and little else."""

import itertools
import re
import signal

import numpy as np
import pytest

from longlive_jax.data import video_frames
from longlive_jax.data.video import VideoWriter, read_video, run_ffmpeg
from longlive_jax.data.video_frames import open_video

SOURCE = ("-f", "lavfi", "-i", "testsrc2=s=96x64:r=24:d=5")
# A keyframe every 40 frames, where the format allows.
ENCODERS = {
  "b_frames.mp4": ("-c:v", "libx264", "-g", "40", "-bf", "3"),
  "open.mp4": ("-c:v", "libx264", "-x264-params", "keyint=40:open-gop=1:scenecut=0"),
  "stripes.mp4": ("-c:v", "libx264", "-x264-params", "keyint=40:intra-refresh=1"),
  "uneven.mkv": (
    *("-vf", "settb=1/1000,setpts=PTS+20*lt(mod(N\\,3)\\,1)", "-fps_mode", "vfr"),
    *("-enc_time_base", "1:1000", "-c:v", "libx264", "-g", "40", "-bf", "2"),
  ),
  "no_times.avi": ("-c:v", "mpeg4", "-g", "40", "-bf", "2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("videos")
  for name, encoder in ENCODERS.items():
    assert run_ffmpeg(*SOURCE, *encoder, str(out / name))[0] == 0
  # Begins amid a group of pictures, what is before is decoded and not shown.
  cut = ("-ss", "2", "-i", str(out / "b_frames.mp4"), "-c", "copy")
  assert run_ffmpeg(*cut, str(out / "cut.mp4"))[0] == 0
  with VideoWriter(out / "fragments.mp4") as writer:
    writer.append(read_video(out / "b_frames.mp4")[0])
  return out


@pytest.fixture
def runs(monkeypatch):
  """Frames that each run of ffmpeg decoded."""
  counts = []

  def counted(*arguments):
    verbose = ["verbose" if word == "error" else word for word in arguments]
    code, output, log = run_ffmpeg(*verbose)
    counts.append(int(re.search(r"(\d+) frames decoded", log)[1]))
    complaints = run_ffmpeg(*arguments)[2]
    return code, output, complaints

  monkeypatch.setattr(video_frames, "run_ffmpeg", counted)
  return counts


def test_the_fixture_has_what_it_says(folder):
  cut = open_video(folder / "cut.mp4")
  assert cut.keys[0] < 0 == cut.times[0] and len(cut) < 80
  assert len(open_video(folder / "stripes.mp4").keys) > 2
  assert len(set(np.diff(open_video(folder / "uneven.mkv").times))) > 2
  assert not len(open_video(folder / "no_times.avi").keys)


OPTIONS = ({}, {"height": 32, "width": 64, "fps": 10}, {"fps": 29.97})


@pytest.mark.parametrize(
  ("name", "options"),
  [
    # The first frame of the AVI file comes late, and read_video counts steps from 0.
    *[("no_times.avi", {}), ("no_times.avi", {"height": 32, "width": 64})],
    *itertools.product((*[*ENCODERS][:-1], "cut.mp4", "fragments.mp4"), OPTIONS),
  ],
)
def test_parts_are_those_of_the_whole(folder, name, options):
  whole, _ = read_video(folder / name, **options)
  video = open_video(folder / name, **options)
  n = len(video)
  assert whole.shape == (n, video.height, video.width, 3)
  for start, stop in ((0, n), (n // 2 - 3, n // 2 + 5), (n - 6, n - 2), (n, n)):
    part, missing = video.read(start, stop)
    np.testing.assert_array_equal(part, whole[start:stop])
    assert missing == 0
  with pytest.raises(ValueError, match=rf"start=2 and stop={n + 1} must be frames of"):
    video.read(2, n + 1)


def test_decoding_begins_at_the_keyframe_before(folder, runs):
  video = open_video(folder / "b_frames.mp4")
  assert runs.pop() < 16  # the first picture, and what the decoder holds back
  video.read(85, 92)
  assert runs.pop() < 12 + 16 and not runs
  # What a keyframe of stripes promises, it does not hold.
  open_video(folder / "stripes.mp4").read(85, 92)
  assert len(runs) == 3 and runs[-1] > 85


def spoil(path, fragment):
  """Makes the pictures of a fragment zeros; the file's structure stays whole."""
  content = bytearray(path.read_bytes())
  begin = [match.start() for match in re.finditer(b"mdat", content)][fragment] + 4
  size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
  content[begin : begin + size] = bytes(size)
  path.write_bytes(content)


def test_pictures_that_do_not_decode_keep_their_places(folder, tmp_path):
  """Frames 48 to 71 of 120."""
  whole, _ = read_video(folder / "fragments.mp4")
  path = tmp_path / "spoilt.mp4"
  path.write_bytes((folder / "fragments.mp4").read_bytes())
  spoil(path, 2)
  video = open_video(path)
  assert len(video) == 120
  found, missing = video.read(0, 120)
  assert missing == 24
  wanted = [*range(48), *[47] * 24, *range(72, 120)]
  np.testing.assert_array_equal(found, whole[wanted])
  found, missing = video.read(60, 80)
  np.testing.assert_array_equal(found, whole[[*[72] * 12, *range(72, 80)]])
  assert missing == 12
  found, missing = video.read(50, 60)
  assert missing == 10 and found.shape == (10, 64, 96, 3) and not found.any()
  for start, stop in ((30, 48), (72, 100)):
    found, missing = video.read(start, stop)
    np.testing.assert_array_equal(found, whole[start:stop])
    assert missing == 0


def test_a_video_whose_first_pictures_are_broken_is_as_long(folder, tmp_path):
  """ffmpeg stops where most of what it saw is broken: then a list ended anywhere."""
  whole, _ = read_video(folder / "fragments.mp4")
  path = tmp_path / "long.mp4"
  with VideoWriter(path) as writer:
    for _ in range(8):
      writer.append(whole)
  spoil(path, 0)
  assert [len(open_video(path)) for _ in range(3)] == [len(read_video(path)[0])] * 3


@pytest.mark.parametrize(
  ("result", "error"),
  [
    ((-signal.SIGKILL, b"", ""), RuntimeError),
    (OSError("no memory"), RuntimeError),
    ((-signal.SIGSEGV, b"", ""), ValueError),  # what the file holds: skipped
  ],
)
def test_what_befalls_one_process_is_no_fault_of_the_file(
  folder, monkeypatch, result, error
):
  path = folder / "b_frames.mp4"
  video = open_video(path)

  def run(*_):
    if isinstance(result, OSError):
      raise result
    return result

  monkeypatch.setattr(video_frames, "run_ffmpeg", run)
  with pytest.raises(error, match=r"b_frames\.mp4"):
    open_video(path)
  if error is RuntimeError:
    with pytest.raises(error, match=r"b_frames\.mp4"):
      video.read(0, 3)


def test_files_that_end_early_or_hold_nothing(folder, tmp_path):
  content = (folder / "fragments.mp4").read_bytes()
  path = tmp_path / "short.mp4"
  path.write_bytes(content[: len(content) // 2])
  whole, _ = read_video(path)
  video = open_video(path)
  assert len(whole) - 1 <= len(video) <= len(whole) < 120  # its last packet is broken
  np.testing.assert_array_equal(video.read(0, len(video))[0], whole[: len(video)])
  path.write_bytes(content)
  for fragment in range(content.count(b"mdat")):
    spoil(path, fragment)
  (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
  for name in ("short.mp4", "junk.mp4"):
    with pytest.raises(ValueError, match=rf"cannot read video .*{name}"):
      open_video(tmp_path / name)
  with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
    open_video(tmp_path / "none.mp4")
  with pytest.raises(ValueError, match="both or neither"):
    open_video(folder / "cut.mp4", height=32)


def test_long_lists_of_frames_are_split(folder, monkeypatch):
  whole, _ = read_video(folder / "b_frames.mp4", fps=20)
  monkeypatch.setattr(video_frames, "_MOST_SELECTED", 30)
  frames, missing = open_video(folder / "b_frames.mp4", fps=20).read(3, 99)
  np.testing.assert_array_equal(frames, whole[3:99])
  assert missing == 0
