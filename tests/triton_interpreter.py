"""Runs kernels on the CPU, on Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter cannot share a
process with tests that compile kernels: `Interpreter` starts this file as a program and
sends it calls.
"""

import importlib
import os
import pickle
import subprocess
import sys
import types
from typing import Any

import jax
import ml_dtypes
import numpy as np

# Triton's names of dtypes.
DTYPES = {
  "bfloat16": "bf16",
  "float32": "fp32",
  "int32": "i32",
  "uint8": "u8",
  "float8_e4m3fn": "fp8e4nv",
}
# Those of kernels/approximate.py, and blocks.py's rounded inverse; float32.
INSTRUCTIONS = {
  "ex2.approx.ftz.f32 $0, $1;": np.exp2,
  "rcp.approx.ftz.f32 $0, $1;": np.reciprocal,
  "{ .reg .f32 y, e; rcp.approx.ftz.f32 y, $1; neg.f32 e, $1; "
  "fma.rn.f32 e, e, y, 0f3F800000; fma.rn.f32 $0, e, y, y; }": np.reciprocal,
}


class Interpreter:
  """A process with the interpreter; a context manager.

  Calling it with a module of `longlive_jax.kernels` and the arguments of its `triton`
  function returns what that returns, as NumPy arrays. "module:name" is another function
  that takes a launcher as `run`.
  """

  def __init__(self):
    self.process = subprocess.Popen(
      [sys.executable, __file__],
      env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  def __enter__(self) -> "Interpreter":
    return self

  def __exit__(self, *_) -> None:
    self.process.stdin.close()
    self.process.wait(timeout=60)
    self.process.stdout.close()

  def __call__(self, module: str, *args: Any, **kwargs: Any) -> Any:
    message = module, *jax.tree.map(to_host, (args, kwargs))
    pickle.dump(message, self.process.stdin)
    self.process.stdin.flush()
    result = pickle.load(self.process.stdout)
    if isinstance(result, Exception):
      raise result
    return result


def to_host(value: Any) -> Any:
  return np.asarray(value) if isinstance(value, jax.Array) else value


class Buffer:
  """What the interpreter wants to see of an array: part of a torch tensor's face."""

  def __init__(self, array: np.ndarray):
    self.array = array
    self.dtype = DTYPES[array.dtype.name]

  def data_ptr(self) -> int:
    return self.array.ctypes.data

  def size(self) -> tuple[int, ...]:
    return self.array.shape

  def stride(self) -> tuple[int, ...]:
    return tuple(s // self.array.itemsize for s in self.array.strides)

  def storage_offset(self) -> int:
    return 0

  def element_size(self) -> int:
    return self.array.itemsize

  # The host's memory is the only one: everything is its own copy there.
  def untyped_storage(self) -> "Buffer":
    return self

  def cpu(self) -> "Buffer":
    return self

  def new_empty(self, *_, **__) -> "Buffer":
    return Buffer(self.array)

  def set_(self, *_) -> None:
    pass

  def copy_(self, _) -> None:
    pass


def interpret(call) -> list[np.ndarray]:
  """Runs a `longlive_jax.kernels.launch.Call`."""
  inputs = [Buffer(np.ascontiguousarray(array)) for array in call.inputs]
  outputs = [Buffer(filled(out)) for out in call.outputs]
  call.kernel[call.grid](*inputs, *outputs, **call.constants)
  return [buffer.array for buffer in outputs]


def filled(out: jax.ShapeDtypeStruct) -> np.ndarray:
  """An array of nonsense, so that a number which no program writes is seen."""
  size = int(np.prod(out.shape)) * out.dtype.itemsize
  return np.full(size, 0xB5, np.uint8).view(out.dtype).reshape(out.shape)


def serve() -> None:
  """Answers calls from standard input until it closes."""
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything prints
  round_like_a_gpu()
  while True:
    try:
      module, args, kwargs = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      module, _, name = module.partition(":")
      module = importlib.import_module(f"longlive_jax.kernels.{module}")
      function = getattr(module, name or "triton")
      result = jax.tree.map(np.asarray, function(*args, **kwargs, run=interpret))
    except Exception as error:
      result = RuntimeError(repr(error))
    pickle.dump(result, answers)
    answers.flush()


def round_like_a_gpu() -> None:
  """Puts right what this interpreter does with bfloat16 and FP8.

  It cuts float32 off to bfloat16, where a GPU rounds to nearest even, gives other codes
  in FP8 at the middle between two and for NaN, multiplies matrices of the bits of
  bfloat16 numbers, and knows no instructions of a GPU.
  """
  import triton.language as tl
  from triton.language.semantic import TritonSemantic
  from triton.runtime import interpreter

  class Builder(interpreter.InterpreterBuilder):
    def cast_impl(self, src, dst_type):
      if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return super().cast_impl(src, dst_type)
      rounded = src.data.astype(ml_dtypes.bfloat16).view(np.uint16)
      return interpreter.TensorHandle(rounded, tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding):
      if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
        return super().create_fp_to_fp(src, dst_type, rounding)
      rounded = src.data.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
      rounded = np.where(np.isnan(src.data), np.uint8(0x7F), rounded)
      return interpreter.TensorHandle(rounded, tl.float8e4nv)

    def create_dot(self, a, b, d, *settings):
      if a.dtype.scalar == tl.bfloat16:
        a, b = (super(Builder, self).cast_impl(x, tl.float32) for x in (a, b))
      return super().create_dot(a, b, d, *settings)

    def create_inline_asm(self, assembly, constraints, values, *settings):
      (x,) = values
      result = interpreter.TensorHandle(INSTRUCTIONS[assembly](x.data), tl.float32)
      return types.SimpleNamespace(get_result=lambda index: result)

  interpreter.interpreter_builder = Builder()
  interpreter.interpreter_semantic = TritonSemantic(interpreter.interpreter_builder)


if __name__ == "__main__":
  serve()
