"""The study of number formats: its own types, what it scores, and its variants."""

import dataclasses

import bench_networks
import eval_precision as study
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import normal

from longlive_jax.data import detectors, toy_world
from longlive_jax.generate import networks, precision, sampler
from longlive_jax.layers import kv_slots, linear
from longlive_jax.models import dit
from longlive_jax.quant import nvfp4, weights

pytestmark = pytest.mark.usefixtures("quick_compiling")


def test_routed_tokens_get_the_plain_product_and_only_they():
  rng = np.random.default_rng(0)
  plain = jnp.asarray(rng.normal(size=(6, 32)), jnp.float32)
  packed = jax.jit(nvfp4.quantise)(plain)
  tokens = jnp.array([[1, 4], [0, 7]])
  x = jnp.asarray(rng.normal(size=(2, 2, 4, 32)), jnp.float32)  # b f p in
  found = linear.matmul(x, study.RoutedWeight(plain, packed, tokens))
  assert found.shape == (2, 2, 4, 6)
  found = found.reshape(2, 8, 6)
  exact = linear.matmul(x, plain).reshape(2, 8, 6)
  coarse = linear.matmul(x, packed).reshape(2, 8, 6)
  for b in range(2):
    for s in range(8):
      want = exact if s in tokens[b].tolist() else coarse
      np.testing.assert_allclose(found[b, s], want[b, s], atol=1e-5)
  assert np.abs(exact - coarse).min(axis=-1).max() > 1e-3


def test_busy_tokens_are_where_something_changes():
  latents = jnp.zeros((1, 2, 4, 4, 3)).at[0, 1, 2, 3].set(5.0)  # f y x
  tokens = study.busy_tokens(latents, 1 / 8, branches=2)
  assert tokens.tolist() == [[7], [7]]  # frame 1, row 1, column 1 of 2 x 2 tokens


def test_aged_slots_read_the_newest_chunks_plainly():
  shape = (1, 2, 6, 3, 1, 16)  # l b slots p n d
  packed = kv_slots.zeros(
    kv_slots.KVFormat("nvfp4"), shape, jnp.float32, keys=True
  )
  slots = study.AgedSlots(
    jnp.zeros(shape), packed, jnp.zeros(shape[:3], jnp.int32), newest=1
  )
  slots = jax.tree.map(lambda leaf: leaf[0], slots)
  encode, read = jax.jit(kv_slots.encode), jax.jit(kv_slots.read, static_argnums=1)
  rng = np.random.default_rng(0)
  chunks = [jnp.asarray(rng.normal(size=(2, 2, 3, 1, 16)), jnp.float32) for _ in "abc"]
  for i, chunk in enumerate(chunks):
    where = slice(2 * i, 2 * i + 2)
    slots = jax.tree.map(
      lambda leaf, new, where=where: leaf.at[:, where].set(new),
      slots,
      encode(slots, chunk),
    )
  found = read(slots, jnp.float32)
  np.testing.assert_array_equal(found[:, 4:], chunks[2])
  coarse = read(slots.packed, jnp.float32)
  np.testing.assert_array_equal(found[:, :4], coarse[:, :4])
  assert np.abs(coarse[:, 4:] - chunks[2]).max() > 1e-3


def test_chunks_are_made_with_aged_slots():
  config = dataclasses.replace(dit.size("test"), layers=2)
  model = jax.eval_shape(lambda: dit.CausalDiT(config, rngs=nnx.Rngs(0)))
  model = networks.random_like(model)
  sampling = sampler.Sampling(
    frames_per_chunk=2, window_frames=4, sink_frames=0, steps=1, kv_format="nvfp4"
  )
  cache = sampler.init_cache(model, sampling, 1, 4, 4)
  study._FLAGS(["test", "--dtype=float32"])
  caches = [cache, study.aged(cache, 1), study.aged(cache, 2)]
  denoise = jax.jit(sampler.denoise_chunk, static_argnums=3)
  videos: list[list[jax.Array]] = [[], [], []]
  chunk = bench_networks.chunk_inputs(config, sampling, 4, 4)
  for frame in (0, 2):
    frames = np.array([[frame, frame + 1]], np.int32)
    chunk = dataclasses.replace(
      chunk,
      noise=normal(*chunk.noise.shape, seed=frame),
      frames=frames,
      temporal=sampler.chunk_temporal(config, sampling, frames, np.zeros(1, np.int32)),
    )
    for i, video in enumerate(videos):
      latents, caches[i] = denoise(model, caches[i], chunk, sampling)
      video.append(latents)
  coarse, one, both = (np.stack(video) for video in videos)
  np.testing.assert_array_equal(one[0], coarse[0])  # nothing was read yet
  np.testing.assert_array_equal(one[1], both[1])  # there is no older chunk
  assert np.abs(one[1] - coarse[1]).max() > 1e-4


def test_scores_of_the_baseline_against_itself_and_a_still():
  scenes = [toy_world.heldout_scene(i, (1, 1)) for i in range(2)]
  found = []
  for scene in scenes:
    frames = np.split(toy_world.render(scene), [29])
    found.append([detectors.detect(shot) for shot in frames])
  latents = np.random.default_rng(0).normal(size=(2, 2, 4))  # chunks, videos, rest
  baseline = study.Outcome(latents, found)
  row = study.scores(scenes, baseline, baseline)
  assert row["motion amount"] == 1 and row["error, all"] == row["error, first"] == 0
  assert all(row[name] == 1 for name in ("shape", "colour", "motion", "subject kept"))
  still = [
    [dataclasses.replace(d, path=0 * d.path + 3) for d in shots] for shots in found
  ]
  later = latents.copy()
  later[1] *= 2
  row = study.scores(scenes, study.Outcome(later, still), baseline)
  assert row["motion amount"] == 0 and row["error, first"] == 0 < row["error, all"]
  assert "| plain | 100.0% |" in study.table({"plain": {"shape": 1.0, "error": 0.1}})


def test_variants_are_chosen_by_name_and_compared_with_the_baseline():
  assert study.chosen_variants(["kv mse"]) == ["plain", "kv mse"]
  assert len(study.chosen_variants(["*"])) == len(study.VARIANTS)
  with pytest.raises(ValueError, match=r"only=.*'fp5'.* fits none of plain, w4a16"):
    study.chosen_variants(["fp5"])


def test_layers_of_a_network_are_routed():
  """All that read tokens of the chunk, and no other."""
  config = dataclasses.replace(dit.size("test"), layers=2)
  base = dit.CausalDiT(config, rngs=nnx.Rngs(0))
  model = precision.apply(base, study.W4A4, steps=1)
  found = study.routed(model, study.by_path(model), base, jnp.zeros((1, 3), jnp.int32))
  routed = {
    name: weight.tokens.shape
    for name, weight in weights.matrices(found).items()
    if isinstance(weight, study.RoutedWeight)
  }
  read = [f"self_attn/{name}" for name in "qkvo"]
  read += ["cross_attn/q", "cross_attn/o", "ffn/fc1", "ffn/fc2"]
  assert routed == {f"blocks/{name}": (2, 1, 3) for name in read}
