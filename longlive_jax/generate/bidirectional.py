"""A clip of all frames at once, by the plain base model that nothing made causal."""

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.generate import schedule
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit

Array = jax.Array


def sample(
  model: dit.CausalDiT,
  noise: Array,
  text: Array,
  negative: Array | None,
  sampling: Sampling,
) -> Array:
  """Samples a clip with the plain, non-causal base model, to check its weights.

  Args:
    noise: (b, f, y, x, c). text, negative: (b, k, text_dim).
    sampling: steps, shift, solver and guidance are used.

  Returns:
    clean latents float32 (b, f, y, x, c).
  """
  b, f = noise.shape[:2]
  table = schedule.solver_table(sampling.solver, sampling.steps, sampling.shift)
  times = dit.time_features(table.timesteps, model.config.freq_dim)

  def velocity(latents, features):
    time = jnp.broadcast_to(features, (b, f, features.shape[-1]))
    v = dit.bidirectional_forward(model, latents, time, text)
    if sampling.branches == 1:
      return v
    v_negative = dit.bidirectional_forward(model, latents, time, negative)
    return v_negative + sampling.guidance * (v - v_negative)

  def step(state, row):
    solver_row, features = row
    return schedule.solver_step(solver_row, state, velocity(state.x, features)), None

  state, _ = lax.scan(step, schedule.solver_init(noise), (table.rows, times))
  return state.x
