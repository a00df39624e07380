"""The training script on tiny clips: it learns, stops, resumes exactly, and exports."""

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import encode_latents
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from longlive_jax.checkpoint import lora, store
from longlive_jax.data.clip import Chunking, save_latents
from longlive_jax.data.clips import clip_source
from longlive_jax.data.video import VideoWriter
from longlive_jax.models import dit, umt5, vae
from longlive_jax.models.text import Tokenizer
from longlive_jax.train import flow, latents, loop, state, step

pytestmark = pytest.mark.usefixtures("quick_compiling")

ROOT = Path(__file__).parent.parent


def load_script(path):
  spec = importlib.util.spec_from_file_location(path.stem + "_script", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


script = load_script(ROOT / "launch" / "train.py")
get_config = load_script(ROOT / "configs" / "train.py").get_config


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
  """Every run here compiles the same programs: once is enough."""
  names = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # it remembers the folder of its first use
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def random_network(kind, config, seed):
  """A network filled by numpy: its own initialisation takes longer to compile."""
  rng = np.random.default_rng(seed)

  def fill(leaf):
    fan_in = max(1, np.prod(leaf.shape[1:]))
    return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

  return jax.tree.map(fill, store.abstract_network(kind, config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Six clips of 5 chunks of 2 latent frames, and a random VAE."""
  root = tmp_path_factory.mktemp("train")
  (root / "data" / "videos").mkdir(parents=True)
  for i in range(6):
    frames = np.random.default_rng(i).integers(0, 255, (37, 32, 32, 3), np.uint8)
    with VideoWriter(root / "data" / "videos" / f"c{i}.mp4", fps=24) as writer:
      writer.append(frames)
    captions = root / "data" / "caption" / f"c{i}"
    captions.mkdir(parents=True)
    for shot in range(2):
      text = json.dumps({"caption": f"shot {shot} of clip {i}"})
      (captions / f"{shot}.json").write_text(text)
    (captions / "shot_durations.txt").write_text("3, 2")
  store.save_network(root / "vae", random_network("vae", vae.VAE_SIZES["test"], 0))
  return root


def make_config(folder, workdir, **changes):
  config = get_config("test")
  config.data.folder = str(folder / "data")
  config.data.latents = str(folder / "latents")
  config.vae_weights = str(folder / "vae")
  config.workdir = str(workdir)
  config.update_from_flattened_dict(changes)
  return config


def losses(workdir):
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return {line["step"]: line["loss"] for line in map(json.loads, lines)}


RECYCLED = {"recycle.buckets": 4, "recycle.capacity": 3}


@pytest.fixture(scope="module")
def straight(folder):
  workdir = folder / "straight"
  script.train(make_config(folder, workdir, **RECYCLED))
  return workdir


def test_a_run_writes_metrics_checkpoints_and_an_inference_model(straight):
  assert sorted(losses(straight)) == [1, 2, 3, 4, 5, 6]
  assert loop.Checkpoints(straight / "checkpoints", 2).steps() == [3, 6]
  network = store.load_dit(straight / "model" / "dit")
  text = store.load_umt5(straight / "model" / "text")
  assert network.dtype == jnp.bfloat16  # what is shipped takes half the space
  tokenizer = Tokenizer(straight / "model" / "tokenizer.json", text.config.text_len)
  embedded = text(*tokenizer(["shot 1 of clip 3"]))
  assert embedded.shape == (1, text.config.text_len, network.config.text_dim)
  assert json.loads((straight / "config.json").read_text())["steps"] == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_straight(folder, straight, monkeypatch, number):
  """A signal in step 3 of 6 saves; the second start ends with the same bits."""
  workdir = folder / f"stopped_{number}"
  write = loop.MetricsLog.write

  def write_and_stop(self, step):
    if step == 3:
      os.kill(os.getpid(), number)
    return write(self, step)

  # Without the periodic checkpoint: the one of step 3 comes from the signal.
  changes = {"checkpoint_every": 100, **RECYCLED}
  with monkeypatch.context() as patch:
    patch.setattr(loop.MetricsLog, "write", write_and_stop)
    script.train(make_config(folder, workdir, **changes))
  assert sorted(losses(workdir)) == [1, 2, 3]
  assert not (workdir / "model").exists()
  with (workdir / "metrics.jsonl").open("a") as file:  # as if killed a step later
    file.write('{"step": 4, "loss": 9.0}\n')
  script.train(make_config(folder, workdir, **changes))
  assert losses(workdir) == losses(straight)
  first = store.load(straight / "checkpoints" / "6")
  second = store.load(workdir / "checkpoints" / "6")
  assert first.keys() == second.keys()
  assert first["errors.filled"].sum() > 4  # they survive, too
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_processes_are_asked_whether_to_stop_now_and_then(
  folder, straight, tmp_path, monkeypatch
):
  """At the same steps in each of them, whatever they know themselves."""
  asked = []

  def any_process(flag, *, ask):
    asked.append(ask)
    return False

  monkeypatch.setattr(loop.meshes, "any_process", any_process)
  changes = {"log_every": 4, "checkpoint_every": 5, "stop_every": 2, **RECYCLED}
  script.train(make_config(folder, tmp_path, **changes))
  assert asked == [False, True, False, True, True, True]


def test_encoded_clips_are_kept_and_redone_when_something_changes(folder, straight):
  made = []
  clips = latents.LatentClips(
    np.ones((1, 2, 1, 1, 3), np.float32), np.zeros((1, 2), bool),
    np.ones(1, np.int32), (("a", "b"),), ("x",),
  )  # fmt: skip

  def encode():
    made.append(1)
    return clips

  cache = folder / "some_cache"
  for identity, count in (("x", 1), ("x", 1), ("y", 2)):
    found = latents.cached_clips(cache, identity, encode)
    assert len(made) == count
    np.testing.assert_array_equal(found.latents, clips.latents)
    assert found.prompts == clips.prompts and found.cuts.dtype == bool
    assert found.valid.tolist() == [1] and found.names == ("x",)
  (cache / "about.json").write_text("{")  # cut short
  latents.cached_clips(cache, "y", encode)
  assert len(made) == 3


def write_latents(folder, out, *flags):
  data, network = folder / "data", folder / "small_vae"
  encode_latents._FLAGS(
    ["encode", f"--data={data}", f"--vae={network}", f"--out={out}", *flags,
     "--frames_per_chunk=2", "--dtype=float32"]
  )  # fmt: skip
  try:
    encode_latents.main([])
  finally:
    encode_latents._FLAGS.unparse_flags()


def test_streamed_batches_match_clips_encoded_once(folder, straight):
  """Without the views' randomness both pipelines serve the same sequences."""
  source = clip_source(folder / "data")
  small = vae.VAEConfig(2, 2, 8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
  network = random_network("vae", small, 0)
  store.save_network(folder / "small_vae", network)
  tokenizer = Tokenizer(straight / "tokenizer.json", 8)
  views = latents.ViewSettings(window=5, plain=1.0, no_sink=0, caption_dropout=0)
  chunking = Chunking(2, chunks=5)
  clips = latents.encode_clips(source, network, chunking, batch=2, threads=2)
  assert clips.latents.shape == (6, 10, 2, 2, 8) and clips.cuts.sum() == 6
  once = latents.EncodedBatches(
    clips, tokenizer, 2, views, frames_per_chunk=2, seed=1
  )
  streamed = latents.StreamedBatches(
    source, network, tokenizer, 2, views, chunking, seed=1, threads=2
  )
  out = folder / "encoded"
  write_latents(folder, out)
  stored = latents.StreamedBatches(
    clip_source(out), network, tokenizer, 2, views, chunking, seed=1
  )
  rows = {}  # by their captions: the order is each pipeline's own
  for _ in range(3):  # all six clips
    batch = next(streamed)
    for name, value in next(stored).items():  # but that of videos and of their latents
      np.testing.assert_allclose(value, batch[name], atol=1e-5, err_msg=name)
    for i, ids in enumerate(batch["ids"]):
      rows[ids.tobytes()] = {name: value[i] for name, value in batch.items()}
  assert len(rows) == 6
  for _ in range(3):
    batch = next(once)
    for i, ids in enumerate(batch["ids"]):
      row = rows[ids.tobytes()]
      assert row.keys() == batch.keys()
      for name, value in row.items():
        np.testing.assert_allclose(batch[name][i], value, atol=1e-4, err_msg=name)
  position = streamed.get_state()
  after = next(streamed)
  streamed.set_state(json.loads(json.dumps(position)))
  np.testing.assert_array_equal(next(streamed)["latents"], after["latents"])
  # What is there is not encoded again, and nothing is mixed.
  first = out / "latents" / "c0.npz"
  (out / "latents" / "c1.npz").unlink()
  before = first.stat().st_mtime_ns
  write_latents(folder, out)
  assert len([*out.glob("latents/*.npz")]) == 6
  assert first.stat().st_mtime_ns == before
  with pytest.raises(ValueError, match="of another VAE or other settings"):
    write_latents(folder, out, "--fps=8")


def test_what_fills_up_a_short_clip_does_not_count(straight, tmp_path):
  """3 chunks in a window of 4: the last is there again, without weight."""
  (tmp_path / "latents").mkdir()
  values = np.random.default_rng(0).normal(size=(6, 2, 2, 8)).astype(np.float32)
  save_latents(tmp_path / "latents" / "x.npz", values, [*"abc"])
  source, chunking = clip_source(tmp_path), Chunking(2, chunks=5, min_chunks=1)
  network = random_network("vae", vae.VAE_SIZES["test"], 0)
  tokenizer = Tokenizer(straight / "tokenizer.json", 8)
  views = latents.ViewSettings(window=4, plain=1.0)
  clips = latents.encode_clips(source, network, chunking)
  assert clips.latents.shape == (1, 10, 2, 2, 8) and clips.valid.tolist() == [3]
  for batches in (
    latents.EncodedBatches(clips, tokenizer, 2, views, frames_per_chunk=2, seed=0),
    latents.StreamedBatches(source, network, tokenizer, 2, views, chunking, seed=0),
  ):
    batch = next(batches)
    np.testing.assert_array_equal(batch["mask"], [[1] * 6 + [0] * 2] * 2)
    np.testing.assert_array_equal(batch["latents"][0, :6], values)
  other = random_network("vae", dataclasses.replace(network.config, z_dim=4), 0)
  with pytest.raises(ValueError, match="have 8 channels, those of the VAE 4"):
    latents.encode_clips(source, other, chunking)


def test_dropped_captions_are_the_empty_prompt(folder, straight):
  tokenizer = Tokenizer(straight / "tokenizer.json", 8)
  prompts = latents.Prompts(tokenizer, ["shot 0 of clip 1"])
  dropped = prompts.rows(["shot 0 of clip 1"] * 3, dropped=True)
  ids, mask = tokenizer([""])
  np.testing.assert_array_equal(dropped["ids"], np.repeat(ids, 3, axis=0))
  np.testing.assert_array_equal(dropped["text_mask"], np.repeat(mask, 3, axis=0))
  assert (prompts.rows(["shot 0 of clip 1"], dropped=False)["ids"] != ids).any()


def tiny_problem(dtype="float32"):
  config = get_config("test")
  config.dtype = dtype
  dit_config = dit.SIZES["test"]
  params = {
    "dit": random_network("dit", dit_config, 0),
    "text": random_network("umt5", umt5.UMT5_SIZES["test"], 1),
  }
  rng = np.random.default_rng(0)
  batch = {
    "latents": rng.normal(size=(2, 8, 2, 2, 8)).astype(np.float32),
    "mask": np.ones((2, 8), np.float32),
    "ids": rng.integers(3, 50, (2, 4, 8)).astype(np.int32),
    "text_mask": np.ones((2, 4, 8), np.int32),
  }
  uniform = flow.FlowSettings(frames_per_chunk=2, weighting="uniform")
  how = dataclasses.replace(script.loss_settings(config), flow=uniform)
  return params, batch, step.make_loss(dit_config, how)


def test_it_learns_with_its_text_encoder():
  params, batch, loss_fn = tiny_problem()
  settings = state.OptimizerSettings(steps=30, learning_rate=3e-3, beta1=0.9)
  optimizer = state.make_optimizer(settings)
  train = state.init_state(params, optimizer)

  @jax.jit
  def learn(train):
    (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      train.params, batch, jax.random.key(0)
    )
    return state.update(train, gradients, optimizer, ema_decay=0.9), loss

  seen = []
  for _ in range(30):
    train, loss = learn(train)
    seen.append(float(loss))
  assert seen[-1] < 0.5 * seen[0]
  moved = lambda name: max(  # noqa: E731
    float(jnp.abs(a - b).max())
    for a, b in zip(
      *map(jax.tree.leaves, (params[name], train.params[name])), strict=True
    )
  )
  assert moved("dit") > 0 and moved("text") > 0


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_optimiser_is_adamw_without_a_moment_that_says_nothing(beta1):
  settings = state.OptimizerSettings(
    steps=9, learning_rate=1e-2, beta1=beta1, weight_decay=0.1, clip=1.0
  )
  found, wanted = state.make_optimizer(settings), optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(state.learning_rate(settings), beta1, 0.999, weight_decay=0.1),
  )  # fmt: skip
  params = {"a": jnp.ones((3, 4)), "b": jnp.zeros(5)}
  states = [found.init(params), wanted.init(params)]
  arrays = [sum(leaf.ndim > 0 for leaf in jax.tree.leaves(one)) for one in states]
  assert arrays == [2 if beta1 == 0 else 4, 4]
  for i in range(3):
    gradients = {"a": jnp.full((3, 4), i - 0.5), "b": jnp.arange(5.0)}
    updates = []
    for n, optimizer in enumerate((found, wanted)):
      update, states[n] = optimizer.update(gradients, states[n], params)
      updates.append(update)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), *updates
    )


def test_bf16_computes_close_to_f32_with_f32_gradients():
  params, batch, loss_fn = tiny_problem()
  _, _, half_fn = tiny_problem(dtype="bfloat16")
  key = jax.random.key(3)
  loss, _ = jax.jit(loss_fn)(params, batch, key)
  half, _ = jax.jit(half_fn)(params, batch, key)
  assert half != loss
  np.testing.assert_allclose(half, loss, rtol=3e-2)
  gradients, _ = jax.eval_shape(jax.grad(half_fn, has_aux=True), params, batch, key)
  assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_average_follows_then_smooths():
  optimizer = optax.sgd(1.0)
  train = state.init_state(jnp.float32(0.0), optimizer)
  seen = []
  for _ in range(3):
    train = state.update(train, -1.0, optimizer, ema_decay=0.75, ema_start=2)
    seen.append((float(train.params), float(train.ema)))
  assert seen == [(1.0, 1.0), (2.0, 2.0), (3.0, 2.25)]


def test_learning_rate_warms_up_and_decays():
  settings = state.OptimizerSettings(
    steps=100, learning_rate=1.0, warmup=10, final_ratio=0.1
  )
  rate = state.learning_rate(settings)
  assert 0 < rate(0) < rate(5) < rate(10) == 1.0
  np.testing.assert_allclose(rate(100), 0.1, rtol=1e-5)
  with pytest.raises(ValueError, match="warmup=100"):
    state.OptimizerSettings(steps=100, warmup=100)


def test_a_loss_that_is_not_finite_stops_the_run(
  folder, straight, tmp_path, monkeypatch
):
  """Before the state is saved as a good one, which it was after step 2."""
  served = latents.EncodedBatches.__next__

  def spoilt(self):
    batch = served(self)
    self.count = getattr(self, "count", 0) + 1
    factor = np.nan if self.count == 4 else 1.0  # the first one tells the shape
    return {**batch, "latents": factor * batch["latents"]}

  monkeypatch.setattr(latents.EncodedBatches, "__next__", spoilt)
  changes = {"log_every": 6, "checkpoint_every": 2, **RECYCLED}
  with pytest.raises(FloatingPointError, match=r"in step 3, of clips c[0-5], c[0-5],"):
    script.train(make_config(folder, tmp_path, **changes))
  assert loop.Checkpoints(tmp_path / "checkpoints", 2).steps() == [2]
  failed = tmp_path / "failed" / "4"
  assert np.isnan(store.load(failed)["params.dit.head.linear.weight"]).any()
  assert store.load_metadata(failed)["iterator"]


def test_checkpoints_are_kept_by_policy(tmp_path):
  """Written while the state that was given goes on changing."""
  checkpoints = loop.Checkpoints(tmp_path / "c", keep=2, keep_every=3)
  add_one = jax.jit(lambda a: a + 1, donate_argnums=0)
  value = jnp.zeros(1000)
  for number in range(1, 9):
    value = add_one(value)
    checkpoints.save(number, {"a": value}, {})
  checkpoints.wait()
  assert checkpoints.steps() == [3, 6, 7, 8]
  assert (store.load(tmp_path / "c" / "6")["a"] == 6).all()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
  checkpoints = loop.Checkpoints(tmp_path / "c", keep=1)
  rng = np.random.default_rng(0)
  checkpoints.save(1, {"a": rng.normal(size=100_000)}, {})
  checkpoints.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # As when a disk is full, writing a file fails half way.
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    checkpoints.save(2, {"a": rng.normal(size=100_000)}, {})
    with pytest.raises(OSError, match=r"cannot save checkpoint .*2: .*whole: step 1"):
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]
  restored, _ = checkpoints.restore({"a": np.zeros(100_000)})
  assert restored["a"].any()
  checkpoints.save(2, {"a": np.ones(3)}, {})
  checkpoints.wait()
  assert checkpoints.steps() == [2]


def test_bad_settings_are_refused_before_anything_is_read(tmp_path, folder):
  cases = {
    "size": ("huge", "huge"),
    "text": ("toy", "text_dim=24, the text encoder 128"),
    "precision": ("w4a16", "precision='w4a16' is for the base of an adapter"),
    "weights": ("none", "dit weights=none/dit cannot be used: no checkpoint"),
    "vae_weights": ("none", "vae weights=none cannot be used: no checkpoint"),
    "dtype": ("fp8", "bfloat16"),
    "train_text": ("maybe", "joint"),
    "batch_size": (0, "batch_size=0"),
    "data.chunks": (3, "view.window=4"),
    "flow.weighting": ("flat", "bell"),
    "flow.conditioning_frames": (8, "fewer than the 8 frames"),
    "data.min_chunks": (6, "min_chunks=6"),
    "data.height": (32, "height=32 and width=None"),
    "stop_every": (0, "stop_every=0"),
    "data.folder": (str(tmp_path), "no clip"),
  }
  for field, (value, message) in cases.items():
    config = make_config(folder, tmp_path / "out", **{field: value})
    with pytest.raises(ValueError, match=message):
      script.train(config)
  for arg, message in (
    ("large", "config='large' is unknown; choose from toy, ti2v-5b, test"),
    ("toy,fast", "config option='fast' is unknown; use i2v, lora"),
  ):
    with pytest.raises(ValueError, match=message):
      get_config(arg)


def test_metrics_are_drawn(straight, tmp_path, capsys):
  plot = load_script(ROOT / "tools" / "plot_metrics.py")
  out = tmp_path / "curves.png"
  assert plot.main([str(straight / "metrics.jsonl"), "--out", str(out)]) == 0
  assert out.stat().st_size > 5000
  assert "loss" in capsys.readouterr().out
  assert plot.main([str(tmp_path / "none.jsonl"), "--out", str(out)]) == 1
  assert "none.jsonl" in capsys.readouterr().err


def test_sizes_used_here_fit_together():
  assert dit.SIZES["toy"].text_dim == umt5.UMT5_SIZES["toy"].dim
  assert dit.SIZES["toy"].text_len == umt5.UMT5_SIZES["toy"].text_len
  assert dit.SIZES["toy"].in_channels == vae.VAE_SIZES["toy"].z_dim


# ---------------------------------------------------------------------- an adapter
def test_an_adapter_on_four_bits_is_trained_saved_and_exported_alone(folder, straight):
  adapted = {
    "weights": str(straight / "model"), "train_text": "frozen", "lora.rank": 2,
    "lora.layers": ("blocks/self_attn/*",), "precision": "w4a16",
    "checkpoint_every": 4,
  }  # fmt: skip
  workdir = folder / "adapter"
  script.train(make_config(folder, workdir, **adapted))
  saved = loop.Checkpoints(workdir / "checkpoints", 2)
  assert saved.steps() == [4, 6]
  names = store.describe(saved.folder / "6")
  assert all(".self_attn." in n for n in names if n.startswith(("params", "ema")))
  assert not any("text" in name or "ffn" in name for name in names)
  result = lora.load_lora(workdir / "model" / "lora", 2)
  assert (result.rank, result.alpha, len(result.factors)) == (2, 2.0, 4)
  assert all(np.abs(b).max() > 0 for _, b in result.factors.values())
  peft = lora.load_lora(workdir / "model" / "peft", 2)
  jax.tree.map(np.testing.assert_array_equal, peft, result)
  assert not (workdir / "model" / "dit").exists()

  shutil.rmtree(saved.folder / "6")
  before = losses(workdir)
  script.train(make_config(folder, workdir, **adapted))
  assert losses(workdir) == before
  moved = shutil.copytree(straight / "model", folder / "moved")
  changed = make_config(folder, workdir, **{**adapted, "weights": str(moved)})
  with pytest.raises(ValueError, match=r"was trained on the base .* give that one"):
    script.train(changed)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora.rank": 2}, "lora.rank=2 needs networks to start from; set weights"),
    ({"lora.rank": 2, "weights": "model"}, "train_text='joint' cannot be; set"),
    ({"lora.rank": -2}, "lora.rank=-2 must not be negative"),
    (
      {"lora.rank": 2, "weights": "model", "train_text": "frozen",
       "precision": "w4a16", "quantise.mode": "nvfp4"},
      "is quantised already",
    ),
    (
      {"lora.rank": 2, "weights": "model", "train_text": "frozen",
       "lora.layers": ("blocks/*/z",)},
      r"lora.layers .*z'\] matches no linear",
    ),
    ({"weights": "model", "precision": "w2"}, "precision='w2' is unknown"),
  ],
)  # fmt: skip
def test_adapters_that_cannot_be_trained(folder, straight, changes, message):
  if "weights" in changes:
    changes = {**changes, "weights": str(straight / "model")}
  with pytest.raises(ValueError, match=message):
    script.check(make_config(folder, "unused", **changes))
