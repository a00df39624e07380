"""Everything that is checked before a model is built."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from longlive_jax.data.video import VideoWriter
from longlive_jax.generate import report, request


def gray_video(path, frames: int, fps: float = 24) -> None:
  with VideoWriter(path, fps=fps) as writer:
    ramp = np.linspace(0, 255, frames).astype(np.uint8)
    writer.append(np.broadcast_to(ramp[:, None, None, None], (frames, 32, 64, 3)))


def test_picture_size():
  request.check_picture(704, 1280, 24)
  with pytest.raises(ValueError, match="height=720 must be a multiple of 32; use 704"):
    request.check_picture(720, 1280, 24)
  with pytest.raises(ValueError, match="width=8 must be a multiple of 32; use 32"):
    request.check_picture(32, 8, 24)
  with pytest.raises(ValueError, match="fps=0 must be positive"):
    request.check_picture(32, 32, 0)


def test_output_folder(tmp_path):
  made = request.check_folder(tmp_path / "a" / "b")
  assert made.is_dir() and not list(made.iterdir())
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"output=.*file/x is not writable .*choose"):
    request.check_folder(tmp_path / "file" / "x")
  with pytest.raises(ValueError, match=r"output=/proc/x is not writable"):
    request.check_folder("/proc/x")


def test_storyboard_sources(tmp_path):
  board = request.build_storyboard(shots=["a", "b"])
  assert (board.batch, board.chunks) == (1, 6)
  assert request.build_storyboard(shots=["a", "b"], durations=[1, 3]).chunks == 4
  (tmp_path / "p.txt").write_text("one\ntwo\n")
  board = request.build_storyboard(prompts=str(tmp_path / "p.txt"), chunks=2)
  assert (board.batch, board.chunks) == (2, 2)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({}, "0 prompt sources were given; use exactly one"),
    (dict(shots=["a"], prompts="x"), "2 prompt sources were given"),
    (dict(image="x.png"), "image=x.png has no text; add --prompt"),
    (dict(shots=[""]), "prompt 0 = '' is empty"),
    (dict(shots=["a", "b"], chunks=2, durations=[2, 1]), "chunk 2, outside the video"),
    (dict(prompts="nowhere"), "prompts=nowhere does not exist"),
    (dict(prompts="x", durations=[1]), r"durations=\(1,\) belong to --prompt"),
    (dict(images="nowhere"), "image folder=nowhere does not exist"),
  ],
)
def test_bad_sources(kwargs, message):
  with pytest.raises(ValueError, match=message):
    request.build_storyboard(**kwargs)


def test_empty_sources(tmp_path):
  (tmp_path / "p.txt").write_text("\n \n")
  with pytest.raises(ValueError, match=r"p\.txt holds no video"):
    request.build_storyboard(prompts=str(tmp_path / "p.txt"))
  with pytest.raises(ValueError, match="holds no image"):
    request.build_storyboard(images=str(tmp_path))
  (tmp_path / "v").mkdir()
  with pytest.raises(ValueError, match="prompt='' of sample 0, chunk 0, is empty"):
    request.build_storyboard(prompts=str(tmp_path))


def test_first_frames_cover_the_picture(tmp_path):
  wide = np.zeros((50, 200, 3), np.uint8)
  wide[:, 100:] = 255
  Image.fromarray(wide).save(tmp_path / "a.png")
  board = request.build_storyboard(shots=["a"], image=str(tmp_path / "a.png"))
  frames = request.first_frames(board, 64, 96)
  assert frames.shape == (1, 64, 96, 3) and frames.dtype == np.uint8
  assert frames[0, :, :40].max() == 0 and frames[0, :, 56:].min() == 255
  assert request.first_frames(request.build_storyboard(shots=["a"]), 64, 96) is None


def test_unreadable_image(tmp_path):
  (tmp_path / "a.png").write_bytes(b"no picture")
  for name in ("a.png", "none.png"):
    board = request.build_storyboard(shots=["a"], image=str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"image=.*{name} is not readable"):
      request.first_frames(board, 32, 32)


CONTINUE = dict(
  height=32, width=64, fps=24, frames_per_chunk=2, window_frames=4, latent_channels=8
)


def test_continuation_takes_the_end_of_a_video(tmp_path):
  gray_video(tmp_path / "v.mp4", 60)
  video = request.continuation(tmp_path / "v.mp4", **CONTINUE)
  assert video.shape == (1, 13, 32, 64, 3)  # 4 latents: the window
  assert np.abs(video[0, -1].astype(int) - 255).max() <= 6
  gray_video(tmp_path / "short.mp4", 12)
  assert request.continuation(tmp_path / "short.mp4", **CONTINUE).shape[1] == 5


def test_unusable_continuations(tmp_path):
  gray_video(tmp_path / "v.mp4", 4)
  with pytest.raises(ValueError, match="has 4 frames at fps=24; at least 5 are needed"):
    request.continuation(tmp_path / "v.mp4", **CONTINUE)
  (tmp_path / "bad.mp4").write_bytes(b"no video")
  for name in ("bad.mp4", "none.mp4"):
    with pytest.raises(ValueError, match=rf"continue_from=.*{name} is no readable"):
      request.continuation(tmp_path / name, **CONTINUE)


def test_continuation_from_latents(tmp_path):
  path = tmp_path / "l.npy"
  np.save(path, np.zeros((2, 2, 4, 8), np.float32))
  assert request.continuation(path, **CONTINUE).shape == (1, 2, 2, 4, 8)
  np.save(path, np.zeros((1, 3, 2, 4, 8), np.float32))
  with pytest.raises(ValueError, match="3 latent frames; they must be a multiple"):
    request.continuation(path, **CONTINUE)
  np.save(path, np.zeros((1, 2, 2, 4, 9), np.float32))
  with pytest.raises(ValueError, match=r"must be \(b, f, 2, 4, 8\)"):
    request.continuation(path, **CONTINUE)
  np.save(path, np.full((1, 2, 2, 4, 8), np.nan, np.float32))
  with pytest.raises(ValueError, match="not finite"):
    request.continuation(path, **CONTINUE)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(ValueError, match="no readable array"):
    request.continuation(path, **CONTINUE)


def test_progress_bar_writes_a_line_an_update():
  out = io.StringIO()
  bar = report.ProgressBar(4, "chunks", out)
  bar.update(1)
  bar.update(4, "30 FPS")
  first, last = out.getvalue().splitlines()
  assert first.startswith("[######....") and "1/4 chunks" in first
  assert "4/4 chunks 30 FPS" in last and "." not in last.split("]")[0]


def test_stopwatch_leaves_the_first_chunk_out_of_the_loop():
  watch = report.Stopwatch()
  watch.start, watch.first, watch.first_frames = watch.start - 100, None, 0
  watch.frames(29)
  assert watch.loop_fps is None and watch.summary()["frames"] == 29
  watch.frames(32)
  assert watch.loop_fps is None  # it may have been done when the first was written
  watch.frames(32)
  watch.first, watch.last = watch.start + 90, watch.start + 92
  assert watch.loop_fps == pytest.approx(32.0)
  assert watch.summary()["time_to_first_frame_s"] == pytest.approx(90)


def test_contact_sheet(tmp_path):
  sheet = report.ContactSheet(columns=2, width=16)
  with pytest.raises(ValueError, match="empty"):
    sheet.image()
  for i in range(40):
    sheet.add(0, 0, np.full((5, 16, 32, 3), i, np.uint8))
  sheet.add(0, 1, np.full((5, 16, 32, 3), 200, np.uint8))
  image = sheet.image()
  assert image.shape == (2 * 8, 2 * 16, 3)
  assert image[0, 0, 0] == 0 and 30 <= image[0, 16, 0] <= 39  # first and a late one
  assert image[8, 0, 0] == 200 and image[8, 16, 0] == 0
  sheet.save(tmp_path / "sheet.png")
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), image)


def test_json_report(tmp_path):
  content = {"a": np.arange(2), "b": np.float32(1.5), **report.environment()}
  report.write_json(tmp_path / "r.json", content)
  read = json.loads((tmp_path / "r.json").read_text())
  assert read["a"] == [0, 1] and read["b"] == 1.5
  assert read["versions"]["jax"] and read["device"]["count"] >= 1
  assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
