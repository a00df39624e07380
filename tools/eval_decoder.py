"""How near decoders in fewer bits come to the float32 decoder: PSNR, as JSON.

  python tools/eval_decoder.py
  python tools/eval_decoder.py --vae_weights=checkpoints/ti2v-5b/vae --clips=1
  python tools/eval_decoder.py --vae=wan2.2 --vae_weights=random --height=32 --width=32

Latents are those of rendered clips of the toy world, held-out combinations; for random
weights, which make no picture of anything, they are noise. Pictures are decoded one
latent frame at a time, as a stream does it, and compared in [-1, 1] (peak 2).
"""

import json

import jax
import numpy as np
from absl import app, flags

from longlive_jax.data import toy_world
from longlive_jax.generate import networks
from longlive_jax.models import pixels, vae, vae_fp8

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_VAE = flags.DEFINE_enum(
  "vae", "toy", list(vae.VAE_SIZES), "Size of random weights.", flag_values=_FLAGS
)
_WEIGHTS = flags.DEFINE_string(
  "vae_weights", str(networks.SHIPPED / "vae"), "Folder or random.", flag_values=_FLAGS
)
_CLIPS = flags.DEFINE_integer("clips", 4, "To decode.", 1, flag_values=_FLAGS)
_LATENTS = flags.DEFINE_integer("latents", 8, "Of a clip.", 1, 8, flag_values=_FLAGS)
_HEIGHT = flags.DEFINE_integer("height", 32, "Of noise.", 16, flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", 32, "Of noise.", 16, flag_values=_FLAGS)

# Name in the output -> dtype and precision of the decoder.
DECODERS = {
  "bfloat16": ("bfloat16", ""),
  "fp8": ("float32", "fp8"),
  "fp8, bfloat16": ("bfloat16", "fp8"),
}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """In dB, of pictures in [-1, 1]."""
  return float(10 * np.log10(4.0 / np.mean((a.astype(np.float64) - b) ** 2)))


def in_dtype(model: vae.VideoVAE, dtype: str) -> vae.VideoVAE:
  """The network as it is loaded in another dtype: statistics stay in float32."""
  other = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
  other.latent_mean, other.latent_std = model.latent_mean, model.latent_std
  return other


def toy_latents(model: vae.VideoVAE, clips: int, latents: int) -> jax.Array:
  """(clips, latents, y, x, z) of rendered clips."""
  frames = 1 + model.config.temporal_factor * (latents - 1)
  scenes = toy_world.heldout_prompts(clips)
  videos = np.stack([toy_world.render(scene)[:frames] for scene in scenes])
  return jax.jit(vae.encode, static_argnums=2)(model, pixels.to_unit(videos), 1)


def main(argv: list[str]) -> None:
  del argv
  weights = _WEIGHTS.value
  model = networks.load(networks.find("vae", _VAE.value, weights), "float32")
  if weights == "random":
    scale = model.config.spatial_factor
    grid = (_HEIGHT.value // scale, _WIDTH.value // scale)
    shape = (_CLIPS.value, _LATENTS.value, *grid, model.config.z_dim)
    latents = jax.random.normal(jax.random.key(0), shape)
  else:
    latents = toy_latents(model, _CLIPS.value, _LATENTS.value)
  decode = jax.jit(vae.decode, static_argnums=2)
  exact = np.asarray(decode(model, latents, 1))
  found = {}
  for name, (dtype, precision) in DECODERS.items():
    other = vae_fp8.apply(in_dtype(model, dtype), precision)
    frames = np.asarray(decode(other, latents, 1), np.float32)
    found[name] = round(psnr(frames, exact), 2)
  print(json.dumps({
    "device": jax.devices()[0].device_kind,
    "vae_weights": weights,
    "latents": list(latents.shape),
    "psnr_db": found,
  }))  # fmt: skip


if __name__ == "__main__":
  app.run(main)
