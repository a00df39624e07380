"""Attention against float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import normal

from longlive_jax.layers import attention as attn

BLOCK = 1024  # BLOCK_Q and BLOCK_K; up to 4 blocks of keys are handled in one piece


def dense(q, k, v, keep, cotangent):
  """Output and gradients in float64. keep: bool, broadcastable to (b, n, q, k)."""
  q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, cotangent))
  scale = q.shape[-1] ** -0.5
  logits = np.where(keep, scale * np.einsum("bqnd,bknd->bnqk", q, k), -np.inf)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum("bqnd,bknd->bnqk", g, v)
  ds = scale * p * (dp - (dp * p).sum(-1, keepdims=True))
  return np.einsum("bnqk,bknd->bqnd", p, v), (
    np.einsum("bnqk,bknd->bqnd", ds, k),
    np.einsum("bnqk,bqnd->bknd", ds, q),
    np.einsum("bnqk,bqnd->bknd", p, g),
  )


def check(queries, keys, keep=True, *, batch=1, **options):
  """Output and gradients of blockwise attention equal the dense ones."""
  shape = (batch, queries, 2, 4)
  q, g = normal(*shape), normal(*shape, seed=1)
  k, v = normal(batch, keys, 2, 4, seed=2), normal(batch, keys, 2, 4, seed=3)

  @jax.jit
  def both(q, k, v, g):
    out, pull = jax.vjp(lambda *a: attn.attention(*a, **options), q, k, v)
    return out, pull(g)

  out, gradients = both(q, k, v, g)
  want, want_gradients = dense(q, k, v, keep, g)
  np.testing.assert_allclose(out, want, atol=3e-6)
  for found, expected in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("queries", "keys"),
  [
    (5, 7),
    (BLOCK, BLOCK),  # the largest of one piece ...
    (BLOCK + 1, BLOCK - 1),  # ... and blocks, both padded
    (BLOCK + 1, 2 * BLOCK),
    (3, 4 * BLOCK),
    (3, 4 * BLOCK + 1),
  ],
)
def test_equals_dense_around_block_edges(queries, keys):
  check(queries, keys)


@pytest.mark.parametrize("queries", [6, BLOCK + 6])
def test_lengths_hide_the_keys_behind_them(queries):
  lengths = np.array([1, BLOCK, BLOCK + 1, BLOCK + 5], np.int32)
  keys = BLOCK + 5
  keep = (np.arange(keys) < lengths[:, None])[:, None, None]
  check(queries, keys, keep, batch=4, lengths=jnp.asarray(lengths))


def test_a_key_block_that_is_masked_as_a_whole_counts_nothing():
  def mask(q, k):
    return (k[None] >= BLOCK + 2) | (q[:, None] < 0)

  keep = np.broadcast_to(np.arange(2 * BLOCK) >= BLOCK + 2, (BLOCK + 1, 2 * BLOCK))
  check(BLOCK + 1, 2 * BLOCK, keep, mask=mask)


def test_masked_attention_over_several_blocks_equals_dense():
  tokens = 1400  # more than a block

  def mask(q, k):
    return (k[None] + 3 * q[:, None]) % 7 < k[None] // 200

  index = np.arange(tokens)
  keep = np.array(mask(index, index))
  keep[:, 1399] = True  # no row is empty
  check(tokens, tokens, keep, mask=lambda q, k: mask(q, k) | (k[None] == 1399))


def sizes_in(jaxpr) -> list[int]:
  """Elements of every array that a program makes, inner programs included."""
  found = []
  for equation in jaxpr.eqns:
    found += [math.prod(var.aval.shape) for var in equation.outvars]
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        found += sizes_in(inner)
  return found


def test_a_5b_chunk_never_makes_its_logits():
  queries, keys, heads, dim = 7_040, 28_160, 24, 128
  q = jax.ShapeDtypeStruct((1, queries, heads, dim), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, keys, heads, dim), jnp.bfloat16)
  lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
  traced = jax.make_jaxpr(
    lambda *a: attn.attention(*a[:3], lengths=a[3], implementation="blockwise")
  )(q, k, k, lengths)
  sizes = sizes_in(traced.jaxpr)
  assert heads * BLOCK * BLOCK in sizes  # the walk did see the inner loop
  # Nothing is larger than the keys padded to whole blocks; the logits are 55 times it.
  padded = -(-keys // BLOCK) * BLOCK * heads * dim
  assert max(sizes) <= padded < heads * queries * keys / 50


def test_result_has_the_dtype_of_the_queries():
  q, k = (normal(1, s, 2, 4, seed=s) for s in (3, 5))
  exact = attn.attention(q, k, k)
  half = attn.attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, k)))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.03)


def test_errors_name_field_value_and_remedy():
  q = normal(1, 2, 1, 4)
  with pytest.raises(ValueError, match=r"implementation='flash'.*use 'cudnn' or"):
    attn.attention(q, q, q, implementation="flash")
  with pytest.raises(ValueError, match="lengths or mask, not both"):
    attn.attention(q, q, q, lengths=jnp.array([1]), mask=lambda q, k: q == k)


def test_cudnn_is_chosen_for_half_precision_on_gpus_only():
  on_gpu = jax.default_backend() == "gpu"
  assert attn.default_implementation(jnp.float32) == "blockwise"
  assert attn.default_implementation(jnp.bfloat16) == (
    "cudnn" if on_gpu else "blockwise"
  )
