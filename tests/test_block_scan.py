"""A pass that only remembers: what it leaves out, and that its numbers are the same."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from random_weights import fill, normal

from longlive_jax.checkpoint import store
from longlive_jax.generate import networks, sampler
from longlive_jax.generate.cached_forward import cached_forward, can_hold
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers import kv_cache
from longlive_jax.models import block_scan, dit
from longlive_jax.parallel import costs
from longlive_jax.quant import weights

pytestmark = pytest.mark.usefixtures("quick_compiling")

LAYERS, N, Y, X = 5, 2, 4, 4
CONFIG = dataclasses.replace(dit.SIZES["test"], layers=LAYERS)
ABSTRACT = jax.eval_shape(lambda: dit.CausalDiT(CONFIG, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("cuts", [[], [2], [1, 4], [1, 2, 3, 4]])
def test_what_is_handed_out_is_that_of_a_scan(cuts):
  weights = jnp.asarray(normal(LAYERS, 8, 8))
  edges = [0, *cuts, LAYERS]
  runs = [weights[a:b] for a, b in itertools.pairwise(edges)]

  def step(x, inputs):
    weight, other, index = inputs
    return jnp.tanh(weight @ x), (x * other, index)

  inputs = jnp.ones(8), runs, jnp.arange(5.0), jnp.arange(LAYERS)
  forward = jax.jit(block_scan.through, static_argnums=0, static_argnames="end")
  x, want = forward(step, *inputs)
  nothing, found = forward(step, *inputs, end=False)
  assert x.shape == (8,) and nothing is None and len(want) == len(runs)
  want, found = block_scan.join(want), block_scan.join(found)
  assert want[1].tolist() == list(range(LAYERS))
  for one, other in zip(found, want, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  everything = lax.scan(step, jnp.ones(8), (weights, *inputs[2:]))
  for one, other in zip(*map(jax.tree.leaves, ((x, want), everything)), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


@functools.cache
def clean_pass(velocity: bool, kv_format: str):
  """The program that writes a chunk into a cache, and the cache that it leaves."""
  model = fill(ABSTRACT)
  sampling = Sampling(
    frames_per_chunk=N, window_frames=3 * N, sink_frames=N, kv_format=kv_format
  )
  cache = sampler.init_cache(model, sampling, 1, Y, X)
  frames = np.arange(N, dtype=np.int32)[None]
  temporal = sampler.chunk_temporal(CONFIG, sampling, frames, np.zeros(1, np.int32))

  def write(model, cache):
    placement = kv_cache.place(cache, jnp.asarray(frames))
    out, kept = cached_forward(
      model, cache, placement, normal(1, N, Y, X, CONFIG.in_channels),
      dit.time_features(np.zeros((1, N)), CONFIG.freq_dim),
      normal(1, 1, CONFIG.text_len, CONFIG.dim), temporal, keep=True, velocity=velocity,
    )  # fmt: skip
    assert (out is not None) == velocity
    return kv_cache.commit(cache, placement, *kept)

  program = jax.jit(write, donate_argnums=1).lower(model, cache).compile()
  return program, jax.tree.map(np.asarray, program(model, cache))


@pytest.mark.parametrize("kv_format", ["", "e4m3"])
def test_the_cache_is_the_same_to_the_bit(kv_format):
  found, want = (clean_pass(velocity, kv_format)[1] for velocity in (False, True))
  for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
  assert np.any(found.k[-1].view(np.uint8))  # the last layer's, too


def test_the_last_block_makes_keys_and_values_only():
  """And no copy of the other blocks' weights, which at 5B are 5 GB."""
  short, whole = (clean_pass(velocity, "")[0] for velocity in (False, True))
  products = [len(re.findall(r" dot\(", p.as_text())) for p in (short, whole)]
  assert products[0] == products[1] + 2  # beside the loop's block; no head in either
  assert f"[{LAYERS - 1},{CONFIG.dim}" not in short.as_text()
  blocks = sum(4 * leaf.size for leaf in jax.tree.leaves(ABSTRACT.blocks))
  spare = [p.memory_analysis().temp_size_in_bytes for p in (short, whole)]
  assert spare[0] - spare[1] < blocks / LAYERS  # what is read of the last one


def test_the_cache_is_written_in_place():
  """Of a donated cache there is no copy, and nothing looks up where a number goes."""
  program, cache = clean_pass(False, "")
  text, slots = program.as_text(), ",".join(map(str, cache.k.shape))
  assert re.search(rf"\[{slots}\]\S* dynamic-update-slice\(", text)
  assert not re.search(rf"\[{slots}\]\S* (copy|scatter|concatenate)\(", text)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
  assert program.memory_analysis().alias_size_in_bytes >= held


# ------------------------------------------------------------------ layers one by one
@pytest.mark.parametrize("formats", [("fp8", "e4m3", "fp8"), ("", "", "")])
def test_an_unrolled_network_that_holds_its_windows_makes_the_same_video(formats):
  """With sinks, so that a window's slots are not in the order of its frames."""
  mode, kv_format, attention_format = formats
  config = dataclasses.replace(CONFIG, layers=2)
  model = jax.eval_shape(lambda: dit.CausalDiT(config, rngs=nnx.Rngs(0)))
  if mode:
    quantise = functools.partial(weights.quantise_weights, mode=mode)
    model = jax.eval_shape(quantise, model)
  model = networks.random_like(model)
  sampling = Sampling(
    frames_per_chunk=N, window_frames=3 * N, sink_frames=N, multi_shot_sink=False,
    steps=2, kv_format=kv_format, attention_format=attention_format, guidance=3.0,
  )  # fmt: skip
  step = jax.jit(sampler.denoise_chunk, static_argnums=3)
  videos = []
  for network in (model, block_scan.unrolled(model)):
    cache, video = sampler.init_cache(network, sampling, 1, Y, X), []
    assert can_hold(network, cache, attention_format) == (network is not model)
    for chunk in range(5):
      frames = N * chunk + np.arange(N, dtype=np.int32)[None]
      latents, cache = step(network, cache, chunk_of(frames, sampling), sampling)
      video.append(np.asarray(latents))
    kept = jax.tree.map(lambda a: np.asarray(a, np.float32), (cache.k, cache.v))
    videos.append((np.stack(video), kept))
  assert not np.allclose(videos[0][0][3], videos[0][0][4], atol=0.1)
  for one, other in zip(*map(jax.tree.leaves, videos), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def chunk_of(frames: np.ndarray, sampling: Sampling) -> sampler.ChunkInputs:
  shape = (*frames.shape, Y, X, CONFIG.in_channels)
  random = np.random.default_rng(frames.sum())
  text = random.normal(size=(1, CONFIG.text_len, CONFIG.text_dim))
  return sampler.ChunkInputs(
    noise=random.normal(size=shape).astype(np.float32),
    text=text.astype(np.float32),
    negative=-text.astype(np.float32),
    frames=frames,
    temporal=sampler.chunk_temporal(CONFIG, sampling, frames, np.zeros(1, np.int32)),
    cut=np.zeros(1, bool),
    known=np.zeros(frames.shape, bool),
    given=np.zeros(shape, np.float32),
  )


@pytest.mark.parametrize(
  ("precision", "changes", "held"),
  [
    ("fp8", {}, True),
    ("fp8", {"kv_format": "nvfp4"}, False),
    ("fp8", {"attention_format": ""}, False),
    ("fp8", {"kv_format": ""}, False),
    ("fp8", {"relative_rope": True}, False),
    ("", {"kv_format": "", "attention_format": ""}, True),
    ("fp8", {"kv_format": "", "attention_format": ""}, False),  # twice the memory
  ],
)
def test_which_windows_are_held(precision, changes, held):
  settings = {"kv_format": "e4m3", "attention_format": "fp8"} | changes
  lengths = {"frames_per_chunk": N, "window_frames": 3 * N, "sink_frames": N}
  sampling = Sampling(**lengths, **settings)
  abstract = ABSTRACT
  if precision:
    quantise = functools.partial(weights.quantise_weights, mode=precision)
    abstract = jax.eval_shape(quantise, ABSTRACT)
  network = jax.eval_shape(block_scan.unrolled, abstract)
  cache = sampler.init_cache(network, sampling, 1, Y, X)
  found = can_hold(network, cache, sampling.attention_format)
  formats = sampling.kv_format, sampling.attention_format
  work = costs.Work(
    1, N, 3 * N, 4, 4, 4, precision, *formats, unrolled=not sampling.relative_rope
  )
  assert found == work.holds_windows == held
  if found:
    form = sampling.attention_format
    assert not can_hold(abstract, cache, form)
    attended = dataclasses.replace(cache.rules, window_frames=2 * N)
    assert not can_hold(network, dataclasses.replace(cache, rules=attended), form)


def test_a_network_is_unrolled_while_it_is_loaded(tmp_path):
  store.save_network(tmp_path / "dit", fill(ABSTRACT))
  source = networks.Source("dit", CONFIG, tmp_path / "dit", unrolled=True)
  load, describe = networks.load, networks.abstract
  network, abstract = load(source, "float32"), describe(source, "float32")
  assert len(block_scan.block_runs(network)) == LAYERS
  assert jax.tree.structure(network) == jax.tree.structure(abstract)
  plain = load(dataclasses.replace(source, unrolled=False), "float32")
  for layer, run in enumerate(block_scan.block_runs(network)):
    for one, whole in zip(*map(jax.tree.leaves, (run, plain.blocks)), strict=True):
      np.testing.assert_array_equal(one, whole[layer : layer + 1])
  with pytest.raises(ValueError, match="unroll='all' is unknown; use 'yes', 'no' or"):
    networks.Choice(unroll="all")
