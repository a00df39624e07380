"""Measures the NVFP4 and FP8 kernels against XLA, and against copying.

  python tools/bench_kernels.py --out=tools/results/bench_kernels_h200.json

prints one JSON line a figure: a kernel at one of the shapes of kernels/shapes.py, in
one implementation, with its time, the bytes a second that it has to read and write, and
these as a share of what a copy of as many bytes reaches in the same run. Products with
packed weights stand beside dequantising the weight before a bfloat16 product (cuBLAS),
and beside this with plain weights. FP8 products are cuBLAS's in every implementation:
of ready codes, with sums in 16 or 32 bits, and with the scales that follow or without.

  python tools/bench_kernels.py --kernels=teacher_forcing --clips=5s,16s,64s
  python tools/bench_kernels.py --sweep

measure attention over training clips forward and backward, as Triton kernels and as
pieces for cuDNN, and each of its Triton kernels with several tiles, as well as kernels
that walk over rows with several walks. TFLOP/s count the pairs that the mask allows.

A time is that of one of several calls, with inputs of their own, in one program: else
the GPU's cache would be measured. On a GPU it is how long the device was busy according
to JAX's profiler ("clock": "device"), which a busy host does not change; where the
profiler sees no device it is the host's time.

  python tools/bench_kernels.py --compile_for=b200

compiles a linear layer in 4-bit arithmetic for a GPU that is not there (any CUDA GPU
must be) and counts its 4-bit products.
"""

import dataclasses
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import clip_cases
import compile_for
import device_clock
import fp8_cases
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from longlive_jax.generate import report
from longlive_jax.kernels import launch
from longlive_jax.kernels.modulate_quantise import modulate_quantise
from longlive_jax.kernels.nvfp4_dequantise import dequantise
from longlive_jax.kernels.nvfp4_matmul import matmul_w4a4, matmul_w4a16
from longlive_jax.kernels.nvfp4_quantise import encode_call, quantise
from longlive_jax.kernels.shapes import SIZES, Sizes
from longlive_jax.quant import nvfp4

Array = jax.Array
Case = tuple[dict[str, Any], Callable[..., Any], Callable[[Array], tuple]]

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_SIZE = flags.DEFINE_enum("size", "ti2v-5b", list(SIZES), "Shapes.", flag_values=_FLAGS)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations",
  ["triton", "jnp", "pieces"],
  "What to measure; pieces is attention over training clips only.",
  flag_values=_FLAGS,
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 20, "Timed runs; the median counts.", 1, flag_values=_FLAGS
)
_KERNELS = flags.DEFINE_list(
  "kernels", [], "Only cases whose kernel starts so.", flag_values=_FLAGS
)
_CLIPS = flags.DEFINE_list(
  "clips", ["5s"], "Training clips of kernels/shapes.py.", flag_values=_FLAGS
)
_SWEEP = flags.DEFINE_bool(
  "sweep", False, "Tiles and walks of the kernels instead.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=_FLAGS)
_COMPILE_FOR = flags.DEFINE_string(
  "compile_for", "", "Compile for this GPU instead.", flag_values=_FLAGS
)


# ------------------------------------------------------------------ cases
def cases(sizes: Sizes, implementation: str) -> Iterator[Case]:
  """What is measured: (labels, function, key -> its arguments)."""

  def case(kernel, shape, function, arguments, **labels) -> Case:
    labels = {"kernel": kernel, "shape": list(shape), **labels}
    return {**labels, "implementation": implementation}, function, arguments

  def numbers(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16)

  use = {"implementation": implementation}
  x_shape, k_shape, window = sizes.activations, sizes.chunk_keys, sizes.window_keys
  mean_shape = (k_shape[0], *k_shape[2:])

  for rule in ("static_6", "mse"):
    for front in ("none", "hadamard"):
      yield case(
        "quantise", x_shape,
        lambda x, rule=rule, front=front: quantise(
          x, rule=rule, front=front, amax=jnp.float32(6), **use
        ),
        lambda key: (numbers(key, x_shape),),
        rule=rule, front=front,
      )  # fmt: skip
    yield case(
      "quantise", k_shape,
      lambda x, mean, rule=rule: quantise(
        x, rule=rule, batch_axes=1, amax=jnp.full(k_shape[:1], 8, jnp.float32),
        front="token_mean", mean=mean, **use,
      ),
      lambda key: (numbers(key, k_shape), numbers(key, mean_shape)),
      rule=rule, front="token_mean",
    )  # fmt: skip
  yield case(
    "quantise_dynamic", x_shape,
    lambda x: quantise(x, rule="mse", **use),
    lambda key: (numbers(key, x_shape),),
    rule="mse",
  )  # fmt: skip
  for rule in ("static_6", "mse"):
    yield case(
      "modulate_quantise", x_shape,
      lambda x, scale, shift, rule=rule: modulate_quantise(
        x, scale, shift, eps=1e-6, rule=rule, amax=jnp.float32(8), **use
      ),
      lambda key: (
        numbers(key, x_shape), *numbers(key, (2, x_shape[0], 1, x_shape[2]))
      ),
      rule=rule,
    )  # fmt: skip

  yield from fp8_cases.cases(sizes, implementation)

  def packed(key: Array, shape: tuple[int, ...], batch_axes: int = 0):
    return nvfp4.quantise(numbers(key, shape), rule="static_6", batch_axes=batch_axes)

  yield case(
    "dequantise", window,
    lambda array: dequantise(array, dtype=jnp.bfloat16, **use),
    lambda key: (packed(key, window, 1),),
  )  # fmt: skip
  yield case(
    "dequantise", window,
    lambda array, mean: dequantise(array, dtype=jnp.bfloat16, mean=mean, **use),
    lambda key: (packed(key, window, 1), numbers(key, (window[0], *window[2:]))),
    mean=True,
  )  # fmt: skip
  for layer, shape in sizes.weights.items():
    yield case(
      "dequantise", shape,
      lambda array: dequantise(array, dtype=jnp.bfloat16, **use),
      lambda key, shape=shape: (packed(key, shape),),
      layer=layer,
    )  # fmt: skip

  def plain(x: Array, weight: Array) -> Array:
    return x @ weight.T

  def unpacked(x: Array, weight: nvfp4.NVFP4Array) -> Array:
    return x @ dequantise(weight, dtype=x.dtype, **use).T

  for layer, shape in sizes.weights.items():
    for rows in sizes.rows:
      for kernel, function, weight in (
        ("matmul_w4a16", lambda x, weight: matmul_w4a16(x, weight, **use), packed),
        ("dequantise_matmul", unpacked, packed),
        ("plain_matmul", plain, numbers),
      ):
        yield case(
          kernel, (rows, *shape), function,
          lambda key, rows=rows, shape=shape, weight=weight: (
            numbers(key, (rows, shape[1])), weight(key, shape)
          ),
          layer=layer,
        )  # fmt: skip


def quantise_sweep(sizes: Sizes) -> Iterator[Case]:
  """Four over six by tiles of a program."""
  shape, groups = sizes.chunk_keys, sizes.chunk_keys[:1]

  def arguments(key: Array) -> tuple[Array, Array]:
    numbers = fp8_cases.numbers(key, shape)
    return numbers, numbers[:, 0]

  for front, tiles in itertools.product(
    ("none", "token_mean", "hadamard"), (1, 2, 4, 8)
  ):

    def function(x, mean, front=front, tiles=tiles):
      amax = jnp.full(groups, 8, jnp.float32)
      mean = mean if front == "token_mean" else None
      return launch.launch(encode_call(x, 1, front, mean, amax, "mse", tiles))

    labels = {"kernel": "quantise", "shape": list(shape), "rule": "mse"}
    labels |= {"front": front, "implementation": "triton", "tiles": tiles}
    yield labels, function, arguments


def all_cases(
  sizes: Sizes, implementations: list[str], clips: list[str]
) -> Iterator[Case]:
  """Those of every implementation; 'pieces' is attention over training clips only."""
  for implementation in implementations:
    if implementation != "pieces":
      yield from cases(sizes, implementation)
    if implementation != "jnp":
      yield from clip_cases.cases(sizes, clips, implementation)


# ------------------------------------------------------------------ time
@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of a call, the bytes that it reads and writes, and which clock said so."""

  seconds: float
  moved: int
  clock: str

  @property
  def bandwidth(self) -> float:
    return self.moved / self.seconds


def time_of(
  function: Callable[..., Any], arguments: Callable[[Array], tuple], repeats: int
) -> Timing:
  """Times `function(*arguments(key))`."""
  shapes = jax.eval_shape(arguments, jax.random.key(0))
  moved = tree_bytes((shapes, jax.eval_shape(function, *shapes)))
  # Enough to leave a cache of 50 MB, few enough to compile and to fit.
  calls = int(np.clip(4e8 // moved, 4, 16))
  make = jax.jit(arguments)
  batch = [make(key) for key in jax.random.split(jax.random.key(0), calls)]
  run = jax.jit(lambda batch: [function(*inputs) for inputs in batch])
  jax.block_until_ready(run(batch))  # compiles
  times, busy = device_clock.clocked(lambda: jax.block_until_ready(run(batch)), repeats)
  if busy is None:
    return Timing(float(np.median(times)) / calls, moved, "host")
  return Timing(busy / (repeats * calls), moved, "device")


def tree_bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Copies:
  """Bandwidth of copying by size."""

  def __init__(self, repeats: int):
    self.repeats = repeats
    self.known: dict[int, Timing] = {}

  def best(self, moved: int) -> Timing:
    """The better of two copies that move about as many bytes, to 20%."""
    exponent = round(np.log2(moved) * 4)
    if exponent not in self.known:
      size = int(2 ** (exponent / 4) / 4)  # uint16, read and written

      def numbers(key: Array) -> tuple[Array]:
        return (jax.random.bits(key, (size,), jnp.uint16),)

      both = [time_of(copy, numbers, self.repeats) for copy in (jnp.copy, jnp.invert)]
      self.known[exponent] = max(both, key=lambda timing: timing.bandwidth)
    return self.known[exponent]


def measure(
  measured: Iterable[Case], repeats: int, only: list[str]
) -> Iterator[dict[str, Any]]:
  """One dict of labels and figures a case."""
  copies = Copies(repeats)
  for labels, function, arguments in measured:
    if only and not labels["kernel"].startswith(tuple(only)):
      continue
    timing = time_of(function, arguments, repeats)
    figures = {"ms": 1e3 * timing.seconds, "clock": timing.clock}
    if "operations" in labels:
      figures["TFLOP/s"] = labels["operations"] / timing.seconds / 1e12
    else:
      figures |= {
        "bytes": timing.moved,
        "GB/s": timing.bandwidth / 1e9,
        "share_of_copy": timing.bandwidth / copies.best(timing.moved).bandwidth,
      }
    if "matmul" in labels["kernel"]:
      operations = 2 * float(np.prod(labels["shape"]))
      figures["TFLOP/s"] = operations / timing.seconds / 1e12
    yield {**labels, **figures}
  for timing in copies.known.values():
    yield {
      "kernel": "copy",
      "bytes": timing.moved,
      "GB/s": timing.bandwidth / 1e9,
      "clock": timing.clock,
    }


# ------------------------------------------------------------------ other GPUs
def native_linear(x: Array, weight: nvfp4.NVFP4Array) -> Array:
  """A linear layer in 4-bit arithmetic: activations are quantised on the way."""
  return matmul_w4a4(quantise(x), weight, dtype=x.dtype)


def count_native(sizes: Sizes, gpu: str) -> dict[str, Any]:
  """Compiles `native_linear` of a chunk for another GPU and counts its custom calls."""
  out, k = sizes.weights["fc1"]
  rows = sizes.frames * sizes.tokens
  x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
  weight = jax.eval_shape(nvfp4.quantise, jax.ShapeDtypeStruct((out, k), jnp.bfloat16))
  compiled = compile_for.compile_for(
    compile_for.described(gpu), native_linear, x, weight
  )
  calls = compile_for.custom_calls(compiled.as_text())
  return {"compile_for": gpu, "shape": [rows, out, k], "custom_calls": calls}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  sizes = SIZES[_SIZE.value]
  if _COMPILE_FOR.value:
    figures = iter([count_native(sizes, _COMPILE_FOR.value)])
  else:
    if _SWEEP.value:
      measured = itertools.chain(
        quantise_sweep(sizes),
        fp8_cases.sweep(sizes, launch.launch),
        clip_cases.sweep(sizes, _CLIPS.value, launch.launch),
      )
    else:
      measured = all_cases(sizes, _IMPLEMENTATIONS.value, _CLIPS.value)
    figures = measure(measured, _REPEATS.value, _KERNELS.value)
  results = []
  for figure in figures:
    print(json.dumps(figure), flush=True)
    results.append(figure)
  if _OUT.value:
    content = {"size": _SIZE.value, "figures": results, **report.environment()}
    content["versions"].update(triton_versions())
    report.write_json(_OUT.value, content)


def triton_versions() -> dict[str, str]:
  versions = {}
  for name in ("triton", "jax-triton"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


if __name__ == "__main__":
  app.run(main)
