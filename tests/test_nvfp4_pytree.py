"""NVFP4 arrays as pytrees of JAX: mapped, scanned, donated, sharded, differentiated."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from packed_weights import same
from random_weights import normal

from longlive_jax.quant import nvfp4

TESTS = Path(__file__).parent
quantise = jax.jit(nvfp4.quantise, static_argnames=("rule", "batch_axes"))
dequantise = jax.jit(nvfp4.dequantise)


def test_vmap():
  x = normal(3, 5, 32)
  mapped = jax.jit(jax.vmap(nvfp4.quantise))(x)
  assert same(mapped, quantise(x, batch_axes=1))
  back = jax.jit(jax.vmap(nvfp4.dequantise))(mapped)
  np.testing.assert_array_equal(back, dequantise(mapped))


def test_gradient_goes_straight_through():
  x, weight = normal(3, 32), normal(3, 32, seed=1)
  fake = functools.partial(nvfp4.fake_quantise, rule="mse", batch_axes=1)

  @jax.jit
  def gradients(x):
    gradient = jax.grad(lambda x: jnp.sum(weight * fake(x) ** 2))(x)
    return gradient, *jax.jvp(fake, (x,), (weight,))

  gradient, value, tangent = gradients(x)
  np.testing.assert_array_equal(value, dequantise(quantise(x, batch_axes=1)))
  np.testing.assert_allclose(gradient, 2 * weight * value, rtol=1e-6)
  np.testing.assert_array_equal(tangent, weight)
  half = jax.eval_shape(fake, jax.ShapeDtypeStruct((3, 32), jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


def test_index_update_stack_and_scan():
  x = normal(4, 3, 32)
  whole = quantise(x, batch_axes=1)
  new = quantise(normal(3, 32, seed=1))
  update = jax.jit(
    lambda array, new, i: jax.tree.map(
      lambda leaf, part: leaf.at[i].set(part), array, new
    )
  )
  changed = update(whole, new, 2)
  assert same(jax.tree.map(lambda leaf: leaf[2], changed), new)
  assert same(
    jax.tree.map(lambda leaf: leaf[:2], changed),
    jax.tree.map(lambda leaf: leaf[:2], whole),
  )
  _, layers = jax.lax.scan(lambda c, part: (c, nvfp4.dequantise(part)), 0, whole)
  np.testing.assert_array_equal(layers, dequantise(whole))
  parts = [quantise(row) for row in x]
  assert same(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), whole)


def test_donation_reuses_every_buffer():
  array = quantise(normal(4, 3, 32), batch_axes=1)
  before = jax.tree.map(np.array, array)  # copies: a view would pin the buffers
  step = jax.jit(
    lambda array: jax.tree.map(lambda leaf: leaf[::-1], array), donate_argnums=0
  )
  after = step(array)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(array))
  assert same(after, jax.tree.map(lambda leaf: leaf[::-1], before))


# The number of CPU devices is fixed when JAX starts: a process of its own.
SCRIPT = """
import json
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from longlive_jax.layers.linear import matmul
from longlive_jax.parallel import mesh as meshes
from longlive_jax.quant import nvfp4
from longlive_jax.quant.weights import W4A4

P = jax.P
mesh = meshes.generation_mesh(4)
rng = np.random.default_rng(0)
x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((8, 5, 32), (16, 32)))
quantise = jax.jit(nvfp4.quantise, static_argnames="batch_axes")
whole = quantise(x, batch_axes=1)
split = meshes.shard_batch(whole, mesh)
apart = jax.jit(jax.shard_map(
  lambda part: nvfp4.quantise(part, batch_axes=1), mesh=mesh,
  in_specs=P("data"), out_specs=P("data"),
))(x)
same = lambda a, b: all(
  np.asarray(p).tobytes() == np.asarray(q).tobytes()
  for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
)
one = quantise(meshes.shard_batch(x, mesh))  # one amax over all devices
packed = nvfp4.quantise(weight)
product = jax.jit(jax.shard_map(
  matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
))
print(json.dumps({
  "shards": [s.data.shape for s in split.codes.addressable_shards],
  "moved": same(split, whole),
  "shard_map": same(apart, whole),
  "global": same(one, quantise(x)),
  "w4a16": float(np.abs(product(x, packed) - matmul(x, packed)).max()),
  "w4a4": float(np.abs(
    product(x, W4A4(packed, "mse")) - matmul(x, W4A4(packed, "mse"))).max()),
}))
"""


def test_several_devices_give_the_bits_of_one():
  path = [str(TESTS), str(TESTS.parent)]
  code = f"import sys\nsys.path[:0] = {path!r}\n{SCRIPT}"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr[-3000:]
  found = json.loads(result.stdout.splitlines()[-1])
  assert found["shards"] == [[2, 5, 16]] * 4
  assert found["moved"] and found["shard_map"] and found["global"]
  assert found["w4a16"] < 1e-5 and found["w4a4"] < 1e-5
