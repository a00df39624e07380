"""The benchmark of generation, at sizes for a CPU."""

import dataclasses
import functools
import json

import bench_generate
import bench_networks
import bench_stages
import compile_for
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.checkpoint import store
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit, vae
from longlive_jax.parallel import costs, hardware

pytestmark = pytest.mark.usefixtures("quick_compiling")


def figures_of(tmp_path, *flags: str) -> dict:
  out = tmp_path / "figures.json"
  bench_generate._FLAGS(["bench", *flags, f"--out={out}"])
  bench_generate.main([])
  bench_generate._FLAGS.unparse_flags()
  return json.loads(out.read_text())


FEW = ("--chunks=5", "--steps=1", "--height=32", "--width=32")


def test_figures_of_a_run_with_its_decoder(tmp_path, capsys):
  trace = tmp_path / "trace"
  figures = figures_of(tmp_path, *FEW, f"--profile={trace}")
  assert figures["device"] and figures["versions"]["jax"]
  for kind in ("dit", "end_to_end"):
    ms = [figures[f"{kind}_chunk_ms_{name}"] for name in ("median", "p90", "p99")]
    assert 0 < ms[0] <= ms[1] <= ms[2]
    assert figures[f"{kind}_fps"] == pytest.approx(32e3 / ms[0])
    assert figures[f"{kind}_first_chunk_warm_s"] > 0
  assert figures["first_chunk_cold_s"] > figures["compile_s"] > 0
  assert figures["compilations"] >= 2
  assert figures["programs"] == {"denoise": 1, "remember": 0, "decode": 1}
  assert figures["programs_after_warm_up"] == 0
  assert figures["bytes"].keys() == {"transformer", "cache", "vae", "decoder_state"}
  program, stages = figures["denoise_program"], figures["stages"]
  assert program["temporary_bytes"] > 0
  assert program["aliased_bytes"] >= sum(figures["bytes"]["cache"].values())
  assert stages["vae"]["temporary_bytes"] > 0
  assert {"patch_embedding", "qkv", "norm_rope", "attention", "cross_attention", "ffn",
          "head", "cache_write", "vae"} < stages.keys()  # fmt: skip
  found = sum(row["chunk_ms"] for name, row in stages.items() if name != "vae")
  assert found + figures["other_ms"] == pytest.approx(figures["dit_chunk_ms_median"])
  assert figures["predicted"]["peak_bytes"] > sum(
    size for sizes in figures["bytes"].values() for size in sizes.values()
  )
  # The planner reads these rates; by their shares they give the measured chunk again.
  rates = hardware.measured_hardware(tmp_path / "figures.json")
  work = costs.Work(1, 8, 32, 1, 1, 2)
  seconds = sum(
    stage.calls * rates.floor(stage)
    for stage in costs.transformer_stages(dit.size("test"), work).values()
  )
  measured = figures["dit_chunk_ms_median"] / 1e3
  assert seconds / rates.denoise_share == pytest.approx(measured)
  assert [*trace.rglob("*.xplane.pb")]
  table = capsys.readouterr().out
  assert "other" in table and "predicted" in table and "norm_rope" in table


def test_peaks_of_a_run(tmp_path):
  packed = ("--precision=w4a16", "--kv_format=nvfp4")
  figures = figures_of(tmp_path, *FEW, *packed, "--memory_only", "--latents_only")
  assert figures["precision"] == "w4a16" and figures["bytes"]["cache"]["nvfp4"] > 0
  assert figures["bytes"]["transformer"]["nvfp4"] > 0
  assert "peak_bytes_after_5_chunks" in figures and "stages" not in figures


def test_layers_one_by_one_and_a_decoder_in_eight_bits(tmp_path):
  figures = figures_of(
    tmp_path, *FEW, "--precision=fp8", "--kv_format=e4m3", "--attention_format=fp8",
    "--unroll", "--vae_precision=fp8", "--memory_only",
  )  # fmt: skip
  assert figures["unroll"] and figures["vae_precision"] == "fp8"
  for part in ("transformer", "cache", "vae", "decoder_state"):
    assert figures["bytes"][part]["float8_e4m3fn"] > 0


def test_too_few_chunks(tmp_path):
  with pytest.raises(ValueError, match="chunks=4 must be more than the 4 that fill"):
    figures_of(tmp_path, "--chunks=4")
  bench_generate._FLAGS.unparse_flags()


@pytest.mark.parametrize("kv_format", ["", "nvfp4"])
def test_stages_are_those_of_the_cost_model(kv_format):
  """The same names; and their bytes are what goes in and comes out, once."""
  config = dataclasses.replace(dit.size("test"), dim=128, ffn_dim=256)
  model = store.abstract_network("dit", config, jnp.bfloat16)
  sampling = Sampling(kv_format=kv_format)
  inputs = jax.eval_shape(
    lambda model: bench_stages.stage_inputs(model, sampling, 16, 16), model
  )
  cases = {c.name: c for c in bench_stages.transformer_cases(model, inputs)}
  work = costs.Work(1, 8, 32, 64, 4, 2, "", kv_format)
  stages = costs.transformer_stages(config, work)
  assert cases.keys() == stages.keys()
  for name in ("cache_read", "attention"):
    case = cases[name]
    arrays = jax.tree.leaves(case.arguments)
    arrays += jax.tree.leaves(jax.eval_shape(case.function, *case.arguments))
    moved = sum(a.size * a.dtype.itemsize for a in arrays)
    assert stages[name].bytes == pytest.approx(moved, rel=0.2), name


def test_carried_arguments_are_handed_on():
  """A state is given back to the next call, and the caller's stays."""
  state = jnp.zeros(3)
  case = bench_stages.Case(
    "vae", lambda state, step: (state + step, state), (state, jnp.ones(3)), True
  )
  assert bench_stages.timed(case, rounds=2, budget=0.0).seconds > 0
  np.testing.assert_array_equal(state, 0)
  video_vae = store.abstract_network("vae", vae.VAE_SIZES["test"])
  decode = bench_stages.decode_case(video_vae, 2, 4, 4)
  state, frames = jax.eval_shape(decode.function, *decode.arguments)
  assert frames.shape == (1, 8, 64, 64, 3) and frames.dtype == jnp.uint8
  assert isinstance(state, vae.DecoderState)


def test_a_chunk_is_compiled_for_another_device(monkeypatch):
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("x",), axis_types=axes, devices=jax.devices("cpu")[:1])
  monkeypatch.setattr(compile_for, "described", lambda gpu: mesh)
  compiled = functools.partial(
    bench_networks.chunk_elsewhere, "b200", dit.size("test"), jnp.float32
  )
  plain = compiled("", Sampling(steps=2), 4, 4)
  packed = compiled("w4a16", Sampling(steps=2, kv_format="nvfp4"), 4, 4)
  assert packed["argument_bytes"] < plain["argument_bytes"]
  assert packed["custom_calls"]["native_fp4"] == 0
