"""Distillation: losses, gradients, and what its steps change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import normal, random_dit, random_vae

from longlive_jax.checkpoint import lora, store
from longlive_jax.generate import sampler
from longlive_jax.generate.precision import Precision, apply
from longlive_jax.models import dit, vae
from longlive_jax.parallel import mesh as meshes
from longlive_jax.train import distill, dmd, ode, self_forcing
from longlive_jax.train import lora as train_lora
from longlive_jax.train import state as train_state

pytestmark = pytest.mark.usefixtures("quick_compiling")

N, Y, CHUNKS = 2, 2, 2
SAMPLING = sampler.Sampling(
  frames_per_chunk=N, window_frames=6, sink_frames=2, steps=2, shift=3.0
)


def make_settings(
  through_cache=False, exit_step="shared", given=0, guidance=2.0, **changes
):
  scores = dmd.DMDSettings(
    N, shift=3.0, teacher_guidance=guidance, conditioning_frames=given
  )
  rollout = self_forcing.RolloutSettings(SAMPLING, through_cache=through_cache)
  return distill.DistillSettings(rollout, scores, exit_step, **changes)


@pytest.fixture(scope="module")
def base() -> dit.CausalDiT:
  return random_dit()


def adapter(base, seed) -> lora.Lora:
  """One that changes something already."""
  made = train_lora.init_lora(
    base, train_lora.LoraSettings(rank=2), jax.random.key(seed)
  )
  factors = {
    path: (a, 0.1 * normal(*b.shape, seed=seed))
    for path, (a, b) in made.factors.items()
  }
  return dataclasses.replace(made, factors=factors)


def make_stories(base, chunks=CHUNKS, given=0, batch=2) -> distill.Stories:
  config = base.config
  return distill.Stories(
    text=normal(batch, chunks, 5, config.text_dim, seed=1),
    cuts=np.arange(chunks)[None].repeat(batch, 0) == 1,
    given=normal(batch, given, Y, Y, config.in_channels, seed=2),
  )


def make_fixed(base, **parts) -> distill.Fixed:
  return distill.Fixed(base, normal(5, base.config.text_dim, seed=3), **parts)


def merged(base, change: lora.Lora):
  """The base with the products of the factors added, differentiable in them."""

  def add(path, weight):
    pair = change.factors.get(store.path_name(path))
    return weight if pair is None else weight + change.alpha / change.rank * (
      pair[1] @ pair[0]
    )

  return jax.tree_util.tree_map_with_path(add, base)


# ---------------------------------------------------------------------- gradients
CASES = [
  {},
  {"given": 1, "timesteps": "shared", "teacher_forcing": False, "through_cache": True,
   "exit_step": "per_chunk"},
]  # fmt: skip


def plain_losses(generator, critic, rest):
  """Both losses as SPEC 7 has them, on networks with merged adapters."""
  fixed, stories, draws, settings = rest
  base, scores = fixed.base, settings.scores
  stop, g = jax.lax.stop_gradient, scores.conditioning_frames
  b, _, y, x, _ = draws.noise.shape
  chunks = self_forcing.make_chunks(
    base.config, settings.rollout, noise=draws.noise, text=stories.text,
    context_noise=draws.context_noise, cuts=stories.cuts, given=stories.given,
    exit_step=draws.exit_step,
  )  # fmt: skip
  model = merged(base, generator)
  cache = sampler.init_cache(model, settings.rollout.sampling, b, y, x)
  latents, _ = self_forcing.rollout(model, cache, chunks, settings.rollout)
  made = jnp.concatenate(list(latents), axis=1)

  u = np.asarray(draws.timestep) / 1000
  sigma = np.clip(3 * u / (1 + 2 * u), 0.02, 0.98)
  sigma[:, :g] = 0
  features = dit.time_features(np.float32(1000 * sigma), base.config.freq_dim)
  s = sigma[..., None, None, None].astype(np.float32)
  noise = jnp.where(s > 0, draws.score_noise, 0.0)
  noisy = stop((1 - s) * made + s * noise)

  def velocity(network, text):
    clean = stop(made) if settings.teacher_forcing else None
    return dit.train_forward(
      network, noisy, features, text, frames_per_chunk=N, clean=clean
    )

  negative = np.broadcast_to(fixed.negative, (b, 1, *fixed.negative.shape))
  cond, uncond = (velocity(base, text) for text in (stories.text, negative))
  real = noisy - s * (cond + 2 * (cond - uncond))
  learnt = velocity(merged(base, critic), stories.text)
  fake = noisy - s * learnt
  distance = jnp.abs(stop(made) - real).reshape(b, CHUNKS, -1).mean(-1)
  gradient = stop((fake - real) / jnp.repeat(distance, N, 1)[..., None, None, None])
  moved = stop(made) - gradient
  return (
    0.5 * jnp.mean(jnp.square(made - moved)[:, g:]),
    jnp.mean(jnp.square(learnt - stop(noise - made))[:, g:]),
  )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_merged_networks(base, case):
  settings, given = make_settings(**case), case.get("given", 0)
  stories, fixed = make_stories(base, given=given), make_fixed(base)
  draws = distill.draw(jax.random.key(0), stories, settings)
  generator, critic = adapter(base, 1), adapter(base, 2)
  inputs = fixed, stories, draws, settings

  def both(generator, critic):
    first, _ = distill.generator_loss(generator, critic, *inputs)
    return first, distill.critic_loss(critic, generator, *inputs)

  def derive(losses):
    """The losses, and the derivative of each by what it trains: of no more than it."""

    def total(*trained):
      found = losses(*trained)
      return sum(found), found

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

  (_, found), slopes = derive(both)(generator, critic)
  plain = functools.partial(plain_losses, rest=inputs)
  (_, wanted), slopes_wanted = derive(plain)(generator, critic)
  np.testing.assert_allclose(found, wanted, rtol=1e-4)
  for slope, want in zip(slopes, slopes_wanted, strict=True):
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    compare = functools.partial(np.testing.assert_allclose, atol=1e-4 * largest)
    jax.tree.map(compare, slope, want)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 0.01 * largest


def test_draws_are_shared_as_asked(base):
  stories = make_stories(base, chunks=8)
  for exit_step, timesteps in (("shared", "per_block"), ("per_chunk", "shared")):
    settings = make_settings(exit_step=exit_step, timesteps=timesteps, score_chunks=8)
    draws = distill.draw(jax.random.key(2), stories, settings)
    assert (len(set(draws.exit_step.tolist())) == 1) == (exit_step == "shared")
    found = [len(set(row.tolist())) for row in draws.timestep]
    assert all((n == 1) == (timesteps == "shared") and n <= 8 for n in found)
  last = distill.draw(jax.random.key(2), stories, make_settings(exit_step="last"))
  assert last.exit_step.tolist() == [1] * 8


def test_the_end_of_a_longer_rollout_is_scored_behind_a_frame_encoded_anew(base):
  video_vae = random_vae()
  videos = normal(2, 8, Y, Y, base.config.in_channels)
  end = jax.jit(distill.last_chunks, static_argnums=1)(videos, 4, video_vae)
  np.testing.assert_array_equal(end[:, 1:], videos[:, -3:])
  picture = vae.decode(video_vae, videos[:, :-3])[:, -1:]
  again = vae.encode(video_vae, picture)
  np.testing.assert_allclose(end[:, :1], again, rtol=1e-3, atol=1e-3)

  settings = make_settings(given=1, score_chunks=2)
  fixed = make_fixed(base, video_vae=video_vae)
  stories = make_stories(base, chunks=4, given=1)
  draws = distill.draw(jax.random.key(1), stories, settings)
  score = lambda g: distill.make_scored(g, fixed, stories, draws, settings)  # noqa: E731
  scored = jax.jit(score)(adapter(base, 1))
  assert scored.noised.sample.shape == (2, 4, Y, Y, base.config.in_channels)
  counts = np.asarray(scored.noised.mask)[0, :, 0, 0, 0]
  assert counts.tolist() == [False] * 2 + [True] * 2
  assert (scored.noised.timestep > 0).all()  # no frame of the end is given
  np.testing.assert_array_equal(scored.text, stories.text[:, -2:])
  short = settings.for_length(4).rollout
  assert self_forcing.trains(np.arange(8).reshape(4, 1, 2), short).tolist() == [
    False, False, False, True
  ]  # fmt: skip


def test_regression_goes_from_noise_straight_to_the_teachers_video(base):
  settings, given = make_settings(given=1), 1
  stories, fixed = make_stories(base, given=given), make_fixed(base)
  generator, key = adapter(base, 1), jax.random.key(3)

  def videos(noise):
    """By the sampler, chunk by chunk, guided in three steps."""
    sampling = dataclasses.replace(SAMPLING, steps=3, guidance=3.0)
    chunks = self_forcing.make_chunks(
      base.config, settings.rollout, noise=noise, context_noise=noise,
      text=stories.text, cuts=stories.cuts, exit_step=np.zeros(CHUNKS, np.int32),
      given=stories.given,
    ).chunk  # fmt: skip
    negative = np.stack([[fixed.negative] * len(noise)] * CHUNKS)
    chunks = dataclasses.replace(chunks, negative=negative)
    cache, made = sampler.init_cache(base, sampling, len(noise), Y, Y), []
    for i in range(CHUNKS):
      chunk = jax.tree.map(lambda a, i=i: a[i], chunks)
      latents, cache = sampler.denoise_chunk(base, cache, chunk, sampling)
      made.append(latents)
    return jnp.concatenate(made, axis=1)

  @jax.jit
  def found(generator):
    noise, sigma = ode.draw(key, stories, settings)
    made = ode.teacher_videos(fixed, stories, noise, settings, 3)
    return noise, sigma, made, ode.ode_loss(generator, fixed, stories, key, settings, 3)

  noise, level, made, loss = found(generator)
  np.testing.assert_allclose(made, jax.jit(videos)(noise), atol=1e-4)
  np.testing.assert_allclose(made[:, :1], stories.given, atol=1e-6)
  table = SAMPLING.solver_table()
  sigma = table.sigmas[np.asarray(level)]
  times = table.timesteps[np.asarray(level)]
  sigma[:, 0] = times[:, 0] = 0
  s = sigma[..., None, None, None]
  velocity = dit.train_forward(
    merged(base, generator), (1 - s) * made + s * noise,
    dit.time_features(times, base.config.freq_dim), stories.text,
    frames_per_chunk=N, clean=made,
  )  # fmt: skip
  want = np.square(velocity - (noise - made))[:, 1:].mean()
  np.testing.assert_allclose(loss, want, rtol=1e-4)


# ---------------------------------------------------------------------- updates
def test_steps_change_adapters_alone_on_a_base_in_four_bits(base):
  settings = make_settings(guidance=0.0)
  fixed = make_fixed(apply(base, Precision("w4a16"), 2))
  stories = make_stories(base)
  optimizer = train_state.make_optimizer(
    train_state.OptimizerSettings(steps=9, learning_rate=1e-2)
  )
  start = distill.DistillState(
    train_state.init_state(adapter(base, 1), optimizer),
    train_state.init_state(adapter(base, 2), optimizer, average=False),
  )
  key = jax.random.key(0)

  @jax.jit
  def steps(state):
    after_critic, first = distill.critic_step(
      state, stories, fixed, key, settings, optimizer
    )
    after_both, second = distill.generator_step(
      after_critic, stories, fixed, key, settings, optimizer, ema_decay=0.5
    )
    return after_critic, after_both, first | second

  critic, both, metrics = steps(start)
  assert all(np.isfinite(value) for value in metrics.values())
  assert (int(critic.step), int(both.step), int(both.generator.step)) == (1, 1, 1)
  jax.tree.map(np.testing.assert_array_equal, critic.generator, start.generator)
  jax.tree.map(np.testing.assert_array_equal, both.critic, critic.critic)
  assert critic.critic.ema is None
  for after, before in (
    (both.generator.params, start.generator.params),
    (critic.critic.params, start.critic.params),
  ):
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, before)
    assert min(jax.tree.leaves(moved)) > 1e-3
  jax.tree.map(
    lambda ema, a, b: np.testing.assert_allclose(ema, (a + b) / 2, atol=1e-6),
    both.generator.ema, both.generator.params, start.generator.params,
  )  # fmt: skip


def test_no_array_without_numbers_enters_shard_map(base):
  """XLA for GPUs crashes on one, which text-to-video has: its given frames."""
  stories, settings = make_stories(base), make_settings()
  draws = distill.draw(jax.random.key(1), stories, settings)

  def videos(generator):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), (meshes.DATA, meshes.SEQUENCE), axis_types=auto)
    return distill.make_videos(generator, base, stories, draws, settings, mesh)

  jaxpr = jax.make_jaxpr(videos)(adapter(base, 1))
  (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
  assert all(array.aval.size for array in equation.invars)
