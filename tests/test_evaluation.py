"""Evaluation videos, TensorBoard files and the progress line of a training."""

import functools
import io
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from random_weights import fill
from tensorboardX.proto import event_pb2
from test_finetune import compile_cache, folder, losses, make_config, script  # noqa: F401

from longlive_jax.checkpoint import store
from longlive_jax.data import detectors, toy_world
from longlive_jax.data.video import read_video
from longlive_jax.generate import report, sampler
from longlive_jax.generate import stream as streams
from longlive_jax.models import umt5
from longlive_jax.models.text import Tokenizer, train_toy_tokenizer
from longlive_jax.train import evaluation, loop
from longlive_jax.train.evaluation import EvalSettings, find_task

pytestmark = pytest.mark.usefixtures("quick_compiling")

EVALUATED = {
  "eval.every": 1, "eval.videos": 3, "eval.batch": 2, "eval.chunks": 2,
  "sampling.window_frames": 8, "sampling.sink_frames": 2, "sampling.steps": 2,
  "tensorboard": True,
}  # fmt: skip


def events(board) -> list:
  """Of all TensorBoard files, in order."""
  found = []
  for path in sorted(board.iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      (size,) = struct.unpack("<Q", data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def test_evaluation_makes_videos_and_changes_nothing(folder, tmp_path):  # noqa: F811
  """From images, at both steps, by programs that are compiled once."""
  (tmp_path / "images").mkdir()
  for name, text in (("a", "a clip\nof two shots"), ("b", "one"), ("c", "number 2")):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / f"{name}.txt").write_text(text)
  plain, seen = tmp_path / "plain", tmp_path / "seen"
  script.train(make_config(folder, plain, "ti2v-5b,i2v"))
  before = streams.compiled_programs()
  changes = {**EVALUATED, "eval.prompts": str(tmp_path / "images")}
  script.train(make_config(folder, seen, "ti2v-5b,i2v", **changes))
  after = streams.compiled_programs()
  assert {name: after[name] - before[name] for name in after} == {
    "denoise": 1, "remember": 0, "decode": 1,
  }  # fmt: skip
  assert losses(seen) == losses(plain)
  one, other = (store.load(path / "checkpoints" / "2") for path in (plain, seen))
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
  for step in "12":
    made = seen / "eval" / step
    for number in range(3):
      frames, fps = read_video(made / f"video_{number:03d}.mp4")
      assert frames.shape == (13, 32, 32, 3) and fps == 24
    assert (made / "shots.png").exists()
    record = json.loads((made / "scores.json").read_text())
    assert record["prompts"][0] == ["a clip", "The scene transitions. of two shots"]
    assert record["scores"] == {}
  lines = [json.loads(s) for s in (seen / "metrics.jsonl").read_text().splitlines()]
  found = events(seen / "tensorboard")
  for line in lines:
    own = [v for e in found if e.step == line["step"] for v in e.summary.value]
    assert {v.tag for v in own} == line.keys() - {"step"}
    for value in own:
      np.testing.assert_allclose(value.simple_value, line[value.tag], rtol=1e-6)


# ------------------------------------------------------------------ the toy world
def true_frames(scenes, rows):
  """What a perfect model makes, chunk by chunk."""
  videos = np.stack([toy_world.render(scenes[row]) for row in rows])
  return np.split(videos, 32 * np.arange(1, scenes[0].chunks) - 3, axis=1)


@pytest.fixture
def toy_evaluation(tmp_path, monkeypatch):
  """Of three videos of two shots by a perfect model, two at a time."""
  settings = EvalSettings(videos=3, batch=2, chunks=2)
  task = find_task(settings, from_image=False)
  prompts = [prompt for sample in task.board.samples for prompt in sample.prompts]
  train_toy_tokenizer(prompts, tmp_path / "tokenizer.json", 256)

  def generate(self, model, embeddings, arrays, rows):
    assert len(rows) == 2 and np.isfinite(embeddings).all()
    return true_frames(self.task.scenes, rows)

  monkeypatch.setattr(evaluation.Evaluation, "_generate", generate)
  return evaluation.Evaluation(
    task,
    settings,
    sampler.Sampling(),
    None,
    Tokenizer(tmp_path / "tokenizer.json", 8),
    tmp_path / "eval",
    None,
    (8, 8),
  )


def test_scenes_are_scored(toy_evaluation):
  encoder = fill(store.abstract_network("umt5", umt5.UMT5_SIZES["test"]))
  scores = toy_evaluation(lambda: (None, encoder), 7)
  assert scores.pop("eval_drift") == 0
  names = ("shape", "colour", "background", "motion", "all_four", "subject_kept")
  assert scores == {f"eval_{name}": 1.0 for name in names}
  written = json.loads((toy_evaluation.folder / "7" / "scores.json").read_text())
  assert written["step"] == 7 and written["scores"]["all four"] == 1.0
  scenes = toy_evaluation.task.scenes
  frames, _ = read_video(toy_evaluation.folder / "7" / "video_002.mp4")
  want = toy_world.render(scenes[2])
  assert np.abs(frames.astype(int) - want).mean() < 4  # but for compression

  shots = true_frames(scenes, [1, 0])  # each the other one's
  found = [[detectors.detect(frames[i]) for frames in shots] for i in range(2)]
  assert evaluation.score(scenes[:2], found)["all four"] == 0


def test_a_first_frame_of_a_scene_is_its_own():
  settings = EvalSettings(videos=2, chunks=1)
  task = find_task(settings, from_image=True)
  for scene, frame in zip(task.scenes, task.first_frames(128, 128), strict=True):
    np.testing.assert_array_equal(frame, toy_world.render(scene)[0])
  with pytest.raises(ValueError, match="128 x 128 pixels, but clips have 64 x 128"):
    task.check_picture(64, 128)


def test_what_cannot_be_written_ends_no_training(toy_evaluation, caplog):
  toy_evaluation.folder.write_text("in the way")
  assert toy_evaluation(lambda: (None, None), 7) == {}
  assert "no evaluation of step 7" in caplog.text


def test_a_lack_of_memory_ends_no_training(toy_evaluation, caplog):
  def networks():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  assert toy_evaluation(networks, 8) == {}
  assert "no evaluation of step 8: RESOURCE_EXHAUSTED" in caplog.text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"eval.every": -1}, "eval.every=-1 must not be negative"),
    ({"eval.chunks": 0}, "eval.chunks=0 must be at least 1"),
    ({"eval.prompts": "nowhere"}, "nowhere"),
    ({"eval.prompts": ""}, "scenes of the toy world, 128 x 128 pixels"),
    ({"sampling.window_frames": 3}, "window_frames=3 must be a multiple"),
    ({"flow.conditioning_frames": 2}, "conditioning_frames=2 must be at most 1"),
  ],
)
def test_settings_that_cannot_be(folder, changes, message):  # noqa: F811
  config = make_config(folder, "unused", **{**EVALUATED, **changes})
  with pytest.raises(ValueError, match=message):
    script.check(config)


# ------------------------------------------------------------------ what is shown
def run_four_steps(root):
  """Of nothing, through the loop."""

  def advance(state, step):
    return state + 1, {"loss": jnp.float32(1 / step)}

  return loop.run(
    advance,
    jnp.int32(0),
    loop.MetricsLog(root / "metrics.jsonl", 0, root / "tensorboard"),
    loop.Checkpoints(root / "checkpoints", 1),
    first=0,
    steps=4,
    log_every=2,
    checkpoint_every=4,
    evaluate=lambda state, step: {"eval_state": float(state)},
    evaluate_every=3,
  )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_one_line_and_a_file_some(
  tmp_path, monkeypatch, caplog, terminal
):
  out = io.StringIO()
  out.isatty = lambda: terminal
  monkeypatch.setenv("COLUMNS", "60")
  bar = functools.partial(report.ProgressBar, out=out)
  monkeypatch.setattr(loop.report, "ProgressBar", bar)
  with caplog.at_level("INFO"):
    state, line = run_four_steps(tmp_path)
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  found = {each["step"]: each["eval_state"] for each in lines if "eval_state" in each}
  assert state == 4 and found == {3: 3.0, 4: 4.0}
  assert line["loss"] == pytest.approx((1 / 3 + 1 / 4) / 2)
  plain = [message for message in caplog.messages if message.startswith("step ")]
  if not terminal:
    assert out.getvalue() == ""
    assert len(plain) == 2 and plain[0].startswith("step 2  loss 0.75  ")
    return
  assert plain == []
  assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")
  shown = out.getvalue().split("\r")
  assert max(map(len, shown)) <= 60  # 59 and the end of the line
  assert "0/4 steps" in shown[0] and "4/4 steps loss 0.2917" in shown[-1]


def test_a_run_that_goes_on_takes_back_what_tensorboard_had(tmp_path):
  run_four_steps(tmp_path)
  loop.MetricsLog(tmp_path / "metrics.jsonl", 2, tmp_path / "tensorboard").close()
  found = events(tmp_path / "tensorboard")
  starts = [e.step for e in found if e.HasField("session_log")]
  assert starts == [1, 3]  # what has these numbers or higher ones is forgotten
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line)["step"] == 2
