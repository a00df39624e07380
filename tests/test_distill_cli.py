"""launch/distill.py from end to end, on tiny networks of random weights."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from test_balanced import start
from test_generate_cli import script, weights  # noqa: F401
from test_train import compile_cache, losses  # noqa: F401

from longlive_jax.checkpoint import lora, store
from longlive_jax.generate import networks, storyboard
from longlive_jax.train import latents, stories

pytestmark = pytest.mark.usefixtures("quick_compiling")

launch = script("launch/distill.py")
get_config = script("configs/distill.py").get_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):  # noqa: F811
  """Captions of three stories, two of which have a cut; an image with a text."""
  root = tmp_path_factory.mktemp("distill")
  for i, shots in enumerate((2, 2, 1)):
    captions = root / "stories" / "caption" / f"s{i}"
    captions.mkdir(parents=True)
    for shot in range(shots):
      text = json.dumps({"caption": f"a red circle {shot} on blue {i}"})
      (captions / f"{shot}.json").write_text(text)
    (captions / "shot_durations.txt").write_text("1, 2" if shots == 2 else "3")
  (root / "images").mkdir()
  Image.new("RGB", (40, 40), "red").save(root / "images" / "a.png")
  (root / "images" / "a.txt").write_text("a red circle")
  return root


def make_config(folder, source, workdir, **changes):
  config = get_config("test,steps=2")
  config.weights, config.programs_dir = str(source), ""
  config.data.prompts = str(folder / "stories")
  config.workdir = str(workdir)
  config.update_from_flattened_dict(changes)
  return config


def same_arrays(first, second, **tolerance):
  first, second = store.load(first), store.load(second)
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_allclose(
      first[name], second[name], rtol=0, err_msg=name, **{"atol": 0, **tolerance}
    )


@pytest.fixture(scope="module")
def made(folder, weights):  # noqa: F811
  """A whole run on one device."""
  config = make_config(folder, weights, folder / "made", batch_size=8)
  line = launch.train(config)
  assert np.isfinite(line["generator_loss"]) and line["matching_gradient"] > 0
  return folder / "made"


def test_a_run_goes_on_where_it_was(folder, weights, made, tmp_path):  # noqa: F811
  lines = [json.loads(s) for s in (made / "metrics.jsonl").read_text().splitlines()]
  assert ["generator_loss" in line for line in lines] == [False, True] * 2
  names = store.describe(made / "checkpoints" / "4")
  assert not any("base" in name or "text" in name for name in names)
  # As if stopped after step 2.
  shutil.copytree(made / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
  launch.train(make_config(folder, weights, tmp_path, batch_size=8))
  assert losses(tmp_path) == {k: v for k, v in losses(made).items() if k > 2}
  same_arrays(made / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
  same_arrays(made / "model" / "lora", tmp_path / "model" / "lora")


def test_its_adapter_generates_and_begins_another_one(
  folder, weights, made, tmp_path  # noqa: F811
):
  config = script("configs/generate.py").get_config("toy")
  changes = dict(
    size="test", vae="test", text="test", weights=str(weights), height=32, width=32,
    frames_per_chunk=2, window_frames=8, sink_frames=2, steps=2, guidance=1.0,
    decode_frames=2, cache_dir=str(tmp_path / "cache"), plan="off", programs_dir="",
    loras=(str(made / "model" / "lora"),),
  )  # fmt: skip
  config.update(changes)
  generate = script("launch/generate.py")
  options = generate.Options(prompt=("a red circle",), chunks=1, output=str(tmp_path))
  report = generate.run(config, options)
  assert not report["error"] and report["loras"][0]["rank"] == 2

  # One of fewer steps, from the one of more.
  config = make_config(
    folder, weights, tmp_path, init_lora=str(made / "model" / "peft")
  )
  sources, _ = launch.check(config)
  base = networks.load(sources.dit, "float32")
  generator = launch.init_generator(config, sources, base)
  critic = launch.init_critic(config, sources, base)
  given = lora.load_lora(made / "model" / "lora", 2)
  for path, pair in given.factors.items():
    for factor, want in zip(generator.factors[path], pair, strict=True):
      np.testing.assert_array_equal(factor, want.astype(np.float32))
    assert not critic.factors[path][1].any()


def test_a_start_by_regression(folder, weights, tmp_path):  # noqa: F811
  changes = {"mode": "ode", "teacher_steps": 3, "generator.learning_rate": 3e-3}
  config = make_config(folder, weights, tmp_path, steps=12, **changes)
  config.generator.final_ratio, config.checkpoint_every = 1.0, 12
  launch.train(config)
  found = list(losses(tmp_path).values())
  assert np.mean(found[-4:]) < 0.95 * np.mean(found[:4])
  assert lora.load_lora(tmp_path / "model" / "lora", 2).rank == 2


def test_first_frames_are_latents_of_images(weights):  # noqa: F811
  video_vae = store.load_vae(weights / "vae")
  pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
  encode = jax.jit(latents.encode_frames, static_argnums=2)
  wanted = encode(video_vae, pictures[[2, 2], None], 1)
  found = stories.encode_images(video_vae, pictures, batch=2)  # in two parts
  np.testing.assert_array_equal(found[2:], wanted[:1])
  assert found.shape == (3, 1, 2, 2, 8) and np.abs(found[0] - found[1]).max() > 1e-3


def test_batches_have_one_length_each_and_resume():
  board = storyboard.from_prompt_lists([["a", "b", "a"], ["b", "b", "b"]])
  arrays = board.arrays()
  embeddings = np.arange(2, dtype=np.float32)[:, None, None]
  given = np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1, 1)
  make = functools.partial(
    stories.StoryBatches, arrays, embeddings, given, 4, (2, 3), seed=0
  )
  batches = make()
  seen = [next(batches) for _ in range(20)]
  assert {batch.cuts.shape for batch in seen} == {(4, 2), (4, 3)}
  for batch in seen:
    second = batch.given[:, 0, 0, 0, 0] == 1
    np.testing.assert_array_equal(batch.text[:, 0, 0, 0], second)  # 'a' is 0, 'b' is 1
    assert (batch.text[:, 1] == 1).all()
  position = json.loads(json.dumps(batches.get_state()))
  after = next(batches)
  other = make()
  other.set_state(position)
  jax.tree.map(np.testing.assert_array_equal, next(other), after)


def broken_lora(path, rank=2, width=64):
  factors = {
    "blocks.ffn.fc1.weight": (
      np.ones((2, rank, width), np.float32), np.ones((2, 96, rank), np.float32)
    )
  }  # fmt: skip
  lora.save_lora(path, lora.Lora(factors, rank, 1.0), overwrite=True)
  return str(path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sampling.steps": 0}, "steps=0 must be at least 1"),
    ({"sampling.timesteps": (500.0, 900.0)}, "500.0, 900.0] must fall strictly"),
    ({"sampling.timesteps": (900.0,)}, "are 1, steps=2; give as many, or none"),
    ({"batch_size": 3, "devices": 2}, "batch_size=3 must be a multiple of devices=2"),
    ({"rollout.min_chunks": 4}, "rollout.min_chunks=4 must be at least 1 and at most"),
    ({"rollout.max_chunks": 9, "scores.chunks": 1}, "scores.chunks=1 must be at least"),
    ({"rollout.exit_step": "first"}, "exit_step='first' is unknown; use shared"),
    ({"scores.timesteps": "all"}, "timesteps='all' is unknown; use 'per_block'"),
    ({"generator_every": 9}, "generator_every=9 must be at most steps=4"),
    ({"data.prompts": ""}, "data.prompts='' and data.images=''"),
    ({"size": "toy"}, "are of size 'test', but size='toy'"),
    ({"init_lora": "narrow"}, "has shape .*, the LoRA gives"),
    ({"init_lora": "rank 3"}, "has rank 3, lora.rank=2; set lora.rank=3"),
    ({"init_lora": "rank 3", "lora.rank": 0}, "init_lora=.* needs lora.rank above 0"),
    ({"init_dit": "dit"}, "init_dit='dit' needs lora.rank=0; for adapters"),
    ({"mode": "gan"}, "mode='gan' is unknown; use 'dmd' or 'ode'"),
    (
      {"mode": "ode", "scores.chunks": 2},
      "rollout.max_chunks=3 must be at most scores.chunks=2 with mode='ode'",
    ),
    ({"lora.layers": ("blocks/none",)}, "lora.layers cannot be used"),
    ({"weights": "random"}, "dit has random weights, which cannot be used"),
    ({"height": 33}, "height=33 must be a multiple of 32"),
  ],
)
def test_bad_settings_are_refused_before_anything_is_built(
  folder, weights, tmp_path, changes, message  # noqa: F811
):
  if "init_lora" in changes:
    rank, width = (3, 64) if changes["init_lora"] == "rank 3" else (2, 32)
    changes = {**changes, "init_lora": broken_lora(tmp_path / "lora", rank, width)}
  with pytest.raises(ValueError, match=message):
    launch.train(make_config(folder, weights, tmp_path / "out", **changes))
  assert not (tmp_path / "out").exists()


def test_config_arguments():
  config = get_config("ti2v-5b,steps=2,nvfp4,i2v")
  assert (config.sampling.steps, config.precision) == (2, "w4a16")
  assert config.data.images and not config.data.prompts
  assert get_config("toy,full").lora.rank == 0
  for arg, message in (
    ("7b", "config='7b' is unknown"),
    ("toy,steps=0", "config steps=0 must be one number"),
    ("toy,fast", "config option='fast' is unknown; use steps=4"),
  ):
    with pytest.raises(ValueError, match=message):
      get_config(arg)


# One run goes on from a checkpoint of one device. And rollouts of a generator that is
# trained whole, so that each device has a part of its weights.
EIGHT = """
jax.config.update("jax_num_cpu_devices", 8)
folder, weights, workdir = map(Path, sys.argv[1:])

import jax.numpy as jnp
import numpy as np
from test_distill import make_settings, make_stories, random_dit
from test_distill_cli import launch, make_config

from longlive_jax.parallel import mesh as meshes
from longlive_jax.train import distill

launch.train(make_config(folder, weights, workdir, batch_size=8, devices=8))

base, settings = random_dit(), make_settings()
stories = make_stories(base, batch=8)
draws = distill.draw(jax.random.key(0), stories, settings)
found = []
for mesh in (None, meshes.training_mesh(8)):
  def loss(generator):
    videos = distill.make_videos(generator, base, stories, draws, settings, mesh)
    return jnp.mean(videos * draws.context_noise)

  generator = meshes.spread(base, meshes.last_axis_specs(base, mesh), mesh)
  found.append(jax.tree.leaves(jax.jit(jax.grad(loss))(generator)))
largest = max(float(np.abs(leaf).max()) for leaf in found[0])
difference = max(float(np.abs(np.asarray(b) - a).max()) for a, b in zip(*found))
print(json.dumps(difference / largest))
"""


def test_eight_devices_give_the_numbers_of_one(
  folder, weights, made, tmp_path  # noqa: F811
):
  shutil.copytree(made / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
  process = start("from pathlib import Path\n" + EIGHT, folder, weights, tmp_path)
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors[-2000:]
  for step, loss in losses(tmp_path).items():
    np.testing.assert_allclose(losses(made)[step], loss, rtol=1e-4)
  paths = [path / "checkpoints" / "4" for path in (made, tmp_path)]
  same_arrays(*paths, atol=1e-4)
  assert json.loads(out.splitlines()[-1]) < 1e-4
