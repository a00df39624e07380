"""UMT5 text encoder (SPEC 11): token ids in, one vector per token out.

A T5 encoder without attention scaling and without biases, where every layer owns
its table of relative position biases. Blocks are stacked on a leading layer axis
and scanned.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.layers.linear import Linear
from longlive_jax.layers.norm import RMSNorm
from longlive_jax.quant.weights import Matrix


@dataclasses.dataclass(frozen=True)
class UMT5Config:
  """Sizes of the encoder. `text_len` is the number of token slots of a prompt."""

  vocab_size: int
  dim: int
  dim_attn: int
  dim_ffn: int
  heads: int
  layers: int
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  text_len: int = 512


UMT5_SIZES: dict[str, UMT5Config] = {
  "umt5-xxl": UMT5Config(
    vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, heads=64, layers=24
  ),
  "toy": UMT5Config(
    vocab_size=512, dim=128, dim_attn=128, dim_ffn=256, heads=4, layers=2, text_len=48
  ),
  "test": UMT5Config(
    vocab_size=97, dim=24, dim_attn=32, dim_ffn=48, heads=4, layers=2, text_len=8
  ),
}


def relative_position_bucket(
  relative: np.ndarray, buckets: int, max_distance: int = 128
) -> np.ndarray:
  """Bucket of each relative position (key minus query), SPEC 11.

  Half of the buckets serve each direction; of those, half are exact distances and
  half grow logarithmically up to `max_distance`. Runs on the host.

  Args:
    relative: integers of any shape.

  Returns:
    int32 of the same shape, in [0, buckets).
  """
  half = buckets // 2
  exact = half // 2
  distance = np.abs(relative)
  # float32 and this order of operations: at distances that are an exact power the
  # float64 logarithm can land just below the integer and truncate to another bucket.
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  growth = np.log(ratio) / np.float32(math.log(max_distance / exact))
  far = exact + (growth * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return (bucket + np.where(relative > 0, half, 0)).astype(np.int32)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype) -> jax.Array:
  return (std * jax.random.normal(rngs.params(), shape)).astype(dtype)


class Embedding(nnx.Module):
  """A table `weight` (rows, width)."""

  def __init__(self, rows: int, width: int, std: float, *, rngs: nnx.Rngs, dtype):
    self.weight = nnx.Param(_normal(rngs, (rows, width), std, dtype))


class SelfAttention(nnx.Module):
  """Multi-head attention without scaling; the position bias is added to the logits."""

  def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype):
    dim, inner = config.dim, config.dim_attn
    self.heads = config.heads
    self.q = Linear(dim, inner, bias=False, dtype=dtype, rngs=rngs)
    # Logits are not divided by sqrt(d): the initial query is small instead, else the
    # first softmax is one-hot and training does not start.
    std = (dim * inner / config.heads) ** -0.5
    self.q.weight = Matrix(_normal(rngs, (inner, dim), std, dtype))
    self.k = Linear(dim, inner, bias=False, dtype=dtype, rngs=rngs)
    self.v = Linear(dim, inner, bias=False, dtype=dtype, rngs=rngs)
    self.o = Linear(inner, dim, bias=False, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    """x (b, k, c), bias (b, n, q, k) float32 with masked keys at the lowest float."""
    split = (*x.shape[:2], self.heads, -1)
    q, k, v = (f(x).reshape(split) for f in (self.q, self.k, self.v))  # (b, k, n, d)
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(x.dtype)
    out = jnp.einsum("bnqk,bknd->bqnd", weights, v)
    return self.o(out.reshape(*x.shape[:2], -1))


class GatedFFN(nnx.Module):
  """fc2(fc1(x) * gelu(gate(x)))."""

  def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype):
    dim, hidden = config.dim, config.dim_ffn
    self.gate = Linear(dim, hidden, bias=False, dtype=dtype, rngs=rngs)
    self.fc1 = Linear(dim, hidden, bias=False, dtype=dtype, rngs=rngs)
    self.fc2 = Linear(hidden, dim, bias=False, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
  """Pre-norm residual layer: attention, then gated feed-forward."""

  def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype):
    self.norm1 = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
    self.attn = SelfAttention(config, rngs=rngs, dtype=dtype)
    self.norm2 = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
    self.ffn = GatedFFN(config, rngs=rngs, dtype=dtype)
    std = (2 * config.buckets * config.heads) ** -0.5
    self.pos_embedding = Embedding(
      config.buckets, config.heads, std, rngs=rngs, dtype=dtype
    )

  def __call__(self, x: jax.Array, bucket: jax.Array, mask: jax.Array) -> jax.Array:
    table = self.pos_embedding.weight[...].astype(jnp.float32)
    bias = jnp.moveaxis(table[bucket], -1, 0)  # (n, q, k)
    lowest = jnp.finfo(jnp.float32).min
    bias = jnp.where(mask[:, None, None, :] == 0, lowest, bias)  # (b, n, q, k)
    x = x + self.attn(self.norm1(x), bias)
    return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
  """UMT5 encoder. Compute happens in the dtype of the parameters.

  Args:
    config: sizes.
    rngs: source of the initial parameters.
    dtype: of the parameters.
  """

  def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
    self.config = config
    self.token_embedding = Embedding(
      config.vocab_size, config.dim, 1.0, rngs=rngs, dtype=dtype
    )
    keys = jax.random.split(rngs.params(), config.layers)
    self.blocks = jax.vmap(lambda k: Block(config, rngs=nnx.Rngs(k), dtype=dtype))(keys)
    self.norm = RMSNorm(config.dim, eps=config.eps, dtype=dtype)

  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeddings that condition the video model: `hidden` with padding rows zeroed.

    Args:
      ids: (b, k) int32 token numbers.
      mask: (b, k) int32, 1 for real tokens (they come first), 0 for padding.

    Returns:
      (b, k, dim) in the dtype of the parameters.
    """
    return jnp.where(mask[..., None] != 0, self.hidden(ids, mask), 0)

  def hidden(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Raw output (b, k, dim): padding rows are finite but mean nothing."""
    position = np.arange(ids.shape[1])
    bucket = jnp.asarray(
      relative_position_bucket(
        position[None, :] - position[:, None],
        self.config.buckets,
        self.config.max_distance,
      )
    )  # (q, k)
    x = self.token_embedding.weight[...][ids]  # (b, k, c)
    x, _ = jax.lax.scan(lambda x, block: (block(x, bucket, mask), None), x, self.blocks)
    return self.norm(x)
