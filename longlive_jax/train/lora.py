"""Training of a low-rank adapter on a base that does not change (SPEC 12).

What is trained is the adapter itself, a pytree of its own: gradients, averages and the
optimiser's state exist for nothing else. The loss puts it beside the base, which may be
quantised, with `checkpoint.lora.attach_lora`.
"""

import dataclasses
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp

from longlive_jax.checkpoint import lora
from longlive_jax.checkpoint.lora import Lora
from longlive_jax.models import dit
from longlive_jax.quant import weights


@dataclasses.dataclass(frozen=True)
class LoraSettings:
  """Which adapter is trained, and on what.

  Attributes:
    rank: of all factors; 0 is off, the network itself is trained.
    alpha: scale before division by the rank; 0 is the rank.
    layers: patterns of layers that get one, as of `weights.quantise_weights`.
  """

  rank: int = 0
  alpha: float = 0.0
  layers: tuple[str, ...] = weights.BLOCK_LINEARS

  def __post_init__(self):
    for name in ("rank", "alpha"):
      if getattr(self, name) < 0:
        raise ValueError(f"lora.{name}={getattr(self, name)} must not be negative")


def check_layers(network: dit.CausalDiT, settings: LoraSettings) -> None:
  """Raises ValueError for patterns that match no layer; the network may be abstract."""
  try:
    jax.eval_shape(lambda key: init_lora(network, settings, key), jax.random.key(0))
  except ValueError as error:
    raise ValueError(f"lora.layers cannot be used: {error}") from error


def init_lora(network: dit.CausalDiT, settings: LoraSettings, key: jax.Array) -> Lora:
  """An adapter that changes nothing yet, as PEFT has it: A uniform, B zero.

  Args:
    network: of weights of any type, which may be abstract.
    key: layers get keys of their own by path.

  Raises:
    ValueError: a pattern that matches no layer.
  """
  shapes = lora.parameter_shapes(network)
  chosen = weights.choose_layers(list(map(_layer, shapes)), settings.layers)
  factors = {}
  for path, (*lead, rows, columns) in shapes.items():
    if _layer(path) not in chosen:
      continue
    # By name, not by number: leaving a layer out must not change the others.
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = columns**-0.5  # kaiming_uniform with a = sqrt(5)
    shape = (*lead, settings.rank, columns)
    a = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
    factors[path] = (a, jnp.zeros((*lead, rows, settings.rank), jnp.float32))
  return Lora(factors, settings.rank, float(settings.alpha or settings.rank))


def export(params: dict[str, Lora], folder: Path, source: str, base: str) -> None:
  """Writes an adapter twice: `folder/lora` for us, `folder/peft` for PEFT.

  Args:
    params: {"lora": adapter}.
    source: what made it.
    base: the folder of the networks that it was trained on.
  """
  adapter = params["lora"]
  lora.save_lora(folder / "lora", adapter, source, base=base, overwrite=True)
  lora.save_peft(folder / "peft", adapter, base)


def _layer(path: str) -> str:
  return path.removesuffix(".weight").replace(".", "/")
