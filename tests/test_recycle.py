"""Error recycling: what is kept, where it goes, and that the target stays clean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.train import flow, recycle

SHAPE = (2, 2, 2, 3)  # a chunk: frames, y, x, c
SETTINGS = recycle.RecycleSettings(
  buckets=5, capacity=4, clean_prob=0.0, noise_prob=1.0, latent_prob=1.0,
  context_prob=1.0, spread=0.0,
)  # fmt: skip

remember = jax.jit(recycle.remember)
inject = jax.jit(recycle.inject)


def _samples(values, chunks=1) -> jax.Array:
  """Samples whose chunks are filled with one number each."""
  values = np.asarray(values, np.float32).reshape(-1, chunks)
  frames = np.repeat(values, SHAPE[0], axis=1)[:, :, None, None, None]
  return jnp.asarray(np.broadcast_to(frames, (*frames.shape[:2], *SHAPE[1:])))


def _levels(levels, chunks=1) -> jax.Array:
  levels = np.asarray(levels, np.int32).reshape(-1, chunks)
  return jnp.asarray(np.repeat(levels, SHAPE[0], axis=1))


def _keep(buffers, values, levels, seed=0, untouched=None):
  errors = _samples(values)
  untouched = jnp.zeros(len(errors), bool) if untouched is None else untouched
  return remember(
    buffers, jax.random.key(seed), errors, -errors, _levels(levels), untouched
  )


def _empty(**changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  return recycle.init_buffers(settings, SHAPE, jnp.float32)


def _kept(buffers, bucket):
  rows = np.asarray(buffers.latent[bucket, : buffers.filled[bucket]])
  assert (rows == rows[:, :1]).all()
  np.testing.assert_array_equal(buffers.noise[bucket, : len(rows)], -rows)
  return rows[:, 0].tolist()


def test_errors_fill_the_bucket_of_their_level_in_order():
  buffers = _keep(_empty(), [1, 2, 3, 4, 5], [0, 999, 199, 200, 1000])
  assert buffers.filled.tolist() == [2, 1, 0, 0, 2]
  assert [_kept(buffers, i) for i in range(5)] == [[1, 3], [4], [], [], [2, 5]]
  buffers = _keep(buffers, [6, 7], [0, 0])
  assert _kept(buffers, 0) == [1, 3, 6, 7]


def test_a_full_bucket_replaces_at_random_and_keeps_the_last_of_equal_places():
  full = _keep(_empty(), [1, 2, 3, 4], [0] * 4)
  seen = set()
  for seed in range(12):
    buffers = _keep(full, [5], [0], seed=seed)
    changed = [i for i, v in enumerate(_kept(buffers, 0)) if v == 5]
    assert len(changed) == 1 and buffers.filled[0] == 4
    seen |= set(changed)
  assert seen == {0, 1, 2, 3}
  # Sixteen errors for four places: as if they came one after the other.
  values = np.arange(10, 26)
  for seed in range(4):
    place = np.asarray(
      jax.random.randint(jax.random.split(jax.random.key(seed))[1], (16,), 0, 4)
    )
    want = dict(enumerate(range(1, 5))) | dict(zip(place, values, strict=True))
    found = _kept(_keep(full, values, [0] * 16, seed=seed), 0)
    assert found == [want[i] for i in range(4)]


def test_more_errors_than_a_bucket_holds_in_one_batch():
  buffers = _keep(_empty(), np.arange(1, 8), [0] * 7)
  assert buffers.filled.tolist() == [4, 0, 0, 0, 0]
  assert set(_kept(buffers, 0)) <= set(range(1, 8))
  assert max(_kept(buffers, 0)) >= 5


def test_few_errors_of_untouched_samples_are_kept():
  untouched = jnp.array([True, False, True])
  for probability, kept in ((0.0, [2]), (1.0, [1, 2, 3])):
    buffers = _empty(clean_keep_prob=probability)
    buffers = _keep(buffers, [1, 2, 3], [0] * 3, untouched=untouched)
    assert _kept(buffers, 0) == kept


def test_errors_go_to_chunks_of_their_level_and_any_to_the_context():
  buffers = _keep(_empty(), [1, 2, 4, 4], [0, 0, 500, 999])
  clean = _samples(np.zeros(64 * 3), chunks=3)
  levels = _levels([0, 500, 300] * 64, chunks=3)  # nothing is kept of the third
  found = inject(buffers, jax.random.key(0), clean, 10 + clean, levels)
  source, noise, context = (
    np.asarray(a)[:, ::2, 0, 0, 0] for a in (found.source, found.noise, found.context)
  )
  assert set(source[:, 0]) == {1, 2} and set(source[:, 1]) == {4}
  assert set(source[:, 2]) == {0} and set(noise[:, 2]) == {10}
  assert set(noise[:, 0]) == {9, 8} and set(noise[:, 1]) == {6}
  # Any of the four, equally often: 4 comes from two buckets.
  values, counts = np.unique(context, return_counts=True)
  assert values.tolist() == [1, 2, 4]
  np.testing.assert_allclose(counts / 192, [0.25, 0.25, 0.5], atol=0.1)


def test_nothing_is_injected_from_empty_buffers_or_into_clean_samples():
  clean = _samples(np.arange(6))
  levels = _levels([0] * 6)
  found = inject(_empty(), jax.random.key(0), clean, clean, levels)
  np.testing.assert_array_equal(found.source, clean)
  assert not found.context.any()
  buffers = _keep(_empty(clean_prob=1.0), [1, 1], [0, 0])
  found = inject(buffers, jax.random.key(0), clean, clean, levels)
  assert found.untouched.all() and not found.context.any()
  np.testing.assert_array_equal(found.noise, clean)


def test_shares_and_scale():
  buffers = _empty(
    clean_prob=0.2, latent_prob=0.9, noise_prob=0.1, context_prob=0.5, spread=0.3
  )
  buffers = _keep(buffers, [1], [0])
  clean = _samples(np.zeros(4000))
  found = inject(buffers, jax.random.key(3), clean, clean, _levels([0] * 4000))
  source, noise, context = (
    np.asarray(a)[:, 0, 0, 0, 0] for a in (found.source, found.noise, found.context)
  )
  shares = [np.mean(a != 0) for a in (source, noise, context)]
  np.testing.assert_allclose(shares, [0.72, 0.08, 0.4], atol=0.03)
  assert np.mean(found.untouched) == pytest.approx(0.2, abs=0.03)
  hit = source[source != 0]
  assert 0.7 <= hit.min() < 0.72 and 1.28 < hit.max() <= 1.3
  assert hit.mean() == pytest.approx(1, abs=0.01)


def _loss(buffers, settings, latents):
  seen = []

  def network(inputs):
    seen.append(inputs)
    return inputs.target + 1.0

  result = flow.ar_loss(
    network, {"latents": latents}, jax.random.key(0), settings, buffers
  )
  return seen[0], result


def test_the_loss_trains_against_the_clean_target():
  latents = np.random.default_rng(0).normal(size=(3, 4, 2, 2, 3)).astype(np.float32)
  settings = flow.FlowSettings(frames_per_chunk=2)
  buffers = _empty()
  for level in range(0, 1000, 200):
    buffers = _keep(buffers, [0.5], [level])
  plain, _ = _loss(None, settings, latents)
  inputs, _ = _loss(buffers, settings, latents)
  sigma = flow.timestep_table(5.0)[inputs.index][..., None, None, None] / 1000
  np.testing.assert_array_equal(inputs.index, plain.index)
  # The noise has an error of -0.5, and the target with it; the latents have one of 0.5,
  # but their target does not; the network knows nothing of either.
  np.testing.assert_allclose(inputs.target, plain.target - 0.5, atol=1e-6)
  np.testing.assert_allclose(
    inputs.noisy, plain.noisy + 0.5 * (1 - sigma) - 0.5 * sigma, atol=1e-5
  )
  np.testing.assert_allclose(inputs.context, plain.context + 0.5, atol=1e-6)


def test_the_loss_keeps_what_the_network_got_wrong():
  latents = np.random.default_rng(0).normal(size=(3, 4, 2, 2, 3)).astype(np.float32)
  inputs, (_, (_, buffers)) = _loss(
    _empty(capacity=8), flow.FlowSettings(frames_per_chunk=2), latents
  )
  # The velocity is off by one: so are the latents by -sigma, the noise by 1 - sigma.
  sigma = flow.timestep_table(5.0)[inputs.index][:, ::2].ravel() / 1000
  bucket = np.asarray(inputs.index)[:, ::2].ravel() // 200
  assert buffers.filled.tolist() == np.bincount(bucket, minlength=5).tolist()
  for i in range(5):
    rows = np.asarray(buffers.latent[i, : buffers.filled[i]])
    want = np.broadcast_to(-sigma[bucket == i][:, None], rows.shape)
    np.testing.assert_allclose(rows, want, atol=1e-4)
    noise = np.asarray(buffers.noise[i, : buffers.filled[i]])
    np.testing.assert_allclose(noise, 1 + want, atol=1e-4)


def test_given_frames_stay_given():
  latents = np.ones((3, 4, 2, 2, 3), np.float32)
  settings = flow.FlowSettings(frames_per_chunk=2, conditioning_frames=1)
  buffers = _keep(_empty(), [0.5] * 5, range(0, 1000, 200))
  inputs, (_, (_, kept)) = _loss(buffers, settings, latents)
  for array in (inputs.noisy, inputs.context):
    np.testing.assert_array_equal(array[:, :1], latents[:, :1])
  assert not inputs.target[:, :1].any()
  # And no error of them is kept, whatever the network says there.
  assert kept.filled.sum() > buffers.filled.sum()
  firsts = np.asarray(kept.noise).reshape(5, 4, *SHAPE)[:, :, 0]
  new = np.arange(4) >= np.asarray(buffers.filled)[:, None]
  assert np.any(firsts[new] == 0) and not np.any(firsts[new] == 1)


def test_no_gradient_through_what_is_kept():
  latents = np.ones((2, 4, 2, 2, 3), np.float32)
  settings = flow.FlowSettings(frames_per_chunk=2)

  def total(scale):
    _, (_, buffers) = flow.ar_loss(
      lambda inputs: scale * inputs.noisy, {"latents": latents}, jax.random.key(0),
      settings, _empty(),
    )  # fmt: skip
    return buffers.latent.sum() + buffers.noise.sum()

  assert jax.grad(total)(0.5) == 0


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("buckets", 1001, r"recycle.buckets=1001 must lie in \[0, 1000\]; 0 turns"),
    ("capacity", 0, "recycle.capacity=0 must be at least 1"),
    ("latent_prob", 1.5, r"recycle.latent_prob=1.5 must lie in \[0, 1\]"),
  ],
)
def test_bad_settings(field, value, message):
  with pytest.raises(ValueError, match=message):
    recycle.RecycleSettings(**{field: value})


def test_latents_of_another_chunk_size():
  latents, levels = jnp.zeros((1, 3, *SHAPE[1:])), jnp.zeros((1, 3), jnp.int32)
  with pytest.raises(ValueError, match="are no whole number of chunks of 24 numbers"):
    recycle.inject(_empty(), jax.random.key(0), latents, latents, levels)


def test_turned_off():
  off = dataclasses.replace(SETTINGS, buckets=0)
  assert recycle.init_buffers(off, SHAPE, jnp.float32) is None
