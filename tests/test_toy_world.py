"""The toy world: what is rendered, what is held out, and that it can be read back."""

import json
import re

import numpy as np
import pytest
from scipy import ndimage

from longlive_jax.data import toy_world as tw
from longlive_jax.data.detectors import detect, matches, same_identity
from longlive_jax.data.toy_render import (
  BACKGROUNDS,
  COLOURS,
  MOTIONS,
  PERIOD,
  SHAPES,
  background_image,
)
from longlive_jax.data.video import read_video
from longlive_jax.generate.storyboard import read_captions, read_durations


def test_the_world_is_as_rich_as_the_design_asks():
  assert len(SHAPES) >= 6 and len(COLOURS) >= 8
  assert len(MOTIONS) == 4 and len(BACKGROUNDS) >= 8


def test_scenes_are_deterministic_and_cut_at_chunk_borders():
  scene = next(
    s for s in map(tw.training_scene, range(50)) if len(s.shots) >= 4 and s.chunks == 12
  )
  video = tw.render(scene)
  assert video.shape == (32 * 12 - 3, 128, 128, 3) and video.dtype == np.uint8
  first = 0
  for shot in scene.shots[:-1]:
    first += shot.chunks
    # Hard cut between frames 32 k - 4 and 32 k - 3, and nowhere nearby.
    cut = 32 * first - 3
    change = np.abs(np.diff(video[cut - 3 : cut + 3].astype(int), axis=0)).mean(
      (1, 2, 3)
    )
    assert change.argmax() == 2 and change[2] > 4 * np.delete(change, 2).max()
  np.testing.assert_array_equal(video, tw.render(scene))
  assert tw.training_scene(3) == tw.training_scene(3) != tw.training_scene(4)


def test_subject_stays_inside_and_follows_its_law():
  rng = np.random.default_rng(0)
  for motion in MOTIONS:
    subject = tw.Subject("triangle", "cyan", "large", "solid")
    shot = tw._shot(rng, subject, "wood", motion, 2, False)
    frames = tw.render_shot(subject, shot, 61)
    changed = (frames != background_image("wood")).any(-1)
    assert not changed[:, [0, -1]].any() and not changed[:, :, [0, -1]].any()
    np.testing.assert_array_equal(frames[0], frames[PERIOD])
    path = detect(frames).path
    expected = np.asarray(shot.centre) + tw.motion_offset(
      motion, np.arange(61), shot.phase
    )
    # A triangle's centre of mass lies off its centre by a constant.
    assert np.ptp(path - expected, axis=0).max() < 1.0  # pixels


def test_a_subject_may_leave_the_picture():
  subject = tw.Subject("circle", "red", "large", "solid")
  whole = tw.render_shot(subject, tw.Shot("sand", "slide", (64, 64), 0, 1, ""), 48)
  for centre, move in (((4, 64), (-60, 0)), ((64, 130), (0, 66)), ((300, -99), None)):
    frames = tw.render_shot(subject, tw.Shot("sand", "slide", centre, 0, 1, ""), 48)
    red, all_red = ((f != background_image("sand")).any(-1) for f in (frames, whole))
    if move is None:
      assert not red.any()
      continue
    x, y = move
    moved = np.roll(all_red, (y, x), axis=(1, 2))
    inside = np.s_[:, 64:, :] if y else np.s_[:, :, :64]
    # Pixels whose edge coverage rounds to nothing may differ.
    assert (red[inside] != moved[inside]).sum() < 20 and red[inside].sum() > 2000


def test_one_combination_in_ten_is_held_out_of_training():
  held_out = tw.held_out_combinations()
  total = len(SHAPES) * len(COLOURS) * len(BACKGROUNDS) * len(MOTIONS)
  assert 0.08 < len(held_out) / total < 0.12
  # Every single attribute still occurs on both sides.
  for values, at in ((SHAPES, 0), (COLOURS, 1), (BACKGROUNDS, 2), (MOTIONS, 3)):
    assert {combination[at] for combination in held_out} == set(values)
  for seed in range(300):
    scene = tw.training_scene(seed)
    for shot in scene.shots:
      key = (scene.subject.shape, scene.subject.colour, shot.background, shot.motion)
      assert key not in held_out
  prompts = tw.heldout_prompts(200, seed=5)
  keys = [
    (s.subject.shape, s.subject.colour, s.shots[0].background, s.shots[0].motion)
    for s in prompts
  ]
  assert set(keys) == set(held_out) and len(keys) == 200
  assert prompts == tw.heldout_prompts(200, seed=5)


def test_captions_name_what_is_shown_and_back_references_do_not():
  named = re.compile(r"\b(" + "|".join([*SHAPES, *COLOURS]) + r")\b")
  full = back = 0
  for seed in range(200):
    scene = tw.training_scene(seed)
    for i, shot in enumerate(scene.shots):
      text = shot.caption.lower()
      assert any(w in text for w in tw.MOTION_WORDS[shot.motion])
      assert any(w in text for w in tw.BACKGROUND_WORDS[shot.background])
      who = text
      for words in (*tw.MOTION_WORDS.values(), *tw.BACKGROUND_WORDS.values()):
        for word in words:  # "circles around" is no circle
          who = who.replace(word, "")
      if named.search(who):
        full += 1
        assert f"{scene.subject.colour} {scene.subject.shape}" in who
      else:
        back += 1
        assert i > 0 and any(w in who for w in tw.BACK_REFERENCES)
  assert 0.45 < back / (back + full) < 0.75
  scene = tw.heldout_scene(1, (1, 2, 1, 1))
  assert [shot.chunks for shot in scene.shots] == [1, 2, 1, 1]
  colour = re.compile(rf"\b{scene.subject.colour}\b")
  assert [bool(colour.search(shot.caption)) for shot in scene.shots] == [1, 0, 0, 0]


def damage(frames, rng):
  """Blur, noise and a colour shift, more than a VAE does."""
  video = ndimage.gaussian_filter(frames.astype(np.float32) / 255, (0, 1, 1, 0))
  video = video * rng.uniform(0.93, 1.07, 3) + rng.uniform(-0.04, 0.04, 3)
  video = video + rng.normal(0, 0.03, video.shape)
  return (np.clip(video, 0, 1) * 2 - 1).astype(np.float32)


@pytest.mark.parametrize("kind", ["clean", "damaged"])
def test_detectors_read_single_chunks_back(kind):
  rng = np.random.default_rng(0)
  scenes = tw.heldout_prompts(16) + [tw.training_scene(i, 1) for i in range(16)]
  for scene in scenes:
    frames = tw.render_shot(scene.subject, scene.shots[0], 29)
    detection = detect(frames if kind == "clean" else damage(frames, rng))
    right = matches(detection, scene.subject, scene.shots[0])
    assert all(right.values()), (scene, detection)
    assert detection.size == scene.subject.size and detection.found == 1
    assert detection.drift < (1e-6 if kind == "clean" else 0.08)


def test_identity_over_shots_and_empty_pictures():
  scene = tw.heldout_scene(0, (1, 1, 1, 1))
  video = tw.render(scene)
  found = [detect(video[max(0, 32 * i - 3) : 32 * i + 29]) for i in range(4)]
  assert all(same_identity(found[0], other) for other in found)
  other = detect(tw.render(tw.heldout_scene(3, (1,))))
  assert not same_identity(found[0], other)
  empty = detect(np.repeat(background_image("sand")[None], 8, 0))
  assert empty.found == 0 and empty.background == "sand"
  assert not matches(empty, scene.subject, scene.shots[0])["colour"]
  with pytest.raises(ValueError, match="toy world"):
    detect(np.zeros((4, 64, 64, 3), np.uint8))


def test_dataset_is_written_once_and_resumes(tmp_path, capsys):
  arguments = ["--out", str(tmp_path), "--chunks", "3", "--seed", "2"]
  tw.main([*arguments, "--clips", "2", "--workers", "1"])
  assert capsys.readouterr().out.startswith("2 clips written, 0 already there")
  broken = tmp_path / "caption" / "002_000001" / "shot_durations.txt"
  broken.unlink()  # as after a crash in the middle of a clip
  tw.main([*arguments, "--clips", "3", "--workers", "2"])
  assert capsys.readouterr().out.startswith("2 clips written, 1 already there")
  for i in range(3):
    scene = tw.training_scene(2_000_000 + i, 3)
    captions = tmp_path / "caption" / f"002_{i:06d}"
    assert read_captions(captions) == [shot.caption for shot in scene.shots]
    durations = read_durations(captions / "shot_durations.txt")
    assert durations == [shot.chunks for shot in scene.shots]
    assert set(json.loads((captions / "0.json").read_text())) == {"caption"}
    frames, fps = read_video(tmp_path / "videos" / f"002_{i:06d}.mp4")
    assert fps == 24
    assert np.abs(frames.astype(int) - tw.render(scene)).mean() < 4
    detection = detect(frames[:29])
    assert all(matches(detection, scene.subject, scene.shots[0]).values())
