"""A video on several devices, or in two processes, is the video of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from longlive_jax.generate import on_mesh
from longlive_jax.generate.sampler import Sampling

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "check_parallel.py"
PATHS = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

# The number of CPU devices is fixed when JAX starts: processes of their own.
PARTS = """
import check_parallel as tool
tool.use_fake_devices(8)

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from packed_weights import same
from random_weights import normal

from longlive_jax.layers import kv_slots
from longlive_jax.layers.linear import matmul
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.sequence import SINGLE, Layout
from longlive_jax.quant import nvfp4, weights

P = jax.P
B, F, TOKENS, HEADS, D = 2, 3, 10, 24, 32
found = {"exchange": [], "encode": {}, "product": {}}


def over(mesh, function, in_specs, out_specs):
  return jax.jit(jax.shard_map(
    function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  ))


# ------------------------------------------------------------------ tokens and heads
def by_device(x, devices):
  # (b, f * p, ...) -> (devices, b, f * p / devices, ...), the last token repeated
  x = np.asarray(x).reshape(B, F, TOKENS, *x.shape[2:])
  own = -(-TOKENS // devices)
  fill = [(0, 0), (0, 0), (0, own * devices - TOKENS)] + [(0, 0)] * (x.ndim - 3)
  x = np.pad(x, fill, mode="edge").reshape(B, F, devices, own, *x.shape[3:])
  return np.moveaxis(x, 2, 0).reshape(devices, B, F * own, *x.shape[4:])


def attend(layer, q, k, v):
  return q + jnp.cumsum(k, axis=1) * v, (k, v)  # tokens matter, and their order


q, k, v = (normal(B, F * TOKENS, HEADS, D, seed=i) for i in range(3))
k = k + 3  # keys have a common offset
for devices in (3, 8):
  mesh, layout = meshes.generation_mesh(1, 1, devices), Layout(devices)
  latents = normal(B, F, 4, 2 * TOKENS // 2, 5)
  back = over(mesh, lambda a: layout.join(layout.split(a, 2), 2, 4, 10), P(), P())
  own = over(mesh, lambda a: layout.split(a, 2), P(), P("seq"))(latents)
  for format in ("", "fp8", "nvfp4"):
    def run(layout, q, k, v):
      return layout.exchanged(attend, F, TOKENS, format)(None, q, k, v)

    def part(q, k, v):
      out, kept = run(layout, q[0], k[0], v[0])
      return out[None], kept

    out, kept = over(mesh, part, P("seq"), (P("seq"), P(None, None, "seq")))(
      *(by_device(a, devices) for a in (q, k, v))
    )
    want, want_kept = jax.jit(functools.partial(run, SINGLE))(q, k, v)
    found["exchange"].append({
      "devices": devices, "format": format,
      "split": list(own.shape), "joined": same(back(latents), latents),
      "out": float(np.abs(out - by_device(want, devices)).max() / np.abs(want).max()),
      "kept": [float(np.mean(np.abs(a - b) > 1e-5))
               for a, b in zip(kept, want_kept, strict=True)],
      "loss": [float(np.sqrt(np.mean((a - b) ** 2)))
               for a, b in zip(kept, (k, v), strict=True)],
    })

# ------------------------------------------------------------------ what is shared
mesh = meshes.generation_mesh(2, 1, 4)
x = normal(B, F, TOKENS, HEADS, D) * np.linspace(1, 9, HEADS)[:, None]
x = x.astype(np.float32)
for name, format in {
  "fp8": kv_slots.KVFormat("fp8"),
  "token_mean": kv_slots.KVFormat("nvfp4"),
  "chunk_amax": kv_slots.KVFormat("nvfp4", "none", chunk_amax=True),
}.items():
  slots = kv_slots.zeros(format, (1, B, F, TOKENS, HEADS, D), jnp.float32, keys=True)
  layer = jax.tree.map(lambda leaf: leaf[0], slots)

  def encode(x, axes=()):
    return jax.tree.map(lambda leaf: leaf[None], kv_slots.encode(layer, x, axes))

  parts = over(
    mesh, lambda x: encode(x, ("seq",)), P("data", None, None, "seq"),
    kv_slots.specs(slots, "data", "seq"),
  )(x)
  found["encode"][name] = same(parts, jax.jit(encode)(x))

packed = nvfp4.quantise(normal(16, 32))
x = normal(4, 8, 32) * np.linspace(1, 9, 8)[:, None].astype(np.float32)
x = x * np.array([1, 3, 1, 5], np.float32)[:, None, None]
for per_sample in (True, False):
  weight = weights.W4A4(packed, "mse", per_sample=per_sample)
  spread = weights.spread({"a": weight}, ("seq",), ("data", "branch"))["a"]
  want = matmul(x, weight)
  of = lambda weight: over(
    mesh, lambda x: matmul(x, weight), P("data", "seq"), P("data", "seq"))(x)
  found["product"][str(per_sample)] = [
    float(np.abs(of(w) - want).max() / np.abs(want).max()) for w in (spread, weight)
  ]
print(json.dumps(found))
"""

STREAMS = """
import check_parallel as tool
tool.use_fake_devices(8)

import dataclasses
import json
import tempfile

import jax
import numpy as np
from packed_weights import quantise

from longlive_jax.checkpoint import store
from longlive_jax.generate import snapshots
from longlive_jax.generate.step_models import StepModels
from longlive_jax.parallel import mesh as meshes

streams, found = tool.streams, {}
# Begins with a given latent, then chunks of two.
plain = dataclasses.replace(
  tool.sampling_of({"guidance": "off", "relative_rope": False, "kv_format": ""}),
  independent_first_frame=True,
)
given = tool.random_latents(1, 1)


def video(mesh, sampling, batch=1, model=None, state=None, story=None, **options):
  model = tool.transformer() if model is None else model
  story = story or tool.story_of(batch)
  state = tool.new_state(sampling, batch, mesh) if state is None else state
  chunks = streams.stream(
    meshes.replicate(model, mesh), None, state, story, sampling, mesh=mesh, **options
  )
  return np.concatenate([np.asarray(chunk.latents) for chunk in chunks], axis=1)


def difference(mesh, *args, **options):
  wanted = video(None, *args, **options)
  return tool.difference(video(mesh, *args, **options), wanted)


# ------------------------------------------------------------------ from 4 to 1 to 2
def stop_after(chunks, folder):
  def save(done, state):
    if done == chunks:
      snapshots.save(folder, done, state, {})

  return save


def loaded(folder, mesh):
  like = jax.eval_shape(lambda: tool.new_state(plain, 1, None))
  return store.load(snapshots.find(folder), streams.shard_state(like, mesh))


def first(chunks):
  story = tool.story_of(1)
  return dataclasses.replace(story, prompt_index=story.prompt_index[:chunks],
                             cut=story.cut[:chunks], shot=story.shot[:chunks])


four, two = meshes.generation_mesh(1, 1, 4), meshes.generation_mesh(1, 1, 2)
with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
  start = tool.new_state(plain, 1, four)
  found["shards"] = sorted({s.data.shape for s in start.cache.k.addressable_shards})
  whole = video(four, plain, state=start, given=given, on_state=stop_after(1, a))
  found["donated"] = start.cache.k.is_deleted()
  second = video(None, plain, state=loaded(a, None), story=first(2),
                 on_state=stop_after(2, b))
  rest = video(two, plain, state=loaded(b, two))
found["moved"] = [tool.difference(second, whole[:, 3:5]),
                  tool.difference(rest, whole[:, 5:])]
found["given"] = tool.difference(whole, video(None, plain, given=given))
found["programs"] = streams.compiled_programs()

# ------------------------------------------------------------------ all together
sampling = dataclasses.replace(
  plain, guidance=2.0, relative_rope=True, kv_format="nvfp4", exchange_format="nvfp4"
)
packed = quantise(tool.transformer(), "w4a4")
found["all"] = difference(
  meshes.generation_mesh(2, 2, 2), sampling, 2,
  StepModels((tool.transformer(), packed), (0, 1, 1)), image=tool.random_latents(2, 1),
)
print(json.dumps(found))
"""

PROCESS = """
import json
import sys

import jax

import check_parallel as tool
tool.use_fake_devices(1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")

import numpy as np
from random_weights import normal, random_dit, random_vae

from longlive_jax.generate import stream as streams
from longlive_jax.generate.sampler import Sampling
from longlive_jax.parallel import mesh as meshes

meshes.initialize(sys.argv[1])
model, video_vae = random_dit(), random_vae()
sampling = Sampling(frames_per_chunk=2, window_frames=6, sink_frames=2, steps=2)
story = streams.Story(
  embeddings=normal(2, 5, model.config.text_dim), negative=None,
  prompt_index=np.array([[0, 1], [1, 0], [1, 1]]), cut=np.zeros((3, 2), bool),
  shot=np.zeros((3, 2), int),
)


def video(mesh):
  state = streams.init_state(
    model, video_vae, sampling, key=jax.random.key(0), samples=range(2), y=2, x=2
  )
  chunks = list(streams.stream(
    *meshes.replicate((model, video_vae), mesh), streams.shard_state(state, mesh),
    story, sampling, mesh=mesh, should_stop=lambda: meshes.any_process(False),
  ))
  return (np.concatenate([meshes.to_host(c.latents) for c in chunks], 1),
          np.concatenate([c.frames for c in chunks], 1))


want, found = video(None), video(meshes.generation_mesh(1, 1, 2))
apart = meshes.shard_batch(np.arange(4), meshes.generation_mesh(2))
print(json.dumps({
  "devices": [len(jax.local_devices()), jax.device_count()],
  "latents": tool.difference(found[0], want[0]),
  "pixels": int(np.abs(found[1].astype(int) - want[1]).max()),
  "apart": [len(apart.addressable_shards), meshes.to_host(apart).tolist()],
  "stop": meshes.any_process(jax.process_index() == 1),
}))
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
  code = f"import sys\nsys.path[:0] = {PATHS!r}\n{code}"
  return subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(process: subprocess.Popen) -> dict:
  out, error = process.communicate(timeout=600)
  assert process.returncode == 0, error[-3000:]
  return json.loads(out.splitlines()[-1])


# ------------------------------------------------------------------ parts
@pytest.fixture(scope="module")
def parts() -> dict:
  return result(start(PARTS))


def test_tokens_become_heads_and_back(parts):
  assert [(e["devices"], e["format"]) for e in parts["exchange"]] == [
    (n, format) for n in (3, 8) for format in ("", "fp8", "nvfp4")
  ]
  for exchange in parts["exchange"]:
    own = -(-10 // exchange["devices"])
    assert exchange["split"] == [2 * exchange["devices"], 3, 2, 2 * own, 5]
    assert exchange["joined"] and exchange["out"] < 1e-5


def test_what_travels_in_fewer_bits_is_what_one_device_would_make_of_it(parts):
  for exchange in parts["exchange"]:
    keys, values = exchange["kept"]
    assert values == 0 and keys < 1e-3  # a code may flip: their mean is another sum
    low, high = {"": (0, 1e-9), "fp8": (0.01, 0.1), "nvfp4": (0.05, 0.12)}[
      exchange["format"]
    ]
    assert all(low <= loss <= high for loss in exchange["loss"])


def test_a_frame_of_the_cache_has_one_scale_over_all_devices(parts):
  assert parts["encode"] == {"fp8": True, "token_mean": True, "chunk_amax": True}


def test_activations_have_one_scale_over_all_devices(parts):
  for spread, unspread in parts["product"].values():
    assert spread < 1e-6 < 1e-2 < unspread


# ------------------------------------------------------------------ videos
def test_every_two_settings_together_give_the_video_of_one_device(tmp_path):
  path = tmp_path / "report.json"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, str(TOOL), "--pairs", "--processes=2", "--output", str(path)],
    capture_output=True, text=True, check=False, env=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  report = json.loads(path.read_text())
  assert report["failed"] == 0 and 15 <= report["cases"] <= 20
  assert {row["sequence_devices"] for row in report["rows"]} == {2, 3, 4, 6, 8}
  assert report["worst_error"]["plain"] < 1e-5


@pytest.fixture(scope="module")
def videos() -> dict:
  return result(start(STREAMS))


def test_a_saved_state_goes_on_with_other_numbers_of_devices(videos):
  assert max(videos["moved"]) < 1e-5


def test_the_cache_is_split_by_heads_and_written_in_place(videos):
  assert videos["shards"] == [[2, 1, 6, 6, 6, 16]] and videos["donated"]


def test_one_program_for_each_number_of_devices(videos):
  assert videos["programs"] == {"denoise": 3, "remember": 2, "decode": 0}


def test_all_at_once_over_three_axes(videos):
  """Videos, guidance and tokens apart; 4-bit products in some steps; 4-bit cache and
  exchange; relative RoPE; an image."""
  assert videos["all"] < 5e-2


def test_given_latents_and_a_single_first_frame(videos):
  assert videos["given"] < 1e-5


def test_two_processes_give_the_video_of_one():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  for found in map(result, [start(PROCESS, f"{address},{i},2") for i in (0, 1)]):
    assert found["devices"] == [1, 2]
    assert found["latents"] < 1e-5 and found["pixels"] <= 1
    assert found["apart"] == [1, [0, 1, 2, 3]]  # a half each, but whole where asked for
    assert found["stop"]


# ------------------------------------------------------------------ bad input
GOOD = dict(
  devices=1, guidance_devices=1, sequence_devices=1, batch=4, heads=24, guidance=2.0
)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(devices=3), "devices=3 must divide the 4 videos"),
    (dict(devices=0), "devices=0 must divide the 4 videos"),
    (dict(guidance_devices=3), "guidance_devices=3 must be 1 or 2"),
    (dict(guidance_devices=2, guidance=1.0), "guidance_devices=2 needs guidance, but"),
    (dict(sequence_devices=5), r"=5 must divide the 24 .* \[1, 2, 3, 4, 6, 8, 12, "),
    (dict(sequence_devices=0), "sequence_devices=0 must divide the 24 heads"),
    (dict(devices=2, sequence_devices=24), "sequence_devices=24 are 48; must be .* 1 "),
  ],
)
def test_numbers_of_devices_that_cannot_be(change, message):
  assert on_mesh.mesh_for(**GOOD) is None
  with pytest.raises(ValueError, match=message):
    on_mesh.mesh_for(**{**GOOD, **change})


def test_an_unknown_exchange_format():
  with pytest.raises(ValueError, match="exchange_format='fp4' is unknown; use"):
    Sampling(exchange_format="fp4")
