"""Which number format is used where: one description, applied to a plain network.

By layer: the first and last layers may keep plain weights; the layers between are a run
of their own, scanned by itself. By step: some solver steps may use the plain weights,
which then stay in memory beside the packed ones. What the cache stores is a matter of
`Sampling.kv_format`. What each choice costs in quality is measured by
tools/eval_precision.py.
"""

import dataclasses

from longlive_jax.generate.sampler import Model, StepModels
from longlive_jax.models import dit
from longlive_jax.quant import weights


@dataclasses.dataclass(frozen=True)
class Precision:
  """Number formats of the transformer's weights and activations.

  Attributes:
    mode: '' (plain) or one of `weights.MODES`.
    rule, activation_rule: of `nvfp4.RULES`.
    patterns: of the layers that are quantised, see `weights.quantise_weights`.
    plain_edges: how many first and how many last layers keep plain weights.
    plain_steps: solver steps with plain weights; negative ones count from the last.
  """

  mode: str = ""
  rule: str = "mse"
  activation_rule: str = "mse"
  patterns: tuple[str, ...] = weights.BLOCK_LINEARS
  plain_edges: int = 0
  plain_steps: tuple[int, ...] = ()


def apply(model: dit.CausalDiT, precision: Precision, steps: int) -> Model:
  """The network in these formats, for `steps` solver steps.

  Raises:
    ValueError: plain_edges that leave no layer or cannot be told from the patterns,
      plain_steps that do not exist, or as `weights.quantise_weights`.
  """
  if not precision.mode:
    return model
  layers, edges, base = model.config.layers, precision.plain_edges, model
  patterns = precision.patterns
  if edges:
    if not 0 < edges < layers / 2:
      raise ValueError(
        f"plain_edges={edges} must leave some of {layers} layers; use at most "
        f"{(layers - 1) // 2}"
      )
    strange = [p for p in patterns if not p.startswith("blocks/")]
    if strange:
      raise ValueError(
        f"patterns={strange} must start with 'blocks/' for plain_edges={edges} to say "
        "which blocks they mean"
      )
    base = dit.split_blocks(model, [edges, layers - edges])
    # The middle run is number 1: "blocks/..." becomes "blocks/1/...".
    patterns = tuple(
      pattern.replace("blocks/", "blocks/1/", 1) for pattern in patterns
    )
  packed = weights.quantise_weights(
    base,
    patterns,
    mode=precision.mode,
    rule=precision.rule,
    activation_rule=precision.activation_rule,
  )
  if not precision.plain_steps:
    return packed
  wrong = [step for step in precision.plain_steps if not -steps <= step < steps]
  if wrong:
    raise ValueError(f"plain_steps={wrong} must lie within the {steps} solver steps")
  plain = {step % steps for step in precision.plain_steps}
  choice = tuple(0 if step in plain else 1 for step in range(steps))
  return StepModels((model, packed), (*choice, 1))
