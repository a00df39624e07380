"""Training on several devices gives the numbers of one, in every layout."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import (  # noqa: F401
  folder,
  losses,
  make_config,
  random_network,
  script,
)

from longlive_jax.checkpoint import store
from longlive_jax.layers import remat
from longlive_jax.models import vae
from longlive_jax.parallel import balanced
from longlive_jax.parallel import mesh as meshes
from longlive_jax.train import accumulate

ROOT = Path(__file__).parent.parent

# The number of CPU devices is fixed when JAX starts: processes of their own.
SETUP = """
import dataclasses
import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_default_matmul_precision", "highest")

from longlive_jax.models import dit

dit.SIZES["test8"] = dataclasses.replace(dit.SIZES["test"], heads=8, layers=3)
"""

PARTS = """
jax.config.update("jax_num_cpu_devices", 8)

import functools

import jax.numpy as jnp
import numpy as np
from random_weights import normal, random_dit

from longlive_jax.parallel import balanced, mesh as meshes

B, F, N = 2, 16, 2
model = random_dit("test8")
clean, noise = normal(B, F, 2, 4, 8), normal(B, F, 2, 4, 8, seed=1)
times = np.random.default_rng(0).uniform(0, 1000, (B, F))
features = dit.time_features(times, model.config.freq_dim)
text = normal(B, F // N, 5, model.config.text_dim)
valid = np.array([10, 16], np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def loss_and_gradients(model, mesh, layout, remat):
  def loss(model):
    velocity = balanced.train_forward(
      model, noise, features, text, mesh=mesh, frames_per_chunk=N, clean=clean,
      clean_time=features[::-1], valid_frames=valid, layout=layout, remat=remat,
    )
    error = jnp.square(velocity - noise).mean((2, 3, 4))
    return jnp.sum(error * (np.arange(F) < valid[:, None])) / valid.sum()

  return jax.value_and_grad(loss)(model)


def spread(mesh):
  return meshes.spread(model, meshes.last_axis_specs(model, mesh), mesh)


def worst(found, want):
  return max(
    float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
  )


def causal(mesh):
  forward = functools.partial(balanced.train_forward, mesh=mesh, frames_per_chunk=N)
  return jax.jit(forward)(spread(mesh), noise, features, text[:, :1])


one = loss_and_gradients(model, None, "balanced", "none")
found = {"errors": {}}
for data, sequence, layout, remat in (
  (1, 2, "balanced", "none"), (2, 2, "plain", "attention"),
  (1, 8, "plain", "none"), (2, 4, "balanced", "blocks"),
):
  mesh = meshes.training_mesh(data, sequence)
  inputs = spread(mesh)
  program = loss_and_gradients.lower(inputs, mesh, layout, remat).compile()
  found["errors"][f"{data} x {sequence} {layout}"] = worst(program(inputs), one)
found["program"] = program.as_text()
found["causal"] = worst(causal(meshes.training_mesh(1, 4)), causal(None))
print(json.dumps(found))
"""

# Runs the script on so many devices; with a third argument as one of two processes.
RUN = """
folder, workdir, devices, sequence, distributed = sys.argv[1:]
if distributed:
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")

from pathlib import Path

from test_train import make_config, script

from longlive_jax.parallel import mesh as meshes

meshes.initialize(distributed)
changes = {
  "size": "test8", "train_text": "frozen", "steps": 2, "accumulate": 2,
  "checkpoint_every": 1, "export_dtype": "float32", "optimizer.warmup": 1,
  "ema_start": 1,
  "recycle.buckets": 4, "recycle.capacity": 4,
  "devices": int(devices), "sequence_devices": int(sequence),
  "data.encode_once": False, "vae_weights": folder + "/small_vae",
}
script.train(make_config(Path(folder), workdir, **changes))
print(json.dumps({"devices": jax.device_count()}))
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
  paths = [str(ROOT / "tests"), str(ROOT / "tools"), str(ROOT)]
  code = f"import sys\nsys.path[:0] = {paths!r}\n{SETUP}\n{code}"
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip


def result(process: subprocess.Popen) -> dict:
  out, error = process.communicate(timeout=600)
  assert process.returncode == 0, error[-3000:]
  return json.loads(out.splitlines()[-1])


# ------------------------------------------------------------------ the forward
@pytest.fixture(scope="module")
def parts() -> dict:
  return result(start(PARTS))


def test_loss_and_gradients_of_one_device(parts):
  """With a prompt for each chunk, padding, and clean frames at times of their own."""
  assert len(parts["errors"]) == 4
  assert max(parts["errors"].values()) < 1e-5, parts["errors"]


def test_without_teacher_forcing_and_with_one_prompt(parts):
  assert parts["causal"] < 1e-5


def test_no_device_holds_the_weights_of_all_blocks(parts):
  """A feed-forward weight is (96, 64) in 3 blocks, here split over 8 devices."""
  shapes = set(re.findall(r"f32\[[\d,]+\]", parts["program"]))
  assert {"f32[3,96,8]", "f32[96,64]"} <= shapes
  assert not {"f32[3,96,64]", "f32[3,64,96]"} & shapes


# ------------------------------------------------------------------ the script
def test_a_run_on_other_devices_and_processes(folder, tmp_path):  # noqa: F811
  """Two processes with four devices each, as 2 x 4; from step 1 again on one device.

  Each process reads samples of its own, and a device encodes a span of them.
  """
  config = vae.VAEConfig(2, 2, 8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
  store.save_network(folder / "small_vae", random_network("vae", config, 0))
  many, one = tmp_path / "many", tmp_path / "one"
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  both = [start(RUN, folder, many, 2, 4, f"{address},{i},2") for i in (0, 1)]
  assert [result(process)["devices"] for process in both] == [8, 8]
  shutil.copytree(many, one)
  for name in ("checkpoints/2", "model"):
    shutil.rmtree(one / name)
  result(start(RUN, folder, one, 1, 1, ""))

  want, found = losses(one), losses(many)
  assert list(want) == list(found) == [1, 2]
  for step, loss in want.items():
    np.testing.assert_allclose(found[step], loss, rtol=1e-5)
  want, found = (store.load(path / "checkpoints" / "2") for path in (one, many))
  assert want.keys() == found.keys() and want["errors.filled"].sum() > 4
  for name, value in want.items():
    # Adam divides by the root of a square: tiny gradients make large differences.
    atol = 1e-3 * np.abs(value).max()
    np.testing.assert_allclose(found[name], value, atol=atol, err_msg=name)
  # The frozen encoder is no part of the state, and leaves as it came.
  assert not any(".text." in name for name in want)
  want, got = (store.load(path / "model" / "text") for path in (one, many))
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  exported = store.load(many / "model" / "dit")
  np.testing.assert_array_equal(
    exported["blocks.ffn.fc1.weight"], found["ema.dit.blocks.ffn.fc1.weight"]
  )


# ------------------------------------------------------------------ accumulation
def test_parts_of_a_batch_add_up_to_all_of_it():
  """Parts with few frames that count weigh less; errors go from part to part."""

  def loss_fn(scale, batch, key, errors):
    error = jnp.square(scale * batch["latents"] - 1)
    loss = jnp.sum(error * batch["mask"]) / jnp.sum(batch["mask"])
    return loss, ({"twice": 2 * loss}, errors + jnp.sum(batch["mask"]))

  rng = np.random.default_rng(0)
  batch = {"latents": rng.normal(size=(6, 4)), "mask": rng.integers(0, 2, (6, 4))}
  batch["mask"][:, 0] = 1
  whole = accumulate.value_and_grad(loss_fn, 1)
  (want, _), gradient = whole(0.7, batch, None, 0.0)
  for parts in (2, 3, 6):
    run = accumulate.value_and_grad(loss_fn, parts)
    key = np.zeros(2, np.uint32)
    (loss, (metrics, errors)), found = run(jnp.float32(0.7), batch, key, 0.0)
    np.testing.assert_allclose([loss, metrics["twice"] / 2], want, rtol=1e-6)
    np.testing.assert_allclose(found, gradient, rtol=1e-6)
    assert errors == batch["mask"].sum()


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(frames=40), "frames=40 .*=4 x frames_per_chunk=8 = 32; use 32 or 64 frames"),
    (dict(frames=8), "frames=8 .* use 32 frames"),
    (dict(devices=5), r"sequence_devices=5 must divide the 24 .* \[1, 2, 3, 4, 6, 8, "),
    (dict(devices=0), "sequence_devices=0 must divide the 24 heads"),
    (dict(layout="even"), "sp_layout='even' is unknown; use balanced or plain"),
  ],
)
def test_clips_that_devices_cannot_share(change, message):
  good = dict(frames=64, frames_per_chunk=8, heads=24, devices=4, layout="plain")
  balanced.check(**good)
  with pytest.raises(ValueError, match=message):
    balanced.check(**{**good, **change})


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (1000, 2)])
def test_devices_that_do_not_exist(shape):
  assert meshes.training_mesh(1, 1) is None
  with pytest.raises(ValueError, match=f"devices={shape[0]} x .*={shape[1]} are"):
    meshes.training_mesh(*shape)


def test_settings_that_are_refused_before_anything_is_read(tmp_path):
  cases = {
    ("sequence_devices", 4): "sequence_devices=4 must divide the 2 heads",
    ("sp_layout", "even"): "sp_layout='even'",
    ("devices", 3): "batch_size=4 must be a multiple of devices=3 x accumulate=1",
    ("accumulate", 3): "batch_size=4 .* accumulate=3",
    ("accumulate", 0): "accumulate=0 must be at least 1",
    ("remat", "all"): "remat='all' is unknown; use none, blocks, attention",
  }
  for (field, value), message in cases.items():
    with pytest.raises(ValueError, match=message):
      script.check(make_config(tmp_path, tmp_path, **{field: value}))
  with pytest.raises(ValueError, match="remat='some'"):
    remat.rematerialised(len, "some")
