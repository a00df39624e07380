"""losses/ar_*: the flow-matching loss, and how its timesteps are drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.train import flow
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
