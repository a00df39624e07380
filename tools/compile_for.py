"""Compiles programs for a GPU that is not there, and counts its 4-bit products.

XLA does this on any machine with some CUDA GPU: not on one without. What can be learned
is whether a program compiles for that GPU and what it is made of, not its speed.
"""

import codecs
import collections
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

# What XLA's compiler asks about a GPU. Limits of a multiprocessor are those of Hopper.
_MULTIPROCESSOR = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
"""
GPUS = {
  "b200": f"""
gpu_device_info {{{_MULTIPROCESSOR}
  core_count: 148
  clock_rate_ghz: 1.965
  memory_bandwidth: 7672320000000
  l2_cache_size: 132644864
  device_memory_size: 191514411008
  cuda_compute_capability {{ major: 10 }}
}}
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
platform_name: "CUDA"
device_description_str: "NVIDIA B200"
""",
}


def described(name: str) -> jax.sharding.Mesh:
  """A mesh ("x",) of one GPU of the table above.

  Raises:
    ValueError: an unknown name.
  """
  if name not in GPUS:
    raise ValueError(f"compile_for={name!r} is unknown; use {', '.join(GPUS)}")
  topology = topologies.get_topology_desc(
    platform="cuda", topology="1x1x1", target_config=GPUS[name]
  )
  return topologies.make_mesh(topology, (1,), ("x",))


def compile_for(
  mesh: jax.sharding.Mesh, function: Callable[..., Any], *arguments: Any
) -> jax.stages.Compiled:
  """Compiles `function(*arguments)` for the one device of `mesh`.

  Args:
    arguments: pytrees of arrays, or of their jax.ShapeDtypeStruct.
  """
  there = jax.NamedSharding(mesh, jax.P())
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
    arguments,
  )
  platform = mesh.devices.flat[0].platform
  # Kernels ask the mesh which GPU they are compiled for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(function).trace(*shapes)
    lowered = traced.lower(
      lowering_platforms=("cuda" if platform == "gpu" else platform,)
    )
  return lowered.compile()


# Attributes that name computations; operands of an instruction may have such names too.
_CALLED = (
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.-]+)"
  r"|(?:branch_computations|called_computations)={([^}]*)}"
)


def custom_calls(text: str) -> dict[str, int]:
  """Counts what one run of a compiled program calls, by target.

  Args:
    text: HLO, `compiled.as_text()`.

  Returns:
    Calls by target, those in loops as often as the loop runs, and among them
    "native_fp4": Triton kernels whose code has a block-scaled 4-bit product, and
    cuDNN's block-scaled products. All branches of a conditional count.
  """
  computations = _computations(text)
  counts: collections.Counter[str] = collections.Counter(native_fp4=0)

  def visit(name: str, times: int) -> None:
    for line in computations[name]:
      if target := re.search(r'custom_call_target="([^"]*)"', line):
        counts[target[1]] += times
        native = "blockScaled" in target[1] or b"mxf4nvf4" in _triton_code(line)
        counts["native_fp4"] += times * native
      trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
      for one, several in re.findall(_CALLED, line):
        for called in re.findall(r"%[\w.-]+", one or several):
          visit(called, times * (int(trips[1]) if trips else 1))

  visit(next(iter(computations)), 1)
  return dict(counts)


def _computations(text: str) -> dict[str, list[str]]:
  """Lines of every computation by name, the entry first."""
  found: dict[str, list[str]] = {}
  entry = lines = None
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?(%[\w.-]+) .*\{$", line):
      lines = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      lines = None
    elif lines is not None:
      lines.append(line)
  if entry is None:
    raise ValueError("text has no ENTRY computation; it must be compiled.as_text()")
  return {entry: found.pop(entry), **found}


def _triton_code(line: str) -> bytes:
  """What jax-triton put into a custom call, PTX among it; b"" for other calls."""
  config = re.search(r'backend_config="((?:[^"\\]|\\.)*)"', line)
  if "triton_kernel_call" not in line or config is None:
    return b""
  return zlib.decompress(codecs.escape_decode(config[1].encode())[0])
