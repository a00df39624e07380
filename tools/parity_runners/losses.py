"""losses/*: flow matching, distribution matching, and how timesteps are drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.train import dmd, flow
from parity_runners.common import Case, Result


def ar_loss(case: Case) -> Result:
  inputs = case.inputs
  initial = inputs.get("initial_latent")
  context_index = inputs.get("aug_timestep_index")
  if context_index is not None:
    context_index = jnp.asarray(context_index, jnp.int32)
  settings = flow.FlowSettings(
    frames_per_chunk=case.frames_per_chunk,
    shift=case.setting("shift", 5.0),
    teacher_forcing=case.setting("teacher_forcing", True),
    context_noise_max=case.setting("context_noise_max", 0),
    conditioning_frames=0 if initial is None else initial.shape[1],
  )
  noised = flow.flow_inputs(
    inputs["clean"],
    inputs["noise"],
    inputs["timestep_index"].astype(np.int32),
    settings,
    context_index=context_index,
    initial=initial,
    mask=inputs.get("loss_mask"),
  )
  loss, gradient = jax.value_and_grad(flow.flow_loss)(inputs["flow_pred"], noised)
  table = flow.timestep_table(settings.shift)
  values = {
    "noisy": noised.noisy,
    "timestep": table[noised.index],
    "loss": loss,
    "grad_flow_pred": gradient,
    "clean_x": noised.context,
    "aug_t": table[noised.context_index],
  }
  return Result({name: values[name] for name in case.outputs if name in values})


def timestep_draws(case: Case) -> Result:
  """The draws are another generator's: only their structure is to be the same."""
  n = case.frames_per_chunk
  checks = {}
  for mode, example in case.outputs.items():
    b, f = example.shape
    drawn = flow.draw_indices(jax.random.key(0), b, f, n, mode=mode)
    for whose, array in (("theirs", example), ("ours", np.asarray(drawn))):
      lead = 1 if mode == "first_frame_separate" else 0
      groups = array[:, lead:].reshape(b, -1, f if mode == "shared" else n)
      same = (groups == groups[:, :, :1]).all()
      inside = (array >= 0).all() and (array < 1000).all()
      checks[f"{mode}, {whose}"] = bool(same and inside)
  return Result(checks=checks, informative=frozenset(case.outputs))


def _noised(case: Case, sample: np.ndarray) -> tuple[dmd.DMDSettings, dmd.NoisedSample]:
  inputs = case.inputs
  initial = inputs.get("initial_latent")
  settings = dmd.DMDSettings(
    frames_per_chunk=case.frames_per_chunk,
    shift=case.setting("shift", 5.0),
    teacher_guidance=case.setting("teacher_guidance", 3.0),
    critic_guidance=case.setting("critic_guidance", 0.0),
    min_timestep=case.setting("min_timestep", 20),
    max_timestep=case.setting("max_timestep", 980),
    first_frame_alone=case.setting("norm_first_frame_separate", False),
    conditioning_frames=0 if initial is None else initial.shape[1],
    reference=case.reference,
  )
  noised = dmd.noise_sample(
    sample,
    inputs["noise"],
    jnp.asarray(inputs["raw_timestep"], jnp.int32),
    settings,
    initial=initial,
    mask=inputs.get("gradient_mask"),
  )
  return settings, noised


def generator_loss(case: Case) -> Result:
  inputs = case.inputs

  def loss(generated):
    settings, noised = _noised(case, generated)
    scores = []
    for who, guidance in (
      ("fake", settings.critic_guidance),
      ("real", settings.teacher_guidance),
    ):
      cond, uncond = inputs[f"{who}_cond_x0"], inputs[f"{who}_uncond_x0"]
      scores.append(dmd.guided(cond, uncond, guidance))
    gradient = dmd.matching_gradient(noised.sample, *scores, settings)
    found = dmd.generator_loss(noised.sample, gradient, noised.mask)
    return found, (noised, gradient)

  (value, (noised, gradient)), slope = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(inputs["generated"])
  )
  values = {
    "noisy": noised.noisy,
    "timestep": noised.timestep,
    "kl_grad": gradient,
    "loss": value,
    "loss_float64": value,
    "grad_generated": slope,
    "gradient_norm_log": jnp.abs(gradient).mean(),
  }
  return Result({name: values[name] for name in case.outputs if name in values})


def critic_loss(case: Case) -> Result:
  inputs = case.inputs
  _, noised = _noised(case, jnp.asarray(inputs["generated"]))
  sigma = case.sigma(noised.timestep)[:, :, None, None, None]

  def loss(clean):  # the case gives the network's output as clean latents
    # The noise level of given frames is 0 in the library; they do not count.
    velocity = (noised.noisy - clean) / jnp.where(noised.mask, sigma, 1.0)
    return dmd.critic_loss(velocity, noised)

  value, slope = jax.value_and_grad(loss)(jnp.asarray(inputs["pred_x0"]))
  values = {
    "noisy": noised.noisy,
    "timestep": noised.timestep,
    "loss": value,
    "grad_pred_x0": slope,
  }
  return Result({name: values[name] for name in case.outputs if name in values})
