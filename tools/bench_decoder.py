"""Times the VAE's decoder alone, with random weights, and prints one line of JSON.

  python tools/bench_decoder.py --vae=wan2.2 --height=704 --width=1280
  python tools/bench_decoder.py --vae=wan2.2 --height=704 --width=1280 \
      --vae_precision=fp8 --devices=2

Milliseconds of a latent frame are those of a call over `decode_frames`, frames as uint8
on the devices; with several of them each has a part of the picture, as by
`decode_on=split`. The state's bytes are of all devices, the temporary and peak ones of
each. Of the compiled program it counts the convolutions, cuDNN's and those of our
kernel, those of either that read FP8 codes, and those of our kernel. A device without
FP8 decodes the same codes in more bits and reads none.
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

from longlive_jax.generate import decoding, report
from longlive_jax.models import vae, vae_fp8
from longlive_jax.parallel import mesh as meshes

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
_DEVICES = flags.DEFINE_integer(
  "devices", 1, "That share the picture.", 1, flag_values=_FLAGS
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
  mesh = meshes.generation_mesh(sequence=_DEVICES.value)
  where = decoding.placement("same" if mesh is None else "split", mesh, y, x)
  model, state = decoding.place(model, state, where)
  latents = meshes.place(latents, where)

  began = time.perf_counter()
  program = decoding.compile_ahead(model, state, latents, frames, _DECODE_TILES.value)
  compile_seconds = time.perf_counter() - began
  times, first = [], np.int32(0)
  for _ in range(2 + _CALLS.value):
    began = time.perf_counter()
    video, _, state = program(model, state, latents, first)
    jax.block_until_ready((video, state))
    times.append(time.perf_counter() - began)
  median, best = np.median(times[2:]), min(times[2:])
  return {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "devices": _DEVICES.value,
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
  """Counts convolutions, those of FP8 codes, and those of our kernel, in a program.

  Args:
    text: HLO, `compiled.as_text()`, with or without the types of operands. Kernels are
      known by the name scope of `launch`.
  """
  codes = set(re.findall(r"(%[\w.-]+) = f8e4m3fn\[", text))
  calls = re.findall(r"custom-call\(([^)]*)\).*__cudnn\$conv", text)
  eight = [call for call in calls if codes.intersection(re.findall(r"%[\w.-]+", call))]
  ours = len(re.findall(r'"triton_kernel_call".*op_name="[^"]*\bfp8_conv/', text))
  return {
    "convolutions": len(calls) + ours,
    "fp8_convolutions": len(eight) + ours,
    "triton_convolutions": ours,
  }


def main(argv: list[str]) -> None:
  del argv
  print(json.dumps(measure()))


if __name__ == "__main__":
  app.run(main)
