"""The evaluation scores a perfect generator with 1 and a forgetful one with less."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from random_weights import fill

from configs import generate as generate_config
from longlive_jax.checkpoint import store
from longlive_jax.data import toy_world
from longlive_jax.data.scores import PIXELS, scene_prompts
from longlive_jax.models import dit, umt5, vae
from longlive_jax.models.text import Tokenizer, train_toy_tokenizer
from tools import eval_toy

pytestmark = pytest.mark.usefixtures("quick_compiling")


def chunk_frames(scenes, first, wanted):
  """The true frames of the wanted chunks, None for the others."""
  videos = np.stack([toy_world.render(scene) for scene in scenes])
  cuts = 32 * np.arange(1, scenes[0].chunks) - 3
  chunks = np.split(videos, cuts, axis=1)
  return [c if i in wanted else None for i, c in enumerate(chunks)]


def forgetful(scenes, first, wanted):
  """Another subject in the second half of the video."""
  red = toy_world.Subject("ring", "red", "large", "solid")
  blue = toy_world.Subject("star", "blue", "large", "solid")
  reds = [dataclasses.replace(scene, subject=red) for scene in scenes]
  blues = [dataclasses.replace(scene, subject=blue) for scene in scenes]
  half = scenes[0].chunks // 2
  begins, ends = (chunk_frames(part, first, wanted) for part in (reds, blues))
  return begins[:half] + ends[half:]


def run(test, generate, videos=3, batch=2):
  with ThreadPoolExecutor(2) as pool:
    return eval_toy.evaluate(
      test, generate, pool, videos=videos, batch=batch, chunks=1, seed=0
    )


def test_true_frames_score_one():
  scores = run("single", chunk_frames)
  assert scores.pop("drift") == 0
  # 24 pixels to and fro in 48 frames is 2 a frame; around in a circle, 3.1.
  assert 1.9 < scores.pop(PIXELS) < 3.2
  assert set(scores) == {"shape", "colour", "background", "motion", "all four"}
  assert set(scores.values()) == {1.0}
  scores = run("shots", chunk_frames, videos=2)
  assert scores.pop(PIXELS) > 1.9
  assert set(scores.values()) == {1.0}
  scores = run("minute", chunk_frames, videos=1)
  assert scores.pop("drift") == 0 and scores.pop(PIXELS) > 1.9
  assert set(scores.values()) == {1.0}


def test_a_forgotten_subject_is_noticed():
  scores = run("shots", forgetful, videos=2)
  assert scores["subject kept"] == scores["shape kept"] == scores["colour kept"] == 0
  assert scores["later background"] == scores["later motion"] == 1


def test_minute_is_a_minute():
  assert toy_world.shot_frames(0, sum(eval_toy.MINUTE)) / toy_world.FPS >= 60


def test_sampling_follows_the_config_and_sinks_can_be_off():
  config = generate_config.get_config("toy")
  config.steps, config.guidance = 5, 2.0
  on = eval_toy.sampling_of(config, sinks=True)
  off = eval_toy.sampling_of(config, sinks=False)
  assert (on.steps, on.guidance, on.sink_frames) == (5, 2.0, config.sink_frames)
  assert off.sink_frames == 0 and not off.multi_shot_sink and off.steps == 5


def test_networks_generate_what_can_be_scored(tmp_path):
  scenes = [toy_world.heldout_scene(i, (1, 1)) for i in range(2)]
  prompts = [p for scene in scenes for p in scene_prompts(scene)]
  train_toy_tokenizer(prompts, tmp_path / "tokenizer.json", 256)
  text_config = umt5.UMT5_SIZES["test"]
  dit_config = dataclasses.replace(dit.SIZES["test"], text_dim=text_config.dim)
  vae_config = dataclasses.replace(vae.VAE_SIZES["test"], z_dim=dit_config.in_channels)
  nets = eval_toy.Networks(
    model=fill(store.abstract_network("dit", dit_config)),
    vae=fill(store.abstract_network("vae", vae_config), gain=0.3),
    text=fill(store.abstract_network("umt5", text_config)),
    tokenizer=Tokenizer(tmp_path / "tokenizer.json", text_config.text_len),
  )
  config = generate_config.get_config("toy")
  config.steps, config.guidance = 2, 2.0
  sampling = eval_toy.sampling_of(config, sinks=True)
  generate = functools.partial(
    eval_toy.generate, nets, sampling, seed=0, size=64
  )
  frames = list(generate(scenes, 0, {0, 1}))
  assert [f.shape for f in frames] == [(2, 29, 64, 64, 3), (2, 32, 64, 64, 3)]
  assert frames[0].dtype == np.uint8
  alone = list(generate(scenes, 0, {1}))  # chunk 0 is decoded as its past all the same
  assert alone[0] is None
  np.testing.assert_array_equal(alone[1], frames[1])
  later = list(generate(scenes[1:] * 2, 1, {0}))  # noise by number, not by row
  np.testing.assert_array_equal(later[0][0], frames[0][1])


def test_table_has_one_row_a_score():
  results = {"shots": {"on": {"subject kept": 0.5, "drift": 0.1}, "off": {}}}
  results["shots"]["off"] = {"subject kept": 0.25, "drift": 0.2}
  results["single"] = {"on": {"shape": 1.0}}
  lines = eval_toy.table(results).splitlines()
  assert lines[2] == "| shots | subject kept | 50.0% | 25.0% |"
  assert lines[3] == "| shots | drift | 0.100 | 0.200 |"
  assert lines[4] == "| single | shape | 100.0% |  |"


def test_random_or_missing_weights_are_refused(tmp_path):
  config = generate_config.get_config("toy")
  config.weights = "random"
  with pytest.raises(ValueError, match="weights='random'"):
    eval_toy.load_networks(config)
  config.weights = str(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="nowhere"):
    eval_toy.load_networks(config)
