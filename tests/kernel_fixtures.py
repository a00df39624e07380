"""A pytest plugin: the ways in which the tests of kernels run."""

import pytest
from kernel_runs import compiled, needs_gpu
from triton_interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter():
  pytest.importorskip("triton", reason="Triton has wheels for Linux only")
  with Interpreter() as process:
    yield process


@pytest.fixture(params=["jnp", "interpreter", pytest.param("triton", marks=needs_gpu)])
def run(request):
  """run(public function, *args, **settings) in one of the three ways.

  The interpreter runs what the function calls for Triton, which has no defaults;
  `internal` are settings that only this has.
  """
  if request.param == "interpreter":
    process = request.getfixturevalue("interpreter")

    def interpret(function, *args, internal=None, **settings):
      module = function.__module__.rpartition(".")[2]
      return process(module, *args, **settings, **(internal or {}))

    return interpret

  def call(function, *args, internal=None, **settings):
    return compiled(function, *args, **settings, implementation=request.param)

  return call
