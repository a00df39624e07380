"""Launches Triton kernels from JAX: the one place that knows jax-triton.

A kernel's file describes a launch as a `Call`, from shapes alone. `launch` runs it on
the GPU; the tests run the same description on Triton's interpreter and compile it for
GPUs that are not there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

try:
  import triton.language as tl
  from triton import jit
except ImportError:  # Triton has wheels for Linux only: kernels stay plain functions
  tl = None

  def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


Array = jax.Array

IMPLEMENTATIONS = ("triton", "jnp", None)


@dataclasses.dataclass(frozen=True)
class Call:
  """One launch of a kernel whose parameters are inputs, outputs, then constants.

  Attributes:
    kernel: a `jit` function.
    inputs: arrays; contiguous, row-major.
    outputs: shapes and dtypes.
    grid: number of programs along each axis.
    constants: the kernel's constexpr parameters by name.
    num_warps, num_stages: fixed here, chosen offline: tuning at run time would start
      slower and could differ from run to run.
  """

  kernel: Any
  inputs: tuple[Array, ...]
  outputs: tuple[jax.ShapeDtypeStruct, ...]
  grid: tuple[int, ...]
  constants: Mapping[str, Any]
  num_warps: int = 4
  num_stages: int = 3


# Runs a call: `launch`, or in tests the interpreter.
Launcher = Callable[[Call], list[Array]]


# Of GPUs that a program may be compiled for without being there.
CAPABILITIES = {
  "NVIDIA H100": 90,
  "NVIDIA H200": 90,
  "NVIDIA GH200": 90,
  "NVIDIA B200": 100,
  "NVIDIA GB200": 100,
  "NVIDIA B300": 103,
  "NVIDIA GB300": 103,
}


def on_triton(implementation: str | None) -> bool:
  """Whether to launch a kernel: as asked for, and by default on NVIDIA GPUs.

  Raises:
    ValueError: an unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} is unknown; use 'triton', 'jnp' or None"
    )
  if implementation is None:
    return "NVIDIA" in device_kind()
  return implementation == "triton"


def compute_capability() -> int:
  """Of the GPU that is traced for: 90 for a Hopper; 0 where it is no NVIDIA GPU.

  Raises:
    ValueError: a mesh of GPUs that are neither here nor known.
  """
  kind, here = device_kind(), jax.devices()[0]
  if "NVIDIA" not in kind:
    return 0
  if kind == here.device_kind:
    return round(10 * float(here.compute_capability))  # "9.0"
  for name, capability in CAPABILITIES.items():
    if kind.startswith(name):
      return capability
  raise ValueError(
    f"device_kind={kind!r} of the mesh is unknown; use {', '.join(CAPABILITIES)}"
  )


def device_kind() -> str:
  """Of the mesh that is traced for, which may only be described, or of this machine."""
  described = jax.sharding.get_abstract_mesh().abstract_device
  return (described or jax.devices()[0]).device_kind


def launch(call: Call) -> list[Array]:
  """Runs a kernel on the GPU.

  Under `jax.vmap` it runs once for each element, one after the other: fold batches into
  the leading axes instead. Outside of `shard_map` XLA gathers its sharded operands.

  Raises:
    NotImplementedError: under differentiation.
    ValueError: where jax-triton or JAX's CUDA plugin is missing.
  """
  name = call.kernel.__name__.strip("_")

  @jax.custom_batching.sequential_vmap
  def run(*inputs: Array) -> list[Array]:
    # The scope puts the kernel's name where profiles and compiled programs show it.
    with jax.named_scope(name):
      return _triton_call(call, inputs)

  instead = "use implementation='jnp', or quantise under nvfp4.fake_quantise"
  return without_derivative(name, run, instead)(*call.inputs)


def without_derivative(
  name: str, function: Callable[..., Any], instead: str
) -> Callable[..., Any]:
  """The function, which raises NotImplementedError under differentiation.

  Args:
    name: of the kernel.
    function: of arrays.
    instead: what the error says to do.
  """

  @jax.custom_jvp
  def inference(*inputs: Array) -> Any:
    return function(*inputs)

  @inference.defjvp
  def _(primals, tangents):
    raise NotImplementedError(f"kernel={name!r} has no derivative; {instead}")

  return inference


def with_gradient_of(
  reference: Callable[..., Any], function: Callable[..., Any]
) -> Callable[..., Any]:
  """The function, differentiated as if it were its reference, which runs once more.

  Args:
    reference, function: of the same arrays.
  """

  @jax.custom_vjp
  def forward(*inputs: Array | None) -> Any:
    return function(*inputs)

  def backward(inputs: tuple[Array | None, ...], gradient: Any) -> tuple[Any, ...]:
    return jax.vjp(reference, *inputs)[1](gradient)

  forward.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
  return forward


def _triton_call(call: Call, inputs: tuple[Array, ...]) -> list[Array]:
  try:
    import jax_triton  # raises on hosts without CUDA, so never at the top
  except ImportError as error:
    raise ValueError(
      "implementation='triton' needs an NVIDIA GPU, JAX's CUDA plugin and jax-triton; "
      "use another implementation, as 'jnp'"
    ) from error
  # Sums of products may not become fused multiply-adds: the codec rounds each step.
  exact = {"enable_fp_fusion": False}
  if jax_triton.__version_info__ < (0, 4):
    versioned = {"out_shape": list(call.outputs), **exact}
  else:
    versioned = {"out_type": list(call.outputs), "backend_options": exact}
  return jax_triton.triton_call(
    *inputs,
    kernel=call.kernel,
    grid=call.grid,
    num_warps=call.num_warps,
    num_stages=call.num_stages,
    compute_capability=compute_capability(),
    **versioned,
    **call.constants,
  )
