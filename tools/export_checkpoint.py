"""Writes a network's Orbax checkpoint as safetensors with PyTorch's names.

  python tools/export_checkpoint.py --source ckpt/dit --out model.safetensors

Names, shapes, dtypes and bytes are those of the file that was converted. The VAE's
latent statistics, which PyTorch files lack, go into the file's header. A transformer
that is quantised to NVFP4 is written in FourOverSix's layout. Of an adapter, --out is
a folder with the two files of PEFT.
"""

import sys

from absl import app, flags, logging

from longlive_jax.checkpoint import convert, four_over_six, store

_SOURCE = flags.DEFINE_string("source", None, "Checkpoint folder.")
_OUT = flags.DEFINE_string("out", None, "File to make, or folder for an adapter.")
_PREFIX = flags.DEFINE_string("prefix", "", "In front of every name, e.g. 'model.'.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  try:
    packed = store.is_packed(store.load_metadata(_SOURCE.value))
    export = four_over_six.export_checkpoint if packed else convert.export
    export(_SOURCE.value, _OUT.value, _PREFIX.value)
  except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(f"wrote {_OUT.value}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["source", "out"])
  app.run(main)
