"""Clips encoded by parts: the latents of the whole, and no more video than needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from random_weights import TINY_VAE, fill, random_vae

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


_encode = jax.jit(vae.encode, static_argnums=2)
_encode_span = jax.jit(halo.encode_span, static_argnums=3)


def _parts(model, clip, spans):
  parts = []
  for device in range(spans.devices):
    start, stop = spans.video_frames(device)
    frames = spans.pad(clip[:, start:stop], device)
    parts.append(_encode_span(model, frames, device * spans.length, spans))
  return np.concatenate(parts, axis=1)[:, : spans.latents]


@pytest.mark.parametrize(("size", "latents"), [("wan2.2", 28), ("toy", 28)])
def test_halo_of_published_networks(size, latents):
  config = vae.VAE_SIZES[size]
  model = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  assert halo.halo_latents(model) == latents


@pytest.mark.parametrize("config", [TINY_VAE, vae.VAE_SIZES["test"]], ids=str)
def test_a_latent_depends_on_its_halo_and_on_nothing_before(config):
  model = fill(jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0))))
  reach, factor = halo.halo_latents(model), config.temporal_factor
  side, last = config.spatial_factor, reach + 2

  def last_latent(spoilt: int) -> np.ndarray:
    """The last latent of a clip with one latent's frames not a number."""
    clip = np.zeros((1, factor * last + 1, side, side, 3), np.float32)
    clip[:, factor * (spoilt - 1) + 1 : factor * spoilt + 1] = np.nan
    return np.asarray(_encode(model, clip, 1))[:, last]

  # A number would shrink below float32's precision on the way. This one cannot.
  assert np.isnan(last_latent(last - reach)).all()
  assert np.isfinite(last_latent(last - reach - 1)).all()


@pytest.mark.parametrize(
  ("latents", "devices", "per_call"),
  [(24, 1, 1), (24, 2, 4), (30, 4, 2), (13, 3, 4), (5, 4, 2)],
)
def test_parts_equal_the_whole(model, latents, devices, per_call):
  spans = halo.make_spans(
    model, latents=latents, devices=devices, frames_per_call=per_call
  )
  assert spans.length * devices >= latents and spans.halo % per_call == 0
  clip = _clip(latents, seed=latents)
  want = _whole(model, clip, per_call)
  np.testing.assert_array_equal(_parts(model, clip, spans), want)


def test_only_the_span_and_its_halo_are_read():
  spans = halo.Spans(
    latents=96, devices=4, length=24, halo=28, frames_per_call=4, factor=4
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
    latents=5, devices=4, length=2, halo=2, frames_per_call=2, factor=4
  )
  assert spans.video_frames(2) == (5, 17) and spans.video_frames(3) == (13, 17)
  spans = halo.Spans(
    latents=2, devices=4, length=1, halo=1, frames_per_call=1, factor=4
  )
  assert spans.video_frames(3) == (5, 5)
  assert spans.pad(np.ones((1, 0, 2, 2, 3), np.uint8), 3).shape == (1, 8, 2, 2, 3)


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
  paths = [str(TESTS), str(TESTS.parent)]
  code = SCRIPT.format(path=str(path))
  result = subprocess.run(
    [sys.executable, "-c", f"import sys\nsys.path[:0] = {paths!r}\n{code}"],
    capture_output=True, text=True, check=False,
    # Without conftest's flag, whose code rounds a span otherwise than a whole clip.
    env={**os.environ, "XLA_FLAGS": ""},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr[-3000:]
  found = json.loads(result.stdout.splitlines()[-1])
  assert found["asked"] == found["expected"]
  assert found["shards"] == [[1, 20]] * 4 and found["shape"] == [2, 40, 4, 4, 8]
  assert found["equal"]
  assert found["most"] < found["clip"]
  assert found["refused"] == "width=15 must be a multiple of 4"


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
  assert spans.halo == 0 and spans.padded_frames == 12
  clip = _clip(6)
  frames = halo.spread_frames(
    lambda rows, start, stop: clip[list(rows), start:stop], spans, None, batch=1,
    height=SIZE, width=SIZE,
  )  # fmt: skip
  latents = halo.encode_spans(model, frames, spans, None)
  np.testing.assert_array_equal(latents, _whole(model, clip, 2))
