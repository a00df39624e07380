"""The data input: layout, prompts and cuts, order, resumption, bad files."""

import json
import shutil

import numpy as np
import pytest

from longlive_jax.data import clips
from longlive_jax.data.toy_world import training_scene, write_clip
from longlive_jax.data.video import VideoWriter
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("data")
  for i in range(7):
    write_clip(out, f"c{i}", training_scene(i, 2))
  return out


@pytest.fixture
def broken(folder, tmp_path):
  out = tmp_path / "data"
  shutil.copytree(folder, out)
  (out / "videos" / "c3.mp4").write_bytes(b"no video")
  shutil.rmtree(out / "caption" / "c5")
  return out


def names(batches, n):
  return [next(batches)["name"] for _ in range(n)]


def test_clip_has_frames_prompts_and_cuts(tmp_path):
  scene = next(s for i in range(99) if len((s := training_scene(i, 4)).shots) == 2)
  write_clip(tmp_path, "x", scene)
  clip = clips.load_clip(clips.clip_source(tmp_path)[0])
  assert clip["name"] == "x" and clip["frames"].shape == (125, 128, 128, 3)
  first, second = scene.shots
  wanted = [first.caption] * first.chunks + [second.caption] * second.chunks
  wanted[first.chunks] = SCENE_CUT_PREFIX + wanted[first.chunks]
  assert clip["prompts"] == wanted
  assert clip["cuts"].tolist() == [i == first.chunks for i in range(4)]
  short = clips.load_clip(clips.clip_source(tmp_path)[0], chunks=2)
  assert short["frames"].shape[0] == 61 and short["prompts"] == wanted[:2]
  np.testing.assert_array_equal(short["frames"], clip["frames"][:61])


def test_video_of_another_size_and_rate_without_durations(tmp_path):
  (tmp_path / "videos").mkdir()
  (tmp_path / "caption" / "v").mkdir(parents=True)
  with VideoWriter(tmp_path / "videos" / "v.mp4", fps=48) as writer:
    writer.append(np.zeros((140, 48, 80, 3), np.uint8))
  for i in range(2):
    (tmp_path / "caption" / "v" / f"{i}.json").write_text(
      json.dumps({"caption": "ab"[i]})
    )
  source = clips.clip_source(tmp_path, height=32, width=32, fps=24)
  clip = clips.load_clip(source[0])
  assert clip["frames"].shape == (61, 32, 32, 3)  # 70 frames: two whole chunks
  assert clip["prompts"] == ["a", SCENE_CUT_PREFIX + "b"]
  clip = clips.load_clip(source[0], frames_per_chunk=4)
  assert clip["frames"].shape[0] == 61 and len(clip["prompts"]) == 4


def test_every_epoch_has_each_clip_once_in_its_own_order(folder):
  batches = clips.clip_batches(clips.clip_source(folder), 7, seed=1, chunks=1)
  first, second = names(batches, 2)
  assert sorted(first) == sorted(second) == [f"c{i}" for i in range(7)]
  assert first != second


def test_batches_do_not_depend_on_the_number_of_processes(broken):
  def stream(rows):
    source = clips.clip_source(broken)
    return clips.clip_batches(source, 4, seed=1, chunks=1, rows=rows)

  whole = names(stream(None), 4)
  hosts = [names(stream(rows), 4) for rows in ([0, 1], [3])]
  for step in range(4):
    assert hosts[0][step] == whole[step][:2] and hosts[1][step] == whole[step][3:]
  source = clips.clip_source(broken)
  windows = next(clips.window_batches(source, 4, seed=3))["frames"]
  half = clips.window_batches(source, 4, seed=3, rows=[1, 3])
  assert windows.shape == (4, 17, 128, 128, 3) and windows.dtype == np.uint8
  np.testing.assert_array_equal(next(half)["frames"], windows[1::2])


def test_iterator_resumes_exactly(folder):
  batches = clips.window_batches(clips.clip_source(folder), 2, seed=1)
  for _ in range(3):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  rest = [next(batches)["frames"] for _ in range(2)]
  again = clips.window_batches(clips.clip_source(folder), 2, seed=1)
  again.set_state(state)
  for frames in rest:
    np.testing.assert_array_equal(next(again)["frames"], frames)


def test_bad_clips_are_named_counted_and_replaced(broken, caplog):
  source = clips.clip_source(broken)
  assert list(source.skipped) == ["c5"] and len(source) == 6
  batches = names(clips.clip_batches(source, 3, seed=0, chunks=1), 4)
  found = [name for batch in batches for name in batch]
  assert "c3" not in found and len(found) == 12
  assert set(source.skipped) == {"c3", "c5"} and "c3.mp4" in source.skipped["c3"]
  assert sum("skipped clip c3" in message for message in caplog.messages) == 1
  source = clips.clip_source(broken)
  loaded = [clip["name"] for clip in clips.load_clips(source, chunks=1)]
  assert loaded == ["c0", "c1", "c2", "c4", "c6"] and "c3" in source.skipped


def test_errors_say_what_is_wrong(folder, tmp_path):
  with pytest.raises(ValueError, match="holds no clip"):
    clips.clip_source(tmp_path)
  source = clips.clip_source(folder)
  with pytest.raises(ValueError, match=r"c0.mp4.* has 61 frames; 3 chunks need 93"):
    clips.load_clip(source[0], chunks=3)
  with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
    clips.clip_batches(source, 0, seed=0, chunks=1)
  with pytest.raises(ValueError, match="none of 7 clips"):
    next(clips.clip_batches(source, 2, seed=0, chunks=3))
