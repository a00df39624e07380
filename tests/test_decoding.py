"""A decoder on a device of its own, or split over several, gives the frames of one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import TINY_VAE, normal, random_vae

from longlive_jax.generate import decoding
from longlive_jax.models import vae, vae_fp8
from longlive_jax.models.vae_bands import Band

TESTS = Path(__file__).parent

# The number of CPU devices is fixed when JAX starts: a process of its own.
SCRIPT = r"""
import dataclasses
import json
import re
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_default_matmul_precision", "highest")

import bench_decoder
import numpy as np
from random_weights import TINY_VAE, normal, random_dit, random_vae

from longlive_jax.checkpoint import store
from longlive_jax.generate import decoding, snapshots
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import vae, vae_fp8
from longlive_jax.parallel import mesh as meshes

model, video_vae = random_dit(), random_vae()
sampling = Sampling(frames_per_chunk=2, window_frames=6, sink_frames=2, steps=1)
zeros = np.zeros((4, 1), np.int32)
text = normal(1, 5, model.config.text_dim)
story = streaming.Story(text, None, zeros, zeros > 0, zeros)


def start():
  return streaming.init_state(
    model, video_vae, sampling, key=jax.random.key(0), samples=range(1), y=2, x=2
  )


def devices(tree):
  return sorted({d.id for a in jax.tree.leaves(tree) for d in a.sharding.device_set})


def video(state, decode_on, on_state=lambda done, state: None):
  where = decoding.placement(decode_on, None, 2, 2)
  network, decoder = decoding.place(video_vae, state.decoder, where)
  state = dataclasses.replace(state, decoder=decoder)
  before, chunks = decoding.compiled_programs(), []
  for chunk in streaming.stream(
    model, network, state, story, sampling, on_state=on_state
  ):
    chunks.append(chunk.frames)
    places = [devices(a) for a in (network, chunk.decoded.padded[0], chunk.latents)]
  programs = decoding.compiled_programs() - before
  return np.concatenate(chunks, axis=1), places, programs


decoders = []


def keep(done, state):
  decoders.append(devices(state.decoder))
  if done == 2:
    snapshots.save(FOLDER, done, state, {})


same, same_places, same_programs = video(start(), "same")
other, other_places, other_programs = video(start(), "other", keep)
rest, *_ = video(store.load(snapshots.find(FOLDER), jax.eval_shape(start)), "same")


def moved(program):
  "What devices send to each other: [operation, dtype, shape] of every array."
  calls = re.findall(r"= (.*?) ((?:all|collective)-[a-z-]+)\(", program)
  return [
    [name, dtype, [int(n) for n in shape.split(",") if n]]
    for arrays, name in calls
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", arrays)
  ]


def spread(decode_on, mesh, y, x, video_vae=video_vae, videos=1):
  where = decoding.placement(decode_on, mesh, y, x)
  pieces = normal(2, videos, 2, y, x, 8)
  state, alone = (vae.init_decoder_state(video_vae, videos, y, x) for _ in range(2))
  network, state = decoding.place(video_vae, state, where)
  program = decoding.compile_ahead(network, state, pieces[0], 2)
  worst = mean = programs = 0
  for piece in pieces:
    before = decoding.compiled_programs()
    made, state = decoding.decode(network, state, piece, 2)
    programs += decoding.compiled_programs() - before
    want, alone = decoding.decode(video_vae, alone, piece, 2)
    frames = made.fetch()
    apart = np.abs(frames.astype(int) - want.fetch())
    worst, mean = max(worst, int(apart.max())), max(mean, float(apart.mean()))
  assert state.history[0].sharding == where
  off = jax.tree.map(
    lambda a, b: float(np.abs(np.float32(a) - np.float32(b)).max()),
    state.history, alone.history,
  )
  return {
    "frames": worst,
    "mean": mean,
    "std": float(frames.std()),
    "history": max(jax.tree.leaves(off)),
    "programs": programs,
    "moved": moved(program.as_text()),
    "shards": [shard.data.shape for shard in made.padded[0].addressable_shards],
  }


quantised = vae_fp8.quantise_decoder(video_vae)


def refusal(*args):
  try:
    decoding.placement(*args)
  except ValueError as error:
    return str(error)


def devices_of(*args):
  return [device.id for device in decoding.placement(*args).device_set]


def bench(*flags):
  vae.VAE_SIZES["test"] = TINY_VAE
  bench_decoder._FLAGS(["bench", "--height=16", "--width=16", "--calls=1", *flags])
  return bench_decoder.measure()


print(json.dumps({
  "std": float(same.std()),
  "other": bool(np.array_equal(same, other)),
  "resumed": bool(np.array_equal(same[:, -rest.shape[1] :], rest)),
  "places": [same_places, other_places],
  "decoders": decoders,
  "programs": [same_programs, other_programs],
  "rows": spread("split", meshes.generation_mesh(4), 8, 3),
  "columns": spread("split", meshes.generation_mesh(8), 3, 8),
  "codes": spread("split", meshes.generation_mesh(4), 8, 3, quantised),
  "videos": spread("same", meshes.generation_mesh(2), 3, 3, quantised, videos=2),
  "uneven": refusal("split", meshes.generation_mesh(3), 44, 80),
  "none_left": refusal("other", meshes.generation_mesh(8), 4, 4),
  "unknown": refusal("gpu", None, 4, 4),
  "bench": bench("--devices=4", "--decode_frames=2", "--vae_precision=fp8"),
  "beside_two": devices_of("other", meshes.generation_mesh(2), 4, 4),
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
  path = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "tools")]
  folder = str(tmp_path_factory.mktemp("states"))
  code = f"import sys\nsys.path[:0] = {path!r}\nFOLDER = {folder!r}\n{SCRIPT}"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


def test_another_device_decodes_the_same_bytes(found):
  assert found["std"] > 20 and found["other"]
  # Weights, frames and latents; and the state after each chunk.
  assert found["places"] == [[[0], [0], [0]], [[1], [1], [0]]]
  assert found["decoders"] == [[1]] * 4
  assert found["programs"] == [1, 1]
  assert found["beside_two"] == [2]


def test_a_saved_state_goes_on_where_there_is_one_device(found):
  assert found["resumed"]


@pytest.mark.parametrize(
  ("axis", "devices", "y", "x"), [("rows", 4, 8, 3), ("columns", 8, 3, 8)]
)
def test_a_picture_is_split_over_devices(found, axis, devices, y, x):
  part, scale = found[axis], TINY_VAE.spatial_factor
  assert part["frames"] <= 1 and part["std"] > 20 and part["history"] < 1e-6
  height, width = scale * y, scale * x
  shape = [height // devices, width] if axis == "rows" else [height, width // devices]
  assert part["shards"] == [[1, 4, *shape, 3]] * devices
  assert part["programs"] == 1  # the second piece finds its state as it was before


@pytest.mark.parametrize(
  ("case", "axis", "coded"), [("rows", 2, 0), ("columns", 3, 0), ("codes", 2, 12)]
)
def test_what_bands_of_a_picture_exchange(found, case, axis, coded):
  """Keys and values of the middle; for each convolution a row each way, or a column."""
  names = ["collective-permute", "all-gather"]
  halos, gathered = ([m for m in found[case]["moved"] if m[0] == n] for n in names)
  assert len(halos) + len(gathered) == len(found[case]["moved"])
  tokens = [1, 2, 8 * 3, TINY_VAE.decoder_widths[0]]  # of two latent frames
  assert [shape for *_, shape in gathered] == [tokens] * 2
  decoder = jax.tree.leaves(random_vae().decoder)
  convolutions = sum(w.ndim > 1 and w.shape[1] == 3 for w in decoder)
  assert len(halos) == 2 * convolutions
  assert all(len(shape) == 5 and shape[axis] == 1 for *_, shape in halos)
  assert sum(dtype == "u8" for _, dtype, _ in halos) == 2 * coded


def test_a_decoder_in_fp8_is_split_over_devices(found):
  """But for codes that another order of sums rounds to their neighbour: few."""
  part, one = found["codes"], found["rows"]
  assert part["mean"] < 0.01 and part["std"] > 20
  assert part["shards"] == one["shards"]


def test_devices_with_videos_of_their_own_exchange_nothing(found):
  part = found["videos"]
  assert part["mean"] < 0.01 and part["std"] > 20
  assert part["shards"] == [[1, 4, 12, 12, 3]] * 2 and part["moved"] == []


def test_a_shared_picture_is_timed(found):
  figures = found["bench"]
  assert (figures["devices"], figures["decode_frames"]) == (4, 2)
  assert figures["ms_a_latent_frame"] > 0 and figures["temporary_bytes"] > 0


def test_a_band_is_not_decoded_in_tiles():
  model, band = random_vae(), Band(2, "space")
  state = vae.init_decoder_state(model, 1, 2, 2)
  with pytest.raises(ValueError, match="tiles=2 must be 1 where 2 devices share"):
    vae.decode_chunk(model, state, normal(1, 1, 2, 2, 8), 2, band)


def test_places_that_there_are_not(found):
  assert found["uneven"] == (
    "decode_on='split' cannot share 44 rows or 80 columns of latents evenly among "
    "devices=3; use one of [1, 2, 4, 5, 8], or decode_on='same'"
  )
  assert found["none_left"].startswith("decode_on='other' needs a device beside the 8")
  assert found["unknown"] == "decode_on='gpu' is unknown; use same, other or split"


@pytest.mark.parametrize("precision", vae_fp8.PRECISIONS)
def test_a_decoder_forgets_bit_for_bit(precision):
  """After so many latents its state is theirs alone, whatever it was before."""
  network, device = vae_fp8.apply(random_vae(), precision), jax.devices()[0]
  count = decoding.frames_remembered(TINY_VAE)
  latents = normal(1, count, 2, 2, TINY_VAE.z_dim)

  def state_after(*pieces):
    state = jax.device_put(vae.init_decoder_state(network, 1, 2, 2), device)
    for piece in pieces:
      for frame in np.split(piece, piece.shape[1], axis=1):
        _, state = decoding.decode(network, state, frame)
    return jax.device_get(state)

  fresh, other = (), (normal(1, 3, 2, 2, TINY_VAE.z_dim, seed=1),)
  early = [state_after(*past, latents[:, : count // 2]) for past in (fresh, other)]
  late = [state_after(*past, latents) for past in (fresh, other)]
  same = [
    all(jax.tree.leaves(jax.tree.map(np.array_equal, *each))) for each in (early, late)
  ]
  assert same == [False, True]


def test_what_decoders_of_all_sizes_remember():
  sizes = {name: decoding.frames_remembered(c) for name, c in vae.VAE_SIZES.items()}
  # By hand: conv1 2, middle 8, stages 12 + 2, 6 + 1, 3, 3, head 1/2; and one.
  assert sizes["wan2.2"] == sizes["toy"] == 39
