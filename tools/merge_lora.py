"""Merges LoRA adapters into a transformer's checkpoint.

  python tools/merge_lora.py --base ckpt/dit --lora lora.pt --out ckpt/dit_merged
  python tools/merge_lora.py --base ckpt/dit --lora a.pt --lora ckpt/b \\
    --weight 1.0 --weight 0.5 --out ckpt/dit_merged

An adapter is a file, a checkpoint (model/lora of launch/train.py), or PEFT's folder.
W + weight * alpha / rank * B A in float32, rounded once to the weight's dtype. The
base must not be quantised: tools/quantize_checkpoint.py merges before it quantises.
"""

from absl import app, flags, logging

from longlive_jax.checkpoint import convert

_BASE = flags.DEFINE_string("base", None, "Checkpoint folder of the transformer.")
_LORA = flags.DEFINE_multi_string("lora", None, "Adapter: file or folder.")
_WEIGHT = flags.DEFINE_multi_float("weight", [], "Of each adapter; 1 if not given.")
_ALPHA = flags.DEFINE_float("alpha", None, "Of the adapters; their own if not given.")
_OUT = flags.DEFINE_string("out", None, "Checkpoint folder to make.")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  convert.merge(_BASE.value, _LORA.value, _OUT.value, _WEIGHT.value, _ALPHA.value)
  print(f"wrote {_OUT.value}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["base", "lora", "out"])
  app.run(main)
