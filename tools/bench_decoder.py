"""Times the VAE's decoder alone, with random weights, and prints one line of JSON.

  python tools/bench_decoder.py --vae=wan2.2 --height=704 --width=1280
  python tools/bench_decoder.py --vae=wan2.2 --height=704 --width=1280 \
      --vae_precision=fp8

Milliseconds of a latent frame are those of a call over `decode_frames`, frames as uint8
on the device. Of the compiled program it counts cuDNN's convolutions, and those that
read FP8 codes: 0 on a device without them, which then decodes the same codes in more
bits.
"""

import json
import re
import time
from typing import Any

import bench_networks
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from longlive_jax.generate import report
from longlive_jax.models import pixels, vae, vae_fp8

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_VAE = flags.DEFINE_enum(
  "vae", "test", list(vae.VAE_SIZES), "VAE size.", flag_values=_FLAGS
)
_HEIGHT = flags.DEFINE_integer("height", 64, "Pixels.", 16, flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", 64, "Pixels.", 16, flag_values=_FLAGS)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision.", flag_values=_FLAGS
)
_VAE_PRECISION = flags.DEFINE_enum(
  "vae_precision", "", list(vae_fp8.PRECISIONS), "Of the decoder.", flag_values=_FLAGS
)
_DECODE_FRAMES = flags.DEFINE_integer(
  "decode_frames", 1, "Latent frames a call.", 1, flag_values=_FLAGS
)
_DECODE_TILES = flags.DEFINE_integer(
  "decode_tiles", 1, "Tiles of the last stages.", 1, flag_values=_FLAGS
)
_CALLS = flags.DEFINE_integer("calls", 20, "To time.", 1, flag_values=_FLAGS)


def measure() -> dict[str, Any]:
  """The figures, by the flags."""
  config, frames = vae.VAE_SIZES[_VAE.value], _DECODE_FRAMES.value
  y = _HEIGHT.value // config.spatial_factor
  x = _WIDTH.value // config.spatial_factor
  dtype, precision = jnp.dtype(_DTYPE.value), _VAE_PRECISION.value
  model = bench_networks.random_decoder(config, dtype, precision)
  state = vae.init_decoder_state(model, 1, y, x)
  latents = jax.random.normal(jax.random.key(1), (1, frames, y, x, config.z_dim))
  state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

  def decode(model, state, latents):
    video, _, state = vae.decode_chunk(model, state, latents, _DECODE_TILES.value)
    return pixels.to_uint8(video), state

  began = time.perf_counter()
  program = jax.jit(decode, donate_argnums=1).lower(model, state, latents).compile()
  compile_seconds = time.perf_counter() - began
  times = []
  for _ in range(2 + _CALLS.value):
    began = time.perf_counter()
    video, state = program(model, state, latents)
    jax.block_until_ready((video, state))
    times.append(time.perf_counter() - began)
  median, best = np.median(times[2:]), min(times[2:])
  return {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "vae": _VAE.value,
    "pixels": f"{_HEIGHT.value}x{_WIDTH.value}",
    "dtype": _DTYPE.value,
    "vae_precision": precision,
    "decode_frames": frames,
    "decode_tiles": _DECODE_TILES.value,
    "ms_a_latent_frame": 1e3 * float(median) / frames,
    "ms_a_latent_frame_best": 1e3 * best / frames,
    "compile_s": compile_seconds,
    "state_bytes": state_bytes,
    "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    "peak_bytes": report.peak_bytes(),
  } | convolutions(program.as_text())


def convolutions(text: str) -> dict[str, int]:
  """Counts cuDNN's convolutions, and those of FP8 codes, in a compiled program.

  Args:
    text: HLO, `compiled.as_text()`, with or without the types of operands.
  """
  codes = set(re.findall(r"(%[\w.-]+) = f8e4m3fn\[", text))
  calls = re.findall(r"custom-call\(([^)]*)\).*__cudnn\$conv", text)
  eight = [call for call in calls if codes.intersection(re.findall(r"%[\w.-]+", call))]
  return {"convolutions": len(calls), "fp8_convolutions": len(eight)}


def main(argv: list[str]) -> None:
  del argv
  print(json.dumps(measure()))


if __name__ == "__main__":
  app.run(main)
