"""The training rollout: what it generates, and the derivatives of both conventions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import normal, random_dit

from longlive_jax.generate import sampler, schedule
from longlive_jax.generate.cached_forward import cached_forward
from longlive_jax.layers import kv_cache
from longlive_jax.models import dit
from longlive_jax.train import self_forcing

pytestmark = pytest.mark.usefixtures("quick_compiling")

SAMPLING = sampler.Sampling(
  frames_per_chunk=2,
  window_frames=4,  # the third chunk evicts the second
  sink_frames=2,
  multi_shot_sink=False,
  shot_rope_offset=2.0,
  steps=2,
)
PLAIN = self_forcing.RolloutSettings(SAMPLING)
B, N, Y = 1, 2, 2
EXITS = (1, 0, 1)


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return random_dit()


def _chunks(model, exits=EXITS, settings=PLAIN) -> self_forcing.RolloutChunks:
  count, c = len(exits), model.config.in_channels
  frames = np.arange(count * N, dtype=np.int32).reshape(count, B, N)
  cut = np.arange(count)[:, None] == 1
  shape = (count, B, N, Y, Y, c)
  known = np.zeros((count, B, N), bool)
  known[0, :, 0] = True
  temporal = [
    sampler.chunk_temporal(model.config, SAMPLING, f, s)
    for f, s in zip(frames, np.cumsum(cut, axis=0), strict=True)
  ]
  chunk = sampler.ChunkInputs(
    noise=normal(*shape),
    text=normal(count, B, 5, model.config.text_dim, seed=1),
    negative=None,
    frames=frames,
    temporal=jax.tree.map(lambda *a: np.stack(a), *temporal),
    cut=cut,
    known=known,
    given=normal(*shape, seed=2),
  )
  trains = self_forcing.trains(frames, settings)
  return self_forcing.RolloutChunks(
    chunk, np.int32(exits), normal(*shape, seed=3), trains
  )


def _cache(model):
  return sampler.init_cache(model, SAMPLING, B, Y, Y)


def _unrolled(model, settings):
  """The same, chunk by chunk and pass by pass, for plain differentiation."""
  chunks, cache, pieces = _chunks(model, EXITS, settings), _cache(model), []
  table = schedule.solver_table("unipc", SAMPLING.steps, SAMPLING.shift)
  features = dit.time_features(
    np.append(table.timesteps, settings.context_noise), model.config.freq_dim
  )
  frozen = jax.lax.stop_gradient(model)
  for i, last in enumerate(EXITS):
    one = jax.tree.map(lambda a, i=i: a[i], chunks)
    chunk = one.chunk
    placement = kv_cache.place(cache, chunk.frames)

    def run(model, cache, x, row, chunk=chunk, placement=placement):
      clean = dit.time_features(np.zeros(()), model.config.freq_dim)
      time = np.where(chunk.known[:, :, None], clean, features[row])
      x = jnp.where(chunk.known[:, :, None, None, None], chunk.given, x)
      velocity, kept = cached_forward(
        model, cache, placement, x, time, model.embed_text(chunk.text[:, None]),
        chunk.temporal, keep=True,
      )  # fmt: skip
      return x, velocity, kept

    state = schedule.solver_init(chunk.noise)
    for step in range(last):
      x, velocity, _ = run(frozen, jax.lax.stop_gradient(cache), state.x, step)
      row = jax.tree.map(lambda a, i=step: a[i], table.rows)
      state = schedule.solver_step(row, dataclasses.replace(state, x=x), velocity)
    attended = cache if settings.through_cache else jax.lax.stop_gradient(cache)
    network = model if one.trains else frozen
    if not one.trains:
      attended = jax.lax.stop_gradient(cache)
    x, velocity, slopes = run(network, attended, jax.lax.stop_gradient(state.x), last)
    latents = x - table.timesteps[last] / 1000 * velocity
    held = chunk.known[:, :, None, None, None]
    latents = jnp.where(held, chunk.given, latents)
    level = settings.context_noise / 1000
    noisy = (1 - level) * latents + level * one.context_noise
    _, _, kept = jax.lax.stop_gradient(
      run(frozen, jax.lax.stop_gradient(cache), jax.lax.stop_gradient(noisy), -1)
    )
    if settings.through_cache:
      kept = jax.tree.map(
        lambda k, s: k + s - jax.lax.stop_gradient(s), kept, slopes
      )
    cache = kv_cache.commit(cache, placement, *kept)
    cache = kv_cache.pin(cache, chunk.frames, chunk.cut & SAMPLING.pins)
    pieces.append(latents)
  return jnp.stack(pieces), cache


def _loss(latents):
  return jnp.mean(latents * normal(*latents.shape, seed=5)) + jnp.mean(latents**2)


def compare_trees(found, want):
  def compare(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(np.abs(b).max())))

  jax.tree.map(compare, found, want)


@pytest.mark.parametrize(
  ("through_cache", "gradient_frames"), [(False, 4), (True, -1)]
)
def test_rollout_and_its_gradient(model, through_cache, gradient_frames):
  settings = self_forcing.RolloutSettings(
    SAMPLING, gradient_frames, context_noise=50.0, through_cache=through_cache
  )

  def loss(model):
    latents, cache = self_forcing.rollout(
      model, _cache(model), _chunks(model, EXITS, settings), settings
    )
    return _loss(latents), (latents, cache)

  def wanted(model):
    latents, cache = _unrolled(model, settings)
    return _loss(latents), (latents, cache)

  (_, (latents, cache)), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
  (_, (pieces, last)), want = jax.jit(jax.value_and_grad(wanted, has_aux=True))(model)
  np.testing.assert_allclose(latents, pieces, atol=1e-4)
  np.testing.assert_array_equal(cache.frame, last.frame)
  np.testing.assert_allclose(cache.k, last.k, atol=1e-4)

  compare_trees(found, want)
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found)) > 1e-3


def test_memory_of_the_backward_pass_grows_by_what_chunks_overwrite_or_not(model):
  def temporary(count, through_cache):
    settings = dataclasses.replace(PLAIN, through_cache=through_cache)
    chunks = _chunks(model, (0,) * count)

    def loss(model):
      return _loss(self_forcing.rollout(model, _cache(model), chunks, settings)[0])

    compiled = jax.jit(jax.grad(loss)).lower(model).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  cache = _cache(model)
  written = (cache.k.nbytes + cache.v.nbytes) * N // SAMPLING.window_frames
  latents = 4 * B * N * Y * Y * model.config.in_channels
  # Twelve chunks more: their latents, noise and so on, but not a cache each.
  assert temporary(16, False) - temporary(4, False) < 12 * 6 * latents
  more = temporary(16, True) - temporary(4, True)
  assert 12 * 0.9 * written < more < 12 * (1.1 * written + 6 * latents)


def test_chunks_are_cut_out_of_whole_videos(model):
  wanted = _chunks(model)
  whole = lambda x: np.concatenate(list(x), axis=1)  # noqa: E731
  chunk = wanted.chunk
  found = self_forcing.make_chunks(
    model.config, PLAIN, noise=whole(chunk.noise), text=np.moveaxis(chunk.text, 0, 1),
    context_noise=whole(wanted.context_noise), cuts=chunk.cut.T,
    exit_step=wanted.exit_step, given=chunk.given[0, :, :1],
  )  # fmt: skip
  hide = lambda chunks: dataclasses.replace(  # noqa: E731
    chunks, chunk=dataclasses.replace(chunks.chunk, given=0)
  )
  jax.tree.map(np.testing.assert_array_equal, hide(found), hide(wanted))
  np.testing.assert_array_equal(found.chunk.given[0, :, 0], chunk.given[0, :, 0])


def test_which_chunks_train():
  frames = np.arange(12).reshape(6, 1, 2)
  for count, want in ((-1, 6), (0, 0), (4, 2), (5, 2), (100, 6)):
    settings = dataclasses.replace(PLAIN, gradient_frames=count)
    found = self_forcing.trains(frames, settings)
    assert found.sum() == want and found[6 - want :].all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sampling": dataclasses.replace(SAMPLING, guidance=2.0)}, "guidance=2.0 must be"),
    ({"sampling": sampler.Sampling(clean_recache=True)}, "clean_recache=True is for"),
    (
      {
        "sampling": dataclasses.replace(SAMPLING, kv_format="nvfp4"),
        "through_cache": True,
      },
      "through_cache=True has no derivative through kv_format='nvfp4'",
    ),
    (
      {"sampling": dataclasses.replace(SAMPLING, attention_format="fp8")},
      "attention_format='fp8' has no derivative; use ''",
    ),
    ({"context_noise": 1000}, "context_noise=1000 must be a timestep"),
  ],
)
def test_bad_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(PLAIN, **changes)
