"""Attention over training clips: layouts against SPEC 2.2, three ways to compute it.

Small tiles on Triton's interpreter, the real ones offline; a GPU runs the same cases.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import compile_offline, needs_gpu
from random_weights import normal
from triton_interpreter import Interpreter

from longlive_jax.kernels import flash_attention
from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.kernels.flash_attention import Tiles
from longlive_jax.layers import remat, teacher_forcing

# The loops of a program walk in steps of 16, its own tokens are up to 32.
SMALL = {
  "forward": {"tiles": Tiles(32, 16, 4, 2)},
  "backward": {"query_tiles": Tiles(32, 16, 4, 2), "key_tiles": Tiles(16, 32, 4, 2)},
}
WIDTH = 1, 16  # heads, head_dim
CASES = {
  "whole_tiles": (ClipLayout(32, 2), None),
  "longer_than_a_tile": (ClipLayout(37, 2), None),
  "two_ranks": (ClipLayout(20, 4, ranks=2), None),
  "three_ranks_padded": (ClipLayout(13, 3, ranks=3), [30, 0]),
  "first_frame": (ClipLayout(20, 2, first_chunk=7, teacher_forced=False), None),
  "first_frame_padded": (ClipLayout(20, 2, 7, teacher_forced=False), [5, 26]),
}


@pytest.fixture(scope="module")
def interpreter():
  # The bounds of loops were arrays of one number there, which NumPy 2.4 refuses.
  pytest.importorskip("triton", minversion="3.7", reason="3.6 does not interpret loops")
  with Interpreter() as process:
    yield process


@pytest.fixture
def interpreted(interpreter, monkeypatch):
  """Puts the interpreter where implementation='triton' would launch kernels."""

  def on_host(name, shapes, *args, layout):
    call = functools.partial(
      interpreter, f"flash_attention:{name}", layout=layout, **SMALL[name]
    )
    return jax.pure_callback(lambda *a: tuple(call(*a)), shapes, *args)

  def forward(q, k, v, lengths, *, layout, run):
    b, s, n, _ = q.shape
    shapes = jax.ShapeDtypeStruct(q.shape, q.dtype), S((b, n, s), jnp.float32)
    return on_host("forward", shapes, q, k, v, lengths, layout=layout)

  def backward(*args, layout, run):
    shapes = (jax.ShapeDtypeStruct(args[0].shape, args[0].dtype),) * 3
    return on_host("backward", shapes, *args, layout=layout)

  monkeypatch.setattr(flash_attention, "forward", forward)
  monkeypatch.setattr(flash_attention, "backward", backward)


@pytest.fixture(
  params=["blockwise", "pieces", "interpreter", pytest.param("triton", marks=needs_gpu)]
)
def implementation(request):
  if request.param != "interpreter":
    return request.param
  request.getfixturevalue("interpreted")
  return "triton"


# ------------------------------------------------------------------ layout
def brute_mask(layout: ClipLayout) -> np.ndarray:
  """SPEC 2.2 over [clean, noisy] or [clip], then rank by rank."""
  tokens, chunk = layout.tokens, layout.chunk
  edges = [0, *range(layout.first_chunk or chunk, tokens, chunk), tokens]
  keep = np.zeros((layout.length,) * 2, bool)
  for start, end in itertools.pairwise(edges):
    keep[start:end, :end] = True  # sees what came before, and itself
    if layout.teacher_forced:
      noisy = slice(tokens + start, tokens + end)
      keep[noisy, :start] = True  # clean chunks before it ...
      keep[noisy, noisy] = True  # ... and itself
  halves = np.arange(layout.length).reshape(layout.halves, layout.ranks, -1)
  order = halves.swapaxes(0, 1).reshape(-1)
  return keep[np.ix_(order, order)]


@st.composite
def layouts(draw) -> ClipLayout:
  chunk, ranks = draw(st.integers(1, 7)), draw(st.integers(1, 4))
  if draw(st.booleans()):
    return ClipLayout(chunk, ranks * draw(st.integers(1, 3)), ranks=ranks)
  first = draw(st.integers(0, chunk))
  return ClipLayout(chunk, draw(st.integers(1, 5)), first, teacher_forced=False)


@given(layouts())
@settings(max_examples=40, deadline=None)
def test_mask_and_rectangles_are_those_of_the_spec(layout):
  want = brute_mask(layout)
  index = np.arange(layout.length)
  np.testing.assert_array_equal(layout.mask(index, index), want)
  found = np.zeros(want.shape, int)
  for rectangle in layout.rectangles():
    for span in rectangle.keys:
      found[slice(*rectangle.queries), slice(*span)] += 1
  np.testing.assert_array_equal(found, want)
  assert layout.pairs() == want.sum()
  assert layout.unmasked_fraction() == pytest.approx(want.mean())
  for half in range(layout.halves):
    at = layout.index(np.arange(layout.tokens), half)
    np.testing.assert_array_equal(layout.position(at), np.arange(layout.tokens))


def test_the_balanced_order():
  layout = ClipLayout(1, 4, ranks=2)
  assert [layout.index(p, 0) for p in range(4)] == [0, 1, 4, 5]
  assert [layout.index(p, 1) for p in range(4)] == [2, 3, 6, 7]
  noisy_3 = layout.rectangles()[-1]
  assert noisy_3.queries == (7, 8) and noisy_3.keys == ((0, 2), (4, 5), (7, 8))
  clean_3 = layout.rectangles()[-2]
  assert clean_3.queries == (5, 6) and clean_3.keys == ((0, 2), (4, 6))


def test_work_of_a_5b_clip():
  """32 latent frames: BASELINES.md counts 437 TFLOP/s in 27.9 ms."""
  layout = ClipLayout.of_frames(32, 8, 880)
  assert layout.length == 56_320 and layout.unmasked_fraction() == 0.3125
  assert 4 * layout.pairs() * 24 * 128 / 27.9e-3 == pytest.approx(437e12, rel=2e-3)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(chunk=0, chunks=2), "chunk=0 must be at least 1"),
    (dict(chunk=4, chunks=2, first_chunk=5), "first_chunk=5 must lie between 0 and"),
    (dict(chunk=4, chunks=2, first_chunk=1), "first_chunk=1 must be 0"),
    (dict(chunk=4, chunks=2, ranks=2, teacher_forced=False), "ranks=2 must be 1"),
    (dict(chunk=4, chunks=3, ranks=2), "chunks=3 must be a multiple of ranks=2"),
  ],
)
def test_layouts_that_do_not_fit(arguments, message):
  with pytest.raises(ValueError, match=message):
    ClipLayout(**arguments)


# ------------------------------------------------------------------ numbers
def dense(q, k, v, layout, lengths, gradient):
  """Output and gradients in float64; padding is left out of the softmax."""
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
  keep = np.broadcast_to(brute_mask(layout), (len(q), layout.length, layout.length))
  if lengths is not None:
    valid = np.asarray(layout.valid(np.arange(layout.length), lengths))
    keep = keep & valid[:, None, :] & valid[:, :, None]
  scale = q.shape[-1] ** -0.5
  p = np.where(keep[:, None], np.exp(scale * np.einsum("bqnd,bknd->bnqk", q, k)), 0)
  p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
  dp = np.einsum("bqnd,bknd->bnqk", g, v)
  ds = scale * p * (dp - (dp * p).sum(-1, keepdims=True))
  return np.einsum("bnqk,bknd->bqnd", p, v), (
    np.einsum("bnqk,bknd->bqnd", ds, k),
    np.einsum("bnqk,bqnd->bknd", ds, q),
    np.einsum("bnqk,bqnd->bknd", p, g),
  )


def inputs(name: str, dtype=jnp.float32):
  layout, lengths = CASES[name]
  shape = (1 if lengths is None else len(lengths), layout.length, *WIDTH)
  arrays = [jnp.asarray(normal(*shape, seed=i), dtype) for i in range(4)]
  lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
  return *arrays[:3], layout, lengths, arrays[3]


def both(q, k, v, layout, lengths, gradient, implementation):
  @jax.jit
  def run(q, k, v, gradient, lengths):
    def attend(q, k, v):
      return teacher_forcing.attention(
        q, k, v, layout, lengths, implementation=implementation
      )

    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(gradient)

  return run(q, k, v, gradient, lengths)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_dense(implementation, name):
  *case, gradient = inputs(name)
  out, gradients = both(*case, gradient, implementation)
  want, want_gradients = dense(*case, gradient)
  np.testing.assert_allclose(out, want, atol=3e-6)
  for found, expected in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)
  if case[-1] is not None:
    padding = ~np.asarray(case[3].valid(np.arange(case[3].length), case[4]))
    for array in (out, *gradients):
      assert not np.any(np.asarray(array)[padding])


def test_bfloat16(implementation):
  *case, gradient = inputs("longer_than_a_tile", jnp.bfloat16)
  out, gradients = both(*case, gradient, implementation)
  want, want_gradients = dense(*case, gradient)
  for found, expected in zip(
    (out, *gradients), (want, *want_gradients), strict=True
  ):
    assert found.dtype == jnp.bfloat16
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.mean(np.abs(found - expected)) < 0.004


def test_logits_of_any_size(interpreted):
  """Exponentials of single logits would be infinite or all zero in float32."""
  q, k, v, layout, _, gradient = inputs("first_frame")
  q = 300 * q
  lengths = jnp.array([22], jnp.int32)
  out, gradients = both(q, k, v, layout, lengths, gradient, "triton")
  want, pull = jax.vjp(
    lambda *a: teacher_forcing.attention(*a, layout, lengths), q, k, v
  )
  np.testing.assert_allclose(out, want, atol=1e-4)
  for found, expected in zip(gradients, pull(gradient), strict=True):
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["whole_tiles", "two_ranks"])
def test_nothing_outside_of_the_rectangles_is_read(interpreter, name):
  """A key that is not a number spoils whatever multiplies it, weight 0 or not."""
  q, k, v, layout, _, gradient = (
    np.asarray(x) if isinstance(x, jax.Array) else x for x in inputs(name)
  )
  run = functools.partial(interpreter, layout=layout)
  keep = brute_mask(layout)
  start, end = layout.rectangles()[3].queries  # noisy chunk 1
  spoilt = np.zeros(layout.length, bool)
  spoilt[start:end] = True
  nan = np.where(spoilt[:, None, None], np.nan, np.float32(1))[None]

  def backward(q, k, v, gradient):
    out, lse = run("flash_attention:forward", q, k, v, None, **SMALL["forward"])
    found = run(
      "flash_attention:backward", q, k, v, None, out, lse, gradient, **SMALL["backward"]
    )
    return out, *found

  def finite(array):
    return np.isfinite(array).all(axis=(0, 2, 3))

  out, dq, *_ = backward(q, k * nan, v * nan, gradient)
  sees = (keep & spoilt).any(axis=1)
  np.testing.assert_array_equal(finite(out), ~sees)
  np.testing.assert_array_equal(finite(dq), ~sees)
  *_, dk, dv = backward(q * nan, k, v, gradient * nan)
  seen = (keep & spoilt[:, None]).any(axis=0)
  np.testing.assert_array_equal(finite(dk), ~seen)
  np.testing.assert_array_equal(finite(dv), ~seen)


@needs_gpu
@pytest.mark.parametrize("case", ["whole_tiles", "odd", "padded", "first_frame"])
def test_real_tiles(case):
  """The kernels as they are launched, against cuDNN's pieces."""
  layout, lengths = {
    "whole_tiles": (ClipLayout.of_frames(8, 2, 880, ranks=2), None),
    "odd": (ClipLayout(333, 3), None),
    "padded": (ClipLayout(300, 4, ranks=2), jnp.array([1200, 700], jnp.int32)),
    "first_frame": (ClipLayout(880, 3, 110, teacher_forced=False), None),
  }[case]
  shape = 2, layout.length, 3, 128
  *qkv, gradient = (jnp.asarray(normal(*shape, seed=i), jnp.bfloat16) for i in range(4))
  out, gradients = both(*qkv, layout, lengths, gradient, "triton")
  want, want_gradients = both(*qkv, layout, lengths, gradient, "pieces")
  for found, expected in zip((out, *gradients), (want, *want_gradients), strict=True):
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=0.02 * size)
    assert np.mean(np.abs(found - expected)) < 0.01 * np.mean(np.abs(expected))


# ------------------------------------------------------------------ choice and errors
S = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
  ("name", "times"), [("none", 1), ("attention", 1), ("blocks", 2)]
)
def test_a_backward_pass_does_not_attend_again(monkeypatch, name, times):
  """cuDNN's outputs are kept, the keys copied together for it are not."""
  fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(
    teacher_forcing.attn, "default_implementation", lambda dtype: "cudnn"
  )
  layout = ClipLayout(8, 3)
  x = S((1, layout.length, 2, 16), jnp.bfloat16)

  def attend(q, k, v):
    return teacher_forcing.attention(q, k, v, layout, implementation="pieces")

  def loss(q, k, v):
    out = remat.rematerialised(attend, name)(q, k, v)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x))
  pieces = len(layout.rectangles())
  assert text.count("dot_product_attention_bwd_wrapper[") == pieces
  assert text.count("dot_product_attention_fwd_wrapper[") == times * pieces


def test_a_backward_pass_holds_keys_once():
  """Not once for each piece, which a scan over layers would stack."""
  layout = ClipLayout(8, 6, ranks=2)
  x = S((1, layout.length, 2, 16), jnp.bfloat16)

  def pull_back(q, k, v):
    attend = functools.partial(
      teacher_forcing.attention, layout=layout, implementation="pieces"
    )
    return jax.vjp(attend, q, k, v)[1]

  kept = jax.tree.leaves(jax.eval_shape(pull_back, x, x, x))
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= 3 * 2 * x.size


def test_the_default_is_pieces_for_half_precision_on_gpus_only():
  half = "pieces" if jax.default_backend() == "gpu" else "blockwise"
  assert teacher_forcing.default_implementation(jnp.bfloat16) == half
  assert teacher_forcing.default_implementation(jnp.float32) == "blockwise"


@pytest.mark.parametrize(
  ("shape", "dtype", "implementation", "message"),
  [
    ((1, 12, 1, 16), "float32", "flash", "implementation='flash' is unknown; use piec"),
    ((1, 11, 1, 16), "float32", None, "must have layout.length=12 rows"),
    ((1, 12, 1, 24), "float32", "triton", "must end with a power of two"),
    ((1, 12, 1, 16), "int8", "triton", "q.dtype=int8 must be bfloat16"),
  ],
)
def test_errors_name_field_value_and_remedy(shape, dtype, implementation, message):
  x = S(shape, dtype)
  attend = functools.partial(
    teacher_forcing.attention,
    layout=ClipLayout(3, 2),
    implementation=implementation,
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(attend, x, x, x)


# ------------------------------------------------------------------ GPUs elsewhere
@pytest.mark.parametrize(("capability", "ranks"), [(90, 1), (100, 4)])
@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient"])
def test_kernels_compile_for_gpus_that_are_not_here(
  tmp_path, monkeypatch, kernel, ranks, capability
):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  layout = ClipLayout.of_frames(32, 8, 880, ranks=ranks)
  x = S((1, layout.length, 24, 128), jnp.bfloat16)
  row = S((1, 24, layout.length), jnp.float32)
  inputs = (x, x, x) if kernel == "forward" else (x, x, x, x, row, row)
  call = getattr(flash_attention, f"{kernel}_call")(inputs, None, layout)
  assert call.constants["EVEN"]  # 7,040 tokens a chunk: no tile needs a mask
  compiled = compile_offline(call, capability)
  ptx = compiled.asm["ptx"]
  assert ("wgmma.mma_async" if capability == 90 else "tcgen05.mma") in ptx
  assert "cp.async.cg.shared.global" in ptx  # 16 bytes a load, ahead of their use
  assert compiled.metadata.shared <= 227 * 1024
