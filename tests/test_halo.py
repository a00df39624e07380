"""Clips encoded by parts: the latents of the whole, and no more video than needed."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from random_weights import TINY_VAE, fill, random_vae
from test_video_frames import spoil

from longlive_jax.data.video import VideoWriter, read_video
from longlive_jax.models import vae
from longlive_jax.parallel import halo
from longlive_jax.train.latents import encode_frames

TESTS = Path(__file__).parent
SIZE = 4  # pixels: one latent row and column of the tiny VAE


@pytest.fixture(scope="module")
def model() -> vae.VideoVAE:
  return random_vae()


def _clip(latents: int, seed: int = 0) -> np.ndarray:
  shape = (1, 2 * (latents - 1) + 1, SIZE, SIZE, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


_whole = jax.jit(encode_frames, static_argnums=2)


@pytest.mark.parametrize("size", vae.VAE_SIZES)
def test_halos_of_published_networks(size):
  config = vae.VAE_SIZES[size]
  model = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  assert halo.halo_latents(model) == (5, 5, 18)


@pytest.mark.parametrize("config", [TINY_VAE, vae.VAE_SIZES["test"]], ids=str)
def test_a_part_depends_on_its_halo_and_on_nothing_before(config):
  model = fill(jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0))))
  side, rate = config.spatial_factor, config.temporal_factor
  shape = (side, side, 3)
  for part, reach in zip(model.encoder.parts(), halo.halo_latents(model), strict=True):
    encode = jax.jit(functools.partial(vae.encode_chunk, part=part))
    state = vae.init_encoder_state(model, 1, 1, 1, part)
    last, lasts = reach + 2, []
    for spoilt in last - reach, last - reach - 1:
      # A number would shrink below float32's precision on the way. This one cannot.
      features = np.zeros((1, last + 1, rate, *shape), np.float32)
      features[:, spoilt] = np.nan
      made, _ = encode(model, state, features.reshape(1, -1, *shape))
      lasts.append(np.asarray(made).reshape(last + 1, -1, *made.shape[2:])[last])
    assert np.isnan(lasts[0][0]).all() and np.isfinite(lasts[1]).all()
    rate, shape = len(lasts[0]), lasts[0].shape[1:]


def test_no_halo_before_the_clip(model):
  """The last of the devices has all of the clip before its span."""
  spans = halo.make_spans(model, latents=5, devices=3, frames_per_call=1)
  assert (spans.length, spans.halos) == (2, (4, 4))
  spans = halo.make_spans(model, latents=60, devices=3, frames_per_call=1)
  assert (spans.length, spans.halos) == (20, (4, 14))


def test_devices_that_share_a_clip_encode_few_frames_at_a_time(model):
  for asked, used in (1, 1), (2, 2), (3, 1), (8, 2):
    spans = halo.make_spans(model, latents=24, devices=2, frames_per_call=asked)
    assert spans.frames_per_call == used and spans.halos == (4, 12)
  spans = halo.make_spans(model, latents=24, devices=1, frames_per_call=8)
  assert spans.frames_per_call == 8 and spans.halos == (0,)


@pytest.mark.parametrize(
  ("latents", "shares"), [(96, (0.192, 0.045, 0.040)), (384, (0.048, 0.011, 0.010))]
)
def test_cost_of_the_halo(latents, shares):
  """It was 32 / 24 and 32 / 96 when all layers encoded 28 latents, in calls of 8."""
  config = vae.VAE_SIZES["wan2.2"]
  network = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  spans = halo.make_spans(network, latents=latents, devices=4, frames_per_call=8)
  assert halo.halo_cost(config, spans, 44, 80) == pytest.approx(shares, abs=6e-4)
  alone = halo.make_spans(network, latents=latents, devices=1, frames_per_call=8)
  assert halo.halo_cost(config, alone, 44, 80) == (0,)


def test_only_the_span_and_its_halo_are_read():
  spans = halo.Spans(
    latents=96, devices=4, length=24, halos=(28, 4), frames_per_call=4, factor=4
  )
  assert [spans.video_frames(d) for d in range(4)] == [
    (0, 93), (0, 189), (77, 285), (173, 381),
  ]  # fmt: skip
  assert spans.padded_frames == 208
  frames = np.arange(93, dtype=np.uint8).reshape(1, 93, 1, 1, 1)
  padded = spans.pad(frames, 0)
  assert padded.shape[1] == 208 and not padded[:, :115].any()
  np.testing.assert_array_equal(padded[:, 115:], frames)


def test_a_span_beyond_the_clip_reads_nothing():
  spans = halo.Spans(
    latents=5, devices=4, length=2, halos=(2,), frames_per_call=2, factor=4
  )
  assert spans.video_frames(2) == (5, 17) and spans.video_frames(3) == (13, 17)
  spans = halo.Spans(
    latents=2, devices=4, length=1, halos=(1,), frames_per_call=1, factor=4
  )
  assert spans.video_frames(3) == (5, 5)
  assert spans.pad(np.ones((1, 0, 2, 2, 3), np.uint8), 3).shape == (1, 8, 2, 2, 3)
  assert spans.frames_of([3]).tolist() == []
  assert spans.frames_of([0, 2]).tolist() == [0, 1, 2, 3, 4]


def test_frames_of_some_devices():
  spans = halo.Spans(
    latents=32, devices=8, length=4, halos=(2,), frames_per_call=2, factor=4
  )
  assert spans.video_frames(1) == (5, 29) and spans.video_frames(2) == (21, 45)
  assert spans.frames_of([1, 2]).tolist() == [*range(5, 45)]
  assert spans.frames_of([6, 1]).tolist() == [*range(5, 29), *range(85, 109)]


# A clip's latents are those of the beginning of a longer one: one whole for all cases.
EXACT = r"""
import dataclasses
import json
import re

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from flax import nnx
from random_weights import fill, random_vae

from longlive_jax.models import vae
from longlive_jax.parallel import halo, mesh as meshes
from longlive_jax.train.latents import encode_frames

DEEP = vae.VAEConfig(8, 2, 8, dim_mult=(1, 1, 1), num_res_blocks=1,
                     temporal_downsample=(True, True))


def deep(dtype):
  # It looks far back: what is oldest would shrink below float32's precision.
  model = jax.eval_shape(lambda: vae.VideoVAE(DEEP, dtype=dtype, rngs=nnx.Rngs(0)))
  return jax.tree.map(
    lambda a: a.at[..., 1:, :].multiply(0.1) if a.ndim == 5 else a, fill(model, seed=2)
  )


MODELS = {
  "tiny": random_vae(), "deep": deep("float32"), "deep, 16 bits": deep("bfloat16")
}
LATENTS = 36
wholes = {}


def clip_of(model):
  side, frames = model.config.spatial_factor, model.config.temporal_factor * LATENTS
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (2, frames, side, side, 3), np.uint8)


def equal(name, data, spans):
  model = MODELS[name]
  clip, n = clip_of(model)[:data], spans.frames_per_call
  if (name, data, n) not in wholes:
    whole = jax.jit(encode_frames, static_argnums=2)
    wholes[name, data, n] = np.concatenate([whole(model, c[None], n) for c in clip])
  mesh = meshes.training_mesh(data, spans.devices)
  side = clip.shape[2]
  frames = halo.spread_frames(
    lambda rows, start, stop: clip[list(rows), start:stop], spans, mesh,
    batch=data, height=side, width=side,
  )
  found = halo.encode_spans(model, frames, spans, mesh)[:, : spans.latents]
  return np.array_equal(found, wholes[name, data, n][:, : spans.latents])


def collectives(name, spans):
  model, mesh = MODELS[name], meshes.training_mesh(1, spans.devices)
  side, count = model.config.spatial_factor, spans.devices * spans.padded_frames
  frames = jax.ShapeDtypeStruct(
    (1, count, side, side, 3), np.uint8, sharding=meshes.sharding(mesh, meshes.CLIPS)
  )
  text = halo.encode_spans.lower(model, frames, spans, mesh).compile().as_text()
  found = re.findall(
    r"= \w+\[([\d,]+)\]\S* (collective-\w+|all-\w+|reduce-scatter)\S*\(", text
  )
  return [[op, [int(n) for n in shape.split(",")]] for shape, op in found]


results = []
for case in json.loads(sys.argv[1]):
  name, data, latents, devices, n, less, ask = case
  spans = halo.make_spans(
    MODELS[name], latents=latents, devices=devices, frames_per_call=n
  )
  halos = tuple(h - l for h, l in zip(spans.halos, less))
  spans = dataclasses.replace(spans, halos=halos)
  results.append({
    "length": spans.length, "halos": halos, "equal": equal(name, data, spans),
    "collectives": collectives(name, spans) if ask else None,
  })
print(json.dumps(results))
"""


def _in_devices(code: str, *arguments: str) -> Any:
  """What a script prints last, which may have devices of its own."""
  paths = [str(TESTS), str(TESTS.parent)]
  result = subprocess.run(
    [sys.executable, "-c", f"import sys\nsys.path[:0] = {paths!r}\n{code}", *arguments],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


def test_spans_equal_the_whole():
  cases = {  # network, samples, latents, devices, frames a call: length and halos
    ("tiny", 1, 36, 2, 2): (18, [4, 14]),
    ("tiny", 1, 13, 3, 1): (5, [4, 10]),  # beyond the clip; all of it is halo
    ("tiny", 2, 30, 4, 8): (8, [4, 14]),  # from two neighbours; two samples
    ("tiny", 1, 22, 8, 1): (3, [4, 14]),  # from five; one span beyond the clip
    ("tiny", 1, 3, 8, 1): (1, [4, 7]),
    ("deep", 1, 36, 4, 2): (10, [2, 4, 14]),
    ("deep", 1, 15, 8, 1): (2, [2, 3, 14]),
    ("deep, 16 bits", 1, 20, 2, 2): (10, [2, 4, 10]),
  }
  asked = [[*case, [0, 0, 0], False] for case in cases]
  found = _in_devices(EXACT, json.dumps(asked))
  for case, (length, halos), one in zip(cases, cases.values(), found, strict=True):
    assert (one["length"], one["halos"]) == (length, halos), case
    assert one["equal"], case


def test_halos_are_needed_and_all_that_is_exchanged():
  case = ["deep", 1, 36, 2, 1]
  less = [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]
  asked = [[*case, cut, not any(cut)] for cut in less]
  exact, *others = _in_devices(EXACT, json.dumps(asked))
  assert (exact["length"], exact["halos"]) == (18, [2, 3, 14])
  assert exact["equal"] and not any(one["equal"] for one in others)
  # Features (pieces, b, frames, y, x, c): two frames a latent, and then one.
  assert exact["collectives"] == [
    ["collective-permute", [3, 1, 2, 2, 2, 8]],
    ["collective-permute", [14, 1, 1, 1, 1, 8]],
  ]


SCRIPT = """
import json
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import numpy as np
from random_weights import random_vae

from longlive_jax.data.video import read_video
from longlive_jax.parallel import halo, mesh as meshes
from longlive_jax.train.latents import encode_frames

model, path = random_vae(), {path!r}
mesh = meshes.training_mesh(2, 2)
spans = halo.make_spans(model, latents=40, devices=2, frames_per_call=2)
asked = []


def read(rows, start, stop):
  asked.append((*rows, start, stop))
  frames = read_video(path, start=start, frames=stop - start)[0]
  return np.stack([frames if row == 0 else 255 - frames for row in rows])


frames = halo.spread_frames(read, spans, mesh, batch=2, height=16, width=16)
latents = halo.encode_spans(model, frames, spans, mesh)
clip = read_video(path)[0]
clips = np.stack([clip, 255 - clip])
whole = jax.jit(encode_frames, static_argnums=2)(model, clips, 2)
try:
  halo.encode_spans(model, frames[:, :, :, :15], spans, mesh)
except ValueError as error:
  refused = str(error)
print(json.dumps({{
  "asked": sorted(asked),
  "expected": [(row, *spans.video_frames(d)) for row in range(2) for d in range(2)],
  "shards": [shard.data.shape[:2] for shard in latents.addressable_shards],
  "shape": whole.shape,
  "equal": np.array_equal(np.asarray(latents)[:, :40], whole),
  "most": max(s.data.shape[1] for s in frames.addressable_shards),
  "clip": clips.shape[1],
  "refused": refused,
}}))
"""


def test_devices_read_and_encode_their_spans(tmp_path):
  path = tmp_path / "clip.mp4"
  rng = np.random.default_rng(0)
  with VideoWriter(path) as writer:
    writer.append(rng.integers(0, 256, (79, 16, 16, 3), np.uint8))
  assert len(read_video(path)[0]) == 79
  found = _in_devices(SCRIPT.format(path=str(path)))
  assert found["asked"] == found["expected"]
  assert found["shards"] == [[1, 20]] * 4 and found["shape"] == [2, 40, 4, 4, 8]
  assert found["equal"]
  assert found["most"] < found["clip"]
  assert found["refused"] == "width=15 must be a multiple of 4"


# Clips of 64 latent frames; of 2 processes each encodes a half of every one.
SHARED = """
import json
import sys

import jax

folder, distributed = sys.argv[1:]
if distributed:
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")

import numpy as np
from random_weights import fill

from flax import nnx
from longlive_jax.data.clip import Chunking
from longlive_jax.data.clips import clip_source
from longlive_jax.models import vae
from longlive_jax.parallel import mesh as meshes
from longlive_jax.train.latents import StreamedBatches, ViewSettings

meshes.initialize(distributed)
mesh = meshes.training_mesh(1, 4) if distributed else None
config = vae.VAEConfig(2, 2, 8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
network = fill(jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0))))


def tokenizer(prompts):
  ids = np.array([[len(prompt)] * 4 for prompt in prompts], np.int32)
  return ids, np.ones_like(ids)


source = clip_source(folder, height=16, width=16)
batches = StreamedBatches(
  source, network, tokenizer, 2, ViewSettings(window=32, plain=1.0),
  Chunking(2, chunks=32), seed=0, threads=1, mesh=mesh,
)
found = {"names": [], "latents": []}
for _ in range(2):
  batch = meshes.to_host(next(batches))
  found["names"].append(batches.clips)
  found["latents"].append(np.float64(batch["latents"]).tolist())
print(json.dumps({
  **found, "held": next(batches._clips)["frames"].shape[1],
  "skipped": list(source.skipped), "damaged": source.damaged
}))
"""


def test_a_process_reads_the_frames_of_its_spans(tmp_path):
  """One of the four clips cannot be read, and one has a hole in its second half."""
  rng = np.random.default_rng(0)
  for name in "abcd":
    (tmp_path / "caption" / name).mkdir(parents=True)
    (tmp_path / "caption" / name / "0.json").write_text('{"caption": "a clip"}')
    path = tmp_path / "videos" / f"{name}.mp4"
    path.parent.mkdir(exist_ok=True)
    with VideoWriter(path) as writer:
      writer.append(rng.integers(0, 256, (253, 24, 32, 3), np.uint8))
  (tmp_path / "videos" / "b.mp4").write_bytes(b"no video")
  spoil(tmp_path / "videos" / "c.mp4", 8)  # frames 192 to 215

  def start(distributed: str) -> subprocess.Popen:
    code = f"import sys\nsys.path[:0] = {[str(TESTS), str(TESTS.parent)]!r}\n{SHARED}"
    return subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path), distributed],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip

  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  found = []
  for process in [start(""), *(start(f"{address},{i},2") for i in (0, 1))]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    found.append(json.loads(out.splitlines()[-1]))
  one, *both = found
  assert {*one["names"][0], *one["names"][1]} == {*"acd"} and one["held"] == 253
  # Up to the end of the span of device 1, and from the halo of device 2 on.
  assert [process["held"] for process in both] == [125, 144]
  assert one["damaged"] == both[1]["damaged"] == {"c": 24} and not both[0]["damaged"]
  for process in both:
    assert process["names"] == one["names"] and process["skipped"] == ["b"]
    np.testing.assert_allclose(process["latents"], one["latents"], atol=1e-5)


@pytest.mark.parametrize("name", ["latents", "devices", "frames_per_call"])
def test_bad_counts(model, name):
  counts = {"latents": 8, "devices": 2, "frames_per_call": 1, name: 0}
  with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
    halo.make_spans(model, **counts)


def test_spans_for_another_mesh(model):
  spans = halo.make_spans(model, latents=8, devices=2)
  with pytest.raises(ValueError, match="for devices=2, but the mesh has 1 that share"):
    halo.spread_frames(lambda *_: None, spans, None, batch=1, height=4, width=4)


def test_a_device_alone_encodes_no_halo(model):
  spans = halo.make_spans(model, latents=6, devices=1, frames_per_call=2)
  assert spans.halos == (0,) and spans.padded_frames == 12
  clip = _clip(6)
  frames = halo.spread_frames(
    lambda rows, start, stop: clip[list(rows), start:stop], spans, None, batch=1,
    height=SIZE, width=SIZE,
  )  # fmt: skip
  latents = halo.encode_spans(model, frames, spans, None)
  np.testing.assert_array_equal(latents, _whole(model, clip, 2))
