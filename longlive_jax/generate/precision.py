"""Which number format is used where: one description, applied to a plain network.

By layer: the first and last layers may keep plain weights; the layers between are a run
of their own, scanned by itself. By step: some solver steps may use the plain weights,
which then stay in memory beside the packed ones. What the cache stores is a matter of
`Sampling.kv_format`. What each choice costs in quality is measured by
tools/eval_precision.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from longlive_jax.checkpoint import store
from longlive_jax.generate.step_models import Model, StepModels
from longlive_jax.models import block_scan, dit
from longlive_jax.quant import nvfp4, weights


@dataclasses.dataclass(frozen=True)
class Precision:
  """Number formats of the transformer's weights and activations.

  Settings of a run are called `precision` (the mode) and `precision_...`; so they are
  in what is raised.

  Attributes:
    mode: '' (plain) or one of `weights.MODES`.
    rule, activation_rule: of `nvfp4.RULES`; without effect on FP8 modes.
    layers: patterns of those that are quantised, see `weights.quantise_weights`.
    plain_edges: how many first and how many last layers keep plain weights.
    plain_steps: solver steps with plain weights; negative ones count from the last.
  """

  mode: str = ""
  rule: str = "mse"
  activation_rule: str = "mse"
  layers: tuple[str, ...] = weights.BLOCK_LINEARS
  plain_edges: int = 0
  plain_steps: tuple[int, ...] = ()

  def __post_init__(self):
    if self.mode not in ("", *weights.MODES):
      raise ValueError(
        f"precision={self.mode!r} is unknown; use {', '.join(weights.MODES)}, or '' "
        "for none"
      )
    for name in (self.rule, self.activation_rule):
      nvfp4.rule_of(name)
    for name in ("layers", "plain_edges", "plain_steps"):
      value = getattr(self, name)
      chosen = value != weights.BLOCK_LINEARS if name == "layers" else value
      if chosen and not self.mode:
        raise ValueError(
          f"precision_{name}={value} needs a precision, but precision='' quantises "
          f"nothing; use one of {', '.join(weights.MODES)} with it, or leave it out"
        )
    if self.plain_edges < 0:
      raise ValueError(
        f"precision_plain_edges={self.plain_edges} must not be negative; use 1 for the "
        "first and the last layer"
      )
    if not all(isinstance(step, int) for step in self.plain_steps):
      raise ValueError(
        f"precision_plain_steps={self.plain_steps} must be whole numbers; use (0, -1) "
        "for the first and the last step"
      )


PLAIN = Precision()


def check(precision: Precision, config: dit.WanConfig, steps: int) -> None:
  """Whether a transformer of these sizes can be had so; builds nothing.

  Raises:
    ValueError: arithmetic that this machine lacks, layers that are not there or do not
      fit, plain_edges that leave none, plain_steps that do not exist.
  """
  if not precision.mode:
    return
  weights.check_mode(precision.mode)
  _check_numbers(precision, config.layers, steps)
  network = store.abstract_network("dit", config)
  try:
    jax.eval_shape(lambda plain: _quantise(plain, precision), network)
  except ValueError as error:
    raise ValueError(f"precision_layers cannot be used: {error}") from error


def apply(model: dit.CausalDiT, precision: Precision, steps: int) -> Model:
  """The network in these formats, for `steps` solver steps.

  Raises:
    ValueError: as `check`, or a network that is quantised already.
  """
  if not precision.mode:
    return model
  _check_numbers(precision, model.config.layers, steps)
  packed = keep_edges(_quantise(model, precision), model, precision.plain_edges)
  if not precision.plain_steps:
    return packed
  plain = {step % steps for step in precision.plain_steps}
  choice = tuple(0 if step in plain else 1 for step in range(steps))
  return StepModels((model, packed), (*choice, 1))


def keep_edges(
  packed: dit.CausalDiT, plain: dit.CausalDiT, edges: int
) -> dit.CausalDiT:
  """The packed network with the first and the last `edges` layers of the plain one.

  Args:
    packed: with one run of layers.
    plain: the same network, or its first and last `edges` layers alone; its arrays
      may be in host memory.
    edges: 0 (then it is the packed network) to less than half of the layers.
  """
  if not edges:
    return packed
  mixed = block_scan.split_blocks(packed, [edges, packed.config.layers - edges])
  for run, kept in ((0, slice(edges)), (2, slice(-edges, None))):
    mixed.blocks[run] = jax.tree.map(
      lambda leaf, kept=kept: jnp.asarray(leaf[kept]), plain.blocks
    )
  return mixed


def _quantise(model: dit.CausalDiT, precision: Precision) -> dit.CausalDiT:
  return weights.quantise_weights(
    model,
    precision.layers,
    mode=precision.mode,
    rule=precision.rule,
    activation_rule=precision.activation_rule,
  )


def check_edges(name: str, edges: int, layers: int) -> None:
  """Raises ValueError for a setting `name` of plain edges that leaves no layer."""
  if not 0 <= 2 * edges < layers:
    raise ValueError(
      f"{name}={edges} must leave some of {layers} layers between the first and the "
      f"last; use 0 to {(layers - 1) // 2}"
    )


def _check_numbers(precision: Precision, layers: int, steps: int) -> None:
  check_edges("precision_plain_edges", precision.plain_edges, layers)
  wrong = [step for step in precision.plain_steps if not -steps <= step < steps]
  if wrong:
    raise ValueError(
      f"precision_plain_steps={precision.plain_steps} must lie within the {steps} "
      f"solver steps, but {wrong} do not; use {-steps} to {steps - 1}"
    )
