"""vae/*: encode, decode, streaming decode, light VAE, folding of pixels."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.checkpoint import torch_names
from longlive_jax.models import vae
from parity_runners.common import Case, Result, channels_last


def run(case: Case) -> Result:
  """Any of the VAE's cases; the names of the outputs say what is wanted."""
  if "patch" in case.outputs:
    return _patchify(case)
  model = _model(case)
  values = {}
  for name in case.outputs:
    source = name.removesuffix("_clamped")
    if source in values and name != source:
      values[name] = np.clip(values[source], -1, 1)
    elif source.startswith("latent"):
      video = channels_last(case.inputs[source.replace("latent", "video")], 1)
      values[name] = _channels_second(jax.jit(vae.encode)(model, video))
    elif source.startswith("video") or source == "full":
      latent = case.inputs.get(source.replace("video", "latent"))
      latent = case.inputs["latent"] if latent is None else latent
      values[name] = _decode(model, latent, [latent.shape[2]])
      if name != source:
        values[name] = np.clip(values[name], -1, 1)
  sizes = case.record.get("chunk_sizes")
  if sizes:
    pieces = _stream(model, case.inputs["latent"], sizes)
    for i, piece in enumerate(pieces):
      if f"chunk{i}" in case.outputs:
        values[f"chunk{i}"] = piece
    if "full" in values:
      joined = np.concatenate(pieces, axis=2)
      same = np.allclose(joined, values["full"], rtol=1e-4, atol=1e-5)
      return Result(values, checks={"streamed equals full": bool(same)})
  return Result(values)


def _model(case: Case) -> vae.VideoVAE:
  weights = torch_names.published_vae_names(case.weights())
  shapes = {name: array.shape for name, array in weights.items()}
  config = torch_names.infer_config("vae", shapes)
  model = torch_names.network_from_torch("vae", config, weights, jnp.float32)
  model.latent_mean = nnx.Param(jnp.asarray(case.inputs["mean"]))
  model.latent_std = nnx.Param(jnp.asarray(case.inputs["std"]))
  return model


def _decode(model: vae.VideoVAE, latent: np.ndarray, sizes: list[int]) -> np.ndarray:
  return np.concatenate(_stream(model, latent, sizes), axis=2)


def _stream(
  model: vae.VideoVAE, latent: np.ndarray, sizes: list[int]
) -> list[np.ndarray]:
  """Unclamped frames (b, 3, t, h, w) of each call."""
  latent = channels_last(latent, 1)
  b, _, y, x, _ = latent.shape
  state = vae.init_decoder_state(model, b, y, x)
  step = jax.jit(vae.decode_chunk)
  pieces, start = [], 0
  for size in sizes:
    frames, dropped, state = step(model, state, latent[:, start : start + size])
    pieces.append(_channels_second(frames[:, int(dropped[0]) :]))
    start += size
  return pieces


def _patchify(case: Case) -> Result:
  video = channels_last(case.inputs["video"], 1)
  patch = vae.fold_pixels(video)
  values = {
    "patch": _channels_second(patch),
    "roundtrip": _channels_second(vae.unfold_pixels(patch)),
  }
  examples = case.record.get("light_checkpoint_key_examples", {})
  checks = {
    f"light name {light}": torch_names.light_vae_name(light) == published
    for light, published in examples.items()
  }
  return Result(values, checks=checks)


def _channels_second(x: jax.Array) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, 1)
