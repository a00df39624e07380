"""launch/generate.py end to end, with tiny networks of random weights."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import imageio_ffmpeg
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from longlive_jax.checkpoint import convert, lora, quantised, store
from longlive_jax.data.video import VideoWriter
from longlive_jax.generate import (
  networks,
  planning,
  recorder,
  report,
  request,
  resuming,
  snapshots,
  stream,
)
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX
from longlive_jax.models.text import train_toy_tokenizer
from longlive_jax.parallel import hardware, plan
from longlive_jax.parallel.hardware import HARDWARE
from longlive_jax.quant.weights import BLOCK_LINEARS

pytestmark = pytest.mark.usefixtures("quick_compiling")

ROOT = pathlib.Path(__file__).parents[1]


def script(path: str):
  spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def generate():
  return script("launch/generate.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
  """A folder like the shipped one; no weight is zero, so that everything matters."""
  folder = tmp_path_factory.mktemp("weights")
  rng = np.random.default_rng(0)
  for kind, part in (("dit", "dit"), ("vae", "vae"), ("umt5", "text")):
    abstract = store.abstract_network(kind, store.NETWORKS[kind][2]["test"])
    network = jax.tree.map(
      lambda leaf: rng.normal(0.0, 0.15, leaf.shape).astype(leaf.dtype), abstract
    )
    store.save_network(folder / part, network)
  train_toy_tokenizer(["a red circle on blue"], folder / "tokenizer.json", 97)
  return folder


@pytest.fixture
def config(weights, tmp_path):
  config = script("configs/generate.py").get_config("toy")
  config.update(
    dict(
      size="test",
      vae="test",
      text="test",
      weights=str(weights),
      height=32,
      width=64,
      frames_per_chunk=2,
      window_frames=6,
      sink_frames=2,
      steps=2,
      decode_frames=2,
      cache_dir=str(tmp_path / "cache"),
    )
  )
  return config


def frames_in(path) -> int:
  return imageio_ffmpeg.count_frames_and_secs(str(path))[0]


def test_prompts_to_video(generate, config, tmp_path):
  out = tmp_path / "out"
  before = stream.compiled_programs()
  options = generate.Options(
    prompt=("a red circle", "on blue"), chunks=4, output=str(out)
  )
  result = generate.run(config, options)
  assert not result["error"] and not result["stopped_by"]
  after = stream.compiled_programs()
  assert after["denoise"] - before["denoise"] == 1  # for all chunks and both shots
  assert after["decode"] - before["decode"] == 1
  assert result["speed"]["frames"] == frames_in(out / "video.mp4") == 4 * 8 - 3
  assert result["speed"]["time_to_first_frame_s"] < result["speed"]["total_s"]
  assert list(result["speed"]["startup_s"]) == [
    "imports", "checks", "prompts", "load", "compile", "first_chunk"
  ]  # fmt: skip
  with Image.open(out / "shots.png") as sheet:
    assert sheet.size == (2 * 64, 2 * 32)  # two shots, two chunks each
  saved = json.loads((out / "run.json").read_text())
  assert saved["chunks"] == [0, 4] and saved["config"]["steps"] == 2
  assert saved["plan"]["filled_in"] == {} and saved["plan"]["predicted"]["fps"] > 0
  assert saved["storyboard"][0]["cuts"] == [False, False, True, False]
  assert saved["versions"]["jax"] == jax.__version__ and saved["seed"] == 0
  assert saved["device"]["count"] >= 1
  # 2 prompts (one with and one without the prefix for shot 1) and the negative one.
  assert len(list((tmp_path / "cache").iterdir())) == 4


def test_adapters_beside_any_weights(generate, config, weights, tmp_path):
  """On plain weights as if merged; on packed ones they act, too; both are reported."""
  rng = np.random.default_rng(5)
  factors = {
    "blocks.ffn.fc1.weight": (
      rng.normal(0, 0.1, (2, 3, 64)).astype(np.float32),
      rng.normal(0, 0.1, (2, 96, 3)).astype(np.float32),
    )
  }
  lora.save_lora(tmp_path / "one", lora.Lora(factors, 3, 3.0))
  convert.merge(
    str(weights / "dit"), [str(tmp_path / "one")], str(tmp_path / "merged"), [1.5]
  )

  config.update(dict(steps=1, guidance=1.0, width=32, plan="off"))

  def keys(name, **settings):
    options = generate.Options(
      prompt=("a red circle",), chunks=1, output=str(tmp_path / name),
      save_state=str(tmp_path / f"{name}_state"),
    )  # fmt: skip
    config.update(settings)
    assert not generate.run(config, options)["error"]
    return store.load(tmp_path / f"{name}_state" / "chunk_00001")["cache.k"]

  merged = keys("merged", dit_weights=str(tmp_path / "merged"))
  plain = keys("plain", dit_weights="")
  loras = (f"{tmp_path}/one", f"{tmp_path}/one:0.5")
  beside = keys("beside", loras=loras)
  np.testing.assert_allclose(beside, merged, rtol=1e-3, atol=1e-3)
  assert np.abs(plain - merged).max() > 0.01
  packed = keys("packed", precision="w4a16", precision_layers=("blocks/ffn/fc1",))
  assert np.abs(packed - merged).max() < np.abs(packed - plain).max()
  report = json.loads((tmp_path / "packed" / "run.json").read_text())
  assert [(a["path"], a["weight"], a["rank"]) for a in report["loras"]] == [
    (f"{tmp_path}/one", 1.0, 3), (f"{tmp_path}/one", 0.5, 3)
  ]  # fmt: skip
  config.loras = (f"{tmp_path}/two:0.5",)
  with pytest.raises(ValueError, match=r"loras='.*two:0.5' cannot be used.*two does"):
    generate.run(config, generate.Options(prompt=("a",), output=str(tmp_path / "x")))


def test_resume_rewind_and_branch(generate, config, tmp_path):
  config.vae_precision = "fp8"  # codes are part of the state
  states = str(tmp_path / "states")

  def go(name, **options):
    output = str(tmp_path / name)
    result = generate.run(config, generate.Options(output=output, **options))
    assert not result["error"]
    return result

  shots = dict(prompt=("a red circle", "on blue"), chunks=4)
  go("straight", **shots, save_state=states, save_every=1)
  # What was made is neither overwritten nor mixed with another run's.
  with pytest.raises(ValueError, match=r"output=.* holds a video"):
    go("straight", resume=states, rewind_to=2)
  with pytest.raises(ValueError, match=r"save_state=.* already holds states"):
    go("other", **shots, save_state=states)
  straight = store.load(f"{states}/chunk_00004")
  again = str(tmp_path / "again")
  result = go("rest", resume=states, rewind_to=2, save_state=again)
  assert result["chunks"] == [2, 4] and result["speed"]["frames"] == 16
  resumed = store.load(f"{again}/chunk_00004")
  assert straight.keys() == resumed.keys()
  for name, value in straight.items():
    np.testing.assert_array_equal(value, resumed[name], err_msg=name)

  # The branch goes on from the same state with a shot of its own.
  branch = str(tmp_path / "branch")
  prompt = (SCENE_CUT_PREFIX + "blue red",)
  result = go(
    "way", resume=states, rewind_to=2, save_state=branch, prompt=prompt, chunks=2
  )
  assert result["storyboard"][0]["cuts"] == [False, False, True, False]
  assert result["storyboard"][0]["prompts"][2:] == [prompt[0], "blue red"]
  branched = store.load(f"{branch}/chunk_00004")
  assert np.abs(branched["cache.k"] - straight["cache.k"]).max() > 1e-3
  np.testing.assert_array_equal(branched["cache.frame"], straight["cache.frame"])


def test_settings_of_a_saved_state_cannot_change(generate, config, tmp_path):
  """Found before a network is built, and by name."""
  states = tmp_path / "states"
  board = request.build_storyboard(shots=("a",), chunks=2)
  about = {"config": config.to_dict(), "storyboard": board.record()}
  store.save(states / "chunk_00001", {"key": np.zeros(1)}, about)
  options = generate.Options(output=str(tmp_path / "more"), resume=str(states))
  changes = dict(
    seed=1, size="toy", vae="toy", height=64, width=32, window_frames=8,
    frames_per_chunk=1, relative_rope=False, dtype="bfloat16", kv_format="nvfp4",
    kv_smoothing="none", kv_rule="static_6", guidance=1.0,
    vae_precision="fp8",
  )  # fmt: skip
  for name, value in changes.items():
    other = config.copy_and_resolve_references()
    other[name] = value
    refused = f"{name}={value!r} cannot be set with --resume"
    with pytest.raises(ValueError, match=f"{refused}: .* {name}={config[name]!r};"):
      generate.run(other, options)
  old = {name: config[name] for name in config if not name.startswith("kv_")}
  config.guidance = 3.0  # guided before and after
  resuming.check_resumed(config, old)
  config.kv_format = "nvfp4"
  with pytest.raises(ValueError, match="was made with kv_format=''"):
    resuming.check_resumed(config, old)


def test_a_command_line_over_the_settings_of_a_saved_run(generate):
  """Options in the argument count like settings by name, what they leave does not."""

  def asked(argument: str, *named: str) -> dict:
    values = flags.FlagValues()
    command = ["generate", f"--config={ROOT}/configs/generate.py{argument}", *named]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    return generate.overrides(values["config"])

  assert asked(":ti2v-5b") == {}
  assert asked(":ti2v-5b", "--config.steps=3") == {"steps": 3}
  assert asked(
    ":toy,w4a4",
    "--config.precision_plain_edges=1",
    "--config.precision_plain_steps=(0,-1)",
    "--config.precision_layers=('blocks/ffn/*',)",
  ) == {
    "precision": "w4a4", "precision_plain_edges": 1, "precision_plain_steps": (0, -1),
    "precision_layers": ("blocks/ffn/*",),
  }  # fmt: skip
  given = asked(":toy,nvfp4,kv=nvfp4,no_sinks", "--config.sink_frames=4")
  assert given == {
    "precision": "w4a16", "kv_format": "nvfp4", "sink_frames": 4,
    "multi_shot_sink": False,
  }  # fmt: skip
  config = script("configs/generate.py").get_config("toy,nvfp4,kv=nvfp4")
  saved = {**config.to_dict(), "kv_format": "", "precision": "", "steps": 9}
  del saved["kv_rule"]
  found = resuming.resumed_settings(config, saved, given)
  assert found == {**saved, **given, "kv_rule": config.kv_rule}
  with pytest.raises(ValueError, match="kv_format='nvfp4' cannot be set with --resume"):
    resuming.check_resumed(found, saved)
  saved |= {"kv_group": 16, "colour": "blue"}
  with pytest.raises(ValueError, match=r"unknown here: \['colour', 'kv_group'\]"):
    resuming.resumed_settings(config, saved, {})


def test_what_the_planner_fills_in(generate, config, tmp_path, monkeypatch):
  """A machine in which the cache fits in 8 bits only; a resumed run keeps them."""
  workload = planning.workload(config, generate.find_networks(config)[1], 1)
  small = dataclasses.replace(HARDWARE["cpu"], kind="small")
  sizes = [
    plan.predict(workload, small, plan.Plan(kv_format=kv_format)).peak
    for kv_format in ("", "fp8")
  ]
  assert sizes[1] < sizes[0]
  small = dataclasses.replace(small, memory=(sizes[0] + sizes[1]) / 2 / plan.USABLE)
  monkeypatch.setattr(hardware, "this_machine", lambda: small)
  states = str(tmp_path / "states")
  options = generate.Options(
    prompt=("a",), chunks=2, output=str(tmp_path / "a"), save_state=states
  )
  with pytest.raises(ValueError, match=r"GB more than a small has .* would fit"):
    generate.run(config, options, {"kv_format", "precision"})
  result = generate.run(config, options)
  assert result["config"]["kv_format"] == "fp8" and config.kv_format == ""
  assert "kv_format" in result["planned"]
  saved = store.load_metadata(result["state"])
  resumed = config.copy_and_resolve_references()
  resumed.update(planning.kept_settings(saved))
  more = generate.Options(prompt=("b",), chunks=1, output=str(tmp_path / "b"),
                          resume=states)  # fmt: skip
  assert generate.run(resumed, more)["config"]["kv_format"] == "fp8"


def test_a_tilde_is_the_home_folder(generate, config, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  options = generate.Options(
    prompt=("a",), chunks=1, output="~/out", save_state="~/states"
  )
  result = generate.run(config, options)
  assert result["state"] == str(tmp_path / "states" / "chunk_00001")
  options = generate.Options(
    output="~/rest", resume="~/states", prompt=("b",), chunks=1
  )
  assert generate.run(config, options)["chunks"] == [1, 2]
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "cache", "out", "rest", "states"
  ]  # fmt: skip


@pytest.mark.parametrize("values", [["3", "x"], ["3", ""], ["2.5"]])
def test_durations_are_numbers(generate, values):
  assert generate.parse_durations(["3", " 2"]) == (3, 2)
  message = f"durations={','.join(values)} must be whole numbers of chunks"
  with pytest.raises(ValueError, match=re.escape(message)):
    generate.parse_durations(values)


def test_four_bits_from_start_to_end(generate, config, weights, tmp_path, capsys):
  """Quantised while loading, or a checkpoint that is quantised: the same video."""
  config.update(precision="w4a16", kv_format="nvfp4", steps=1)
  rule = config.precision_rule
  quantised.quantise_checkpoint(weights / "dit", tmp_path / "dit", rule=rule)

  def go(name, **settings):
    config.update(settings)
    states = str(tmp_path / f"{name}_states")
    options = generate.Options(
      prompt=("a",), chunks=2, output=str(tmp_path / name), save_state=states
    )
    result = generate.run(config, options)
    assert not result["error"]
    return result, store.load(result["state"])

  result, state = go("loading")
  line = capsys.readouterr().err
  assert "transformer " in line and "MB nvfp4" in line and "cache " in line
  saved = json.loads((tmp_path / "loading" / "run.json").read_text())["bytes"]
  assert saved == result["bytes"]
  assert saved["transformer"].keys() == {"nvfp4", "float32"}
  assert saved["vae"].keys() == {"float32"} and saved["cache"].keys() == {
    "nvfp4", "bfloat16"
  }  # fmt: skip
  # Keys and values of 2 layers, 6 frames of 2 tokens, 2 rows of guidance; 64 numbers a
  # token in 36 bytes, and a tensor scale a layer, row and frame.
  assert saved["cache"]["nvfp4"] == 2 * 2 * 6 * 2 * (2 * 36 + 4)
  _, again = go("checkpoint", precision="", dit_weights=str(tmp_path / "dit"))
  assert state.keys() == again.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_ctrl_c_keeps_a_video_and_a_state(generate, config, tmp_path, monkeypatch):
  update, before = report.ProgressBar.update, signal.getsignal(signal.SIGINT)

  def interrupt(self, done, note=""):
    update(self, done, note)
    if done == 1:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(report.ProgressBar, "update", interrupt)
  states = str(tmp_path / "states")
  options = generate.Options(
    prompt=("a",), chunks=6, output=str(tmp_path), save_state=states
  )
  result = generate.run(config, options)
  done = result["chunks"][1]
  assert result["stopped_by"] == "SIGINT" and 0 < done < 6
  assert frames_in(tmp_path / "video.mp4") == done * 8 - 3
  assert signal.getsignal(signal.SIGINT) is before

  options = generate.Options(output=str(tmp_path / "rest"), resume=states)
  rest = generate.run(config, options)
  assert rest["chunks"] == [done, 6]
  assert frames_in(tmp_path / "rest" / "video.mp4") == (6 - done) * 8


def test_full_disk_loses_no_frame(generate, config, tmp_path):
  out, states = tmp_path / "out", str(tmp_path / "states")
  out.mkdir()
  (out / "video.mp4").symlink_to("/dev/full")
  options = generate.Options(
    prompt=("a",), chunks=12, output=str(out), save_state=states
  )
  result = generate.run(config, options)
  assert "No space left" in result["error"] and "video.mp4" in result["error"]
  done = result["chunks"][1]
  assert 0 < done <= 12

  # Nothing reached the disk, so the resumed video begins with all of it.
  options = generate.Options(
    output=str(tmp_path / "rest"), resume=states, prompt=("b",), chunks=1
  )
  generate.run(config, options)
  assert frames_in(tmp_path / "rest" / "video.mp4") == (done + 1) * 8 - 3


def test_an_error_beside_the_denoising_ends_the_run(
  generate, config, tmp_path, monkeypatch
):
  """With its own words; the video so far plays, and saved states stay."""
  add, threads = recorder.Recorder.add, set()

  def fail(self, frames, shots=None):
    threads.add(threading.current_thread())
    if shots is not None and self._sent[0]:
      raise RuntimeError("the contact sheet tore")
    add(self, frames, shots)

  monkeypatch.setattr(recorder.Recorder, "add", fail)
  out, states = tmp_path / "out", tmp_path / "states"
  options = generate.Options(
    prompt=("a",), chunks=9, output=str(out), save_state=str(states), save_every=1
  )
  with pytest.raises(RuntimeError, match="the contact sheet tore") as caught:
    generate.run(config, options)
  assert "write" in [frame.name for frame in caught.traceback]
  assert threading.main_thread() not in threads
  assert frames_in(out / "video.mp4") == 5
  saved = snapshots.chunks(states)
  # The fourth chunk waits for the second, which failed, while the fifth is denoised.
  assert 1 in saved and saved[-1] <= 4
  monkeypatch.undo()
  options = generate.Options(
    output=str(tmp_path / "rest"), resume=str(states), rewind_to=1
  )
  assert generate.run(config, options)["chunks"] == [1, 9]
  assert frames_in(tmp_path / "rest" / "video.mp4") == 8 * 8


def test_latents_that_are_not_finite(generate, config, weights, tmp_path):
  bad = store.load_network(weights / "dit", "dit")
  bad.head.linear.bias.set_value(bad.head.linear.bias[...] * np.nan)
  store.save_network(tmp_path / "bad", bad)
  config.dit_weights = str(tmp_path / "bad")
  states = tmp_path / "states"
  options = generate.Options(
    prompt=("a",), output=str(tmp_path), save_state=str(states), save_every=1
  )
  result = generate.run(config, options)
  assert "chunk=0 has latents that are not finite" in result["error"]
  assert "chunk=0" in json.loads((tmp_path / "run.json").read_text())["error"]
  assert result["state"] is None and not list(states.iterdir())


def test_start_from_an_image(generate, config, tmp_path):
  Image.new("RGB", (40, 40), (200, 90, 30)).save(tmp_path / "a.png")
  config.i2v = True
  options = generate.Options(
    prompt=("a",), image=str(tmp_path / "a.png"), chunks=2, output=str(tmp_path)
  )
  assert not generate.run(config, options)["error"]
  assert frames_in(tmp_path / "video.mp4") == 13


def test_continue_a_video(generate, config, tmp_path):
  with VideoWriter(tmp_path / "old.mp4") as writer:
    writer.append(np.full((15, 32, 64, 3), 90, np.uint8))
  options = generate.Options(
    prompt=("a",),
    chunks=1,
    continue_from=str(tmp_path / "old.mp4"),
    output=str(tmp_path),
  )
  assert not generate.run(config, options)["error"]
  # 13 of the 15 frames are 4 latents, 2 chunks; then comes the new one.
  assert frames_in(tmp_path / "video.mp4") == 13 + 8


def test_batch_with_guidance(generate, config, tmp_path):
  config.guidance = 3.0
  (tmp_path / "p.txt").write_text("a red circle\non blue\n")
  options = generate.Options(
    prompts=str(tmp_path / "p.txt"), chunks=1, output=str(tmp_path)
  )
  result = generate.run(config, options)
  assert result["speed"]["frames"] == 10
  for name in ("video_000.mp4", "video_001.mp4"):
    assert str(tmp_path / name) in result["videos"]
    assert frames_in(tmp_path / name) == 5


def test_base_model_clip(generate, config, tmp_path):
  options = generate.Options(
    prompt=("a",), chunks=2, mode="bidirectional", output=str(tmp_path)
  )
  generate.run(config, options)
  assert frames_in(tmp_path / "video.mp4") == 13


BAD = [
  (dict(window_frames=7), {}, "window_frames=7 must be a multiple of"),
  (dict(sink_frames=3), {}, "sink_frames=3 must be a multiple of"),
  (dict(height=40), {}, "height=40 must be a multiple of 32; use 32"),
  (dict(size="7b"), {}, "dit size='7b' is unknown; use one of"),
  (dict(size="toy", vae="toy"), {}, "are of size 'test', but size='toy'"),
  (dict(solver="ddim"), {}, "solver='ddim' is unknown"),
  (dict(steps=0), {}, "steps=0 must be at least 1"),
  (dict(dtype="float8"), {}, "dtype='float8' is unknown"),
  (dict(devices=2), {}, "devices=2 must divide the 1 videos"),
  (dict(sequence_devices=3), {}, r"sequence_devices=3 must divide .* of \[1, 2\]"),
  (dict(sequence_devices=2), {}, "are 2; must be between 1 and the 1 that exist"),
  (dict(guidance_devices=2, guidance=1.0), {}, "guidance_devices=2 needs guidance"),
  (dict(exchange_format="fp4"), {}, "exchange_format=.fp4. is unknown"),
  (dict(decode_frames=0), {}, "decode_frames=0 must be at least 1; use 1"),
  (dict(decode_tiles=2), {}, r"decode_tiles=2 does not make equal .* one of \[1\]"),
  (dict(decode_on="other"), {}, "decode_on='other' needs a device beside the 1 of"),
  (dict(decode_on="gpu"), {}, "decode_on='gpu' is unknown; use same, other or split"),
  (dict(decode_on="split", decode_tiles=2), {}, "decode_tiles=2 needs decode_on='same"),
  (
    dict(decode_on="other"),
    dict(mode="bidirectional"),
    "decode_on='other' needs --mode=stream",
  ),
  (
    dict(decode_tiles=2),
    dict(mode="bidirectional"),
    "decode_tiles=2 needs --mode=stream",
  ),
  (dict(precision="fp5"), {}, "precision='fp5' is unknown; use w4a16"),
  (dict(precision="w4a16", precision_rule="x"), {}, "rule='x' is unknown; use"),
  (
    dict(precision="w4a16", precision_layers=("blocks/mlp/*",)),
    {},
    r"precision_layers cannot be used: .*\['blocks/mlp/\*'\] matches no linear layer",
  ),
  (dict(precision_plain_edges=1), {}, "precision_plain_edges=1 needs a precision"),
  (dict(precision_plain_steps=(0,)), {}, r"precision_plain_steps=\(0,\) needs a prec"),
  (dict(precision="w4a4", precision_plain_edges=1), {}, "some of 2 layers between"),
  (dict(precision="w4a4", precision_plain_steps=(2,)), {}, "within the 2 solver step"),
  (
    dict(precision="w4a4", precision_plain_steps=(0,)),
    dict(mode="bidirectional"),
    r"precision_plain_steps=\(0,\) needs --mode=stream",
  ),
  (dict(kv_format="fp4"), {}, "kv_format='fp4' is unknown"),
  (dict(vae_precision="fp5"), {}, "vae_precision='fp5' is unknown; use 'fp8', or ''"),
  (
    dict(weights="nowhere"),
    {},
    "dit weights=nowhere/dit cannot be used: no checkpoint",
  ),
  (dict(vae_weights="TEXT"), {}, "vae weights=.* it holds 'umt5', not 'vae'"),
  (dict(tokenizer="no.json"), {}, r"tokenizer=no\.json does not exist"),
  (dict(i2v=True), {}, "no image was given; add --image"),
  ({}, dict(prompt=("",)), "prompt 0 = '' is empty"),
  ({}, dict(prompt=("a", "b"), durations=(3, 1), chunks=2), "outside the video of"),
  ({}, dict(image="none.png"), r"image=none\.png is not readable"),
  ({}, dict(continue_from="none.mp4"), r"continue_from=none\.mp4 is no readable"),
  ({}, dict(output="/proc/x"), "output=/proc/x is not writable"),
  ({}, dict(resume="nowhere"), "resume=nowhere holds no saved state"),
  ({}, dict(rewind_to=3), "rewind_to=3 needs --resume"),
  ({}, dict(save_every=3), "save_every=3 needs --save_state"),
  ({}, dict(image="a", resume="b"), "--image and --resume exclude each other"),
  ({}, dict(mode="bidirectional", save_state="x"), "--save_state needs --mode=stream"),
  (
    {},
    dict(mode="bidirectional", prompt=("a", "b")),
    "makes one shot; give one prompt",
  ),
]


@pytest.mark.parametrize(("settings", "options", "message"), BAD)
def test_bad_input_is_found_before_a_model_is_built(
  generate, config, weights, tmp_path, monkeypatch, settings, options, message
):
  def build(*_):
    raise AssertionError("a network was built")

  monkeypatch.setattr(networks, "load", build)
  if "vae_weights" in settings:
    settings = dict(vae_weights=str(weights / "text"))
  config.update(settings)
  options = {"prompt": ("a",), "output": str(tmp_path / "out"), **options}
  with pytest.raises(ValueError, match=message):
    generate.run(config, generate.Options(**options))


def test_damaged_checkpoint(generate, config, weights, tmp_path):
  (tmp_path / "dit").mkdir()
  for file in (weights / "dit").rglob("*"):
    copy = tmp_path / "dit" / file.relative_to(weights / "dit")
    if file.is_dir():
      copy.mkdir(parents=True, exist_ok=True)
    else:
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  config.dit_weights = str(tmp_path / "dit")
  with pytest.raises(ValueError, match=r"dit weights=.* cannot be used: .*damaged"):
    generate.run(config, generate.Options(prompt=("a",), output=str(tmp_path)))


def test_command_line_says_what_is_wrong(tmp_path):
  command = [sys.executable, ROOT / "launch/generate.py", "--prompt", "", "--output"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command += [str(tmp_path), "--config", f"{ROOT}/configs/generate.py:toy,random"]
  command += ["--config.programs_dir="]  # not in the home folder
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr.strip().endswith(
    "error: prompt 0 = '' is empty; write what it should show"
  )
  assert "Traceback" not in done.stderr


def test_config_arguments():
  get_config = script("configs/generate.py").get_config
  full = get_config("ti2v-5b,i2v,random")
  assert (full.height, full.width, full.dtype) == (704, 1280, "bfloat16")
  assert full.i2v and full.weights == "random" and full.sink_frames == 8
  assert get_config("toy,no_sinks").sink_frames == 0
  few = get_config("toy,steps=2")
  assert (few.steps, few.guidance) == (2, 1.0) and few.loras[0].endswith("toy/lora_2")
  with pytest.raises(ValueError, match="no adapter for 'ti2v-5b'"):
    get_config("ti2v-5b,steps=4")
  plain, packed = get_config("toy"), get_config("ti2v-5b,nvfp4,kv=nvfp4")
  assert (plain.precision, plain.kv_format) == ("", "")
  assert (packed.precision, packed.kv_format) == ("w4a16", "nvfp4")
  assert packed.kv_smoothing == "token_mean"
  assert get_config("toy,w4a4").precision == "w4a4"
  eight = get_config("toy,fp8,kv=fp8")
  assert (eight.precision, eight.kv_format) == ("fp8", "fp8")
  assert (eight.attention_format, plain.attention_format) == ("", "")
  fast = get_config("ti2v-5b,fp8,attention=fp8,kv=e4m3")
  assert (fast.attention_format, fast.kv_format) == ("fp8", "e4m3")
  assert plain.precision_layers == BLOCK_LINEARS
  assert plain.vae_precision == ""
  assert get_config("ti2v-5b,fp8,vae=fp8").vae_precision == "fp8"
  with pytest.raises(ValueError, match="'nvfp4' and 'w4a4' exclude each other"):
    get_config("toy,nvfp4,w4a4")
  with pytest.raises(ValueError, match="'kv=nvfp4' and 'kv=fp8' exclude each other"):
    get_config("toy,kv=fp8,kv=nvfp4")
  with pytest.raises(ValueError, match="config size='7b' is unknown"):
    get_config("7b")
  with pytest.raises(ValueError, match="config option='fast' is unknown"):
    get_config("toy,fast")
