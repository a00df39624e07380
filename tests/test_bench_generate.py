"""The benchmark of generation, at sizes for a CPU."""

import functools
import json

import bench_generate
import compile_for
import jax
import jax.numpy as jnp
import pytest

from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit


@pytest.mark.parametrize("only", ["latents_only", "memory_only"])
def test_figures_of_a_run(only, tmp_path):
  out = tmp_path / "figures.json"
  values = ["--chunks=5", "--steps=1", "--precision=w4a16", "--kv_format=nvfp4"]
  bench_generate._FLAGS(["bench", *values, f"--{only}", f"--out={out}"])
  bench_generate.main([])
  bench_generate._FLAGS.unparse_flags()
  figures = json.loads(out.read_text())
  assert figures["precision"] == "w4a16" and figures["kv_format"] == "nvfp4"
  assert figures["bytes_dit"]["nvfp4"] > 0
  if only == "latents_only":
    assert figures["dit_fps"] > 0 and figures["programs"]["denoise"] == 1
  else:
    assert "peak_bytes_after_5_chunks" in figures


def test_a_chunk_is_compiled_for_another_device(monkeypatch):
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("x",), axis_types=axes, devices=jax.devices("cpu")[:1])
  monkeypatch.setattr(compile_for, "described", lambda gpu: mesh)
  compiled = functools.partial(
    bench_generate.chunk_elsewhere, "b200", dit.size("test"), jnp.float32
  )
  plain = compiled("", Sampling(steps=2), 4, 4)
  packed = compiled("w4a16", Sampling(steps=2, kv_format="nvfp4"), 4, 4)
  assert packed["argument_bytes"] < plain["argument_bytes"]
  assert packed["custom_calls"]["native_fp4"] == 0
