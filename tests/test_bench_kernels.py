"""The kernels' benchmark at tiny shapes, and what it reads out of compiled programs."""

import re
import zlib

import bench_kernels
import clip_cases
import compile_for
import fp8_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.kernels.shapes import SIZES


def test_figures_of_a_tiny_run():
  tiny = SIZES["test"]
  figures = list(
    bench_kernels.measure(bench_kernels.cases(tiny, "jnp"), 1, ["modulate"])
  )
  kernels = [figure["kernel"] for figure in figures]
  assert kernels == ["modulate_quantise", "modulate_quantise", "copy"]
  frames, tokens, dim = tiny.activations
  x, rows = frames * tokens * dim, frames * dim
  for figure in figures[:2]:
    assert figure["implementation"] == "jnp" and figure["shape"] == [2, 37, 96]
    # x, scale and shift in 16 bits; codes, block scales and the tensor scale.
    assert figure["bytes"] == 2 * (x + 2 * rows) + x // 2 + x // 16 + 4
    assert figure["GB/s"] == pytest.approx(figure["bytes"] / figure["ms"] / 1e6)
    copy = figures[2]["GB/s"]
    assert figure["share_of_copy"] == pytest.approx(figure["GB/s"] / copy)


def test_every_case_fits_the_real_shapes():
  sizes = SIZES["ti2v-5b"]
  kernels = set()
  for labels, function, arguments in bench_kernels.cases(sizes, "jnp"):
    shapes = jax.eval_shape(arguments, jax.random.key(0))
    assert jax.eval_shape(function, *shapes) is not None
    kernels.add(labels["kernel"])
  assert kernels == {
    "fp8_rows",
    "fp8_modulate",
    "fp8_residual",
    "fp8_gelu",
    "fp8_matmul",
    "fp8_attention",
    "norm_rope",
    "quantise",
    "quantise_dynamic",
    "modulate_quantise",
    "dequantise",
    "matmul_w4a16",
    "dequantise_matmul",
    "plain_matmul",
  }


def test_attention_over_tiny_clips():
  tiny = SIZES["test"]
  cases = bench_kernels.all_cases(tiny, ["pieces"], ["16s"])
  figures = list(bench_kernels.measure(cases, 1, ["teacher_forcing"]))
  kernels = [figure["kernel"] for figure in figures]
  assert kernels == ["teacher_forcing_forward", "teacher_forcing_backward"]
  for figure, products in zip(figures, (2, 5), strict=True):
    # 3 chunks of 74 tokens, clean and noisy; one of 3 heads a rank.
    assert figure["shape"] == [1, 2 * 222, 1, 32]
    operations = 2 * products * 74 * 2 * (74 + 148 + 222) * 32
    assert figure["operations"] == operations
    speed = operations / figure["ms"] / 1e9
    assert figure["TFLOP/s"] == pytest.approx(speed)


def test_tiles_of_the_attention_kernels():
  """Every call of a sweep at real sizes, with its outputs as they would come back."""
  found = []

  def run(call):
    found.append((call.kernel.__name__, call.constants["TILE_Q"], call.grid))
    return [jnp.zeros(out.shape, out.dtype) for out in call.outputs]

  sizes = SIZES["ti2v-5b"]
  for labels, function, arguments in clip_cases.sweep(sizes, list(sizes.clips), run):
    shapes = jax.eval_shape(arguments, jax.random.key(0))
    outputs = jax.eval_shape(function, *shapes)
    assert list(outputs[0].shape) == labels["shape"]
  assert len(found) == 3 * sum(map(len, clip_cases.SWEEP.values()))
  assert found[0] == ("_flash_forward", 128, (2 * 4 * 55, 24))
  assert found[-1] == ("_flash_key_gradient", 64, (2 * 48 * 110, 6))
  with pytest.raises(ValueError, match="clips='1h' is unknown; use 5s, 16s, 64s"):
    clip_cases.clip_of(sizes, "1h")


def test_walks_of_the_kernels_over_rows():
  """Every call of a sweep at real sizes, with its outputs as they would come back."""
  found = []

  def run(call):
    found.append((call.kernel.__name__, call.grid, call.num_warps))
    return [jnp.zeros(out.shape, out.dtype) for out in call.outputs]

  sizes = SIZES["ti2v-5b"]
  for labels, function, arguments in fp8_cases.sweep(sizes, run):
    outputs = jax.eval_shape(function, *jax.eval_shape(arguments, jax.random.key(0)))
    assert outputs[0].size == np.prod(labels["shape"])
    assert labels["walk"]["num_warps"] == found[-1][2]
  assert found[:3] == [("_fp8_rows", (7040 // rows, 1), 2) for rows in (1, 2, 4)]
  assert found[9] == ("_fp8_modulate", (880, 8), 2)
  assert len(found) == 8 * 9 and {name for name, *_ in found} == {
    "_fp8_rows", "_fp8_modulate", "_fp8_residual", "_fp8_gelu", "_norm_rope"
  }  # fmt: skip


def escaped(data: bytes) -> str:
  """As XLA prints the configuration of a custom call."""
  return "".join(
    chr(b) if 32 <= b < 127 and b not in b"\"'\\" else f"\\{b:03o}" for b in data
  )


def test_native_products_are_counted():
  def call(code: bytes) -> str:
    return (
      '  y = f32[2]{0} custom-call(x), custom_call_target="triton_kernel_call", '
      f'backend_config="{escaped(zlib.compress(code))}"'
    )

  trips = 'backend_config={"known_trip_count":{"n":"30"}}'
  text = "\n".join(
    [
      "HloModule jit_step",
      "%c (x: f32[2]) -> pred[] {",
      "  ROOT %t = pred[] constant(true)",
      "}",
      "",
      "%layer.1 (x: f32[2]) -> f32[2] {",
      call(b"tcgen05.mma.kind::mxf4nvf4.block_scale" + bytes(range(256))),
      call(b"wgmma.mma_async"),
      "}",
      "",
      "ENTRY %main.2 (x: f32[2]) -> f32[2] {",
      f"  %y = f32[2]{{0}} while(%x), condition=%c, body=%layer.1, {trips}",
      '  %z = f32[2]{0} custom-call(%y), custom_call_target="__cudnn$blockScaledDot"',
      "  %layer.1 = f32[2]{0} negate(%z)",  # an operand, not the computation
      "  ROOT %w = f32[2]{0} call(%layer.1), to_apply=%layer.1",
      "}",
    ]
  )
  assert compile_for.custom_calls(text) == {
    "native_fp4": 32,
    "triton_kernel_call": 62,
    "__cudnn$blockScaledDot": 1,
  }
  with pytest.raises(ValueError, match="no ENTRY"):
    compile_for.custom_calls("add(x, y)")


def test_a_program_is_compiled_for_the_given_mesh():
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("x",), axis_types=axes, devices=jax.devices("cpu")[:1])
  matrix = jax.ShapeDtypeStruct((8, 8), jnp.float32)

  def function(x):
    return jax.lax.scan(lambda x, _: (jnp.linalg.cholesky(x), None), x, length=5)

  compiled = compile_for.compile_for(mesh, function, matrix)
  calls = compile_for.custom_calls(compiled.as_text())
  assert calls.pop("native_fp4") == 0
  ((name, count),) = calls.items()
  assert re.search("potrf", name) and count == 5
  with pytest.raises(ValueError, match="compile_for='b100'"):
    compile_for.described("b100")
