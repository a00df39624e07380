"""The autoregressive loss against the reference's numbers; the context view."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.generate import sampler
from longlive_jax.layers import kv_cache
from longlive_jax.train import context, flow

pytestmark = pytest.mark.usefixtures("quick_compiling")

GOLDEN = sorted((Path(__file__).parent / "golden" / "flow").glob("*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_ar_loss_follows_the_reference(path):
  golden = dict(np.load(path))
  case = json.loads(str(golden["settings"]))
  initial = golden.get("inputs.initial_latent")
  settings = flow.FlowSettings(
    frames_per_chunk=case["frames_per_chunk"],
    shift=case["shift"],
    teacher_forcing=case["teacher_forcing"],
    context_noise_max=case["context_noise_max"],
    conditioning_frames=initial.shape[1] if case["i2v"] else 0,
  )
  inputs = flow.flow_inputs(
    golden["inputs.clean"],
    golden["inputs.noise"],
    jnp.asarray(golden["inputs.timestep_index"]),
    settings,
    context_index=_optional(golden.get("inputs.aug_timestep_index")),
    initial=initial,
    mask=_optional(golden.get("inputs.loss_mask")),
  )
  table = flow.timestep_table(settings.shift)
  loss, gradient = jax.value_and_grad(flow.flow_loss)(
    golden["inputs.flow_pred"], inputs
  )
  found = {
    "noisy": inputs.noisy,
    "timestep": table[inputs.index],
    "clean_x": inputs.context,
    "aug_t": table[inputs.context_index],
    "loss": loss,
    "grad_flow_pred": gradient,
  }
  expected = {k[8:]: v for k, v in golden.items() if k.startswith("outputs.")}
  assert {"noisy", "timestep", "loss", "grad_flow_pred"} <= set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def _optional(array):
  return None if array is None else jnp.asarray(array)


def test_index_modes_have_the_right_structure():
  key = jax.random.key(0)
  draw = lambda mode, frames: np.asarray(  # noqa: E731
    flow.draw_indices(key, 64, frames, 4, minimum=3, maximum=9, mode=mode)
  )
  block = draw("per_block", 12)
  assert (block == np.repeat(block[:, ::4], 4, axis=1)).all()
  assert set(block.ravel()) == set(range(3, 9))  # the maximum is exclusive
  assert (block[:, 0] != block[:, 4]).any()
  shared = draw("shared", 12)
  assert (shared == shared[:, :1]).all() and len(set(shared[:, 0])) == 6
  first = draw("first_frame_separate", 13)
  assert (first[:, 1:] == np.repeat(first[:, 1::4], 4, axis=1)).all()
  assert (first[:, 0] != first[:, 1]).any()
  for frames, mode in ((13, "per_block"), (12, "first_frame_separate")):
    with pytest.raises(ValueError, match=f"frames={frames}"):
      draw(mode, frames)
  with pytest.raises(ValueError, match="per_block, shared"):
    draw("random", 12)


def test_ar_loss_is_a_function_of_the_key_and_respects_the_mask():
  latents = np.random.default_rng(0).normal(size=(2, 6, 2, 2, 3)).astype(np.float32)
  settings = flow.FlowSettings(frames_per_chunk=2, weighting="uniform")
  mask = np.float32([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
  seen = []

  def network(inputs):
    seen.append(inputs)
    return jnp.zeros_like(inputs.noisy)

  batch = {"latents": latents, "mask": mask}
  loss, (metrics, _) = flow.ar_loss(network, batch, jax.random.key(1), settings)
  again, _ = flow.ar_loss(network, batch, jax.random.key(1), settings)
  other, _ = flow.ar_loss(network, batch, jax.random.key(2), settings)
  assert loss == again != other
  np.testing.assert_allclose(loss, jnp.mean(seen[0].target[:, :2] ** 2), rtol=1e-6)
  assert len(metrics) == 4
  np.testing.assert_array_equal(seen[0].context, latents)
  noise = seen[0].target + latents
  sigma = flow.timestep_table(5.0)[seen[0].index][..., None, None, None] / 1000
  mixed = (1 - sigma) * latents + sigma * noise
  np.testing.assert_allclose(seen[0].noisy, mixed, atol=1e-5)


def test_context_noise_and_jitter_reach_the_context_only():
  latents = np.ones((2, 4, 2, 2, 3), np.float32)
  plain = flow.FlowSettings(frames_per_chunk=2)

  def inputs_of(settings):
    seen = []

    def network(inputs):
      seen.append(inputs)
      return inputs.noisy

    flow.ar_loss(network, {"latents": latents}, jax.random.key(0), settings)
    return seen[0]

  base = inputs_of(plain)
  told = inputs_of(dataclasses.replace(plain, context_noise_max=10))
  assert told.context_index.max() < 10
  assert jnp.abs(told.context - latents).max() > 1
  quiet = inputs_of(dataclasses.replace(plain, context_jitter=0.05))
  assert quiet.context_index.min() == flow.CLEAN_INDEX
  assert 0 < jnp.abs(quiet.context - latents).max() < 0.4
  for changed in (told, quiet):
    np.testing.assert_array_equal(changed.noisy, base.noisy)
    np.testing.assert_array_equal(changed.target, base.target)


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="weighting='flat'"):
    flow.FlowSettings(frames_per_chunk=2, weighting="flat")
  with pytest.raises(ValueError, match="context_noise_max=1001"):
    flow.FlowSettings(frames_per_chunk=2, context_noise_max=1001)


# -- context view ------------------------------------------------------------


def test_one_shot_keeps_the_first_and_the_newest():
  cuts = [False] * 12
  assert context.window_chunks(cuts, 2, 4) == (0, 1, 2)
  assert context.window_chunks(cuts, 3, 4) == (0, 1, 2, 3)
  assert context.window_chunks(cuts, 9, 4) == (0, 7, 8, 9)
  assert context.window_chunks(cuts, 9, 4, sink=False) == (6, 7, 8, 9)


def test_a_cut_pins_its_first_chunk():
  cuts = [i == 5 for i in range(12)]
  sees = lambda current, **rules: context.window_chunks(cuts, current, 4, **rules)  # noqa: E731
  assert sees(5) == (0, 3, 4, 5)  # the cut chunk still sees the old shot
  assert sees(6) == (0, 5, 6)
  assert sees(7) == (0, 5, 6, 7)
  assert sees(10) == (0, 5, 9, 10)
  assert sees(10, multi_shot_sink=False) == (0, 8, 9, 10)
  assert sees(6, clean_recache=False) == (0, 4, 5, 6)
  assert sees(8, clean_recache=False) == (0, 5, 7, 8)
  assert sees(6, sink=False) == (3, 4, 5, 6)


def test_a_second_cut_releases_the_first_pin():
  cuts = [i in (3, 6) for i in range(12)]
  assert context.window_chunks(cuts, 6, 4) == (0, 3, 5, 6)
  assert context.window_chunks(cuts, 11, 4) == (0, 6, 10, 11)


@pytest.mark.parametrize(
  "rules",
  [
    {},
    {"clean_recache": False},
    {"multi_shot_sink": False, "clean_recache": False},
    {"sink": False, "multi_shot_sink": False, "clean_recache": False},
  ],
  ids=["all", "no_recache", "one_sink", "no_sink"],
)
def test_it_is_what_the_cache_of_the_generator_holds(rules):
  """Runs the real cache, one frame a chunk, over 16 videos with their own cuts."""
  chunks, batch, window = 12, 16, 4
  cuts = np.random.default_rng(1).random((chunks, batch)) < 0.3
  sampling = sampler.Sampling(
    frames_per_chunk=1,
    window_frames=window,
    sink_frames=int(rules.get("sink", True)),
    multi_shot_sink=rules.get("multi_shot_sink", True),
    clean_recache=rules.get("clean_recache", True),
  )
  cache = kv_cache.init_cache(
    sampling.cache_rules,
    layers=1,
    batch=batch,
    capacity_frames=window,
    tokens_per_frame=1,
    heads=1,
    head_dim=1,
    dtype=jnp.float32,
  )

  @jax.jit
  def step(cache, chunk, cut):
    frames = jnp.full((batch, 1), chunk, jnp.int32)
    attended = kv_cache.place(cache, frames).frame
    cut &= sampling.pins & (chunk > 0)
    if sampling.clean_recache:
      cache = kv_cache.reset(cache, cut)
    placement = kv_cache.place(cache, frames)
    empty = jnp.zeros((1, batch, 1, 1, 1, 1))
    cache = kv_cache.commit(cache, placement, empty, empty)
    return attended, kv_cache.pin(cache, frames, cut)

  for chunk in range(chunks):
    attended, cache = step(cache, chunk, cuts[chunk])
    for b, row in enumerate(np.asarray(attended)):
      held = context.window_chunks(cuts[:, b], chunk, window, **rules)
      assert tuple(sorted(row[row >= 0])) == held, (b, chunk)


def test_views_count_only_true_caches():
  rng = np.random.default_rng(0)
  for _ in range(30):
    cuts = rng.random(12) < 0.3
    for current in range(12):
      chunks, counts = context.context_view(cuts, current, 4, 5)
      assert chunks.shape == counts.shape == (5,)
      held = context.window_chunks(cuts, current, 4)
      assert tuple(chunks[: len(held)]) == held
      assert counts[len(held) - 1] == 1 and counts[0] == 1
      for i in np.flatnonzero(counts):
        seen = context.window_chunks(cuts, int(chunks[i]), 4)
        assert tuple(chunks[: i + 1]) == seen
  chunks, counts = context.context_view([False] * 12, 9, 4, 4)
  np.testing.assert_array_equal(chunks, [0, 7, 8, 9])
  np.testing.assert_array_equal(counts, [1, 0, 0, 1])


def test_bad_views_are_refused():
  with pytest.raises(ValueError, match="current=3"):
    context.window_chunks([False] * 3, 3, 4)
  with pytest.raises(ValueError, match="window=2"):
    context.window_chunks([False] * 3, 1, 2)
  with pytest.raises(ValueError, match="length=3"):
    context.context_view([False] * 3, 1, 4, 3)


def test_views_at_a_cut_end_in_the_first_chunk_of_a_later_shot():
  cuts = [False, False, True, False, False, True, False, False]
  rng = np.random.default_rng(0)
  for _ in range(50):
    chunks, counts = context.draw_view(cuts, rng, 4, at_cut=1.0)
    assert any(count and cuts[c] for c, count in zip(chunks, counts, strict=True))
  still = [False] * 5  # without a cut any chunk will do
  lasts = {context.draw_view(still, rng, 4, at_cut=1.0)[0][-1] for _ in range(50)}
  assert len(lasts) > 1


def test_a_clip_shorter_than_the_window_is_filled_up():
  cuts = [False, True, False]
  for plain in (0.0, 1.0):
    chunks, counts = context.draw_view(cuts, np.random.default_rng(0), 5, plain=plain)
    assert len(chunks) == 5 and chunks.max() == 2
    assert not counts[3:].any() and counts[0]
  np.testing.assert_array_equal(chunks, [0, 1, 2, 2, 2])
  np.testing.assert_array_equal(counts, [1, 1, 1, 0, 0])


def test_given_frames_are_clean_whatever_is_done_to_the_others():
  """Image to video: noise of the context and mixed-in noise leave the image alone."""
  settings = flow.FlowSettings(
    2, conditioning_frames=1, context_jitter=0.5, context_noise_max=100
  )
  clean = np.random.default_rng(0).normal(size=(2, 4, 1, 1, 3)).astype(np.float32)
  seen = []

  def network(inputs):
    seen.append(inputs)
    return jnp.where(jnp.arange(4)[None, :, None, None, None] < 1, 99.0, inputs.target)

  loss, _ = flow.ar_loss(network, {"latents": clean}, jax.random.key(0), settings)
  assert loss == 0  # what is said of the image does not count
  (inputs,) = seen
  for part in (inputs.noisy, inputs.context):
    np.testing.assert_array_equal(part[:, :1], clean[:, :1])
    assert (part[:, 1:] != clean[:, 1:]).all()
  for index in (inputs.index, inputs.context_index):
    assert (index[:, 0] == flow.CLEAN_INDEX).all()
    assert (index[:, 1:] < flow.CLEAN_INDEX).all()
  np.testing.assert_array_equal(inputs.mask, [[0, 1, 1, 1]] * 2)
  with pytest.raises(ValueError, match="conditioning_frames=4 must be fewer than"):
    every = dataclasses.replace(settings, conditioning_frames=4)
    flow.ar_loss(network, {"latents": clean}, jax.random.key(0), every)
  with pytest.raises(ValueError, match="conditioning_frames=-1"):
    dataclasses.replace(settings, conditioning_frames=-1)
