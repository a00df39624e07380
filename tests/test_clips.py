"""The data input: layout, prompts and cuts, order, resumption, bad files."""

import json
import shutil

import numpy as np
import pytest
from test_video_frames import spoil

from longlive_jax.data import clips
from longlive_jax.data.clip import Chunking, captions_of, load_clip, save_latents
from longlive_jax.data.toy_world import training_scene, write_clip
from longlive_jax.data.video import VideoWriter
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX

ONE = Chunking(chunks=1)


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
  clip = load_clip(clips.clip_source(tmp_path)[0], Chunking())
  assert clip["name"] == "x" and clip["frames"].shape == (125, 128, 128, 3)
  first, second = scene.shots
  wanted = [first.caption] * first.chunks + [second.caption] * second.chunks
  wanted[first.chunks] = SCENE_CUT_PREFIX + wanted[first.chunks]
  assert clip["prompts"] == wanted
  assert clip["cuts"].tolist() == [i == first.chunks for i in range(4)]
  short = load_clip(clips.clip_source(tmp_path)[0], Chunking(chunks=2))
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
  clip = load_clip(source[0], Chunking())
  assert clip["frames"].shape == (61, 32, 32, 3)  # 70 frames: two whole chunks
  assert clip["prompts"] == ["a", SCENE_CUT_PREFIX + "b"]
  clip = load_clip(source[0], Chunking(4))
  assert clip["frames"].shape[0] == 61 and len(clip["prompts"]) == 4


def test_every_epoch_has_each_clip_once_in_its_own_order(folder):
  batches = clips.clip_batches(clips.clip_source(folder), 7, ONE, seed=1)
  first, second = names(batches, 2)
  assert sorted(first) == sorted(second) == [f"c{i}" for i in range(7)]
  assert first != second


def test_batches_do_not_depend_on_the_number_of_processes(broken):
  def stream(rows):
    source = clips.clip_source(broken)
    return clips.clip_batches(source, 4, ONE, seed=1, rows=rows)

  whole = names(stream(None), 4)
  hosts = [names(stream(rows), 4) for rows in ([0, 1], [3])]
  for step in range(4):
    assert hosts[0][step] == whole[step][:2] and hosts[1][step] == whole[step][3:]


def test_iterator_resumes_exactly(folder):
  batches = clips.clip_batches(clips.clip_source(folder), 2, ONE, seed=1)
  for _ in range(3):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  rest = [next(batches) for _ in range(2)]
  again = clips.clip_batches(clips.clip_source(folder), 2, ONE, seed=1)
  again.set_state(state)
  for batch in rest:
    found = next(again)
    assert found["name"] == batch["name"]
    np.testing.assert_array_equal(found["frames"], batch["frames"])


def test_bad_clips_are_named_counted_and_replaced(broken, caplog):
  source = clips.clip_source(broken)
  assert list(source.skipped) == ["c5"] and len(source) == 6
  batches = names(clips.clip_batches(source, 3, ONE, seed=0), 4)
  found = [name for batch in batches for name in batch]
  assert "c3" not in found and len(found) == 12
  assert set(source.skipped) == {"c3", "c5"} and "c3.mp4" in source.skipped["c3"]
  assert sum("skipped clip c3" in message for message in caplog.messages) == 1
  source = clips.clip_source(broken)
  loaded = [clip["name"] for clip in clips.load_clips(source, ONE)]
  assert loaded == ["c0", "c1", "c2", "c4", "c6"] and "c3" in source.skipped


def test_a_clip_with_a_hole_keeps_its_place_in_batches(folder, tmp_path, caplog):
  """Only a process that decodes the hole sees it: it may not skip the clip."""
  shutil.copytree(folder, tmp_path / "data")
  spoil(tmp_path / "data" / "videos" / "c3.mp4", 2)  # frames 48 to 71 of 61
  whole, streams = [], []
  for frames in (None, range(45), range(40, 61)):
    source = clips.clip_source(tmp_path / "data")
    chunking = Chunking(chunks=2)
    batches = clips.clip_batches(
      source, 7, chunking, seed=0, frames=frames, threads=1
    )
    batch = next(batches)
    streams.append(batch["name"])
    assert source.damaged == ({} if frames == range(45) else {"c3": 13})
    assert not source.skipped
    whole = batch["frames"] if frames is None else whole
    for row, shown in zip(batch["frames"], whole, strict=True):
      np.testing.assert_array_equal(
        row, shown[slice(None) if frames is None else frames]
      )
  assert streams[0] == streams[1] == streams[2]
  assert "clip c3: 13 pictures do not decode" in caplog.messages
  source = clips.clip_source(tmp_path / "data")
  loaded = clips.load_clips(source, Chunking(chunks=2))
  assert len(loaded) == 6
  assert source.skipped == {"c3": "13 pictures of it do not decode"}


def test_errors_say_what_is_wrong(folder, tmp_path):
  with pytest.raises(ValueError, match="holds no clip"):
    clips.clip_source(tmp_path)
  source = clips.clip_source(folder)
  with pytest.raises(ValueError, match=r"c0.mp4.* has 61 frames; 3 chunks need 93"):
    load_clip(source[0], Chunking(chunks=3))
  with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
    clips.clip_batches(source, 0, ONE, seed=0)
  with pytest.raises(ValueError, match="none of 7 clips"):
    next(clips.clip_batches(source, 2, Chunking(chunks=3), seed=0))


# ---------------------------------------------------------------------- shots
def write_clip_of(folder, name, lengths, captions, size=(16, 16)):
  """Grey videos, frame t as bright as t, and their captions by number."""
  several = len(lengths) > 1
  for i, length in enumerate(lengths):
    file = folder / "videos" / (f"{name}/{i}.mp4" if several else f"{name}.mp4")
    file.parent.mkdir(parents=True, exist_ok=True)
    grey = np.arange(length, dtype=np.uint8)[:, None, None, None]
    with VideoWriter(file, crf=1) as writer:
      writer.append(np.broadcast_to(grey, (length, *size, 3)))
  (folder / "caption" / name).mkdir(parents=True)
  for i, caption in enumerate(captions):
    file = folder / "caption" / name / f"{i}.json"
    file.write_text(json.dumps({"caption": caption}))


CUT = SCENE_CUT_PREFIX


@pytest.mark.parametrize(
  ("settings", "prompts", "starts"),
  [
    ({}, ["a", "a", "a", CUT + "b", "b"], [0, 5, 13, 21, 29]),
    ({"chunks_per_shot": 2}, ["a", "a", CUT + "b", "b", "b"], [0, 5, 13, 21, 29]),
    ({"max_chunks_per_shot": 1}, ["a", CUT + "b"], [0, 21]),
    ({"max_chunks_per_shot": 2, "chunks": 3}, ["a", "a", CUT + "b"], [0, 5, 13 + 8]),
  ],
)
def test_shots_of_one_video(tmp_path, settings, prompts, starts):
  """5 chunks of 2 latent frames: 5 video frames, then 8 each."""
  write_clip_of(tmp_path, "v", [37], "ab")
  clip = load_clip(clips.clip_source(tmp_path)[0], Chunking(2, **settings))
  assert clip["prompts"] == prompts and clip["valid"] == len(prompts)
  np.testing.assert_array_equal(clip["cuts"], [p.startswith(CUT) for p in prompts])
  wanted = [t for s in starts for t in range(s, s + (8 if s else 5))]
  shown = clip["frames"].mean((1, 2, 3))
  np.testing.assert_allclose(shown, wanted, atol=2)


def test_a_video_a_shot(tmp_path):
  """Whole chunks of each; the second is shorter than one, the fourth not needed."""
  write_clip_of(tmp_path, "v", [22, 7, 20, 99], "abcd")
  source = clips.clip_source(tmp_path)
  assert [file.name for file in source[0].files] == [f"{i}.mp4" for i in range(4)]
  clip = load_clip(source[0], Chunking(2, chunks=5))
  assert clip["prompts"] == ["a", "a", "a", CUT + "c", "c"]
  shown = clip["frames"].mean((1, 2, 3))
  np.testing.assert_allclose(shown, [*range(21), *range(16)], atol=2)
  short = load_clip(source[0], Chunking(2, chunks=5, max_chunks_per_shot=2))
  assert short["prompts"] == ["a", "a", CUT + "c", "c", CUT + "d"]
  assert short["frames"].shape == clip["frames"].shape
  assert captions_of(source[0]) == [*"abcd"]


def test_short_clips_are_filled_up_and_say_so(tmp_path):
  write_clip_of(tmp_path, "v", [22], "ab")
  source = clips.clip_source(tmp_path)
  clip = load_clip(source[0], Chunking(2, chunks=5, min_chunks=3))
  assert clip["valid"] == 3 and clip["frames"].shape == (37, 16, 16, 3)
  assert clip["prompts"] == ["a", "a", CUT + "b", CUT + "b", CUT + "b"]
  assert clip["cuts"].tolist() == [False, False, True, False, False]
  shown = clip["frames"].mean((1, 2, 3))
  np.testing.assert_allclose(shown, [*range(21), *[20] * 16], atol=2)
  with pytest.raises(ValueError, match=r"v.mp4' has 22 frames; 4 chunks need 29"):
    load_clip(source[0], Chunking(2, chunks=5, min_chunks=4))
  with pytest.raises(ValueError, match="chunks=5 must be at least min_chunks=6"):
    Chunking(2, chunks=5, min_chunks=6)


@pytest.mark.parametrize(
  ("lengths", "size", "settings"),
  [
    ([99], {}, {}),
    ([99], {"height": 8, "width": 16, "fps": 10.0}, {}),
    ([99], {}, {"max_chunks_per_shot": 2, "chunks": 4}),
    ([22, 7, 20, 40], {}, {"chunks": 5, "max_chunks_per_shot": 2}),
    ([22, 7, 20], {"fps": 30.0}, {}),
    ([22], {}, {"chunks": 9, "min_chunks": 1}),
  ],
)
def test_some_frames_of_a_clip(tmp_path, lengths, size, settings):
  """What else is known of it does not depend on which frames are read."""
  write_clip_of(tmp_path, "v", lengths, "abcd"[: max(2, len(lengths))])
  source = clips.clip_source(tmp_path, **size)
  whole = load_clip(source[0], Chunking(2, **settings))
  frames = whole.pop("frames")
  n = len(frames)
  assert n == 8 * len(whole["prompts"]) - 3
  parts = (range(n // 2), range(n // 3, n), range(n - 2, n), [3, 4, *range(11, n)], [])
  for numbers in parts:
    part = load_clip(source[0], Chunking(2, **settings), numbers)
    np.testing.assert_array_equal(part.pop("frames"), frames[list(numbers)])
    for key, value in whole.items():
      np.testing.assert_array_equal(part[key], value, err_msg=key)
  with pytest.raises(ValueError, match="99 chunks need"):
    load_clip(source[0], Chunking(2, chunks=99), range(2))


# ---------------------------------------------------------------------- bad input
def test_captions_and_videos_that_miss_each_other(tmp_path):
  write_clip_of(tmp_path, "good", [9], "a")
  write_clip_of(tmp_path, "shots", [9, 9], "a")  # the second has none
  write_clip_of(tmp_path, "alone", [], "a")
  source = clips.clip_source(tmp_path)
  assert [clip.name for clip in source] == ["good"]
  assert "alone' have no video" in source.skipped["alone"]
  assert "1.json" in source.skipped["shots"]


def test_clips_of_several_sizes_need_one(tmp_path):
  write_clip_of(tmp_path, "a", [9], "a")
  write_clip_of(tmp_path, "b", [9], "b", size=(16, 32))
  chunking = Chunking(2, chunks=1)
  batches = clips.clip_batches(clips.clip_source(tmp_path), 2, chunking, seed=0)
  with pytest.raises(ValueError, match=r"frames of shapes .* give height and width"):
    next(batches)
  source = clips.clip_source(tmp_path, height=16, width=16)
  batch = next(clips.clip_batches(source, 2, chunking, seed=0))
  assert batch["frames"].shape == (2, 5, 16, 16, 3)
  with pytest.raises(ValueError, match="height=16 and width=None"):
    clips.clip_source(tmp_path, height=16)


def test_latents_instead_of_videos(tmp_path):
  (tmp_path / "latents").mkdir()
  latents = np.random.default_rng(0).normal(size=(6, 1, 1, 3)).astype(np.float32)
  prompts = ["a", "a", CUT + "b"]
  save_latents(tmp_path / "latents" / "x.npz", latents, prompts)
  source = clips.clip_source(tmp_path)
  clip = load_clip(source[0], Chunking(2, chunks=2))
  np.testing.assert_array_equal(clip["latents"], latents[:4])
  assert clip["prompts"] == ["a", "a"] and not clip["cuts"].any()
  assert captions_of(source[0]) == ["a", "a", "b"]
  whole = load_clip(source[0], Chunking(2, chunks=4, min_chunks=3))
  assert whole["valid"] == 3 and whole["cuts"].tolist() == [False, False, True, False]
  np.testing.assert_array_equal(whole["latents"][6:], latents[[5, 5]])
  with pytest.raises(ValueError, match=r"x.npz' has 6 latents; 4 chunks need 8"):
    load_clip(source[0], Chunking(2, chunks=4))
  with pytest.raises(ValueError, match="not frames_per_chunk=3 each"):
    load_clip(source[0], Chunking(3))
  content = (tmp_path / "latents" / "x.npz").read_bytes()
  for name, broken in (("cut", content[:-40]), ("empty", b"")):
    (tmp_path / "latents" / f"{name}.npz").write_bytes(broken)
  source = clips.clip_source(tmp_path)
  batch = next(clips.clip_batches(source, 3, Chunking(2, chunks=3), seed=0))
  assert batch["name"] == ["x"] * 3 and set(source.skipped) == {"cut", "empty"}
