"""self_forcing/*: the training rollout and its gradients in both conventions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import store, torch_names
from longlive_jax.generate import sampler
from longlive_jax.layers import kv_cache
from longlive_jax.train import self_forcing
from parity_runners.common import Arrays, Case, Result, channels_last


def run(case: Case) -> Result:
  model, settings = case.transformer(), _settings(case)
  noise = channels_last(case.inputs["noise"], 2)
  b, frames, y, x, _ = noise.shape
  chunks = _chunks(case, model, settings, noise)
  weight = _by_chunk(channels_last(case.inputs["loss_weight"], 2), case)
  cache = kv_cache.init_cache(
    settings.sampling.cache_rules,
    layers=model.config.layers,
    batch=b,
    capacity_frames=case.setting("capacity_frames"),
    tokens_per_frame=model.config.tokens_per_frame(y, x),
    heads=model.config.heads,
    head_dim=model.config.head_dim,
    dtype=jnp.float32,
  )

  values: Arrays = {}
  for name, through in (("grad", True), ("grad_detached_cache", False)):
    chosen = dataclasses.replace(settings, through_cache=through)

    def loss(model, chosen=chosen):
      latents, _ = self_forcing.rollout(model, cache, chunks, chosen)
      return jnp.mean(latents * weight), latents

    (value, latents), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    for tensor, array in _by_torch_name(gradient, case, name).items():
      values[f"{name}.{tensor}"] = array
  latents = np.moveaxis(np.asarray(latents), 0, 1).reshape(b, frames, y, x, -1)
  values |= {"output": np.moveaxis(latents, -1, 2), "loss": value}
  return Result(values)


def _settings(case: Case) -> self_forcing.RolloutSettings:
  capacity, window = case.setting("capacity_frames"), case.setting("window_frames")
  sampling = sampler.Sampling(
    frames_per_chunk=case.frames_per_chunk,
    window_frames=capacity if window is None else min(window, capacity),
    sink_frames=case.setting("sink_frames", 0),
    multi_shot_sink=case.setting("multi_shot_sink", False),
    shot_rope_offset=case.setting("shot_rope_offset", 0.0),
    steps=case.setting("steps"),
    shift=case.setting("shift", 5.0),
    reference=case.reference,
  )
  return self_forcing.RolloutSettings(
    sampling,
    gradient_frames=case.setting("gradient_frames", -1),
    context_noise=case.setting("context_noise", 0),
  )


def _chunks(case, model, settings, noise) -> self_forcing.RolloutChunks:
  inputs, (b, total) = case.inputs, noise.shape[:2]
  exits = np.asarray(case.setting("exit_steps"), np.int32)
  if case.setting("same_exit_step", False):
    exits = np.full_like(exits, exits[0])
  count = len(exits)
  cuts = np.zeros((b, count), bool)
  cuts[:, list(case.setting("cut_chunks", []))] = True
  text = np.broadcast_to(inputs["context"], (count, *inputs["context"].shape[1:]))
  # Of each chunk, the same for all samples.
  again = channels_last(inputs["context_noise"], 2)
  initial = inputs.get("initial_latent")
  return self_forcing.make_chunks(
    model.config,
    settings,
    noise=noise,
    context_noise=np.broadcast_to(again.reshape(total, *noise.shape[2:]), noise.shape),
    text=np.repeat(text[None], b, axis=0),
    cuts=cuts,
    exit_step=exits,
    given=noise[:, :0] if initial is None else channels_last(initial, 2),
  )


def _by_chunk(x: np.ndarray, case: Case) -> np.ndarray:
  """(b, f, ...) -> (chunks, b, n, ...)."""
  b, n = x.shape[0], case.frames_per_chunk
  return np.moveaxis(x.reshape(b, -1, n, *x.shape[2:]), 1, 0)


def _by_torch_name(gradient, case: Case, prefix: str) -> Arrays:
  """Those gradients that the case stores, by PyTorch's names."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    views = torch_names.torch_views(
      "dit", gradient.config, store.path_name(path), np.asarray(leaf)
    )
    for name, view in views:
      if f"{prefix}.{name}" in case.outputs:
        found[name] = view
  return found
