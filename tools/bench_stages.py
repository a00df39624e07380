"""The stages of a chunk, each by itself at its real shapes, and the machine's rates.

A stage is built of the network's own modules and jitted alone. What it is held against
is its floor: its operations over the rate of a large matrix product in its number of
bits, or its least bytes over the bandwidth of a copy, whichever takes longer. The rates
are measured in the same run, those in fewer bits from that in 16.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import device_clock
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from longlive_jax.generate import sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers import fp8_attention, kv_cache, kv_slots, operand, rope
from longlive_jax.layers.norm import modulation
from longlive_jax.models import block_scan, dit, pixels, vae
from longlive_jax.parallel import costs
from longlive_jax.parallel.hardware import Hardware
from longlive_jax.quant import fp8

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
  """A stage to run.

  Attributes:
    name: of the stage in parallel/costs.py.
    function: of the arguments.
    arguments: pytrees of arrays.
    carries: the function returns (first argument for the next call, rest), and the
      first argument's memory is reused, as generating does with caches and states.
  """

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  carries: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of a call, and the bytes of its temporaries."""

  seconds: float
  temporaries: int


def timed(case: Case, rounds: int = 5, budget: float = 0.05) -> Timing:
  """The median of several rounds of calls that are queued together.

  On a GPU the time in which it is busy: to launch a small stage takes the host longer.
  """
  own, *others = case.arguments
  leaves, rest = jax.tree.leaves(own), jax.tree.leaves(others)
  structure = jax.tree.structure(case.arguments)

  def function(first: list[Array], rest: list[Array]) -> Any:
    # Flat: flattening modules for every call would take the host longer than the call.
    out = case.function(*jax.tree.unflatten(structure, [*first, *rest]))
    return (jax.tree.leaves(out[0]), out[1]) if case.carries else (first[:0], out)

  program = jax.jit(function, donate_argnums=0 if case.carries else ())
  first = [jnp.copy(leaf) for leaf in leaves] if case.carries else leaves
  compiled = program.lower(first, rest).compile()

  def run(calls: int = 1) -> None:
    nonlocal first
    for _ in range(calls):
      new, out = program(first, rest)
      first = new if case.carries else first
    jax.block_until_ready((first, out))

  run()
  (once,), _ = device_clock.clocked(run, 1)
  calls = int(np.clip(budget / once, 1, 50))
  times, busy = device_clock.clocked(lambda: run(calls), rounds)
  all_calls = float(np.median(times)) if busy is None else busy / rounds
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return Timing(all_calls / calls, temporaries)


# ------------------------------------------------------------------ stages
def stage_inputs(
  model: dit.CausalDiT, sampling: Sampling, y: int, x: int
) -> dict[str, Any]:
  """What the stages of one video read, with a full window; of blocks: the first one."""
  c, p = model.config, model.config.tokens_per_frame(y, x)
  f, w = sampling.frames_per_chunk, sampling.window_frames
  # rbg: threefry compiles for seconds on a CPU, and again for every shape.
  keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 16))

  def numbers(*shape: int) -> Array:
    return jax.random.normal(next(keys), shape, model.dtype)

  positions = np.arange(w, w + f, dtype=np.int32)[None]
  text = numbers(1, 1, c.text_len, c.text_dim)
  cache = sampler.init_cache(model, sampling, 1, y, x)
  cache = dataclasses.replace(cache, frame=jnp.arange(w, dtype=jnp.int32)[None])

  def first(stacked: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], stacked)

  block, layer = first(block_scan.block_runs(model)[0]), first((cache.k, cache.v))
  reads = fp8_attention.operand_dtype(
    sampling.attention_format, model.dtype, c.head_dim
  )
  read = kv_slots.attended_dtype(layer[1], model.dtype, reads)
  h, rows = numbers(1, f, p, c.dim), numbers(3, 1, f, 1, c.dim)
  norm2 = modulation(rows[0], rows[1], c.eps)
  return {
    "block": block,
    "latents": numbers(1, f, y, x, c.in_channels),
    "time": numbers(1, f, c.freq_dim),
    "h": h,
    "text_reads": operand.normed(h, block.norm3.affine(), [block.cross_attn.q]),
    "ffn_reads": operand.normed(h, norm2, [block.ffn.fc1]),
    "e": numbers(1, f, c.dim),
    "rows": rows,  # scale, shift and gate
    "projected": block.self_attn.queries(numbers(1, f * p, c.dim)),
    "q": fp8.as_dtype(numbers(1, f * p, c.heads, c.head_dim), reads),
    "k": fp8.as_dtype(numbers(1, f, p, c.heads, c.head_dim), read),
    "window": fp8.as_dtype(numbers(1, w * p, c.heads, c.head_dim), reads),
    "attended": numbers(1, f * p, c.dim),
    "text": text,
    "text_keys": first(model.text_keys(model.embed_text(text))),
    "rotation": model.rotation(rope.temporal_rotation(positions, c.head_dim), y, x),
    "cache": cache,
    "layer": layer,
    "placement": kv_cache.place(cache, jnp.asarray(positions)),
  }


def transformer_cases(
  model: dit.CausalDiT, inputs: Mapping[str, Any], attention_format: str = ""
) -> Iterator[Case]:
  """Every stage of the transformer.

  Args:
    inputs: of `stage_inputs`; of shapes, if nothing is to be run.
    attention_format: of Sampling.
  """
  c = model.config
  reads = fp8_attention.operand_dtype(attention_format, model.dtype, c.head_dim)

  def case(name: str, function: Callable[..., Any], *names: str, carries=False) -> Case:
    given = {**inputs, "model": model}
    return Case(name, function, tuple(given[name] for name in names), carries)

  def embed(model, latents):
    return model.patch_embedding(dit.patchify(latents, c.patch))

  def project(block, h, rows):
    own = block.self_attn
    norm1 = modulation(rows[0], rows[1], c.eps)
    h = operand.normed(h, norm1, readers=[own.q, own.k, own.v])
    tokens = h.reshape(1, -1, c.dim)
    return own.queries(tokens), own.keys_values(tokens)

  def norm_rope(q, k, rotation):
    return [rope.rotate(each, rotation, reads) for each in (q, k)]

  def output(block, h, attended, rows):
    norm3, readers = block.norm3.affine(), [block.cross_attn.q]
    return operand.added(h, block.self_attn.o, attended, rows[2], norm3, readers)

  def attend_text(block, h, read, keys, rows):
    norm2, readers = modulation(rows[0], rows[1], c.eps), [block.ffn.fc1]
    found = block.attend_text(read, keys)
    return operand.added(h, block.cross_attn.o, found, None, norm2, readers)

  def feed(block, h, read, rows):
    return h + rows[2] * block.ffn(read)

  def write(cache, placement, k, v):
    def encode(layer):
      return kv_slots.encode(layer[0], k), kv_slots.encode(layer[1], v)

    encoded = jax.lax.map(encode, (cache.k, cache.v))
    return kv_cache.commit(cache, placement, *encoded), ()

  yield case("patch_embedding", embed, "model", "latents")
  yield case("time", lambda model, time: model.embed_time(time), "model", "time")
  yield case("qkv", project, "block", "h", "rows")
  yield case("norm_rope", norm_rope, "projected", "projected", "rotation")
  yield case("cache_read", kv_cache.attended, "placement", "layer", "k", "k")
  attend = fp8_attention.by_format(attention_format, model.dtype)
  yield case("attention", attend, "q", "window", "window")
  yield case("output", output, "block", "h", "attended", "rows")
  yield case(
    "cross_attention", attend_text, "block", "h", "text_reads", "text_keys", "rows"
  )
  yield case("ffn", feed, "block", "h", "ffn_reads", "rows")
  yield case("head", lambda model, h, e: model.head(h, e), "model", "h", "e")
  yield case(
    "text", lambda model, t: model.text_keys(model.embed_text(t)), "model", "text"
  )
  yield case("cache_write", write, "cache", "placement", "k", "k", carries=True)


def decode_case(video_vae: vae.VideoVAE, frames: int, y: int, x: int) -> Case:
  """Decoding `frames` latent frames of one video, to uint8."""

  def decode(state, video_vae, latents):
    decoded, _, state = vae.decode_chunk(video_vae, state, latents)
    return state, pixels.to_uint8(decoded)

  shape = (1, frames, y, x, video_vae.config.z_dim)
  latents = jax.random.normal(jax.random.key(1, impl="rbg"), shape)
  state = vae.init_decoder_state(video_vae, 1, y, x)
  return Case("vae", decode, (state, video_vae, latents), carries=True)


# ------------------------------------------------------------------ rates
def measured(hardware: Hardware, config: dit.WanConfig, tokens: int, dtype) -> Hardware:
  """The same device with rates of this run.

  Of a product with the first layer of the FFN, a 3x3 convolution of 256 channels, a
  copy as large as the product's output, and a copy of that to the host; all of them
  large enough to be a rate. Rates in fewer bits keep their ratio to the product's.
  """
  rows, d_in, d_out = (max(512, n) for n in (tokens, config.dim, config.ffn_dim))

  def numbers(*shape: int) -> Array:
    return jax.random.normal(jax.random.key(2, impl="rbg"), shape, dtype)

  x, weight, hidden = numbers(rows, d_in), numbers(d_out, d_in), numbers(rows, d_out)
  product = Case("matrix", lambda x, weight: x @ weight.T, (x, weight))
  matrix = 2 * rows * d_in * d_out / timed(product).seconds
  channels, side = 256, max(16, int((hidden.size / 256) ** 0.5))
  convolution = Case(
    "convolution",
    lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC")
    ),
    (numbers(1, side, side, channels), numbers(channels, 3, 3, channels)),
  )
  convolutions = 2 * side**2 * channels**2 * 9 / timed(convolution).seconds
  # Not jnp.copy, which need not read; a sign costs nothing.
  copied = timed(Case("copy", jnp.negative, (hidden,)))
  times = []
  for turn in range(3):
    fresh = jax.block_until_ready(hidden + turn)  # a host copy is kept with its array
    began = time.perf_counter()
    np.asarray(fresh)
    times.append(time.perf_counter() - began)
  return dataclasses.replace(
    hardware,
    source="measured by tools/bench_generate.py; links as before",
    matrix=matrix,
    matrix_fp8=matrix * hardware.matrix_fp8 / hardware.matrix,
    matrix_fp4=matrix * hardware.matrix_fp4 / hardware.matrix,
    convolution=convolutions,
    convolution_fp8=convolutions * hardware.convolution_fp8 / hardware.convolution,
    copy=2 * hidden.nbytes / copied.seconds,
    host=hidden.nbytes / float(np.median(times)),
  )


def stage_table(
  cases: Iterable[Case], stages: dict[str, costs.Stage], hardware: Hardware
) -> dict[str, dict[str, float]]:
  """Milliseconds of every stage, by itself and in a chunk, beside its floor."""
  table = {}
  for case in cases:
    stage, timing = stages[case.name], timed(case)
    logging.info("%s: %.4f ms", case.name, 1e3 * timing.seconds)
    # Attention as products in its number of bits: its own rate is what is asked here.
    floor = dataclasses.replace(
      hardware, attention=hardware.matrix, attention_fp8=hardware.matrix_fp8
    ).floor(stage)
    table[case.name] = {
      "calls": stage.calls,
      "ms": 1e3 * timing.seconds,
      "floor_ms": 1e3 * floor,
      "chunk_ms": 1e3 * stage.calls * timing.seconds,
      "flops": stage.flops,
      "bytes": stage.bytes,
      "temporary_bytes": timing.temporaries,
    }
  return table


def shares(
  hardware: Hardware,
  stages: dict[str, costs.Stage],
  table: dict[str, dict[str, float]],
  denoise_ms: float,
  decode_ms: float | None,
) -> Hardware:
  """The hardware with the rate of attention and the shares of whole chunks.

  Args:
    table: of `stage_table`.
    denoise_ms, decode_ms: of a chunk; None without a decoder.
  """
  (cost,) = stages["attention"].costs
  rate = stages["attention"].flops / (1e-3 * table["attention"]["ms"])
  faster = rate / getattr(hardware, cost.unit)  # in 16 or 8 bits; both are scaled
  hardware = dataclasses.replace(
    hardware,
    attention=faster * hardware.attention,
    attention_fp8=faster * hardware.attention_fp8,
  )

  def share(names: Iterable[str], ms: float) -> float:
    return 1e3 * sum(stages[n].calls * hardware.floor(stages[n]) for n in names) / ms

  denoise = share([name for name in stages if name != "vae"], denoise_ms)
  decode = share(["vae"], decode_ms) if decode_ms else hardware.decode_share
  return dataclasses.replace(
    hardware, denoise_share=denoise, unrolled_share=denoise, decode_share=decode
  )
