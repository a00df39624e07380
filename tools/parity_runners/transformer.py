"""dit_components/* and dit_train/*: the transformer, without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import store, torch_names
from longlive_jax.generate import schedule
from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.layers import rope
from longlive_jax.layers.norm import modulate
from longlive_jax.models import dit
from parity_runners.common import Case, Result, channels_last, frame_offsets


# ---------------------------------------------------------------------- components
def rotary(case: Case) -> Result:
  x = case.inputs["x"]
  frames, y, columns = case.record["grid"]
  b, head_dim = x.shape[0], x.shape[-1]

  def rotate(start=0, offset=0.0, t_scale=1.0):
    offset = frame_offsets(offset, b, start, frames)
    positions = dit.temporal_positions(start + np.arange(frames), offset, t_scale)
    positions = np.broadcast_to(positions, (b, frames))
    temporal = rope.temporal_rotation(positions, head_dim)
    return rope.rotate(x, rope.grid_rotation(temporal, y, columns, head_dim))

  values = {"plain": rotate()}
  for i, variant in enumerate(case.record["variants"]):
    values[f"causal{i}"] = rotate(
      variant["start_frame"],
      variant.get("temporal_offset", 0.0),
      variant.get("t_scale", 1.0),
    )
  if "frame_offset" in case.inputs:
    values["per_frame_offset"] = rotate(offset=case.inputs["frame_offset"])
  table = case.outputs.get("freq_table")
  if table is not None:
    groups = [
      np.stack(rope.group_rotation(np.arange(len(table)), pairs), axis=-1)
      for pairs in rope.pair_split(head_dim)
    ]
    values["freq_table"] = np.concatenate(groups, axis=1)
  checks = {}
  if "pair_split" in case.record:
    split = rope.pair_split(head_dim)
    checks["pair split"] = list(split) == list(case.record["pair_split"])
  return Result(values, checks=checks)


def time_embedding(case: Case) -> Result:
  model, t = case.transformer(), case.inputs["t"]
  features = dit.time_features(t, model.config.freq_dim)
  e, table = model.embed_time(jnp.asarray(features)[None])
  return Result({"sinusoid": features, "e": e[0], "e6": table[0]})


def intermediates(case: Case) -> Result:
  """The hidden states of one forward, block by block, and the forward as a whole."""
  model = case.transformer()
  latents = channels_last(case.inputs["x"], 1)
  b, f, y, x, _ = latents.shape
  patch, n = model.config.patch, case.frames_per_chunk
  time = dit.time_features(case.inputs["t"], model.config.freq_dim)
  context = case.inputs["context"][:, None]
  p = model.config.tokens_per_frame(y, x)
  positions = np.broadcast_to(np.arange(f), (b, f))
  rotation = model.rotation(
    rope.temporal_rotation(positions, model.config.head_dim), y, x
  )
  layout = ClipLayout.of_frames(f, n, p, teacher_forced=False)
  attend = dit.attend_all(rotation, layout)

  h = model.patch_embedding(dit.patchify(jnp.asarray(latents), patch))
  text = model.embed_text(jnp.asarray(context))
  e, table = model.embed_time(jnp.asarray(time))
  values = {"patch_tokens": h, "text_tokens": text[:, 0]}
  for i in range(model.config.layers):
    block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.rows(table)
    inside = {"self_attn_in": modulate(h, scale1, shift1, block.eps)}
    heads, _ = block.attend_self(inside["self_attn_in"], attend, None)
    inside["self_attn_out"] = block.self_attn.o(heads).reshape(h.shape)
    h = h + gate1 * inside["self_attn_out"]
    inside["cross_attn_in"] = block.norm3(h)
    heads = block.attend_text(inside["cross_attn_in"], text)
    inside["cross_attn_out"] = block.cross_attn.o(heads).reshape(h.shape)
    h = h + inside["cross_attn_out"]
    inside["ffn_in"] = modulate(h, scale2, shift2, block.eps)
    inside["ffn_out"] = block.ffn(inside["ffn_in"])
    h = h + gate2 * inside["ffn_out"]
    inside["out"] = h
    values |= {f"block{i}.{name}": value for name, value in inside.items()}
  values["head_out"] = model.head(h, e)
  values = {name: a.reshape(b, -1, a.shape[-1]) for name, a in values.items()}
  # The forward as it is really run, scanned over layers.
  flow = dit.train_forward(model, latents, time, context, frames_per_chunk=n)
  values["flow"] = np.moveaxis(np.asarray(flow), -1, 1)
  return Result(values)


# ---------------------------------------------------------------------- training
def train(case: Case) -> Result:
  """A forward over a whole clip, its loss and its gradients."""
  if case.inputs["t"].ndim == 1:
    return _bidirectional(case)
  model = case.transformer()
  config = model.config
  x, t = case.inputs["x"], case.inputs["t"]
  noisy = channels_last(x, 2)
  b, f, y, columns, _ = noisy.shape
  text = case.inputs["context"]
  text = text.reshape(b, -1, *text.shape[1:])
  clean, clean_time = None, None
  if "clean_x" in case.inputs:
    clean = channels_last(case.inputs["clean_x"], 2)
    aug = case.inputs.get("aug_t", np.zeros_like(t))
    clean_time = dit.time_features(aug, config.freq_dim)
  offset = frame_offsets(case.inputs.get("rope_offset", 0.0), b, 0, f)
  positions = dit.temporal_positions(np.arange(f), offset, case.setting("t_scale", 1.0))
  forward = functools.partial(
    dit.train_forward,
    noisy=noisy,
    time=dit.time_features(t, config.freq_dim),
    text=text,
    frames_per_chunk=case.frames_per_chunk,
    clean=clean,
    clean_time=clean_time,
    temporal=rope.temporal_rotation(
      np.broadcast_to(positions, (b, f)), config.head_dim
    ),
    independent_first_frame=case.setting("independent_first_frame", False),
  )
  weight = channels_last(case.inputs["loss_weight"], 2)

  def loss_fn(model):
    flow = forward(model)
    return jnp.mean(flow * weight), flow

  (loss, flow), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(model)
  flow = np.moveaxis(np.asarray(flow), -1, 2)
  values = {
    "flow": flow,
    "x0": schedule.velocity_to_clean(x, flow, case.sigma(t)),
    "loss": loss,
  }
  for path, gradient in store.named_leaves(gradients).items():
    views = torch_names.torch_views("dit", config, path, np.asarray(gradient))
    values |= {f"grad.{name}": view for name, view in views}
  if "mask" in case.outputs:
    p = config.tokens_per_frame(y, columns)
    values["mask"] = _mask(case, f, p, clean is not None)
  return Result({name: values[name] for name in case.outputs if name in values})


def _mask(case: Case, f: int, p: int, teacher_forcing: bool) -> np.ndarray:
  layout = ClipLayout.of_frames(
    f,
    case.frames_per_chunk,
    p,
    teacher_forced=teacher_forcing,
    independent_first_frame=case.setting("independent_first_frame", False),
  )
  index = jnp.arange(layout.length)
  return np.asarray(layout.mask(index, index))


def _bidirectional(case: Case) -> Result:
  model = case.transformer()
  latents = channels_last(case.inputs["x"], 1)
  b, f = latents.shape[:2]
  t = np.broadcast_to(case.inputs["t"][:, None], (b, f))
  flow = jax.jit(dit.bidirectional_forward)(
    model,
    latents,
    dit.time_features(t, model.config.freq_dim),
    case.inputs["context"],
  )
  return Result({"flow": np.moveaxis(np.asarray(flow), -1, 1)})
