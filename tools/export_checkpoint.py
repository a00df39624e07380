"""Writes a network's Orbax checkpoint as safetensors with PyTorch's names.

  python tools/export_checkpoint.py --source ckpt/dit --out model.safetensors

Names, shapes, dtypes and bytes are those of the file that was converted. The VAE's
latent statistics, which PyTorch files lack, go into the file's header.
"""

from absl import app, flags, logging

from longlive_jax.checkpoint import convert

_SOURCE = flags.DEFINE_string("source", None, "Checkpoint folder.")
_OUT = flags.DEFINE_string("out", None, "File to make, .safetensors.")
_PREFIX = flags.DEFINE_string("prefix", "", "In front of every name, e.g. 'model.'.")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  convert.export(_SOURCE.value, _OUT.value, _PREFIX.value)
  print(f"wrote {_OUT.value}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["source", "out"])
  app.run(main)
