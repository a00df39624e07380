"""The transformer of a chunk's passes: one, or another by solver step."""

import dataclasses

import jax
import jax.numpy as jnp

from longlive_jax.models import dit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepModels:
  """The transformer with other weights in some passes of a chunk: precision by step.

  It stands where a CausalDiT stands in generate/sampler.py.

  Attributes:
    models: transformers that differ in the number format of their weights only.
    choice: static, which of them each solver step uses and, last, the clean pass.
  """

  models: tuple[dit.CausalDiT, ...]
  choice: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  @property
  def config(self) -> dit.WanConfig:
    return self.models[0].config

  @property
  def dtype(self) -> jnp.dtype:
    return self.models[0].dtype


Model = dit.CausalDiT | StepModels


def models_of(model: Model) -> tuple[dit.CausalDiT, ...]:
  """The transformers that it may be."""
  return model.models if isinstance(model, StepModels) else (model,)


def choice_of(model: Model, steps: int) -> tuple[int, ...]:
  """Which of the models each solver step uses and, last, the clean pass.

  Raises:
    ValueError: a choice for another number of steps.
  """
  if not isinstance(model, StepModels):
    return (0,) * (steps + 1)
  if len(model.choice) != steps + 1:
    raise ValueError(
      f"choice={model.choice} must have {steps} solver steps and the clean pass"
    )
  return model.choice
