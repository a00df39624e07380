"""The chunk step: guidance, given frames, cuts a sample, windows; and its settings."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from random_weights import normal, random_dit

from longlive_jax.generate import bidirectional, sampler, step_models
from longlive_jax.generate.sampler import ChunkInputs, Sampling
from longlive_jax.models import dit

pytestmark = pytest.mark.usefixtures("quick_compiling")

CONFIG = dit.SIZES["test"]
Y, X, N = 2, 4, 2
SHAPE = (Y, X, CONFIG.in_channels)
BASE = Sampling(
  frames_per_chunk=N, window_frames=3 * N, sink_frames=N, multi_shot_sink=True, steps=2
)
EULER = dataclasses.replace(BASE, solver="euler", steps=1)  # x = noise - velocity

denoise = jax.jit(sampler.denoise_chunk, static_argnames="sampling")
clean_pass = jax.jit(sampler.clean_pass, static_argnames="sampling")


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return random_dit()


@functools.cache
def embedding(name: int) -> np.ndarray:
  return normal(5, CONFIG.text_dim, seed=100 + name)


def chunk(
  sampling: Sampling,
  index: int,
  text: list[int],
  *,
  cut: list[bool] | None = None,
  shot: list[int] | None = None,
  start: int | None = None,
  samples: list[int] | None = None,
  negative: int | None = None,
  image: np.ndarray | None = None,
) -> ChunkInputs:
  """Inputs of chunk `index` of len(text) videos, with prompts text[i]."""
  b, start = len(text), index * N if start is None else start
  samples = list(range(b)) if samples is None else samples
  frames = np.tile(np.arange(start, start + N, dtype=np.int32), (b, 1))
  noise = np.stack([normal(N, *SHAPE, seed=1000 * s + index) for s in samples])
  known, given = np.zeros((b, N), bool), np.zeros_like(noise)
  if image is not None:
    known[:, : image.shape[1]] = True
    given[:, : image.shape[1]] = image
  return ChunkInputs(
    noise=noise,
    text=np.stack([embedding(t) for t in text]),
    negative=None if negative is None else np.stack([embedding(negative)] * b),
    frames=frames,
    temporal=sampler.chunk_temporal(
      CONFIG, sampling, frames, np.array(shot or [0] * b)
    ),
    cut=np.array(cut or [False] * b),
    known=known,
    given=given,
  )


def run(model, sampling, chunks):
  """Latents of every chunk and the cache."""
  cache = sampler.init_cache(model, sampling, len(chunks[0].cut), Y, X)
  out = []
  for inputs in chunks:
    latents, cache = denoise(model, cache, inputs, sampling)
    out.append(np.asarray(latents))
  return out, cache


STORY = dict(
  text=[[0, 1], [0, 1], [2, 1], [2, 3], [2, 3], [2, 4]],
  cut=[[0, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 1]],
  shot=[[0, 0], [0, 0], [1, 0], [1, 1], [1, 1], [1, 2]],
)


def story(sampling, samples=(0, 1), **options):
  """Six chunks of two videos that cut at different times, or some of the videos."""
  return [
    chunk(
      sampling,
      i,
      [STORY["text"][i][s] for s in samples],
      cut=[bool(STORY["cut"][i][s]) for s in samples],
      shot=[STORY["shot"][i][s] for s in samples],
      samples=list(samples),
      **options,
    )
    for i in range(len(STORY["text"]))
  ]


# ------------------------------------------------------------------ the chunk step
def test_the_scan_equals_chunk_by_chunk(model):
  chunks = story(BASE)
  one_by_one, cache = run(model, BASE, chunks)
  stacked = jax.tree.map(lambda *a: np.stack(a), *chunks)
  empty = sampler.init_cache(model, BASE, 2, Y, X)
  rollout = jax.jit(sampler.rollout, static_argnames="sampling")
  latents, scanned = rollout(model, empty, stacked, BASE)
  # Two programs: XLA may fuse them differently, no more.
  np.testing.assert_allclose(latents, np.stack(one_by_one), atol=1e-5)
  np.testing.assert_array_equal(scanned.frame, cache.frame)
  np.testing.assert_array_equal(scanned.pinned, cache.pinned)
  np.testing.assert_allclose(scanned.k, cache.k, atol=1e-5)


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"guidance": 3.0},
    {"relative_rope": True},
    {"clean_recache": True},
    {"kv_format": "nvfp4", "guidance": 3.0, "relative_rope": True},
    {"kv_format": "nvfp4", "kv_smoothing": "channel_mean", "clean_recache": True},
    {"kv_format": "fp8", "guidance": 3.0, "relative_rope": True},
  ],
  ids=str,
)
def test_videos_of_a_batch_do_not_see_each_others_cuts(model, change):
  sampling = dataclasses.replace(BASE, **change)
  negative = 9 if sampling.branches == 2 else None
  together, cache = run(model, sampling, story(sampling, negative=negative))
  for s in (0, 1):
    alone, own = run(model, sampling, story(sampling, [s], negative=negative))
    for a, b in zip(alone, together, strict=True):
      np.testing.assert_allclose(a[0], b[s], atol=1e-5)
    for row in range(sampling.branches):
      mine = s * sampling.branches + row
      np.testing.assert_array_equal(own.frame[row], cache.frame[mine])
      np.testing.assert_array_equal(own.pinned[row], cache.pinned[mine])
  pinned = [
    sorted(np.asarray(f)[np.asarray(p)].tolist())
    for f, p in zip(cache.frame, cache.pinned, strict=True)
  ]
  assert pinned[0] == [4, 5] and pinned[-1] == [10, 11]  # the last cut of each


def test_a_cut_matters_from_the_next_chunk_on(model):
  """The pin acts on what later chunks remember, once the window is full."""
  plain = [dataclasses.replace(c, cut=np.zeros(2, bool)) for c in story(BASE)]
  without, _ = run(model, BASE, plain)
  cuts, _ = run(model, BASE, story(BASE))
  same = [np.array_equal(a, b) for a, b in zip(without, cuts, strict=True)]
  assert same == [True] * 4 + [False] * 2  # window of 3 chunks, sample 0 cuts at 2


def test_clean_recache_keeps_the_global_sink_and_the_new_shot(model):
  sampling = dataclasses.replace(BASE, clean_recache=True)
  _, cache = run(model, sampling, story(sampling)[:3])  # sample 0 cuts at chunk 2
  frames = [sorted(f for f in row.tolist() if f >= 0) for row in cache.frame]
  assert frames == [[0, 1, 4, 5], [0, 1, 2, 3, 4, 5]]
  assert cache.has_pin.tolist() == [True, False]


def test_the_shot_opens_a_temporal_gap(model):
  without = dataclasses.replace(BASE, shot_rope_offset=0.0)
  gap = sampler.chunk_temporal(CONFIG, BASE, np.array([[4, 5]]), np.array([2]))
  plain = sampler.chunk_temporal(CONFIG, without, np.array([[20, 21]]), np.array([2]))
  for a, b in zip(gap, plain, strict=True):
    np.testing.assert_array_equal(a, b)  # 4 + 2 * 8
  half = dataclasses.replace(BASE, t_scale=0.5)
  scaled = sampler.chunk_temporal(CONFIG, half, np.array([[4, 6]]), np.array([1]))
  plain = sampler.chunk_temporal(CONFIG, without, np.array([[6, 7]]), np.array([0]))
  for a, b in zip(scaled, plain, strict=True):
    np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------ precision by step
def test_every_pass_of_a_chunk_may_have_its_own_weights(model):
  other = jax.tree.map(lambda a: np.float32(1.01) * a, jax.device_get(model))
  sampling = dataclasses.replace(BASE, steps=3)
  inputs = chunk(sampling, 0, [0, 1])

  def go(choice):
    models = step_models.StepModels((model, other), choice)
    latents, cache = run(models, sampling, [inputs])
    return latents[0], np.asarray(cache.k)

  want, remembered = run(model, sampling, [inputs])
  same = go((0, 0, 0, 0))
  np.testing.assert_array_equal(same[0], want[0])
  np.testing.assert_array_equal(same[1], remembered.k)
  latents, keys = go((0, 0, 0, 1))  # the clean pass alone
  np.testing.assert_allclose(latents, want[0], atol=1e-6)
  assert np.abs(keys - remembered.k).max() > 1e-3
  found = [go(choice)[0] for choice in ((0, 1, 1, 0), (0, 1, 0, 0), (1, 1, 1, 0))]
  for a, b in itertools.combinations([want[0], *found], 2):
    assert np.abs(a - b).max() > 1e-4
  with pytest.raises(ValueError, match=r"choice=\(0, 1\) must have 3 solver steps"):
    go((0, 1))


# ------------------------------------------------------------------ guidance
def test_without_guidance_there_is_no_negative_branch(model):
  cache = sampler.init_cache(model, BASE, 2, Y, X)
  assert BASE.branches == 1 and cache.k.shape[1] == 2
  guided = dataclasses.replace(BASE, guidance=2.0)
  assert guided.branches == 2
  assert sampler.init_cache(model, guided, 2, Y, X).k.shape[1] == 4


def test_guidance_combines_two_networks_with_a_cache_each(model):
  """One Euler step from sigma 1: x = noise - (v_neg + g (v - v_neg))."""
  g, text, negative = 3.0, [0, 1], 9
  guided = dataclasses.replace(EULER, guidance=g)
  chunks = [chunk(guided, i, text, negative=negative) for i in range(3)]
  found, _ = run(model, guided, chunks)

  caches = [sampler.init_cache(model, EULER, 2, Y, X) for _ in range(2)]
  for i, latents in enumerate(found):
    branches = [chunk(EULER, i, text), chunk(EULER, i, [negative] * 2)]
    v, v_negative = (
      inputs.noise - np.asarray(denoise(model, cache, inputs, EULER)[0])
      for cache, inputs in zip(caches, branches, strict=True)
    )
    want = chunks[i].noise - (v_negative + g * (v - v_negative))
    np.testing.assert_allclose(latents, want, atol=5e-5)
    caches = [  # both remember the guided latents
      clean_pass(model, cache, latents, inputs, EULER)
      for cache, inputs in zip(caches, branches, strict=True)
    ]


# ------------------------------------------------------------------ image to video
def test_given_frames_are_held_at_timestep_zero(model):
  image = normal(1, 1, *SHAPE, seed=7)
  inputs = chunk(EULER, 0, [0], image=image)
  found, _ = run(model, EULER, [inputs])
  np.testing.assert_array_equal(found[0][:, :1], image)

  clamped = np.concatenate([image, inputs.noise[:, 1:]], axis=1)
  time = dit.time_features(np.array([[0.0, 1000.0]]), CONFIG.freq_dim)
  v = jax.jit(dit.bidirectional_forward)(model, clamped, time, inputs.text)
  np.testing.assert_allclose(found[0][:, 1:], (clamped - v)[:, 1:], atol=1e-5)


def test_given_frames_stay_exact_over_steps_and_guidance(model):
  sampling = dataclasses.replace(BASE, steps=3, guidance=2.0)
  image = normal(2, 1, *SHAPE, seed=7)
  inputs = chunk(sampling, 0, [0, 1], negative=9, image=image)
  found, cache = run(model, sampling, [inputs])
  np.testing.assert_array_equal(found[0][:, :1], image)
  # Whatever noise stood there.
  noise = inputs.noise.copy()
  noise[:, 0] = 1e3
  again, same = run(model, sampling, [dataclasses.replace(inputs, noise=noise)])
  np.testing.assert_array_equal(again[0], found[0])
  np.testing.assert_array_equal(same.k, cache.k)


def test_a_wholly_given_chunk_is_remembered_like_a_clean_pass(model):
  given = normal(1, N, *SHAPE, seed=7)
  inputs = chunk(BASE, 0, [0], image=given)
  _, cache = run(model, BASE, [inputs])
  empty = sampler.init_cache(model, BASE, 1, Y, X)
  prefilled = clean_pass(model, empty, given, chunk(BASE, 0, [0]), BASE)
  np.testing.assert_allclose(prefilled.k, cache.k, atol=1e-5)
  np.testing.assert_array_equal(prefilled.frame, cache.frame)


# ------------------------------------------------------------------ positions
def video(model, sampling, start, chunks=5):
  frames = [
    chunk(sampling, i, [0], start=start + N * i, shot=[0]) for i in range(chunks)
  ]
  return np.stack(run(model, sampling, frames)[0])


def test_absolute_positions_matter_by_differences_only(model):
  near, far = video(model, BASE, 0), video(model, BASE, 100_000)
  np.testing.assert_allclose(near, far, atol=1e-4)


def test_relative_positions_know_no_frame_number(model):
  relative = dataclasses.replace(BASE, relative_rope=True)
  near, far = video(model, relative, 0), video(model, relative, 100_000)
  np.testing.assert_array_equal(near, far)
  # Until the window is full both count from its start. Later only the order of
  # what is kept remains of the frame numbers.
  absolute = video(model, BASE, 0)
  full = BASE.window_frames // N
  np.testing.assert_allclose(near[:full], absolute[:full], atol=2e-5)
  assert np.abs(near[full:] - absolute[full:]).max() > 1e-4


def test_t_scale_reaches_relative_positions(model):
  squeezed = dataclasses.replace(BASE, t_scale=0.5)
  relative = dataclasses.replace(squeezed, relative_rope=True)
  a, b = video(model, squeezed, 0, 3), video(model, relative, 0, 3)
  np.testing.assert_allclose(a, b, atol=2e-5)
  assert np.abs(a - video(model, BASE, 0, 3)).max() > 1e-4


# ------------------------------------------------------------------ the base model
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_bidirectional_sampling_is_one_euler_step(model, guidance):
  sampling = dataclasses.replace(EULER, guidance=guidance)
  noise, text, negative = normal(1, 3, *SHAPE), embedding(0)[None], embedding(9)[None]
  time = dit.time_features(np.full((1, 3), 1000.0), CONFIG.freq_dim)
  forward = jax.jit(dit.bidirectional_forward)
  v = forward(model, noise, time, text)
  v_negative = forward(model, noise, time, negative)
  sample = jax.jit(bidirectional.sample, static_argnames="sampling")
  found = sample(model, noise, text, negative, sampling)
  want = noise - (v_negative + guidance * (v - v_negative))
  np.testing.assert_allclose(found, want, atol=3e-5)


# ------------------------------------------------------------------ noise
def test_noise_depends_on_key_sample_and_frame_alone():
  key = jax.random.key(3)
  draw = jax.jit(sampler.frame_noise, static_argnums=3)

  def noise(samples, frames, key=key):
    frames = np.tile(np.array(frames), (len(samples), 1))
    return np.asarray(draw(key, np.array(samples), frames, SHAPE))

  whole = noise([0, 1, 2], range(6))
  assert whole.shape == (3, 6, *SHAPE) and whole.dtype == np.float32
  parts = [noise([0, 1, 2], part) for part in ([0, 1, 2], [3, 4, 5])]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
  np.testing.assert_array_equal(noise([2, 0, 1], range(6)), whole[[2, 0, 1]])
  other = noise([0, 1, 2], range(6), jax.random.key(4))
  flat = np.concatenate([whole, other]).reshape(36, -1)
  assert np.abs(np.corrcoef(flat) - np.eye(36)).max() < 0.6  # of 64 numbers each
  assert abs(flat.mean()) < 0.1 and abs(flat.std() - 1) < 0.1


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"frames_per_chunk": 0}, "frames_per_chunk=0 must be at least 1"),
    ({"window_frames": -8}, "window_frames=-8 must not be negative"),
    ({"sink_frames": -8}, "sink_frames=-8 must not be negative"),
    ({"window_frames": 30}, "window_frames=30 .* frames_per_chunk=8; use 24 or 32"),
    ({"sink_frames": 4}, "sink_frames=4 .* frames_per_chunk=8; use 0 or 8"),
    ({"window_frames": 16}, r"window_frames=16 .*sink_frames=8.*; use 24 or more"),
    ({"window_frames": 0}, "window_frames=0 has no room .* use 24 or more"),
    (
      {"clean_recache": True, "multi_shot_sink": False},
      "clean_recache=True needs multi_shot_sink=True",
    ),
    ({"solver": "heun"}, "solver='heun' is unknown; choose from unipc"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"shift": 0.0}, "shift=0.0 must be positive"),
    ({"kv_format": "fp2"}, "kv_format='fp2' is unknown; use '' .* 'nvfp4'"),
    ({"kv_smoothing": "mean"}, "kv_smoothing='mean' is unknown; use token_mean"),
    ({"kv_rule": "static_5"}, "rule='static_5' is unknown; use static_6"),
  ],
)
def test_settings_that_do_not_fit(change, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**change)


@pytest.mark.parametrize(
  ("options", "smallest"),
  [
    (dict(sink_frames=0, multi_shot_sink=False), 8),
    (dict(sink_frames=0), 8),
    (dict(sink_frames=8, multi_shot_sink=False), 16),
    (dict(sink_frames=8), 24),  # global sink, shot sink, chunk
    (dict(sink_frames=16), 32),  # the shot sink is at most a chunk
  ],
)
def test_the_smallest_window_has_room_for_sinks_and_a_chunk(options, smallest):
  assert Sampling(window_frames=smallest, **options).window_frames == smallest
  with pytest.raises(ValueError, match=f"use {smallest} or more"):
    Sampling(window_frames=smallest - 8, **options)


def test_what_settings_mean():
  assert BASE.pins and BASE.global_sink_frames == N
  single = dataclasses.replace(BASE, multi_shot_sink=False)
  assert not single.pins and single.global_sink_frames == 0
  assert single.cache_rules.sink_frames == N
  assert not dataclasses.replace(BASE, sink_frames=0).pins
  assert hash(BASE) == hash(dataclasses.replace(BASE))
