"""Video files: round trip, growth, interruption, full disk, bad input."""

import re
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from longlive_jax.data.video import VideoWriter, read_image, read_video


def moving_square(frames, size=64):
  video = np.full((frames, size, size, 3), (30, 60, 90), np.uint8)
  for i in range(frames):
    video[i, 16:40, i % 32 : i % 32 + 24] = (230, 40, 30)
  return video


def write(path, video, pieces=1, **options):
  with VideoWriter(path, **options) as writer:
    for piece in np.array_split(video, pieces):
      writer.append(piece)
  return path


def test_round_trip_keeps_frames_colours_and_rate(tmp_path):
  video = moving_square(61)
  path = write(tmp_path / "a.mp4", video, pieces=3, crf=8)
  back, fps = read_video(path)
  assert back.shape == video.shape and back.dtype == np.uint8 and fps == 24
  assert np.abs(back.astype(int) - video).mean() < 3
  # A wrong colour matrix would shift flat colours by more than this.
  assert np.abs(back[5, 20:34, 12:24].mean((0, 1)) - (230, 40, 30)).max() < 5


@pytest.mark.parametrize("start, frames", [(0, 5), (37, 17), (50, 100)])
def test_a_part_equals_the_same_part_of_the_whole(tmp_path, start, frames):
  path = write(tmp_path / "a.mp4", moving_square(61))
  whole, _ = read_video(path)
  part, _ = read_video(path, start=start, frames=frames)
  np.testing.assert_array_equal(part, whole[start : start + frames])


def test_resize_crop_and_resample(tmp_path):
  path = write(tmp_path / "a.mp4", moving_square(48))
  video, fps = read_video(path, height=32, width=48, fps=12)
  assert video.shape == (24, 32, 48, 3) and fps == 12


def test_growing_file_plays_before_it_is_closed(tmp_path):
  path = tmp_path / "a.mp4"
  with VideoWriter(path) as writer:
    writer.append(moving_square(96))
    writer.append(moving_square(96))
    for _ in range(200):  # the encoder runs beside this process
      try:
        if len(read_video(path)[0]) >= 24:
          break
      except ValueError:
        pass
    else:
      pytest.fail("no frame could be read while the file was growing")
  assert len(read_video(path)[0]) == writer.frames_written == 192


def test_interruption_keeps_all_frames(tmp_path):
  with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4") as writer:
    writer.append(moving_square(40))
    raise KeyboardInterrupt
  assert len(read_video(tmp_path / "a.mp4")[0]) == 40


def test_killed_process_leaves_a_file_that_plays(tmp_path):
  code = (
    "import os, signal, sys, numpy as np\n"
    "from longlive_jax.data.video import VideoWriter\n"
    "w = VideoWriter(sys.argv[1])\n"
    "w.append(np.zeros((60, 32, 32, 3), np.uint8))\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  path = tmp_path / "a.mp4"
  run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
  assert run.returncode == -9
  # The encoder sees the end of its input and finishes the file by itself.
  for _ in range(100):
    try:
      if len(read_video(path)[0]) == 60:
        return
    except ValueError:
      pass
  pytest.fail("the file does not hold the frames that were appended")


def test_full_disk_is_an_error_with_file_and_cause(tmp_path):
  with (
    pytest.raises(OSError, match=r"/dev/full.*No space left"),
    VideoWriter("/dev/full") as writer,
  ):
    for _ in range(50):
      writer.append(moving_square(48))


def test_what_fitted_on_the_disk_plays(tmp_path):
  path = tmp_path / "a.mp4"
  noise = np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8)
  with pytest.raises(OSError, match=re.escape(str(path))), VideoWriter(path) as writer:
    writer.append(noise)
    limit = (1_000_000, 1_000_000)
    resource.prlimit(writer._process.pid, resource.RLIMIT_FSIZE, limit)
    for _ in range(50):
      writer.append(noise)
  assert len(read_video(path)[0]) >= 24


def test_bad_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
    read_video(tmp_path / "none.mp4")
  with pytest.raises(FileNotFoundError, match=r"none\.png"):
    read_image(tmp_path / "none.png")
  for name in ("empty.mp4", "junk.mp4"):
    (tmp_path / name).write_bytes(b"" if name == "empty.mp4" else b"junk" * 100)
    with pytest.raises(ValueError, match=name):
      read_video(tmp_path / name)
    with pytest.raises(ValueError, match=name):
      read_image(tmp_path / name)
  path = write(tmp_path / "a.mp4", moving_square(8))
  with pytest.raises(ValueError, match="start=99"):
    read_video(path, start=99)
  with pytest.raises(ValueError, match="both or neither"):
    read_video(path, height=32)
  image = np.full((4, 6, 3), 9, np.uint8)
  Image.fromarray(image).save(tmp_path / "a.png")
  np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)
  whole = (tmp_path / "a.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"cut\.png"):
    read_image(tmp_path / "cut.png")


def test_writer_rejects_bad_input(tmp_path):
  with pytest.raises(OSError, match="missing"):
    VideoWriter(tmp_path / "missing" / "a.mp4")
  with VideoWriter(tmp_path / "a.mp4") as writer:
    with pytest.raises(ValueError, match="uint8"):
      writer.append(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="even"):
      writer.append(np.zeros((2, 31, 32, 3), np.uint8))
    writer.append(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="began with"):
      writer.append(np.zeros((2, 32, 64, 3), np.uint8))


def test_a_photo_is_turned_upright(tmp_path):
  image = Image.new("RGB", (8, 4))
  exif = image.getexif()
  exif[0x0112] = 6  # orientation: turned by a quarter
  image.save(tmp_path / "a.jpg", exif=exif)
  assert read_image(tmp_path / "a.jpg").shape == (8, 4, 3)
