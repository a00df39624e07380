"""The transformer against SPEC 2 in float64 NumPy; its three ways of use agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import normal, random_dit

from longlive_jax.generate.cached_forward import cached_forward
from longlive_jax.layers import kv_cache, operand, rope
from longlive_jax.models import block_scan, dit

pytestmark = pytest.mark.usefixtures("quick_compiling")

CONFIG = dit.SIZES["test"]
Y, X = 4, 6
B, N, CHUNKS = 2, 2, 3  # videos, frames of a chunk, chunks of a clip
F = N * CHUNKS
train_forward = jax.jit(
  dit.train_forward, static_argnames=("frames_per_chunk", "independent_first_frame")
)


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return random_dit()


def latents(frames: int = F, seed: int = 0) -> np.ndarray:
  return normal(B, frames, Y, X, CONFIG.in_channels, seed=seed)


def prompts(segments: int, seed: int = 5) -> np.ndarray:
  """(b, segments, k, text_dim), shorter than text_len."""
  return normal(B, segments, 5, CONFIG.text_dim, seed=seed)


def features(t: np.ndarray) -> np.ndarray:
  return dit.time_features(np.asarray(t, np.float64), CONFIG.freq_dim)


# ------------------------------------------------------------------ SPEC 2 in NumPy
def reference(model: dit.CausalDiT, x: np.ndarray, t: np.ndarray, text: np.ndarray):
  """Every frame sees every frame. x (b, f, y, x, c), t (b, f), text (b, k, td)."""
  w = {
    jax.tree_util.keystr(path).removesuffix(".value").lstrip("."): np.float64(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model)
  }
  c = model.config
  b, f, rows, cols, _ = x.shape
  heads, d = c.heads, c.head_dim

  def linear(name, h, layer=...):
    return h @ w[f"{name}.weight"][layer].T + w[f"{name}.bias"][layer]

  def silu(h):
    return h / (1 + np.exp(-h))

  def gelu(h):
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

  def norm(h):
    h = h - h.mean(-1, keepdims=True)
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + c.eps)

  def rms(name, h, layer):
    h = h / np.sqrt((h * h).mean(-1, keepdims=True) + c.eps)
    return (h * w[f"{name}.weight"][layer]).reshape(*h.shape[:-1], heads, d)

  def attend(name, layer, h, source, turn=None):
    q = rms(f"{name}.norm_q", linear(f"{name}.q", h, layer), layer)
    k = rms(f"{name}.norm_k", linear(f"{name}.k", source, layer), layer)
    v = linear(f"{name}.v", source, layer).reshape(*source.shape[:-1], heads, d)
    if turn is not None:
      q, k = turn(q), turn(k)
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(d)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return linear(
      f"{name}.o", np.einsum("bnqk,bknd->bqnd", p, v).reshape(h.shape), layer
    )

  # Tokens: frame, row, column; channels of a patch: channel, row, column.
  grid = [
    (i, r, s) for i in range(f) for r in range(rows // 2) for s in range(cols // 2)
  ]
  tokens = np.stack(
    [
      x[:, i, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2].transpose(0, 3, 1, 2).reshape(b, -1)
      for i, r, s in grid
    ],
    axis=1,
  ).astype(np.float64)
  side = d // 2 // 3
  pairs = (d // 2 - 2 * side, side, side)
  angles = np.concatenate(
    [
      np.array(grid)[:, i : i + 1] * 10000.0 ** (-np.arange(pairs[i]) / pairs[i])
      for i in range(3)
    ],
    axis=1,
  )  # (s, d/2)

  def turn(h):
    z = (h[..., 0::2] + 1j * h[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(h.shape)

  half = c.freq_dim // 2
  phase = np.float64(t)[..., None] * 10000.0 ** (-np.arange(half) / half)
  e = np.concatenate([np.cos(phase), np.sin(phase)], -1)
  e = linear("time_embedding.fc2", silu(linear("time_embedding.fc1", e)))
  table = linear("time_projection", silu(e)).reshape(b, f, 6, c.dim)
  per_token = [i for i, _, _ in grid]
  text = np.pad(np.float64(text), ((0, 0), (0, c.text_len - text.shape[1]), (0, 0)))
  text = linear("text_embedding.fc2", gelu(linear("text_embedding.fc1", text)))

  h = linear("patch_embedding", tokens)
  for layer in range(c.layers):
    m = (table + w["blocks.modulation"][layer])[:, per_token]  # (b, s, 6, D)
    shift1, scale1, gate1, shift2, scale2, gate2 = np.moveaxis(m, 2, 0)
    a = norm(h) * (1 + scale1) + shift1
    h = h + gate1 * attend("blocks.self_attn", layer, a, a, turn)
    a = norm(h) * w["blocks.norm3.weight"][layer] + w["blocks.norm3.bias"][layer]
    h = h + attend("blocks.cross_attn", layer, a, text)
    a = norm(h) * (1 + scale2) + shift2
    a = linear("blocks.ffn.fc2", gelu(linear("blocks.ffn.fc1", a, layer)), layer)
    h = h + gate2 * a
  shift, scale = np.moveaxis(e[:, :, None] + w["head.modulation"], 2, 0)
  h = norm(h) * (1 + scale[:, per_token]) + shift[:, per_token]
  out = np.zeros((b, f, rows, cols, c.out_channels))
  for token, (i, r, s) in zip(
    np.moveaxis(linear("head.linear", h), 1, 0), grid, strict=True
  ):
    patch = token.reshape(b, 2, 2, c.out_channels)  # row, column, channel
    out[:, i, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2] = patch
  return out


def test_forward_equals_the_specification(model):
  x, text = latents(), prompts(1)[:, 0]
  t = np.array([[999, 937, 0, 500.5, 1, 20], [0, 1, 2, 3, 4, 5]])
  found = jax.jit(dit.bidirectional_forward)(model, x, features(t), text)
  assert found.dtype == jnp.float32
  want = reference(model, x, t, text)
  assert np.std(want) > 0.3  # no term is too small to show
  np.testing.assert_allclose(found, want, atol=2e-4, rtol=1e-4)


# ------------------------------------------------------------------ sizes and shapes
@pytest.mark.parametrize("size", ["ti2v-5b", "t2v-1.3b"])
def test_parameter_counts(size):
  config = dit.size(size)
  tree = jax.eval_shape(lambda: dit.CausalDiT(config, rngs=nnx.Rngs(0)))
  count = sum(leaf.size for leaf in jax.tree.leaves(tree))
  d, h, c = config.dim, config.ffn_dim, 4 * config.in_channels
  attention = 4 * (d * d + d) + 2 * d
  block = 6 * d + 2 * attention + 2 * d + (2 * d * h + h + d)
  by_hand = (
    config.layers * block
    + (c * d + d)
    + (config.text_dim * d + d + d * d + d)
    + (config.freq_dim * d + d + d * d + d)
    + (6 * d * d + 6 * d)
    + (2 * d + c * d + c)
  )
  assert count == by_hand
  if size == "ti2v-5b":
    assert count == 4_999_787_712


def test_unknown_size():
  with pytest.raises(ValueError, match=r"size='5b' is unknown; use one of .*ti2v-5b"):
    dit.size("5b")


def test_patchify_round_trip_differs_in_channel_order_only():
  x = latents()
  tokens = dit.patchify(x, 2)
  assert tokens.shape == (B, F, CONFIG.tokens_per_frame(Y, X), 4 * CONFIG.in_channels)
  fastest = tokens.reshape(*tokens.shape[:3], -1, 4).swapaxes(-1, -2)
  np.testing.assert_array_equal(
    dit.unpatchify(fastest.reshape(tokens.shape), 2, Y, X), x
  )


def test_an_untrained_head_gives_zero_velocity():
  build = jax.jit(
    lambda key: dit.CausalDiT(CONFIG, rngs=nnx.Rngs(key))
  )  # rbg compiles much faster on CPU than threefry
  model = build(jax.random.key(0, impl="rbg"))
  velocity = dit.bidirectional_forward(
    model, latents(1), features(np.full((B, 1), 500)), prompts(1)[:, 0]
  )
  np.testing.assert_array_equal(velocity, np.zeros_like(velocity))
  for name in ("q", "k", "v", "o"):
    weight = np.asarray(getattr(model.blocks.self_attn, name).weight[...])
    assert weight.shape == (CONFIG.layers, CONFIG.dim, CONFIG.dim)
    assert 0.05 < weight.std() < 0.3
    assert not np.array_equal(weight[0], weight[1])  # each layer draws its own


def test_half_precision_is_close(model):
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
  t = features(np.full((B, F), 937.0))
  args = (latents(), t, prompts(1)[:, 0])
  exact = jax.jit(dit.bidirectional_forward)(model, *args)
  found = jax.jit(dit.bidirectional_forward)(half, *args)
  assert half.dtype == jnp.bfloat16 and found.dtype == jnp.float32
  error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
  assert error < 0.05


@pytest.mark.parametrize("starts", [(), (1,)])
def test_text_keys_stand_for_the_text(model, starts):
  model = block_scan.split_blocks(model, starts) if starts else model
  time = features(np.full((B, F), 500.0))
  positions = np.broadcast_to(np.arange(F), (B, F))
  temporal = rope.temporal_rotation(positions, CONFIG.head_dim)

  @jax.jit
  def both(model, x, text):
    attend = dit.attend_all(model.rotation(temporal, Y, X))
    text = model.embed_text(text)  # two segments
    keys = model.text_keys(text)
    assert keys.k.shape[:3] == (CONFIG.layers, 2 * B, CONFIG.text_len)
    return [model(x, time, t, attend)[0] for t in (text, keys)]

  plain, known = both(model, latents(), prompts(2))
  np.testing.assert_allclose(known, plain, atol=1e-5)
  other, _ = both(model, latents(), prompts(2)[:, ::-1])
  assert not np.allclose(other, plain, atol=1e-3)


# ------------------------------------------------------------------ training masks
def test_one_chunk_is_the_bidirectional_model(model):
  t = features(np.full((B, F), 500.0))
  whole = train_forward(model, latents(), t, prompts(1), frames_per_chunk=F)
  plain = jax.jit(dit.bidirectional_forward)(model, latents(), t, prompts(1)[:, 0])
  np.testing.assert_allclose(whole, plain, atol=1e-5)


@jax.jit
def _cached(model, cache, x, time, text, temporal):
  """One forward of a chunk and the cache with it."""
  f = x.shape[1]
  first = cache.frame.max(axis=1) + 1
  placement = kv_cache.place(cache, first[:, None] + jnp.arange(f, dtype=jnp.int32))
  text = model.embed_text(text)[:, None]
  velocity, (k, v) = cached_forward(
    model, cache, placement, x, time, text, temporal, keep=True
  )
  return velocity, kv_cache.commit(cache, placement, k, v)


def by_chunks(model, x, t, text, lengths, clean=None):
  """Velocities chunk by chunk against a cache that forgets nothing.

  With `clean`, x is noisy and each chunk is remembered by its clean latents at t = 0.
  """
  total = sum(lengths)
  cache = kv_cache.init_cache(
    kv_cache.CacheRules(total),
    layers=CONFIG.layers,
    batch=B,
    capacity_frames=total,
    tokens_per_frame=CONFIG.tokens_per_frame(Y, X),
    heads=CONFIG.heads,
    head_dim=CONFIG.head_dim,
    dtype=jnp.float32,
  )
  out, start = [], 0
  for i, length in enumerate(lengths):
    part = slice(start, start + length)
    positions = np.tile(np.arange(start, start + length), (B, 1))
    rest = text[:, i], rope.temporal_rotation(positions, CONFIG.head_dim)
    velocity, after = _cached(model, cache, x[:, part], features(t[:, part]), *rest)
    if clean is not None:
      zero = features(np.zeros((B, length)))
      _, after = _cached(model, cache, clean[:, part], zero, *rest)
    cache, start = after, start + length
    out.append(velocity)
  return np.concatenate(out, axis=1)


@pytest.mark.parametrize("t", [0.0, 750.0])
def test_a_causal_clip_equals_its_chunks_against_the_cache(model, t):
  """Also: each chunk has a prompt of its own, in both."""
  x, text, t = latents(), prompts(CHUNKS), np.full((B, F), t)
  clip = train_forward(model, x, features(t), text, frames_per_chunk=N)
  np.testing.assert_allclose(
    clip, by_chunks(model, x, t, text, [N] * CHUNKS), atol=2e-5
  )


def test_a_teacher_forced_clip_equals_its_chunks_against_a_clean_cache(model):
  noisy, clean, text = latents(), latents(seed=1), prompts(CHUNKS)
  t = np.repeat([[999.0, 500.0, 20.0], [10.0, 300.0, 900.0]], N, axis=1)
  clip = train_forward(
    model,
    noisy,
    features(t),
    text,
    frames_per_chunk=N,
    clean=clean,
    clean_time=features(np.zeros((B, F))),
  )
  chunks = by_chunks(model, noisy, t, text, [N] * CHUNKS, clean)
  np.testing.assert_allclose(clip, chunks, atol=2e-5)


def test_an_independent_first_frame_equals_its_chunks(model):
  x, t = latents(1 + N), np.full((B, 1 + N), 100.0)
  text = np.repeat(prompts(1), 2, axis=1)
  clip = train_forward(
    model,
    x,
    features(t),
    text[:, :1],
    frames_per_chunk=N,
    independent_first_frame=True,
  )
  np.testing.assert_allclose(clip, by_chunks(model, x, t, text, [1, N]), atol=2e-5)


def test_clean_latents_at_another_timestep_are_another_context(model):
  """Noise augmentation of the context reaches the noisy half, and only later chunks."""
  args = (model, latents(), features(np.full((B, F), 500.0)), prompts(1))

  def run(t):
    time = features(np.full((B, F), t))
    return train_forward(
      *args, frames_per_chunk=N, clean=latents(seed=1), clean_time=time
    )

  difference = np.abs(run(0.0) - run(400.0))
  assert difference[:, :N].max() < 1e-6 and difference[:, N:].max() > 1e-3


def test_padding_reaches_no_frame(model):
  """The last frame shares its chunk with one that is valid."""
  changed = latents()
  changed[:, -1] += 1

  def run(x, valid):
    return train_forward(
      model, x, features(np.full((B, F), 500.0)), prompts(1), frames_per_chunk=N,
      clean=x, valid_frames=jnp.full((B,), valid),
    )[:, :-1]  # fmt: skip

  np.testing.assert_array_equal(run(changed, F - 1), run(latents(), F - 1))
  assert np.abs(run(changed, F) - run(latents(), F)).max() > 1e-3


@pytest.mark.parametrize("name", ["blocks", "attention"])
def test_remat_changes_nothing(model, name):
  def loss(model, remat):
    v = dit.train_forward(
      model,
      latents(N),
      features(np.full((B, N), 500.0)),
      prompts(1),
      frames_per_chunk=N,
      remat=remat,
    )
    return jnp.mean(v**2)

  plain = jax.jit(jax.grad(loss), static_argnums=1)(model, "none")
  remat = jax.jit(jax.grad(loss), static_argnums=1)(model, name)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
    assert np.any(np.asarray(a))  # every parameter is learnt


def test_errors_of_the_training_forward(model):
  x, t, text = latents(5), features(np.zeros((B, 5))), prompts(1)
  with pytest.raises(ValueError, match="frames=5 must be 0 plus a multiple of frames_"):
    dit.train_forward(model, x, t, text, frames_per_chunk=2)
  with pytest.raises(ValueError, match="frames=5 must be 1 plus a multiple of frames_"):
    dit.train_forward(
      model, x, t, text, frames_per_chunk=3, independent_first_frame=True
    )
  with pytest.raises(ValueError, match="not defined with independent_first_frame"):
    dit.train_forward(
      model, x, t, text, frames_per_chunk=2, independent_first_frame=True, clean=x,
      clean_time=t,
    )  # fmt: skip


def test_time_features():
  """In float32 the angle of t = 999 is off by 6e-5."""
  found = dit.time_features(np.array([0.0, 999.0]), 32)
  w = np.longdouble(10000) ** (-np.arange(16, dtype=np.longdouble) / 16)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found[0], [1.0] * 16 + [0.0] * 16)
  np.testing.assert_allclose(found[1, :16], np.cos(999 * w), atol=1e-7)
  np.testing.assert_allclose(found[1, 16:], np.sin(999 * w), atol=1e-7)


def test_runs_of_layers_are_the_same_network(model):
  split = block_scan.split_blocks(model, [1])
  assert [len(run.modulation[...]) for run in block_scan.block_runs(split)] == [1, 1]
  assert len(block_scan.block_runs(model)) == 1  # the model itself is as it was
  t = np.random.default_rng(3).uniform(0, 1000, (B, F))
  inputs = latents(), t, prompts(CHUNKS), [N] * CHUNKS
  found, want = by_chunks(split, *inputs), by_chunks(model, *inputs)
  np.testing.assert_allclose(found, want, atol=1e-6)
  for starts in ([0], [2], [1, 1]):
    with pytest.raises(ValueError, match=r"starts=\(.*must ascend between 1 and 1"):
      block_scan.split_blocks(model, starts)
  with pytest.raises(ValueError, match="has 2 runs already"):
    block_scan.split_blocks(split, [1])


def test_the_derivative_of_gelu_needs_its_input_alone():
  x = normal(3, 4)
  out, pull = jax.vjp(operand.gelu, x)
  np.testing.assert_array_equal([a for a in jax.tree.leaves(pull) if a.ndim], [x])
  np.testing.assert_allclose(out, jax.nn.gelu(x), atol=1e-6)
