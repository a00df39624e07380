"""The causal diffusion transformer (SPEC 2): velocity of noisy latents, given text.

One network for everything. What a query may see is not its business: `attend` is handed
in, with a KV cache (generate/sampler.py), with a mask over a whole clip (training) or
with nothing (bidirectional). Blocks are stacked on a leading layer axis and scanned.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.layers import attention as attn
from longlive_jax.layers import operand, rope, teacher_forcing
from longlive_jax.layers.linear import Linear
from longlive_jax.layers.norm import LayerNorm, RMSNorm, modulate, modulation
from longlive_jax.layers.operand import Operand, gelu
from longlive_jax.layers.projection import Projection, projected
from longlive_jax.layers.remat import rematerialised
from longlive_jax.models import block_scan

Array = jax.Array
# attend(layer state, q and k, v (b, s, n, d)) -> (out (b, s, n, d), what to hand out)
Attend = Callable[[Any, Projection, Projection, Array], tuple[Operand, Any]]


@dataclasses.dataclass(frozen=True)
class WanConfig:
  """Sizes of a transformer. Hashable: static under jit.

  Attributes:
    dim, ffn_dim, heads, layers: width D, hidden width, attention heads, blocks.
    in_channels, out_channels: latent channels.
    freq_dim: size of the sinusoidal timestep features.
    text_dim, text_len: width of the text embeddings; rows they are padded to.
    patch: token size in latent rows and columns.
    eps: of every norm.
  """

  dim: int
  ffn_dim: int
  heads: int
  layers: int
  in_channels: int = 48
  out_channels: int = 48
  freq_dim: int = 256
  text_dim: int = 4096
  text_len: int = 512
  patch: int = 2
  eps: float = 1e-6

  @property
  def head_dim(self) -> int:
    return self.dim // self.heads

  def tokens_per_frame(self, y: int, x: int) -> int:
    """Tokens of a latent frame of y rows and x columns."""
    return (y // self.patch) * (x // self.patch)


SIZES: dict[str, WanConfig] = {
  "ti2v-5b": WanConfig(dim=3072, ffn_dim=14336, heads=24, layers=30),
  "t2v-1.3b": WanConfig(
    dim=1536, ffn_dim=8960, heads=12, layers=30, in_channels=16, out_channels=16
  ),
  "toy": WanConfig(
    dim=256, ffn_dim=768, heads=4, layers=6, in_channels=24, out_channels=24,
    freq_dim=128, text_dim=128, text_len=48,
  ),
  "test": WanConfig(
    dim=64, ffn_dim=96, heads=2, layers=2, in_channels=8, out_channels=8,
    freq_dim=32, text_dim=24, text_len=8,
  ),
}  # fmt: skip


def size(name: str) -> WanConfig:
  """The configuration of a named size. Raises ValueError for an unknown name."""
  if name not in SIZES:
    raise ValueError(f"size={name!r} is unknown; use one of {sorted(SIZES)}")
  return SIZES[name]


def time_features(t: np.ndarray, freq_dim: int) -> np.ndarray:
  """Sinusoidal features [cos(t w), sin(t w)], w_k = 10000^(-k/half) (SPEC 2.2).

  On the host in float64: in float32 the angle of t = 999 is off by 6e-5.

  Args:
    t: timesteps (...), 0 to 1000.

  Returns:
    float32 (..., freq_dim).
  """
  half = freq_dim // 2
  w = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
  angles = np.asarray(t, np.float64)[..., None] * w
  features = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
  return features.astype(np.float32)


def patchify(latents: Array, patch: int) -> Array:
  """(b, f, y, x, c) -> (b, f, p, c * patch * patch), channel slowest."""
  b, f, y, x, c = latents.shape
  z = latents.reshape(b, f, y // patch, patch, x // patch, patch, c)
  z = z.transpose(0, 1, 2, 4, 6, 3, 5)
  return z.reshape(b, f, (y // patch) * (x // patch), c * patch * patch)


def unpatchify(tokens: Array, patch: int, y: int, x: int) -> Array:
  """(b, f, p, patch * patch * c), channel fastest -> (b, f, y, x, c)."""
  b, f = tokens.shape[:2]
  z = tokens.reshape(b, f, y // patch, x // patch, patch, patch, -1)
  return z.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, f, y, x, -1)


class Mlp(nnx.Module):
  """fc2(activation(fc1(x)))."""

  def __init__(self, d_in: int, d_hidden: int, d_out: int, activation, *, dtype, rngs):
    self.fc1 = Linear(d_in, d_hidden, dtype=dtype, rngs=rngs)
    self.fc2 = Linear(d_hidden, d_out, dtype=dtype, rngs=rngs)
    self.activation = activation

  def __call__(self, x: Operand) -> Array:
    return self.fc2(operand.activated(self.fc1, x, self.activation, self.fc2))


class AttentionProjections(nnx.Module):
  """q, k, v, o and the RMS norms of q and k over the full width (SPEC 2.5)."""

  def __init__(self, config: WanConfig, *, dtype, rngs):
    dim = config.dim
    self.q = Linear(dim, dim, dtype=dtype, rngs=rngs)
    self.k = Linear(dim, dim, dtype=dtype, rngs=rngs)
    self.v = Linear(dim, dim, dtype=dtype, rngs=rngs)
    self.o = Linear(dim, dim, dtype=dtype, rngs=rngs)
    self.norm_q = RMSNorm(dim, eps=config.eps, dtype=dtype)
    self.norm_k = RMSNorm(dim, eps=config.eps, dtype=dtype)
    self.heads = config.heads

  def queries(self, x: Operand) -> Projection:
    return projected(self.q, x, self.norm_q, self.heads)

  def keys_values(self, x: Operand) -> tuple[Projection, Array]:
    v = self.v(x)
    keys = projected(self.k, x, self.norm_k, self.heads)
    return keys, v.reshape(*v.shape[:-1], self.heads, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextKeys:
  """What cross-attention makes of prompts: the same in every pass over a chunk.

  Attributes:
    k, v: (l, b * segments, text_len, n, d); of one layer without l.
  """

  k: Array
  v: Array


class Block(nnx.Module):
  """Modulated self-attention, cross-attention, modulated feed-forward (SPEC 2.4)."""

  def __init__(self, config: WanConfig, *, dtype, rngs):
    dim = config.dim
    noise = jax.random.normal(rngs.params(), (6, dim)) / dim**0.5
    self.modulation = nnx.Param(noise.astype(dtype))
    self.self_attn = AttentionProjections(config, dtype=dtype, rngs=rngs)
    self.cross_attn = AttentionProjections(config, dtype=dtype, rngs=rngs)
    self.norm3 = LayerNorm(dim, eps=config.eps, dtype=dtype)
    self.ffn = Mlp(dim, config.ffn_dim, dim, gelu, dtype=dtype, rngs=rngs)
    self.eps = config.eps

  def __call__(
    self,
    x: Array,
    table: Array,
    text: Array | TextKeys,
    attend: Attend,
    layer: Any,
  ) -> tuple[Array, Any]:
    """Args: x (b, f, p, D); table (b, f, 6, D); text (b, segments, k, D) or keys."""
    shift1, scale1, gate1, shift2, scale2, gate2 = self.rows(table)
    norm1 = modulation(scale1, shift1, self.eps)
    norm2 = modulation(scale2, shift2, self.eps)
    norm3, own, cross = self.norm3.affine(), self.self_attn, self.cross_attn
    h = operand.normed(x, norm1, readers=[own.q, own.k, own.v])
    h, handed_out = self.attend_self(h, attend, layer)
    x, h = operand.added(x, own.o, h, gate1, norm3, readers=[cross.q])
    h = self.attend_text(h, text)
    x, h = operand.added(x, cross.o, h, None, norm2, readers=[self.ffn.fc1])
    x = x + gate2 * self.ffn(h)
    return x, handed_out

  def rows(self, table: Array) -> list[Array]:
    """The six modulation rows, each (b, f, 1, D) to broadcast over tokens."""
    return jnp.split(table + self.modulation[...], 6, axis=2)

  def attend_self(self, h: Operand, attend: Attend, layer: Any) -> tuple[Operand, Any]:
    """Self-attention of h (b, f, p, D) through `attend`: (b, f * p, D), for o."""
    b, f, p, dim = h.shape
    tokens = h.reshape(b, f * p, dim)
    q = self.self_attn.queries(tokens)
    k, v = self.self_attn.keys_values(tokens)
    out, handed_out = attend(layer, q, k, v)
    return out.reshape(b, f * p, dim), handed_out

  def attend_text(self, h: Operand, text: Array | TextKeys) -> Array:
    """Cross-attention, no mask: h (b, f, p, D), text (b, segments, k, D) or its keys.

    The tokens of a sample are cut into `segments` equal consecutive pieces; piece i
    sees prompt i (SPEC 2.2).

    Returns:
      (b * segments, tokens of a piece, D), for o.
    """
    keys = text if isinstance(text, TextKeys) else self.text_keys(text)
    pieces = h.reshape(len(keys.k), -1, h.shape[-1])
    q = self.cross_attn.queries(pieces).numbers()
    return attn.attention(q, keys.k, keys.v).reshape(pieces.shape)

  def text_keys(self, text: Array) -> TextKeys:
    """Keys of embedded prompts (b, segments, k, D) for this layer."""
    keys, values = self.cross_attn.keys_values(text.reshape(-1, *text.shape[2:]))
    return TextKeys(keys.numbers(), values)


class Head(nnx.Module):
  """Modulated norm and projection to velocity patches (SPEC 2.7)."""

  def __init__(self, config: WanConfig, *, dtype, rngs):
    dim = config.dim
    noise = jax.random.normal(rngs.params(), (2, dim)) / dim**0.5
    self.modulation = nnx.Param(noise.astype(dtype))
    self.linear = Linear(
      dim, config.out_channels * config.patch**2, dtype=dtype, zero=True, rngs=rngs
    )
    self.eps = config.eps

  def __call__(self, x: Array, e: Array) -> Array:
    """x (b, f, p, D), e (b, f, D) -> (b, f, p, patch * patch * c)."""
    shift, scale = jnp.split(e[:, :, None] + self.modulation[...], 2, axis=2)
    return self.linear(modulate(x, scale, shift, self.eps))


class CausalDiT(nnx.Module):
  """The transformer. Compute is in the dtype of its biases.

  Attributes:
    blocks: one Block whose every array has a leading layer axis, or, where layers
      differ in number format or are unrolled, a list of such runs of consecutive ones.
  """

  def __init__(
    self, config: WanConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
  ):
    c = config
    self.config = config
    self.patch_embedding = Linear(
      c.in_channels * c.patch**2, c.dim, dtype=dtype, rngs=rngs
    )
    self.text_embedding = Mlp(c.text_dim, c.dim, c.dim, gelu, dtype=dtype, rngs=rngs)
    self.time_embedding = Mlp(
      c.freq_dim, c.dim, c.dim, jax.nn.silu, dtype=dtype, rngs=rngs
    )
    self.time_projection = Linear(c.dim, 6 * c.dim, dtype=dtype, rngs=rngs)
    keys = jax.random.split(rngs.params(), c.layers)
    self.blocks = jax.vmap(
      lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key))
    )(keys)
    self.head = Head(config, dtype=dtype, rngs=rngs)

  @property
  def dtype(self) -> jnp.dtype:
    return self.patch_embedding.bias.dtype

  def embed_text(self, text: Array) -> Array:
    """(..., k, text_dim) -> (..., text_len, D). Zero rows are embedded, too."""
    short = self.config.text_len - text.shape[-2]
    text = jnp.pad(text, [(0, 0)] * (text.ndim - 2) + [(0, short), (0, 0)])
    return self.text_embedding(text.astype(self.dtype))

  def text_keys(self, text: Array) -> TextKeys:
    """Keys of embedded prompts (b, segments, text_len, D) for all layers.

    For several passes with the same prompts. They take 2 l times the memory of the
    embedding, so training, which has one pass and many prompts, does without.
    """

    def step(_, inputs):
      return None, inputs[0].text_keys(text)

    pieces = block_scan.through(step, None, block_scan.block_runs(self))[1]
    return block_scan.join(pieces)

  def embed_time(self, time: Array) -> tuple[Array, Array]:
    """Time features (b, f, freq_dim) -> e (b, f, D) and table (b, f, 6, D)."""
    e = self.time_embedding(time.astype(self.dtype))
    table = self.time_projection(jax.nn.silu(e))
    return e, table.reshape(*e.shape[:2], 6, -1)

  def __call__(
    self,
    latents: Array,
    time: Array,
    text: Array | TextKeys,
    attend: Attend,
    layers: Any = None,
    *,
    remat: str = "none",
    velocity: bool = True,
  ) -> tuple[Array | None, list[Any]]:
    """Velocity of noisy latents.

    Args:
      latents: (b, f, y, x, c).
      time: features of each frame's timestep (b, f, freq_dim), see time_features.
      text: embedded text (b, segments, text_len, D), see embed_text, or text_keys.
      attend: self-attention, see `Attend`; it also norms and rotates q and k.
      layers: per-layer state for attend, see `block_scan.through`, or None.
      remat: what the backward pass computes again, see layers/remat.py.
      velocity: False leaves out what only serves it, when a pass is to remember.

    Returns:
      velocity (b, f, y, x, c) float32 or None, and what attend handed out, stacked
      over the layers of each run.
    """
    y, x_size = latents.shape[2:4]
    patch = self.config.patch
    x = self.patch_embedding(patchify(latents.astype(self.dtype), patch))
    e, table = self.embed_time(time)
    text_keys = text if isinstance(text, TextKeys) else None

    def step(x, inputs):
      block, keys, layer = inputs
      return block(x, table, text if keys is None else keys, attend, layer)

    x, handed_out = block_scan.through(
      rematerialised(step, remat),
      x,
      block_scan.block_runs(self),
      text_keys,
      layers,
      end=velocity,
    )
    if not velocity:
      return None, handed_out
    out = unpatchify(self.head(x, e), patch, y, x_size)
    return out.astype(jnp.float32), handed_out

  def rotation(self, temporal: rope.Rotation, y: int, x: int) -> rope.Rotation:
    """Rotation of all tokens, from temporal rotations (b, f, pairs)."""
    patch = self.config.patch
    return rope.grid_rotation(temporal, y // patch, x // patch, self.config.head_dim)


def attend_all(
  rotation: rope.Rotation,
  layout: ClipLayout | None = None,
  lengths: Array | None = None,
) -> Attend:
  """Attention among the given tokens: all of them, or as a clip's layout allows."""

  def attend(layer, q, k, v):
    q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
    if layout is None:
      return attn.attention(q, k, v), None
    return teacher_forcing.attention(q, k, v, layout, lengths), None

  return attend


def temporal_positions(
  frames: np.ndarray, offset: np.ndarray | float = 0.0, t_scale: float = 1.0
) -> np.ndarray:
  """(frame + offset) * t_scale in float64, on the host. Shapes broadcast."""
  return (np.asarray(frames, np.float64) + np.asarray(offset, np.float64)) * t_scale


def train_forward(
  model: CausalDiT,
  noisy: Array,
  time: Array,
  text: Array,
  *,
  frames_per_chunk: int,
  clean: Array | None = None,
  clean_time: Array | None = None,
  temporal: rope.Rotation | None = None,
  independent_first_frame: bool = False,
  valid_frames: Array | None = None,
  remat: str = "none",
) -> Array:
  """One forward over a whole clip under the training mask (SPEC 2.2).

  Args:
    noisy: (b, f, y, x, c).
    time, clean_time: timestep features (b, f, freq_dim) of both halves; the clean half
      is at timestep 0 if not given.
    text: text embeddings (b, segments, k, text_dim), raw.
    clean: clean latents; given, the clip is teacher-forced: noisy chunk b sees clean
      chunks before b and itself.
    temporal: rotation (b, f, pairs); frames 0, 1, ... if not given.
    independent_first_frame: frame 0 is a chunk of its own.
    valid_frames: int32 (b,), frames that are no padding; None = all.
    remat: see layers/remat.py.

  Returns:
    velocity (b, f, y, x, c) of the noisy frames.

  Raises:
    ValueError: when f does not divide into chunks, or for teacher forcing together
      with an independent first frame.
  """
  b, f, y, x, _ = noisy.shape
  p = model.config.tokens_per_frame(y, x)
  layout = ClipLayout.of_frames(
    f, frames_per_chunk, p,
    teacher_forced=clean is not None, independent_first_frame=independent_first_frame,
  )  # fmt: skip
  lengths = None if valid_frames is None else valid_frames * p
  if temporal is None:
    positions = np.broadcast_to(np.arange(f), (b, f))
    temporal = rope.temporal_rotation(positions, model.config.head_dim)
  text = model.embed_text(text)
  if clean is None:
    attend = attend_all(model.rotation(temporal, y, x), layout, lengths)
    return model(noisy, time, text, attend, remat=remat)[0]
  if clean_time is None:
    clean_time = time_features(np.zeros((b, f)), model.config.freq_dim)
  both = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), temporal)
  attend = attend_all(model.rotation(both, y, x), layout, lengths)
  velocity, _ = model(
    jnp.concatenate([clean.astype(noisy.dtype), noisy], axis=1),
    jnp.concatenate([clean_time, time], axis=1),
    jnp.concatenate([text, text], axis=1),  # the segments of each half
    attend,
    remat=remat,
  )
  return velocity[:, f:]


def bidirectional_forward(
  model: CausalDiT, latents: Array, time: Array, text: Array
) -> Array:
  """The plain, non-causal backbone: every frame sees every frame.

  Args:
    latents: (b, f, y, x, c). time: (b, f, freq_dim). text: (b, k, text_dim), raw.
  """
  b, f, y, x, _ = latents.shape
  positions = np.broadcast_to(np.arange(f), (b, f))
  temporal = rope.temporal_rotation(positions, model.config.head_dim)
  attend = attend_all(model.rotation(temporal, y, x))
  return model(latents, time, model.embed_text(text)[:, None], attend)[0]
