"""dit_inference/*, pipeline/* and nvfp4/kv_quant_pipeline*: cache and sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.generate import sampler, schedule, storyboard
from longlive_jax.layers import kv_cache, kv_slots, rope
from longlive_jax.models import dit
from parity_runners.common import Case, Result, channels_last, frame_offsets


# ---------------------------------------------------------------------- single calls
def calls(case: Case) -> Result:
  """A sequence of calls with the cache, pins and resets replayed between them.

  The reference writes the cache in every call; so does this runner, because the rules
  for attending look at the pin as it was before the call.
  """
  model = case.transformer()
  config = model.config
  records = case.record["calls"]
  t_scale = case.setting("t_scale", 1.0)
  caches: dict[str, kv_cache.KVCache] = {}
  last: dict[str, tuple[list[int], np.ndarray]] = {}  # indices and frames of the last
  values = {}

  for record in records:
    i, which = record["call"], record["cache"]
    x, t = (case.inputs[f"call{i:03d}.{name}"] for name in "xt")
    latents = channels_last(x, 2)
    b, f, y, columns, _ = latents.shape
    start = record["current_start_tokens"] // config.tokens_per_frame(y, columns)
    frames = np.broadcast_to(start + np.arange(f, dtype=np.int32), (b, f))
    cache = caches.get(which)
    if cache is None:
      cache = _empty_cache(case, model, b, y, columns)
    else:
      cache = _between(cache, last[which], record["indices_before"])
    offset = frame_offsets(record.get("rope_temporal_offset") or 0.0, b, start, f)
    positions = dit.temporal_positions(frames, offset, t_scale)
    t = np.broadcast_to(t, (b, f))
    flow, caches[which] = _call(
      model,
      cache,
      frames,
      latents,
      dit.time_features(t, config.freq_dim),
      case.inputs[record["context"]],
      rope.temporal_rotation(np.broadcast_to(positions, (b, f)), config.head_dim),
      t_scale,
    )
    last[which] = (record["indices_after"], frames)
    flow = np.moveaxis(np.asarray(flow), -1, 2)
    values[f"call{i:03d}.flow"] = flow
    if f"call{i:03d}.x0" in case.outputs:
      x0 = schedule.velocity_to_clean(x, flow, case.sigma(t))
      values[f"call{i:03d}.x0"] = x0

  informative = {name for name in case.outputs if "slot_norm" in name}
  expected = {}
  if "final.k" in case.outputs:
    filled = case.record["final_indices"][1]
    for name, ours in zip("kv", _by_frame(caches["pos"]), strict=True):
      values[f"final.{name}"] = ours
      expected[f"final.{name}"] = case.outputs[f"final.{name}"][:, :filled]
  return Result(values, expected, informative=frozenset(informative))


@functools.partial(jax.jit, static_argnames="t_scale")
def _call(model, cache, frames, latents, time, text, temporal, t_scale):
  """A forward that writes the cache, as every call of the reference does."""
  placement = kv_cache.place(cache, frames)
  flow, (k, v) = sampler.cached_forward(
    model,
    cache,
    placement,
    latents,
    time,
    model.embed_text(text[:, None]),
    temporal,
    t_scale=t_scale,
    keep=True,
  )
  return flow, kv_cache.commit(cache, placement, k, v)


def _empty_cache(
  case: Case, model: dit.CausalDiT, b: int, y: int, columns: int
) -> kv_cache.KVCache:
  capacity = case.setting("capacity_frames")
  window = case.setting("window_frames")
  rules = kv_cache.CacheRules(
    window_frames=capacity if window is None else min(window, capacity),
    sink_frames=case.setting("sink_frames", 0),
    global_sink_frames=case.setting("global_sink_frames", 0),
    relative_rope=case.setting("relative_rope", False),
    reference=case.reference,
  )
  config = model.config
  return kv_cache.init_cache(
    rules,
    layers=config.layers,
    batch=b,
    capacity_frames=capacity,
    tokens_per_frame=config.tokens_per_frame(y, columns),
    heads=config.heads,
    head_dim=config.head_dim,
    dtype=jnp.float32,
  )


def _between(
  cache: kv_cache.KVCache, last: tuple[list[int], np.ndarray], before: list[int]
) -> kv_cache.KVCache:
  """What the sampling loop did between two calls, read off the reference's indices."""
  after, frames = last
  everyone = np.ones(frames.shape[0], bool)
  if before[:2] != after[:2]:
    cache = kv_cache.reset(cache, everyone)
  if before[2:] != after[2:] and before[2] >= 0 and before[3] > 0:
    cache = kv_cache.pin(cache, frames, everyone)
  return cache


def _by_frame(cache: kv_cache.KVCache) -> tuple[np.ndarray, np.ndarray]:
  """Layer 0's keys and values (b, tokens, n, d), filled slots in order of frames."""
  frame = np.asarray(cache.frame)
  count = int((frame[0] >= 0).sum())
  order = np.argsort(np.where(frame < 0, np.iinfo(np.int32).max, frame), axis=1)
  order = order[:, :count, None, None, None]

  def pick(slots):
    slots = np.asarray(kv_slots.read(slots, jnp.float32)[0])
    slots = np.take_along_axis(slots, order, axis=1)
    return slots.reshape(slots.shape[0], -1, *slots.shape[3:])

  return pick(cache.k), pick(cache.v)


# ---------------------------------------------------------------------- whole videos
def pipeline(case: Case) -> Result:
  """Chunks sampled one after the other from given noise."""
  latents, _ = _sample(case, case.transformer(), _sampling(case))
  return Result({"latents": latents})


def quantised_pipeline(case: Case) -> Result:
  """The same with an NVFP4 cache, and every forward on its own from given latents."""
  model, prefix = case.transformer(), case.setting("cut_prefix")
  sampling = dataclasses.replace(
    _sampling(case), kv_format="nvfp4", kv_smoothing="channel_mean"
  )
  latents, cache = _sample(case, model, sampling)
  values = {"latents": latents, "final.k_dequant": _by_frame(cache)[0]}

  table, cache = case.record["prompt_table"], None
  for record in case.record["calls"]:
    name = f"call{record['call']:03d}"
    x = channels_last(case.inputs[f"{name}.x"], 2)
    b, f, y, columns, _ = x.shape
    start = record["start"] // model.config.tokens_per_frame(y, columns)
    frames = np.broadcast_to(start + np.arange(f, dtype=np.int32), (b, f))
    positions = dit.temporal_positions(frames, record["offset"], sampling.t_scale)
    text = case.inputs[table[record["prompt"]]]
    cache = sampler.init_cache(model, sampling, b, y, columns) if not cache else cache
    flow, cache = _call(
      model,
      cache,
      frames,
      x,
      dit.time_features(np.full((b, f), record["t"]), model.config.freq_dim),
      np.broadcast_to(text, (b, *text.shape)),
      rope.temporal_rotation(positions, model.config.head_dim),
      sampling.t_scale,
    )
    if record["t"] == 0 and sampling.pins and record["prompt"].startswith(prefix):
      cache = kv_cache.pin(cache, frames, np.ones(b, bool))
    values[f"{name}.flow"] = np.moveaxis(np.asarray(flow), -1, 2)
  return Result(values)


def _sample(
  case: Case, model: dit.CausalDiT, sampling: sampler.Sampling
) -> tuple[np.ndarray, kv_cache.KVCache]:
  """The case's video, (b, f, c, y, x), and the cache at its end."""
  noise = channels_last(case.inputs["noise"], 2)
  initial = case.inputs.get("initial_latent")
  if initial is not None:
    initial = channels_last(initial, 2)
  b, total, y, x, _ = noise.shape
  n = sampling.frames_per_chunk
  # Given frames are held fixed in the first chunk, or come before it (SPEC 3).
  alone = sampling.independent_first_frame
  held = initial is not None and alone and initial.shape[1] == 1
  before = 0 if initial is None or held else initial.shape[1]
  text, cut, shot = _story(case, b)
  negative = case.inputs["embed_negative"] if sampling.branches == 2 else None
  cache = sampler.init_cache(model, sampling, b, y, x)
  denoise = jax.jit(sampler.denoise_chunk, static_argnums=3)
  remember = jax.jit(sampler.clean_pass, static_argnums=4)

  def inputs(index, frame, latents, given=None):
    f = latents.shape[1]
    frames = np.broadcast_to(frame + np.arange(f, dtype=np.int32), (b, f))
    known, fixed = np.zeros((b, f), bool), np.zeros(latents.shape, np.float32)
    if given is not None:
      known[:, : given.shape[1]] = True
      fixed[:, : given.shape[1]] = given
    index = max(index, 0)  # given frames have the first prompt and no cut
    cuts, shots, rows = cut[index], shot[index], text[index]
    return sampler.ChunkInputs(
      noise=latents,
      text=rows,
      negative=None if negative is None else np.broadcast_to(negative, rows.shape),
      frames=frames,
      temporal=sampler.chunk_temporal(model.config, sampling, frames, shots),
      cut=cuts,
      known=known,
      given=fixed,
    )

  pieces, frame = [], 0
  for length in _lengths(before, n, alone and before > 0):
    given = initial[:, frame : frame + length]
    cache = remember(model, cache, given, inputs(-1, frame, given), sampling)
    pieces.append(given)
    frame += length
  first_alone = alone and not held and frame == 0
  done = 0
  for index, length in enumerate(_lengths(total, n, first_alone)):
    start = inputs(
      index,
      frame,
      noise[:, done : done + length],
      initial if held and index == 0 else None,
    )
    latents, cache = denoise(model, cache, start, sampling)
    pieces.append(np.asarray(latents))
    frame, done = frame + length, done + length
  return np.moveaxis(np.concatenate(pieces, axis=1), -1, 2), cache


def _sampling(case: Case) -> sampler.Sampling:
  window = case.setting("window_frames")
  multi_shot = case.setting("multi_shot_sink", False)
  solver = case.setting("solver", "unipc")
  return sampler.Sampling(
    frames_per_chunk=case.frames_per_chunk,
    window_frames=case.setting("capacity_frames") if window is None else window,
    sink_frames=case.setting("sink_frames", 0),
    multi_shot_sink=multi_shot,
    shot_rope_offset=case.setting("shot_rope_offset", 0.0),
    relative_rope=case.setting("relative_rope", False),
    t_scale=case.setting("t_scale", 1.0),
    # Without a shot sink the reference has nothing to do at a cut.
    clean_recache=multi_shot and case.setting("clean_recache", False),
    guidance=case.setting("guidance", 1.0),
    steps=case.setting("steps", 50),
    shift=case.setting("shift", 5.0),
    solver={"dpmpp": "dpm++"}.get(solver, solver),
    independent_first_frame=case.setting("independent_first_frame", False),
    reference=case.reference,
  )


def _story(case: Case, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Text (chunks, b, k, text_dim), cuts and shot numbers (chunks, b)."""
  prompts = case.record.get("prompts_per_block") or case.record["prompts"]
  table = case.record["prompt_table"]
  board = storyboard.from_prompt_lists(prompts, prefix=case.setting("cut_prefix"))
  arrays = board.arrays()
  embeddings = np.stack([case.inputs[table[prompt]] for prompt in arrays.prompts])
  cut, shot = arrays.cut, arrays.shot
  if case.reference:  # it looks for cuts in the first sample's prompts only
    cut, shot = (np.repeat(a[:, :1], b, axis=1) for a in (cut, shot))
  return embeddings[arrays.prompt_index], cut, shot


def _lengths(frames: int, n: int, first_alone: bool) -> list[int]:
  return [1] * first_alone + [n] * ((frames - first_alone) // n)
