"""Converts published PyTorch checkpoints into this project's Orbax checkpoints.

  python tools/convert_checkpoint.py --kind generator --source model.pt --out ckpt/dit
  python tools/convert_checkpoint.py --kind vae --source Wan2.2_VAE.pth --out ckpt/vae
  python tools/convert_checkpoint.py --kind umt5 \\
    --source models_t5_umt5-xxl-enc-bf16.pth --out ckpt/text
  python tools/convert_checkpoint.py --kind lora --source lora.pt --out ckpt/lora

Reads .safetensors, .pt and .pth files and diffusers-style folders; .pt needs torch.
Parameters are read, stacked and written one after the other, so that memory holds a
few of them, never the model.
"""

from absl import app, flags, logging

from longlive_jax.checkpoint import convert, lora, store

_KIND = flags.DEFINE_enum(
  "kind", None, [*convert.KINDS, "lora"], "What the source holds."
)
_SOURCE = flags.DEFINE_string("source", None, "File or folder to convert.")
_OUT = flags.DEFINE_string("out", None, "Checkpoint folder to make.")
_SIZE = flags.DEFINE_string(
  "size", "", "Size of the network by name; read off the tensors' shapes if not given."
)
_EMA = flags.DEFINE_bool(
  "ema", False, "Take the averaged generator where there is one."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "", list(convert.DTYPES), "Of all parameters; '': as stored."
)
_LAYERS = flags.DEFINE_integer("layers", 30, "Blocks of the LoRA's transformer.")
_ALPHA = flags.DEFINE_float("alpha", None, "Of the LoRA; its rank if not given.")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  if _KIND.value == "lora":
    adapter = lora.load_lora(_SOURCE.value, _LAYERS.value, _ALPHA.value)
    lora.save_lora(_OUT.value, adapter, _SOURCE.value)
  else:
    convert.convert(
      _KIND.value,
      _SOURCE.value,
      _OUT.value,
      _SIZE.value,
      _EMA.value,
      _DTYPE.value,
    )
  print(f"wrote {_OUT.value}: {store.load_metadata(_OUT.value)}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["kind", "source", "out"])
  app.run(main)
