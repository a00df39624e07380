"""What number formats cost in quality: the toy world, variant by variant.

Every variant generates the same videos from the same noise: four shots of two chunks,
prompts that training never saw, later shots named "the same subject". Beside the
detectors' scores (tools/eval_toy.py) stand

  motion amount   pixels that the subject moves a frame, over those of the baseline
  error, first    relative L2 difference of the first chunk's latents to the baseline's
  error, all      the same over the whole video, where small differences have grown

  python tools/eval_precision.py --out tools/results/precision_toy.json
  python tools/eval_precision.py --only='kv*' --videos=16 --batch=16

Variants are named by what is in 4 or 8 bits. The last ones are studies, with types that
only this file has: precision by denoising step, by age of the cached frame, by token.
"""

import concurrent.futures
import dataclasses
import fnmatch
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import eval_toy
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from variants import choose, detecting_pool, table

from longlive_jax.data import detectors, toy_world
from longlive_jax.data.detectors import Detection
from longlive_jax.data.scores import score_all_shots, score_identity
from longlive_jax.data.toy_world import Scene
from longlive_jax.generate import precision, report
from longlive_jax.generate.precision import Precision
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.stream import stream
from longlive_jax.layers import kv_slots, linear
from longlive_jax.models import dit
from longlive_jax.quant import weights

_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(Path(__file__).parents[1] / "configs" / "generate.py") + ":toy",
  "Networks and sampling; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_ONLY = flags.DEFINE_multi_string(
  "only", ["*"], "Variants: patterns of their names.", flag_values=_FLAGS
)
_VIDEOS = flags.DEFINE_integer("videos", 200, "Videos.", 1, flag_values=_FLAGS)
_BATCH = flags.DEFINE_integer("batch", 100, "Made together.", 1, flag_values=_FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", flag_values=_FLAGS)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Baseline.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string(
  "out", "tools/results/precision_toy.json", "Report.", flag_values=_FLAGS
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """Where 4 or 8 bits are used.

  Attributes:
    precision: of the weights and activations.
    kv: settings of Sampling for the cache.
    plain_chunks: newest chunks that are kept in plain numbers (and the current one).
    plain_tokens: share of tokens, chosen by content, that use plain weights.
  """

  precision: Precision
  kv: tuple[tuple[str, str], ...] = ()
  plain_chunks: int = 0
  plain_tokens: float = 0.0


def _kv(rule: str = "mse", smoothing: str = "token_mean") -> tuple:
  return (("kv_format", "nvfp4"), ("kv_smoothing", smoothing), ("kv_rule", rule))


KV_FP8 = (("kv_format", "fp8"),)
ATTENTION_FP8 = (("attention_format", "fp8"), ("kv_format", "e4m3"))

BASELINE = "plain"
PLAIN = Precision()
STATIC = Precision("w4a4", "static_6", "static_6")
W4A4 = Precision("w4a4")
VARIANTS = {
  BASELINE: Variant(PLAIN),
  "w4a16 static_6": Variant(Precision("w4a16", "static_6")),
  "w4a16 mse": Variant(Precision("w4a16")),
  "w4a4 static_6": Variant(STATIC),
  "w4a4 mse": Variant(W4A4),
  "kv static_6": Variant(PLAIN, kv=_kv("static_6")),
  "kv mse": Variant(PLAIN, kv=_kv()),
  "kv mse, no smoothing": Variant(PLAIN, kv=_kv(smoothing="none")),
  "kv mse, channel_mean": Variant(PLAIN, kv=_kv(smoothing="channel_mean")),
  "w4a4 static_6 + kv static_6": Variant(STATIC, _kv("static_6")),
  "w4a4 mse + kv mse": Variant(W4A4, _kv()),
  "w4a16 mse + kv mse": Variant(Precision("w4a16"), _kv()),
  "w8a16": Variant(Precision("w8a16")),
  "fp8": Variant(Precision("fp8")),
  "kv fp8": Variant(PLAIN, kv=KV_FP8),
  "fp8 + kv fp8": Variant(Precision("fp8"), KV_FP8),
  "kv e4m3 + attention fp8": Variant(PLAIN, ATTENTION_FP8),
  "fp8 + kv e4m3 + attention fp8": Variant(Precision("fp8"), ATTENTION_FP8),
  "study w4a4, first and last layer plain": Variant(Precision("w4a4", plain_edges=1)),
  "study w4a4, first step plain": Variant(Precision("w4a4", plain_steps=(0,))),
  "study w4a4, last step plain": Variant(Precision("w4a4", plain_steps=(-1,))),
  "study w4a4, 20% of tokens plain": Variant(W4A4, plain_tokens=0.2),
  "study kv, newest chunk plain": Variant(PLAIN, kv=_kv(), plain_chunks=1),
}


# ---------------------------------------------------------------- types of the studies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgedSlots:
  """Slots of which the newest are read in plain numbers.

  For quality only: it keeps all frames in both forms. `stamp` (..., slots) counts the
  writes, so that age is known.
  """

  plain: jax.Array
  packed: kv_slots.NVFP4Slots
  stamp: jax.Array
  newest: int = dataclasses.field(metadata={"static": True})


@kv_slots.encode.register
def _(slots: AgedSlots, x: jax.Array, mesh_axes: Sequence[str] = ()) -> AgedSlots:
  stamp = jnp.max(slots.stamp, axis=1, keepdims=True) + 1
  return dataclasses.replace(
    slots,
    plain=x.astype(slots.plain.dtype),
    packed=kv_slots.encode(slots.packed, x, mesh_axes),
    stamp=jnp.broadcast_to(stamp, x.shape[:2]),
  )


@kv_slots.read.register
def _(slots: AgedSlots, dtype: jnp.dtype) -> jax.Array:
  last = jnp.max(slots.stamp, axis=1, keepdims=True)
  new = (slots.stamp > last - slots.newest)[..., None, None, None]
  return jnp.where(new, slots.plain.astype(dtype), kv_slots.read(slots.packed, dtype))


@kv_slots.attended_dtype.register
def _(slots: AgedSlots, dtype: jnp.dtype, wanted: jnp.dtype) -> jnp.dtype:
  return dtype


def aged(cache: Any, newest: int) -> Any:
  """An empty NVFP4 cache with its slots replaced by AgedSlots."""

  def wrap(slots: kv_slots.NVFP4Slots, dtype: jnp.dtype) -> AgedSlots:
    plain = jnp.zeros(slots.shape, dtype)
    return AgedSlots(plain, slots, jnp.zeros(slots.shape[:3], jnp.int32), newest)

  dtype = jnp.dtype(_DTYPE.value)
  return dataclasses.replace(cache, k=wrap(cache.k, dtype), v=wrap(cache.v, dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedWeight:
  """A weight in both precisions, and the tokens (b, k) that get the plain one."""

  plain: jax.Array
  packed: Any
  tokens: jax.Array


@linear.matmul_rule.register
def _(weight: RoutedWeight, x: jax.Array) -> jax.Array:
  flat = x.reshape(len(weight.tokens), -1, x.shape[-1])  # (b, s, in)
  chosen = jnp.take_along_axis(flat, weight.tokens[..., None], axis=1)
  rows = jnp.arange(len(flat))[:, None]
  y = linear.matmul(flat, weight.packed)
  y = y.at[rows, weight.tokens].set(linear.matmul(chosen, weight.plain))
  return y.reshape(*x.shape[:-1], -1)


# Layers whose inputs are the tokens of the chunk (not those of the prompt).
TOKEN_LINEARS = ("blocks/self_attn/[qkvo]", "blocks/cross_attn/[qo]", "blocks/ffn/*")


def routed(
  model: dit.CausalDiT, packed: dict[str, Any], base: dit.CausalDiT, tokens: jax.Array
) -> dit.CausalDiT:
  """`model`, quantised, with routed weights.

  Args:
    packed: its quantised weights by path.
    base: the plain network.
    tokens: (b, k) of a chunk.
  """
  plain = by_path(base)
  spread = jnp.broadcast_to(tokens, (base.config.layers, *tokens.shape))

  def route(path: tuple[Any, ...], node: Any) -> Any:
    name = weights.layer_path(path)
    if not weights.is_matrix(node) or name not in packed:
      return node
    return node.replace(RoutedWeight(plain[name], packed[name], spread))

  return jax.tree_util.tree_map_with_path(route, model, is_leaf=weights.is_matrix)


def by_path(model: dit.CausalDiT) -> dict[str, Any]:
  """Weights of the layers in TOKEN_LINEARS by path, whatever their type."""
  return {
    name: weight
    for name, weight in weights.matrices(model).items()
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in TOKEN_LINEARS)
  }


def busy_tokens(latents: jax.Array, share: float, branches: int) -> jax.Array:
  """Tokens (b, k) of a chunk with most edges and motion in latents (b, f, y, x, c)."""
  z = latents.astype(jnp.float32)
  pad = lambda d, axis: jnp.pad(  # noqa: E731
    jnp.abs(d), [(1, 0) if i == axis else (0, 0) for i in range(z.ndim)]
  )
  change = sum(pad(jnp.diff(z, axis=axis), axis) for axis in (1, 2, 3)).sum(-1)
  b, f, y, x = change.shape
  score = change.reshape(b, f, y // 2, 2, x // 2, 2).sum((3, 5)).reshape(b, -1)
  _, tokens = jax.lax.top_k(score, int(score.shape[1] * share))
  return jnp.repeat(tokens, branches, axis=0)


# ---------------------------------------------------------------- one variant


def latents_of(
  nets: eval_toy.Networks,
  variant: Variant,
  sampling: Sampling,
  scenes: Sequence[Scene],
  first: int,
  size: int,
) -> Iterator[jax.Array]:
  """Generates a batch; yields each chunk's latents (b, f, y, x, c)."""
  sampling = dataclasses.replace(sampling, **dict(variant.kv))
  story = eval_toy.story_of(nets, sampling, scenes)
  state = eval_toy.start_of(
    nets, sampling, first, len(scenes), seed=_SEED.value, size=size
  )
  if variant.plain_chunks:
    state = dataclasses.replace(state, cache=aged(state.cache, variant.plain_chunks))
  model = precision.apply(nets.model, variant.precision, sampling.steps)
  if not variant.plain_tokens:
    for chunk in stream(model, None, state, story, sampling):
      yield chunk.latents
    return
  # The tokens are chosen anew for every chunk, by the chunk before it.
  packed = by_path(model)
  previous = jnp.zeros((len(scenes), sampling.frames_per_chunk, *state.latent_shape))
  for index in range(story.chunks):
    tokens = busy_tokens(previous, variant.plain_tokens, sampling.branches)
    routing = routed(model, packed, nets.model, tokens)
    upto = dataclasses.replace(
      story,
      prompt_index=story.prompt_index[: index + 1],
      cut=story.cut[: index + 1],
      shot=story.shot[: index + 1],
    )
    after: list[Any] = []
    chunks = stream(
      routing, None, state, upto, sampling, on_state=lambda _, s, a=after: a.append(s)
    )
    (chunk,) = chunks
    state, previous = after[0], chunk.latents
    yield previous


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a variant made: latents (chunks, n, ...) and detections by video and shot."""

  latents: np.ndarray
  found: list[list[Detection]]


def run(
  nets: eval_toy.Networks,
  variant: Variant,
  sampling: Sampling,
  scenes: Sequence[Scene],
  batch: int,
  size: int,
  pool: concurrent.futures.Executor,
) -> Outcome:
  """Generates all scenes and detects all shots."""
  kept: list[list[np.ndarray]] = []

  def generate(part, first, wanted):
    rows: list[np.ndarray] = []
    kept.append(rows)

    def tapped():
      for latents in latents_of(nets, variant, sampling, part, first, size):
        rows.append(np.asarray(latents, np.float32))
        yield latents

    return eval_toy.decode(nets.vae, tapped(), wanted)

  found = eval_toy.detect_shots(generate, scenes, batch, pool)
  latents = np.concatenate([np.stack(rows) for rows in kept], axis=1)
  return Outcome(latents[:, : len(scenes)], found)


def scores(
  scenes: Sequence[Scene], outcome: Outcome, baseline: Outcome
) -> dict[str, float]:
  """The table's row of a variant."""
  row = score_all_shots(scenes, outcome.found)
  row["subject kept"] = score_identity(outcome.found)["subject kept"]
  moved, before = (
    detectors.motion_amount(itertools.chain(*each.found))
    for each in (outcome, baseline)
  )
  row["motion amount"] = moved / before
  for name, part in (("error, first", slice(1)), ("error, all", slice(None))):
    want = baseline.latents[part]
    row[name] = float(
      np.linalg.norm(outcome.latents[part] - want) / np.linalg.norm(want)
    )
  return row


def chosen_variants(patterns: Sequence[str]) -> list[str]:
  """Names that fit a pattern, the baseline first; all are compared with it."""
  return choose(patterns, VARIANTS, BASELINE)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  names, began = chosen_variants(_ONLY.value), time.perf_counter()
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  config = _CONFIG.value
  config.dtype = _DTYPE.value
  nets = eval_toy.load_networks(config)
  sampling = eval_toy.sampling_of(config, sinks=True)
  first = _SEED.value * 1_000_000
  scenes = [
    toy_world.heldout_scene(first + i, eval_toy.FOUR_SHOTS)
    for i in range(_VIDEOS.value)
  ]
  batch = min(_BATCH.value, len(scenes))
  rows: dict[str, dict[str, float]] = {}
  baseline = None
  with detecting_pool() as pool:
    for name in names:
      outcome = run(
        nets, VARIANTS[name], sampling, scenes, batch, config.height, pool
      )
      baseline = outcome if baseline is None else baseline
      rows[name] = scores(scenes, outcome, baseline)
      logging.info("%s: %s", name, json.dumps(rows[name]))
      content = {
        "results": rows,
        "videos": len(scenes),
        "seed": _SEED.value,
        "config": config.to_dict(),
        "seconds": time.perf_counter() - began,
        **report.environment(),
      }
      report.write_json(out, content)
  print(table(rows))


if __name__ == "__main__":
  app.run(main)
