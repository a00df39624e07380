"""The training state, its optimiser and the update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from longlive_jax.parallel import mesh as meshes
from longlive_jax.quant.weights import is_packed
from longlive_jax.train.recycle import ErrorBuffers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes. The data iterator's state is saved beside it.

  Attributes:
    step: () int32, updates made.
    params: network modules (a module or a dict of them), float32 master weights.
    ema: exponential moving average of params, same structure, or None.
    opt_state: of the optimiser.
    errors: of error recycling, or None.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: optax.OptState
  errors: ErrorBuffers | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW with linear warmup, cosine decay and gradient clipping.

  Attributes:
    steps: length of the schedule.
    learning_rate: at its peak.
    final_ratio: last learning rate over the peak.
    warmup: steps until the peak.
    beta1, beta2, weight_decay: of AdamW.
    clip: largest global norm of the gradient.
  """

  steps: int
  learning_rate: float = 1e-5
  final_ratio: float = 0.0
  warmup: int = 0
  beta1: float = 0.0
  beta2: float = 0.999
  weight_decay: float = 0.0
  clip: float = 10.0

  def __post_init__(self):
    if not 0 <= self.warmup < self.steps:
      raise ValueError(
        f"warmup={self.warmup} must lie in [0, steps={self.steps}); "
        f"use for example {self.steps // 20}"
      )


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
  """The learning rate as a function of the step."""
  return optax.warmup_cosine_decay_schedule(
    init_value=settings.learning_rate / max(settings.warmup, 1),
    peak_value=settings.learning_rate,
    warmup_steps=settings.warmup,
    decay_steps=settings.steps,
    end_value=settings.learning_rate * settings.final_ratio,
  )


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
  """AdamW. With beta1 = 0 its first moment, the gradient itself, is not kept."""
  beta1, beta2 = settings.beta1, settings.beta2
  if beta1:
    scale = optax.scale_by_adam(beta1, beta2)
  else:
    scale = optax.scale_by_rms(beta2, eps_in_sqrt=False, bias_correction=True)
  return optax.chain(
    optax.clip_by_global_norm(settings.clip),
    scale,
    optax.add_decayed_weights(settings.weight_decay),
    optax.scale_by_learning_rate(learning_rate(settings)),
  )


def init_state_on(
  mesh: Mesh | None,
  params: Any,
  optimizer: optax.GradientTransformation,
  errors: ErrorBuffers | None = None,
  *,
  average: bool = True,
) -> TrainState:
  """State at step 0, split over a mesh as `mesh.last_axis_specs` says.

  Averages and moments are made where they belong: one device has no room for all. Nor
  has it for parameters that someone still holds: give them away.
  """
  if mesh is None:
    return init_state(params, optimizer, errors, average=average)

  def fresh(params: Any, errors: ErrorBuffers | None) -> TrainState:
    return fresh_state(params, optimizer, errors, average=average)

  specs = meshes.last_axis_specs((params, errors), mesh)
  params, errors = meshes.spread((params, errors), specs, mesh)
  specs = meshes.last_axis_specs(jax.eval_shape(fresh, params, errors), mesh)
  places = jax.tree.map(lambda spec: meshes.sharding(mesh, spec), specs)
  return jax.jit(fresh, out_shardings=places, donate_argnums=0)(params, errors)


def init_state(
  params: Any,
  optimizer: optax.GradientTransformation,
  errors: ErrorBuffers | None = None,
  *,
  average: bool = True,
) -> TrainState:
  """State at step 0, on the first device of each process."""
  # Committed to its device, as a restored state is: else resuming would compile
  # another program, which on a GPU may round differently.
  state = fresh_state(params, optimizer, errors, average=average)
  return jax.device_put(state, jax.local_devices()[0])


def fresh_state(
  params: Any,
  optimizer: optax.GradientTransformation,
  errors: ErrorBuffers | None = None,
  *,
  average: bool = True,
) -> TrainState:
  """State at step 0; inside jit, wherever that puts its outputs."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # Own buffers: the state is donated.
    ema=jax.tree.map(jnp.copy, params) if average else None,
    opt_state=optimizer.init(params),
    errors=errors,
  )


def update(
  state: TrainState,
  gradients: Any,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_start: int = 0,
) -> TrainState:
  """Applies gradients; before step `ema_start` the average, if any, simply follows."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if state.ema is None:
    return TrainState(state.step + 1, params, None, opt_state, state.errors)
  decay = jnp.where(state.step < ema_start, 0.0, ema_decay)
  # Written as a step towards params: old + (1 - decay) * difference keeps the small
  # increments that decay * old + (1 - decay) * new would round away.
  ema = jax.tree.map(
    lambda old, new: old + (1 - decay) * (new - old), state.ema, params
  )
  return TrainState(state.step + 1, params, ema, opt_state, state.errors)


def cast(tree: Any, dtype: jnp.dtype) -> Any:
  """Floating-point leaves in another dtype; the gradient comes back in the first.

  A quantised array stays as it is: its float leaves are scales in a format of its own.
  """

  def convert(leaf: Any) -> Any:
    if is_packed(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return leaf.astype(dtype)

  return jax.tree.map(convert, tree, is_leaf=is_packed)
