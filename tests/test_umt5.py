import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from longlive_jax.models.umt5 import (
  UMT5_SIZES,
  UMT5Config,
  UMT5Encoder,
  relative_position_bucket,
)

pytestmark = pytest.mark.usefixtures("quick_compiling")

GOLDEN = pathlib.Path(__file__).parent / "golden" / "umt5"


def leaf_shapes(tree) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = jax.tree_util.keystr
  return {name(p).strip(".").removesuffix(".value"): x.shape for p, x in leaves}


def test_full_size_tree_is_the_published_one():
  config = UMT5_SIZES["umt5-xxl"]
  shapes = leaf_shapes(
    jax.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
  )
  expected = {
    "token_embedding.weight": (256384, 4096),
    "norm.weight": (4096,),
    "blocks.norm1.weight": (24, 4096),
    "blocks.norm2.weight": (24, 4096),
    "blocks.attn.q.weight": (24, 4096, 4096),
    "blocks.attn.k.weight": (24, 4096, 4096),
    "blocks.attn.v.weight": (24, 4096, 4096),
    "blocks.attn.o.weight": (24, 4096, 4096),
    "blocks.ffn.gate.weight": (24, 10240, 4096),
    "blocks.ffn.fc1.weight": (24, 10240, 4096),
    "blocks.ffn.fc2.weight": (24, 4096, 10240),
    "blocks.pos_embedding.weight": (24, 32, 64),
  }
  assert shapes == expected
  # One torch tensor a layer for each stacked leaf: the 242 of the published file.
  torch_tensors = sum(24 if k.startswith("blocks") else 1 for k in shapes)
  assert torch_tensors == 242


def test_toy_is_small():
  toy = jax.eval_shape(lambda: UMT5Encoder(UMT5_SIZES["toy"], rngs=nnx.Rngs(0)))
  assert sum(math.prod(s) for s in leaf_shapes(toy).values()) <= 500_000


def golden_encoder(weights: dict[str, np.ndarray]) -> UMT5Encoder:
  """Fills the encoder from tensors named as in the published checkpoint."""
  config = UMT5Config(
    vocab_size=97, dim=32, dim_attn=48, dim_ffn=64, heads=4, layers=2, text_len=160
  )
  encoder = UMT5Encoder(config, rngs=nnx.Rngs(0))
  renamed = {
    k.replace("gate.0.", "gate.").replace("pos_embedding.embedding", "pos_embedding"): v
    for k, v in weights.items()
  }

  def fill(path, leaf):
    name = jax.tree_util.keystr(path).strip(".").removesuffix(".value")
    if not name.startswith("blocks."):
      return jnp.asarray(renamed[name], leaf.dtype)
    rest = name.removeprefix("blocks.")
    layers = [renamed[f"blocks.{i}.{rest}"] for i in range(config.layers)]
    return jnp.asarray(np.stack(layers), leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, encoder)


def test_golden_encoder_numbers():
  encoder = golden_encoder(load_file(GOLDEN / "weights.safetensors"))
  case = load_file(GOLDEN / "case.safetensors")
  ids, mask = jnp.asarray(case["ids"], jnp.int32), jnp.asarray(case["mask"], jnp.int32)
  out = jax.jit(lambda m, i, k: m(i, k))(encoder, ids, mask)
  np.testing.assert_allclose(out, case["hidden_zeroed"], rtol=1e-4, atol=1e-4)
  hidden = jax.jit(lambda m, i, k: m.hidden(i, k))(encoder, ids, mask)
  np.testing.assert_allclose(hidden, case["hidden"], rtol=1e-4, atol=1e-4)


def test_golden_buckets():
  bucket = load_file(GOLDEN / "case.safetensors")["relative_position_bucket"]
  np.testing.assert_array_equal(
    relative_position_bucket(np.arange(-300, 301), 32), bucket
  )


def test_buckets_are_exact_integers_at_powers():
  # 16, 32, 64 with e = 8 lie exactly on a bucket border; float64 would truncate.
  np.testing.assert_array_equal(
    relative_position_bucket(np.array([-8, -16, -32, -64, -128, 128]), 32),
    [8, 10, 12, 14, 15, 31],
  )


def test_padding_does_not_change_a_prompt():
  encoder = UMT5Encoder(UMT5_SIZES["test"], rngs=nnx.Rngs(1))
  ids = jnp.array([[5, 6, 7, 1]], jnp.int32)
  padded = jnp.pad(ids, ((0, 0), (0, 12)), constant_values=9)
  short = encoder(ids, jnp.ones_like(ids))
  long = encoder(padded, jnp.arange(16)[None] < 4)
  np.testing.assert_allclose(long[:, :4], short, atol=2e-6)
  np.testing.assert_array_equal(long[:, 4:], 0)


def test_gradient_reaches_every_parameter():
  encoder = UMT5Encoder(UMT5_SIZES["test"], rngs=nnx.Rngs(2))
  ids = jnp.arange(16, dtype=jnp.int32)[None]
  grads = jax.grad(lambda m: jnp.sum(m(ids, jnp.ones_like(ids)) ** 2))(encoder)
  for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
    assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_bfloat16_parameters_compute_in_bfloat16():
  encoder = UMT5Encoder(UMT5_SIZES["test"], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  ids = jnp.ones((1, 4), jnp.int32)
  assert encoder(ids, jnp.ones_like(ids)).dtype == jnp.bfloat16
