"""Low-rank adapters of a run: found and checked first, then put beside the weights."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from longlive_jax.checkpoint import lora, store
from longlive_jax.checkpoint.lora import Lora
from longlive_jax.generate.step_models import Model, StepModels
from longlive_jax.models.dit import WanConfig


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter before it is read.

  Attributes:
    path: file or checkpoint folder, see `lora.load_lora`.
    weight: by which its change is multiplied.
    rank, alpha: its own.
    parameters: how many numbers it has.
  """

  path: Path
  weight: float
  rank: int
  alpha: float
  parameters: int


def find(given: str, config: WanConfig) -> Adapter:
  """Finds an adapter; reads only names and shapes.

  Args:
    given: 'PATH' or 'PATH:WEIGHT'.
    config: of the transformer.

  Raises:
    ValueError: nothing there, no adapter, one of another transformer, or a weight that
      is no finite number.
  """
  path, colon, weight = given.rpartition(":")
  if not colon or Path(given).expanduser().exists():
    path, weight = given, "1"
  path = Path(path).expanduser()
  try:
    if not math.isfinite(float(weight)):
      raise ValueError(f"weight={weight} is not finite")
    adapter = lora.load_lora(path, config.layers, abstract=True)
    plain = store.abstract_network("dit", config)
    lora.check_lora(adapter, lora.parameter_shapes(plain))
  except (OSError, ValueError, ImportError) as error:
    raise ValueError(
      f"loras={given!r} cannot be used; give 'PATH' or 'PATH:WEIGHT': {error}"
    ) from error
  parameters = sum(factor.size for factor in jax.tree.leaves(adapter))
  return Adapter(path, float(weight), adapter.rank, adapter.alpha, parameters)


def describe(adapters: Sequence[Adapter], config: WanConfig) -> list[Lora]:
  """The adapters with shapes for arrays."""
  return [lora.load_lora(a.path, config.layers, abstract=True) for a in adapters]


def load(adapters: Sequence[Adapter], config: WanConfig) -> list[Lora]:
  """The adapters, committed to the first device."""
  loaded = [lora.load_lora(a.path, config.layers) for a in adapters]
  return jax.device_put(loaded, jax.local_devices()[0])


def attach(network: Model, adapters: Sequence[Adapter], loras: Sequence[Lora]) -> Any:
  """The network with adapters beside its weights, by their weights.

  Args:
    adapters, loras: the same ones.
  """
  if isinstance(network, StepModels):
    models = tuple(attach(model, adapters, loras) for model in network.models)
    return dataclasses.replace(network, models=models)
  for adapter, factors in zip(adapters, loras, strict=True):
    network = lora.attach_lora(network, factors, adapter.weight)
  return network


def records(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
  """For the report of a run."""
  return [{**dataclasses.asdict(a), "path": str(a.path)} for a in adapters]
