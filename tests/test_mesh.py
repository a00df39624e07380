"""Several devices give the video of one, and what does not fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.parallel import mesh as meshes

TESTS = Path(__file__).parent

# The number of CPU devices is fixed when JAX starts: a process of its own.
SCRIPT = """
import json
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)

import numpy as np
from random_weights import normal, random_dit, random_vae

from longlive_jax.generate import stream as streaming
from longlive_jax.generate.sampler import Sampling
from longlive_jax.parallel import mesh as meshes

model, video_vae = random_dit(), random_vae()
sampling = Sampling(
  frames_per_chunk=2, window_frames=6, sink_frames=2, steps=2, guidance=2.0
)
rng = np.random.default_rng(0)
cut = rng.random((4, 4)) < 0.4
cut[0] = False
story = streaming.Story(
  embeddings=normal(4, 5, model.config.text_dim),
  negative=normal(5, model.config.text_dim, seed=1),
  prompt_index=rng.integers(0, 4, (4, 4)).astype(np.int32),
  cut=cut,
  shot=np.cumsum(cut, axis=0).astype(np.int32),
)


def video(devices):
  mesh = meshes.generation_mesh(devices)
  networks = meshes.replicate((model, video_vae), mesh)
  state = streaming.init_state(
    model, video_vae, sampling, key=jax.random.key(0), samples=range(4), y=2, x=2
  )
  state = streaming.shard_state(state, mesh)
  latents, frames = [], []
  for chunk in streaming.stream(*networks, state, story, sampling, mesh=mesh):
    assert len(chunk.latents.sharding.device_set) == devices
    latents.append(np.asarray(chunk.latents))
    frames.append(chunk.frames)
  return np.concatenate(latents, 1), np.concatenate(frames, 1)


def refusal(work):
  try:
    work()
  except ValueError as error:
    return str(error)


one, four = video(1), video(4)
mesh = meshes.generation_mesh(4)
print(json.dumps({
  "devices": jax.device_count(),
  "shape": one[1].shape,
  "latents": float(np.abs(one[0] - four[0]).max()),
  "frames": np.bincount(np.abs(one[1].astype(int) - four[1]).ravel()).tolist(),
  "std": float(one[1].std()),
  "programs": streaming.compiled_programs(),
  "batch": refusal(lambda: meshes.shard_batch(np.zeros((6, 4)), mesh)),
  "axis": refusal(lambda: meshes.shard_batch(np.zeros((4, 6)), mesh, axis=1)),
  "shards": [s.data.shape for s in
             meshes.shard_batch(np.zeros((3, 8)), mesh, axis=1).addressable_shards],
  "copies": [s.data.shape for s in
             meshes.replicate(np.zeros((3, 8)), mesh).addressable_shards],
}))
"""


@pytest.fixture(scope="module")
def found() -> dict:
  path = [str(TESTS), str(TESTS.parent)]
  code = f"import sys\nsys.path[:0] = {path!r}\n{SCRIPT}"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


def test_four_devices_give_the_video_of_one(found):
  assert found["devices"] == 4
  assert found["shape"] == [4, 15, 8, 8, 3] and found["std"] > 20
  assert found["latents"] < 1e-5
  # Number of bytes by difference: a value at .5 may round to either side, no more.
  same, *others = found["frames"]
  assert same > 11_500 and sum(others) <= 5 and len(others) <= 1


def test_one_program_for_each_mesh(found):
  assert found["programs"] == {"denoise": 2, "remember": 0, "decode": 2}


def test_where_arrays_go(found):
  assert found["shards"] == [[3, 2]] * 4
  assert found["copies"] == [[3, 8]] * 4


def test_batches_that_do_not_divide(found):
  message = "batch=6 must be a multiple of devices=4"
  assert found["batch"] == message and found["axis"] == message


@pytest.mark.parametrize("devices", [0, 1000])
def test_devices_that_do_not_exist(devices):
  with pytest.raises(ValueError, match=f"devices={devices} x .* must be between 1"):
    meshes.generation_mesh(devices)


def test_a_single_device_needs_no_mesh():
  assert meshes.generation_mesh(1) is None
  tree = {"a": np.arange(6).reshape(3, 2)}
  assert meshes.shard_batch(tree, None) is meshes.replicate(tree, None) is tree


@pytest.mark.parametrize("spec", ["10.0.0.1:1234", "10.0.0.1:1234,0,two", "yes"])
def test_processes_that_are_described_wrongly(spec):
  with pytest.raises(ValueError, match=r"distributed=.* must be 'auto' or HOST:PORT"):
    meshes.initialize(spec)


def test_a_loop_asks_other_processes_only_when_it_says_so(monkeypatch):
  assert meshes.any_process(True, ask=False)  # alone
  asked = []
  monkeypatch.setattr(meshes.jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    meshes.multihost_utils, "process_allgather", lambda flag: asked.append(1) or flag
  )
  assert not meshes.any_process(True, ask=False) and not asked
  assert meshes.any_process(True) and asked == [1]
