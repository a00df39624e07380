"""Distribution matching losses against the reference's numbers, and their edges."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.generate import schedule
from longlive_jax.train import dmd

GOLDEN = Path(__file__).parent / "golden" / "dmd"
PLAIN = dmd.DMDSettings(frames_per_chunk=2)


def _case(path):
  golden = dict(np.load(path))
  case = json.loads(str(golden["settings"]))
  initial = golden.get("inputs.initial_latent")
  settings = dmd.DMDSettings(
    frames_per_chunk=case["frames_per_chunk"],
    shift=case["shift"],
    teacher_guidance=case.get("teacher_guidance", 3.0),
    critic_guidance=case.get("critic_guidance", 0.0),
    first_frame_alone=case.get("norm_first_frame_separate", False),
    conditioning_frames=0 if initial is None else initial.shape[1],
    reference=True,
  )

  def noised(generated):
    return dmd.noise_sample(
      generated,
      golden["inputs.noise"],
      jnp.asarray(golden["inputs.raw_timestep"], jnp.int32),
      settings,
      initial=initial,
      mask=golden.get("inputs.gradient_mask"),
    )

  return golden, settings, noised


def _check(golden, found):
  for name, value in found.items():
    np.testing.assert_allclose(
      value, golden[f"outputs.{name}"], rtol=1e-5, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize(
  "path", sorted(GOLDEN.glob("dmd_*.npz")), ids=lambda path: path.stem
)
def test_generator_loss_follows_the_reference(path):
  golden, settings, noised = _case(path)

  def loss(generated):
    sample = noised(generated)
    fake = dmd.guided(
      golden["inputs.fake_cond_x0"],
      golden["inputs.fake_uncond_x0"],
      settings.critic_guidance,
    )
    real = dmd.guided(
      golden["inputs.real_cond_x0"],
      golden["inputs.real_uncond_x0"],
      settings.teacher_guidance,
    )
    gradient = dmd.matching_gradient(sample.sample, fake, real, settings)
    value = dmd.generator_loss(sample.sample, gradient, sample.mask)
    return value, (sample, gradient)

  (value, (sample, gradient)), slope = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(golden["inputs.generated"])
  )
  _check(
    golden,
    {
      "noisy": sample.noisy,
      "timestep": sample.timestep,
      "kl_grad": gradient,
      "loss_float64": value,
      "grad_generated": slope,
      "gradient_norm_log": jnp.abs(gradient).mean(),
    },
  )


@pytest.mark.parametrize(
  "path", sorted(GOLDEN.glob("critic_*.npz")), ids=lambda path: path.stem
)
def test_critic_loss_follows_the_reference(path):
  golden, settings, noised = _case(path)
  sample = noised(golden["inputs.generated"])
  grid = schedule.training_grid(settings.shift)
  sigma = schedule.sigma_at(sample.timestep, grid=grid, reference=True)

  def loss(clean):
    velocity = (sample.noisy - clean) / sigma[:, :, None, None, None]
    return dmd.critic_loss(velocity, sample)

  value, slope = jax.value_and_grad(loss)(jnp.asarray(golden["inputs.pred_x0"]))
  _check(golden, {"noisy": sample.noisy, "loss": value, "grad_pred_x0": slope})


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_timesteps_are_shifted_and_clamped():
  found = dmd.score_timestep(jnp.array([0, 1, 500, 999]), PLAIN)
  np.testing.assert_allclose(found, [20, 20, 833.3333, 980], rtol=1e-6)
  plain = dmd.DMDSettings(frames_per_chunk=2, shift=1.0)
  np.testing.assert_allclose(dmd.score_timestep(jnp.array([300]), plain), [300])


def test_sigmas_are_exact_unless_those_of_the_reference_are_asked_for():
  sample, noise = np.zeros((1, 2, 1, 1, 1), np.float32), np.ones((1, 2, 1, 1, 1))
  raw = jnp.array([[0, 123]])
  noised = dmd.noise_sample(sample, noise, raw, PLAIN)
  np.testing.assert_allclose(
    noised.noisy.ravel(), noised.timestep.ravel() / 1000, rtol=1e-6
  )


def test_a_gradient_that_is_not_a_number_moves_nothing():
  sample, fake = _normal(1, 4, 2, 2, 3), _normal(1, 4, 2, 2, 3, seed=1)
  real = sample.copy()
  real[:, 2:] = fake[:, 2:] + 1  # chunk 0: distance 0, so x / 0
  fake[:, 0] = real[:, 0]  # frame 0: 0 / 0
  gradient = dmd.matching_gradient(sample, fake, real, PLAIN)
  assert np.isfinite(gradient).all() and not gradient[:, 0].any()
  norm = np.abs(sample - real)[:, 2:].mean()
  np.testing.assert_allclose(gradient[:, 2:], -1 / norm, rtol=1e-5)


def test_no_gradient_reaches_the_scores():
  sample = jnp.asarray(_normal(1, 2, 2, 2, 3))

  def loss(fake):
    gradient = dmd.matching_gradient(sample, fake, 2 * sample, PLAIN)
    return dmd.generator_loss(sample, gradient, jnp.ones_like(sample, bool))

  assert not jax.grad(loss)(jnp.asarray(_normal(1, 2, 2, 2, 3, seed=1))).any()


def test_an_empty_mask_gives_no_loss():
  sample = jnp.asarray(_normal(1, 2, 2, 2, 3))
  nowhere = jnp.zeros((1, 2, 1, 1, 1), bool)
  assert dmd.generator_loss(sample, sample, nowhere) == 0
  noised = dmd.noise_sample(sample, sample, jnp.array([[5, 5]]), PLAIN, mask=nowhere)
  assert dmd.critic_loss(sample, noised) == 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"conditioning_frames": -1}, "and conditioning_frames=-1 at least 0"),
    ({"min_timestep": 0}, "min_timestep=0 and max_timestep=980.0 must ascend"),
    ({"max_timestep": 1000}, "max_timestep=1000 must ascend within"),
    (
      {"first_frame_alone": True, "conditioning_frames": 1},
      "first_frame_alone=True and conditioning_frames=1 exclude each other",
    ),
  ],
)
def test_bad_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    dmd.DMDSettings(frames_per_chunk=2, **changes)


def test_given_frames_must_be_there():
  sample = _normal(1, 2, 2, 2, 3)
  settings = dmd.DMDSettings(frames_per_chunk=2, conditioning_frames=1)
  with pytest.raises(ValueError, match="initial has 0 frames; must be conditioning_fr"):
    dmd.noise_sample(sample, sample, jnp.array([[5, 5]]), settings)


def test_frames_that_do_not_divide():
  sample = _normal(1, 3, 2, 2, 3)
  with pytest.raises(ValueError, match="frames=3 must be 0 plus a multiple of"):
    dmd.matching_gradient(sample, sample, sample, PLAIN)
