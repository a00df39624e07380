"""One step of teacher-forced training: the loss of the networks, and their update.

  loss_fn = make_loss(dit_config, LossSettings(flow, ...), mesh)
  step_fn = make_step(loss_fn, StepSettings(...), optimizer, specs, mesh)
  state, metrics = step_fn(state, batch, base)

The same for one device and for a mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.checkpoint.lora import attach_lora
from longlive_jax.generate.precision import keep_edges
from longlive_jax.models import dit, umt5
from longlive_jax.parallel import balanced, sharded_weights
from longlive_jax.parallel import mesh as meshes
from longlive_jax.quant.training import (
  FP8TrainingSettings,
  TrainingSettings,
  prepare_training,
)
from longlive_jax.train import accumulate, flow
from longlive_jax.train import state as train_state

LossFn = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """What a step computes, and how.

  Attributes:
    flow: how samples are noised and weighted.
    dtype: of the computation; master weights are float32.
    train_text: 'joint', or 'frozen': the text encoder gets no gradient.
    sp_layout: of `balanced.LAYOUTS`.
    remat: of layers/remat.py.
    quantise: how products with weights are quantised; None if they are not.
    quantised_layers: patterns of these weights.
    plain_edges: how many first and how many last blocks are not.
  """

  flow: flow.FlowSettings
  dtype: str = "bfloat16"
  train_text: str = "frozen"
  sp_layout: str = "balanced"
  remat: str = "none"
  quantise: TrainingSettings | FP8TrainingSettings | None = None
  quantised_layers: tuple[str, ...] = ()
  plain_edges: int = 0


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """How parameters follow the gradients.

  Attributes:
    optimizer: AdamW and its schedule.
    seed: of noise and times.
    accumulate: parts of a batch, one after the other.
    ema_decay, ema_start: as `state.update`.
  """

  optimizer: train_state.OptimizerSettings
  seed: int = 0
  accumulate: int = 1
  ema_decay: float = 0.99
  ema_start: int = 0


def make_loss(
  config: dit.WanConfig, settings: LossSettings, mesh: Mesh | None = None
) -> LossFn:
  """loss(params, batch, key, errors=None, base=None) -> (loss, (metrics, errors)).

  See `flow.ar_loss`. What is in base stands beside params and gets no gradient. With a
  text encoder in either, the batch has 'ids' and 'text_mask' (b, segments, k) int32;
  without, 'text': embeddings (b, segments, k, text_dim).
  """
  features = dit.time_features(
    flow.timestep_table(settings.flow.shift), config.freq_dim
  )  # (1001, freq_dim), one row an index
  quantise = settings.quantise
  if quantise and mesh is not None:
    quantise = quantise.spread(mesh.axis_names)

  def loss_fn(params, batch, key, errors=None, base=None):
    params = train_state.cast({**(base or {}), **params}, settings.dtype)
    transformer = params["dit"]
    if quantise:
      # Far from the numbers of a split: the draws of the loss stay what they are.
      rounding = jax.random.fold_in(key, 2**31)
      prepared = prepare_training(
        transformer, settings.quantised_layers, quantise, rounding
      )
      transformer = keep_edges(prepared, transformer, settings.plain_edges)
    if "lora" in params:
      transformer = attach_lora(transformer, params["lora"])
    if "text" in params:
      encode_text = sharded_weights.over(mesh, encode_prompts)
      context = encode_text(params["text"], batch["ids"], batch["text_mask"])
    else:
      context = batch["text"]
    if settings.train_text == "frozen":
      context = jax.lax.stop_gradient(context)
    table = jnp.asarray(features)

    def network(inputs: flow.FlowInputs) -> jax.Array:
      return balanced.train_forward(
        transformer,
        inputs.noisy,
        table[inputs.index],
        context,
        mesh=mesh,
        frames_per_chunk=settings.flow.frames_per_chunk,
        clean=inputs.context,
        clean_time=table[inputs.context_index],
        layout=settings.sp_layout,
        remat=settings.remat,
      )

    return flow.ar_loss(network, batch, key, settings.flow, errors)

  return loss_fn


def encode_prompts(
  encoder: umt5.UMT5Encoder, ids: jax.Array, text_mask: jax.Array
) -> jax.Array:
  """Tokens and their mask (b, segments, k) -> embeddings (b, segments, k, text_dim)."""
  b, segments, k = ids.shape
  context = encoder(ids.reshape(-1, k), text_mask.reshape(-1, k))
  return context.reshape(b, segments, k, -1)


def make_step(
  loss_fn: LossFn,
  settings: StepSettings,
  optimizer: optax.GradientTransformation,
  specs: Any,
  mesh: Mesh | None = None,
) -> Callable[..., tuple[train_state.TrainState, dict[str, jax.Array]]]:
  """step(state, batch, base) -> (state, metrics), compiled; the state is given away.

  Args:
    loss_fn: of `make_loss`.
    optimizer: of `settings.optimizer`.
    specs: PartitionSpecs of the state on the mesh.
  """
  gradient_fn = accumulate.value_and_grad(loss_fn, settings.accumulate)
  schedule = train_state.learning_rate(settings.optimizer)
  key = jax.random.key(settings.seed)

  def step_fn(state, batch, base):
    step_key = jax.random.fold_in(key, state.step)
    (loss, (metrics, errors)), gradients = gradient_fn(
      state.params, batch, step_key, state.errors, base
    )
    metrics["loss"] = loss
    metrics["gradient_norm"] = optax.global_norm(gradients)
    metrics["learning_rate"] = schedule(state.step)
    state = train_state.update(
      state,
      gradients,
      optimizer,
      ema_decay=settings.ema_decay,
      ema_start=settings.ema_start,
    )
    state = dataclasses.replace(state, errors=errors)
    return meshes.constrain((state, metrics), (specs, P()), mesh)

  return jax.jit(step_fn, donate_argnums=0)
