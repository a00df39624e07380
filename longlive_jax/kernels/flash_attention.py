"""Flash attention in the rectangles of a training clip: Triton, forward and backward.

A program owns a tile of queries (forward, gradient of queries) or of keys (gradients of
keys and values) inside one chunk, and walks over the runs of consecutive tokens that it
shares rectangles with: the history of a chunk is one run a rank, the chunk itself one
more. Runs follow from positions by arithmetic; nothing outside of the rectangles is
read, and only the last tile of a run may need a mask.

Softmax is in powers of two, its scale folded into one multiply-add a logit. Matrix
products take the dtype of the inputs and add in float32. Nothing is added atomically,
so gradients repeat to the bit.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a kernel is cut: tokens of a tile, both powers of two, and its pipeline."""

  queries: int
  keys: int
  num_warps: int
  num_stages: int


# For Hopper and heads of 128, as large as registers and shared memory allow.
FORWARD = Tiles(128, 128, 8, 2)
QUERY_GRADIENT = Tiles(128, 64, 8, 3)
KEY_GRADIENT = Tiles(64, 128, 8, 3)


def forward(
  q: Array,
  k: Array,
  v: Array,
  lengths: Array | None,
  *,
  layout: ClipLayout,
  run: Launcher,
  tiles: Tiles = FORWARD,
) -> tuple[Array, Array]:
  """Attention under the mask of a layout; `run` is `launch` or the interpreter.

  Args:
    q, k, v: (b, s, n, d) with s = layout.length, d a power of two from 16 on, of one
      dtype: bfloat16, float16 or float32.
    lengths: int32 (b,), valid positions, or None for all.

  Returns:
    out (b, s, n, d), 0 where there is padding, and the float32 log-sum-exp of the
    logits (b, n, s), infinite there.

  Raises:
    ValueError: shapes or dtypes that do not fit.
  """
  out, lse = run(forward_call((q, k, v), lengths, layout, tiles))
  return out, lse


def backward(
  q: Array,
  k: Array,
  v: Array,
  lengths: Array | None,
  out: Array,
  lse: Array,
  gradient: Array,
  *,
  layout: ClipLayout,
  run: Launcher,
  query_tiles: Tiles = QUERY_GRADIENT,
  key_tiles: Tiles = KEY_GRADIENT,
) -> tuple[Array, Array, Array]:
  """Gradients of q, k, v (b, s, n, d), 0 at padding.

  Args:
    q, k, v, lengths, layout, run: see `forward`; out, lse: what it returned.
    gradient: (b, s, n, d), of out.
  """
  gradient = gradient.astype(q.dtype)
  products = gradient.astype(jnp.float32) * jnp.asarray(out, jnp.float32)
  delta = jnp.moveaxis(jnp.sum(products, axis=-1), 1, 2)  # (b, n, s)
  inputs = q, k, v, gradient, lse, delta
  (dq,) = run(query_gradient_call(inputs, lengths, layout, query_tiles))
  dk, dv = run(key_gradient_call(inputs, lengths, layout, key_tiles))
  return dq, dk, dv


Inputs = tuple[Array, ...]


def forward_call(
  inputs: Inputs, lengths: Array | None, layout: ClipLayout, tiles: Tiles = FORWARD
) -> Call:
  """q, k, v -> out (b, s, n, d) and lse (b, n, s)."""
  q = inputs[0]
  lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
  outputs = jax.ShapeDtypeStruct(q.shape, q.dtype), lse
  return _call(_flash_forward, inputs, lengths, outputs, layout, tiles, by_queries=True)


def query_gradient_call(
  inputs: Inputs,
  lengths: Array | None,
  layout: ClipLayout,
  tiles: Tiles = QUERY_GRADIENT,
) -> Call:
  """q, k, v and the gradient (b, s, n, d), lse and delta (b, n, s) -> dq."""
  kernel = _flash_query_gradient
  outputs = (jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype),)
  return _call(kernel, inputs, lengths, outputs, layout, tiles, by_queries=True)


def key_gradient_call(
  inputs: Inputs, lengths: Array | None, layout: ClipLayout, tiles: Tiles = KEY_GRADIENT
) -> Call:
  """What `query_gradient_call` takes -> dk and dv."""
  kernel = _flash_key_gradient
  outputs = (jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype),) * 2
  return _call(kernel, inputs, lengths, outputs, layout, tiles, by_queries=False)


def _call(kernel, inputs, lengths, outputs, layout, tiles, *, by_queries) -> Call:
  """A program for each tile of queries (or keys) of each chunk and for each head."""
  q, k, v = inputs[:3]
  b, s, n, d = q.shape
  if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype):
    raise ValueError(
      f"q, k, v are {q.shape} {q.dtype}, {k.shape} {k.dtype}, {v.shape} {v.dtype}; "
      "they must have one shape and one dtype"
    )
  if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise ValueError(f"q.dtype={q.dtype} must be bfloat16, float16 or float32")
  if s != layout.length:
    raise ValueError(f"q.shape={q.shape} must have layout.length={layout.length} rows")
  if d < 16 or d & (d - 1):
    raise ValueError(f"q.shape={q.shape} must end with a power of two from 16 on")
  rows, walked = tiles.queries, tiles.keys
  if not by_queries:
    rows, walked = walked, rows
  fills = layout.chunk % walked == 0 and layout.first_chunk % walked == 0
  return Call(
    kernel,
    (*inputs, q if lengths is None else lengths),  # q is not read there
    outputs,
    (layout.halves * layout.chunks * math.ceil(layout.chunk / rows), b * n),
    {
      "CHUNK": layout.chunk,
      "CHUNKS": layout.chunks,
      "SHIFT": layout.shift,
      "SPAN": layout.span,
      "RANKS": layout.ranks,
      "HALVES": layout.halves,
      "PADDED": lengths is not None,
      "EVEN": fills and lengths is None,
      "HEADS": n,
      "D": d,
      "TILE_Q": tiles.queries,
      "TILE_K": tiles.keys,
    },
    num_warps=tiles.num_warps,
    num_stages=tiles.num_stages,
  )


LOG2_E = tl.constexpr(math.log2(math.e)) if tl else math.log2(math.e)


@jit
def _index(position, half, SPAN: tl.constexpr, HALVES: tl.constexpr):
  """ClipLayout.index."""
  return position + (position // SPAN * (HALVES - 1) + half) * SPAN


@jit
def _chunk_span(chunk, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
  """ClipLayout.chunk_span."""
  end = (chunk + 1) * CHUNK - SHIFT
  return tl.maximum(end - CHUNK, 0), end


@jit
def _query_tile(
  CHUNK: tl.constexpr,
  CHUNKS: tl.constexpr,
  SHIFT: tl.constexpr,
  HALVES: tl.constexpr,
  TILE_Q: tl.constexpr,
):
  """Chunk's positions [start, end), first position and half of a program's queries.

  The last chunk sees most: it starts first, so that no program is left alone at last.
  """
  TILES: tl.constexpr = (CHUNK + TILE_Q - 1) // TILE_Q
  program = tl.program_id(0)
  chunk = CHUNKS - 1 - program // (TILES * HALVES)
  start, end = _chunk_span(chunk, CHUNK, SHIFT)
  return start, end, start + program % TILES * TILE_Q, program // TILES % HALVES


@jit
def _head(
  CHUNK: tl.constexpr,
  CHUNKS: tl.constexpr,
  SHIFT: tl.constexpr,
  HALVES: tl.constexpr,
  HEADS: tl.constexpr,
  D: tl.constexpr,
):
  """Where a program's head begins in (b, s, n, d) and in (b, n, s), and its sample."""
  S: tl.constexpr = HALVES * (CHUNKS * CHUNK - SHIFT)
  head = tl.program_id(1).to(tl.int64)
  sample = head // HEADS
  return (sample * S * HEADS + head % HEADS) * D, head * S, sample


@jit
def _key_run(
  run, own_run, start, limit, half, SPAN: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
  """First index and number of keys of a run: the history rank by rank, then itself."""
  own = run == own_run
  first = tl.where(own, _index(start, half, SPAN, HALVES), run * SPAN * HALVES)
  count = tl.where(own, limit - start, tl.minimum(SPAN, start - run * SPAN))
  return first, count


@jit
def _load(pointer, first, left, ROWS: tl.constexpr, STRIDE: tl.constexpr,
          D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
  """Rows (ROWS, D) from index `first` on; if masked, 0 behind `left` rows."""
  row = tl.arange(0, ROWS)[:, None]
  at = pointer + first.to(tl.int64) * STRIDE + row * STRIDE + tl.arange(0, D)[None, :]
  if MASKED:
    tile = tl.load(at, mask=row < left, other=0.0)
  else:
    tile = tl.load(at)
  return tile


@jit
def _store(pointer, first, tile, left, ROWS: tl.constexpr, STRIDE: tl.constexpr,
           D: tl.constexpr):  # fmt: skip
  row = tl.arange(0, ROWS)[:, None]
  at = pointer + first.to(tl.int64) * STRIDE + row * STRIDE + tl.arange(0, D)[None, :]
  tl.store(at, tile.to(pointer.dtype.element_ty), mask=row < left)


@jit
def _logits(q, k, left, MASKED: tl.constexpr):
  """q k^T (queries, keys) float32, unscaled; if masked, -inf behind `left` keys."""
  s = tl.dot(q, tl.trans(k), input_precision="ieee")
  if MASKED:
    s = tl.where(tl.arange(0, k.shape[0])[None, :] < left, s, float("-inf"))
  return s


@jit
def _add_keys(
  total, weight, top, q, k_ptr, v_ptr, first, left,
  SCALE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, TILE_K: tl.constexpr,
  MASKED: tl.constexpr,
):  # fmt: skip
  """One more tile of keys in the online softmax. A tile has at least one key."""
  k = _load(k_ptr, first, left, TILE_K, STRIDE, D, MASKED)
  s = _logits(q, k, left, MASKED)
  new_top = tl.maximum(top, tl.max(s, axis=1) * SCALE)
  p = tl.exp2(tl.fma(s, SCALE, -new_top[:, None]))
  shrink = tl.exp2(top - new_top)
  weight = weight * shrink + tl.sum(p, axis=1)
  v = _load(v_ptr, first, left, TILE_K, STRIDE, D, MASKED)
  total = total * shrink[:, None]
  total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")
  return total, weight, new_top


@jit
def _flash_forward(
  q_ptr,
  k_ptr,
  v_ptr,
  lengths_ptr,
  out_ptr,
  lse_ptr,
  CHUNK: tl.constexpr,
  CHUNKS: tl.constexpr,
  SHIFT: tl.constexpr,
  SPAN: tl.constexpr,
  RANKS: tl.constexpr,
  HALVES: tl.constexpr,
  PADDED: tl.constexpr,
  EVEN: tl.constexpr,
  HEADS: tl.constexpr,
  D: tl.constexpr,
  TILE_Q: tl.constexpr,
  TILE_K: tl.constexpr,
):
  STRIDE: tl.constexpr = HEADS * D
  SCALE: tl.constexpr = LOG2_E / D**0.5
  head, rows, sample = _head(CHUNK, CHUNKS, SHIFT, HALVES, HEADS, D)
  start, end, position, half = _query_tile(CHUNK, CHUNKS, SHIFT, HALVES, TILE_Q)
  limit = tl.minimum(end, tl.load(lengths_ptr + sample)) if PADDED else end
  index = _index(position, half, SPAN, HALVES)
  live = tl.arange(0, TILE_Q) < limit - position
  q = _load(q_ptr + head, index, limit - position, TILE_Q, STRIDE, D, True)
  k_ptr += head
  v_ptr += head

  total = tl.zeros((TILE_Q, D), tl.float32)
  weight = tl.zeros((TILE_Q,), tl.float32)
  top = tl.full((TILE_Q,), float("-inf"), tl.float32)
  own_run = (start + SPAN - 1) // SPAN
  for run in range(0, tl.where(position < limit, own_run + 1, 0)):
    first, count = _key_run(run, own_run, start, limit, half, SPAN, HALVES)
    whole = count // TILE_K * TILE_K
    for i in range(0, whole, TILE_K):
      total, weight, top = _add_keys(
        total, weight, top, q, k_ptr, v_ptr, first + i, count - i,
        SCALE, STRIDE, D, TILE_K, False,
      )  # fmt: skip
    if not EVEN:
      for i in range(whole, count, TILE_K):
        total, weight, top = _add_keys(
          total, weight, top, q, k_ptr, v_ptr, first + i, count - i,
          SCALE, STRIDE, D, TILE_K, True,
        )  # fmt: skip

  weight = tl.where(live, weight, 1.0)
  out = tl.where(live[:, None], total / weight[:, None], 0.0)
  lse = tl.where(live, (top + tl.log2(weight)) / LOG2_E, float("inf"))
  _store(out_ptr + head, index, out, end - position, TILE_Q, STRIDE, D)
  row = tl.arange(0, TILE_Q)
  tl.store(lse_ptr + rows + index + row, lse, mask=row < end - position)


@jit
def _add_to_query_gradient(
  dq, q, gradient, lse, delta, k_ptr, v_ptr, first, left,
  SCALE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, TILE_K: tl.constexpr,
  MASKED: tl.constexpr,
):  # fmt: skip
  k = _load(k_ptr, first, left, TILE_K, STRIDE, D, MASKED)
  v = _load(v_ptr, first, left, TILE_K, STRIDE, D, MASKED)
  p = tl.exp2(tl.fma(_logits(q, k, left, MASKED), SCALE, -lse[:, None]))
  dp = tl.dot(gradient, tl.trans(v), input_precision="ieee")
  ds = p * (dp - delta[:, None])
  return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit
def _flash_query_gradient(
  q_ptr,
  k_ptr,
  v_ptr,
  gradient_ptr,
  lse_ptr,
  delta_ptr,
  lengths_ptr,
  dq_ptr,
  CHUNK: tl.constexpr,
  CHUNKS: tl.constexpr,
  SHIFT: tl.constexpr,
  SPAN: tl.constexpr,
  RANKS: tl.constexpr,
  HALVES: tl.constexpr,
  PADDED: tl.constexpr,
  EVEN: tl.constexpr,
  HEADS: tl.constexpr,
  D: tl.constexpr,
  TILE_Q: tl.constexpr,
  TILE_K: tl.constexpr,
):
  STRIDE: tl.constexpr = HEADS * D
  SCALE: tl.constexpr = LOG2_E / D**0.5
  head, rows, sample = _head(CHUNK, CHUNKS, SHIFT, HALVES, HEADS, D)
  start, end, position, half = _query_tile(CHUNK, CHUNKS, SHIFT, HALVES, TILE_Q)
  limit = tl.minimum(end, tl.load(lengths_ptr + sample)) if PADDED else end
  index = _index(position, half, SPAN, HALVES)
  left = limit - position
  q = _load(q_ptr + head, index, left, TILE_Q, STRIDE, D, True)
  gradient = _load(gradient_ptr + head, index, left, TILE_Q, STRIDE, D, True)
  row = tl.arange(0, TILE_Q)
  at = rows + index + row
  lse = tl.load(lse_ptr + at, mask=row < left, other=float("inf")) * LOG2_E
  delta = tl.load(delta_ptr + at, mask=row < left, other=0.0)
  k_ptr += head
  v_ptr += head

  dq = tl.zeros((TILE_Q, D), tl.float32)
  own_run = (start + SPAN - 1) // SPAN
  for run in range(0, tl.where(left > 0, own_run + 1, 0)):
    first, count = _key_run(run, own_run, start, limit, half, SPAN, HALVES)
    whole = count // TILE_K * TILE_K
    for i in range(0, whole, TILE_K):
      dq = _add_to_query_gradient(
        dq, q, gradient, lse, delta, k_ptr, v_ptr, first + i, count - i,
        SCALE, STRIDE, D, TILE_K, False,
      )  # fmt: skip
    if not EVEN:
      for i in range(whole, count, TILE_K):
        dq = _add_to_query_gradient(
          dq, q, gradient, lse, delta, k_ptr, v_ptr, first + i, count - i,
          SCALE, STRIDE, D, TILE_K, True,
        )  # fmt: skip
  _store(dq_ptr + head, index, dq * (D**-0.5), end - position, TILE_Q, STRIDE, D)


@jit
def _add_to_key_gradients(
  dk, dv, k, v, q_ptr, gradient_ptr, lse_ptr, delta_ptr, first, left,
  SCALE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, TILE_Q: tl.constexpr,
  MASKED: tl.constexpr,
):  # fmt: skip
  """One more tile of queries. Those behind `left` have weight 0: their lse is inf."""
  q = _load(q_ptr, first, left, TILE_Q, STRIDE, D, MASKED)
  gradient = _load(gradient_ptr, first, left, TILE_Q, STRIDE, D, MASKED)
  row = tl.arange(0, TILE_Q)
  if MASKED:
    lse = tl.load(lse_ptr + first + row, mask=row < left, other=float("inf"))
    delta = tl.load(delta_ptr + first + row, mask=row < left, other=0.0)
  else:
    lse = tl.load(lse_ptr + first + row)
    delta = tl.load(delta_ptr + first + row)
  s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (keys, queries)
  p = tl.exp2(tl.fma(s, SCALE, -(lse * LOG2_E)[None, :]))
  dv = tl.dot(p.to(gradient.dtype), gradient, dv, input_precision="ieee")
  dp = tl.dot(v, tl.trans(gradient), input_precision="ieee")
  ds = p * (dp - delta[None, :])
  dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
  return dk, dv


@jit
def _flash_key_gradient(
  q_ptr,
  k_ptr,
  v_ptr,
  gradient_ptr,
  lse_ptr,
  delta_ptr,
  lengths_ptr,
  dk_ptr,
  dv_ptr,
  CHUNK: tl.constexpr,
  CHUNKS: tl.constexpr,
  SHIFT: tl.constexpr,
  SPAN: tl.constexpr,
  RANKS: tl.constexpr,
  HALVES: tl.constexpr,
  PADDED: tl.constexpr,
  EVEN: tl.constexpr,
  HEADS: tl.constexpr,
  D: tl.constexpr,
  TILE_Q: tl.constexpr,
  TILE_K: tl.constexpr,
):
  STRIDE: tl.constexpr = HEADS * D
  SCALE: tl.constexpr = LOG2_E / D**0.5
  TILES: tl.constexpr = (CHUNK + TILE_K - 1) // TILE_K
  head, rows, sample = _head(CHUNK, CHUNKS, SHIFT, HALVES, HEADS, D)
  # The first clean chunk is seen by most: it starts first.
  program = tl.program_id(0)
  half = program // (CHUNKS * TILES)
  start, end = _chunk_span(program // TILES % CHUNKS, CHUNK, SHIFT)
  position = start + program % TILES * TILE_K
  valid = tl.load(lengths_ptr + sample) if PADDED else CHUNKS * CHUNK - SHIFT
  left = tl.minimum(end, valid) - position
  index = _index(position, half, SPAN, HALVES)
  k = _load(k_ptr + head, index, left, TILE_K, STRIDE, D, True)
  v = _load(v_ptr + head, index, left, TILE_K, STRIDE, D, True)
  q_ptr += head
  gradient_ptr += head
  lse_ptr += rows
  delta_ptr += rows

  dk = tl.zeros((TILE_K, D), tl.float32)
  dv = tl.zeros((TILE_K, D), tl.float32)
  # Noisy keys are seen by their own chunk. Clean ones by clean queries from their own
  # chunk on and by noisy ones from the next: from each rank a run of both.
  rank = start // SPAN
  runs = tl.where(half == 1, 1, (RANKS - rank) * HALVES)
  for run in range(0, tl.where(left > 0, runs, 0)):
    run_half = tl.where(half == 1, 1, run % HALVES)
    run_rank = rank + run // HALVES
    begin = tl.where(run_half > half, end, start)
    begin = tl.maximum(begin, run_rank * SPAN)
    behind = tl.minimum(tl.where(half == 1, end, (run_rank + 1) * SPAN), valid)
    first = begin + (run_rank * (HALVES - 1) + run_half) * SPAN
    count = tl.maximum(behind - begin, 0)
    whole = count // TILE_Q * TILE_Q
    for i in range(0, whole, TILE_Q):
      dk, dv = _add_to_key_gradients(
        dk, dv, k, v, q_ptr, gradient_ptr, lse_ptr, delta_ptr, first + i, count - i,
        SCALE, STRIDE, D, TILE_Q, False,
      )  # fmt: skip
    if not EVEN:
      for i in range(whole, count, TILE_Q):
        dk, dv = _add_to_key_gradients(
          dk, dv, k, v, q_ptr, gradient_ptr, lse_ptr, delta_ptr, first + i, count - i,
          SCALE, STRIDE, D, TILE_Q, True,
        )  # fmt: skip
  # Rows of padding hold nonsense, perhaps not finite.
  live = (tl.arange(0, TILE_K) < left)[:, None]
  dk, dv = tl.where(live, dk * (D**-0.5), 0.0), tl.where(live, dv, 0.0)
  _store(dk_ptr + head, index, dk, end - position, TILE_K, STRIDE, D)
  _store(dv_ptr + head, index, dv, end - position, TILE_K, STRIDE, D)
