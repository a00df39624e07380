"""Quantises a transformer's checkpoint to NVFP4, or imports one that is quantised.

  python tools/quantize_checkpoint.py --source ckpt/dit --out ckpt/dit_nvfp4
  python tools/quantize_checkpoint.py --source ckpt/dit --lora lora.pt \\
    --mode w4a4 --rule static_6 --out ckpt/dit_w4a4
  python tools/quantize_checkpoint.py --source model_4o6.pt --out ckpt/dit_nvfp4

--mode says what the 4-bit weights are multiplied with: w4a16 as it comes, w4a4
quantised, too. Adapters are merged first, in float32 and rounded once; a quantised
network takes none. Parameters are read, quantised and written one after the other, so
that memory holds a few of them, never the model.

A file with FourOverSix's quantised layers is taken as it is, codes and scales byte for
byte; tools/export_checkpoint.py writes one.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from longlive_jax.checkpoint import convert, four_over_six, quantised
from longlive_jax.quant import nvfp4, weights

_SOURCE = flags.DEFINE_string("source", None, "Checkpoint folder, or published file.")
_OUT = flags.DEFINE_string("out", None, "Checkpoint folder to make.")
_MODE = flags.DEFINE_enum("mode", "w4a16", ["w4a16", "w4a4"], "What weights are for.")
_RULE = flags.DEFINE_enum(
  "rule", None, list(nvfp4.RULES),
  "How block scales are chosen; default mse, or what a published file says.",
)  # fmt: skip
_LAYERS = flags.DEFINE_multi_string(
  "layers", list(weights.BLOCK_LINEARS),
  "Patterns of the paths of a checkpoint's layers.",
)  # fmt: skip
_LORA = flags.DEFINE_multi_string("lora", [], "Adapters to merge before.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "", list(convert.DTYPES),
  "Of a checkpoint's parameters before they are quantised; '': as stored.",
)  # fmt: skip
_SIZE = flags.DEFINE_string("size", "", "Of a published file's transformer, by name.")


def make() -> None:
  """Makes the checkpoint that the flags describe.

  Raises:
    ValueError: flags that do nothing for this source, or as what makes it.
  """
  if (Path(_SOURCE.value) / "_CHECKPOINT_METADATA").exists():
    if _SIZE.value:
      raise ValueError(
        f"size={_SIZE.value!r} is for published files; source={_SOURCE.value} is a "
        "checkpoint, which has a size: leave it out"
      )
    quantised.quantise_checkpoint(
      _SOURCE.value,
      _OUT.value,
      mode=_MODE.value,
      rule=_RULE.value or "mse",
      layers=_LAYERS.value,
      adapters=_LORA.value,
      dtype=convert.DTYPES[_DTYPE.value],
    )
    return
  if _LORA.value:
    raise ValueError(
      f"lora={_LORA.value[0]} cannot be merged into source={_SOURCE.value}, which is "
      "quantised or no checkpoint of this project; merge it into the generator that "
      "the source was made from"
    )
  for flag in (_LAYERS, _DTYPE):
    if flag.present:
      raise ValueError(
        f"{flag.name}={flag.value} cannot be chosen for source={_SOURCE.value}, which "
        "is taken as it is quantised; leave it out"
      )
  four_over_six.import_checkpoint(
    _SOURCE.value,
    _OUT.value,
    rule=_RULE.value or "",
    mode=_MODE.value,
    size=_SIZE.value,
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  try:
    make()
  except (OSError, ValueError, ImportError) as error:
    sys.exit(f"error: {error}")
  sizes = quantised.checkpoint_bytes(_OUT.value)
  listed = ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items())
  print(f"wrote {_OUT.value}: {listed}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["source", "out"])
  app.run(main)
