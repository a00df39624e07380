"""Networks with random weights, and a chunk compiled for a GPU that is not there."""

import functools

import compile_for
import jax
import numpy as np
from flax import nnx

from longlive_jax.checkpoint import store
from longlive_jax.generate import networks, sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import block_scan, dit, vae, vae_fp8
from longlive_jax.quant import weights


def abstract_model(config: dit.WanConfig, dtype, precision: str) -> dit.CausalDiT:
  """Shapes of the transformer."""
  model = store.abstract_network("dit", config, dtype)
  if not precision:
    return model
  quantise = functools.partial(weights.quantise_weights, mode=precision)
  return jax.eval_shape(quantise, model)


def random_dit(config: dit.WanConfig, dtype) -> dit.CausalDiT:
  """A transformer with random weights everywhere."""
  model = dit.CausalDiT(config, dtype=dtype, rngs=nnx.Rngs(_key(0)))
  # A fresh head is zero, and matrix units run faster on zeros than on data.
  head = model.head.linear.weight
  head.set_value(0.02 * jax.random.normal(_key(1), head.shape, dtype))
  return model


def random_vae(config: vae.VAEConfig, dtype) -> vae.VideoVAE:
  return vae.VideoVAE(config, dtype=dtype, rngs=nnx.Rngs(_key(2)))


def _key(seed: int) -> jax.Array:
  # rbg: threefry compiles for seconds on a CPU, and again for every shape.
  return jax.random.key(seed, impl="rbg")


def random_decoder(config: vae.VAEConfig, dtype, precision: str) -> vae.VideoVAE:
  """A VAE without encoder, made on the device.

  Args:
    precision: of `vae_fp8.PRECISIONS`.
  """

  def build():
    network = random_vae(config, dtype)
    network.encoder = network.conv1 = None
    return network

  return vae_fp8.apply(jax.jit(build)(), precision)


def random_networks(
  size: str,
  vae_size: str,
  dtype,
  precision: str = "",
  vae_precision: str = "",
  unroll: bool = False,
):
  """Both networks with random weights, made on the device.

  With a precision the transformer's weights are random codes from the start.
  The VAE has no encoder: generating from text does not load it.
  """
  config = dit.size(size)
  video_vae = vae.VAE_SIZES[vae_size]
  if video_vae.z_dim != config.in_channels:
    raise ValueError(
      f"vae={vae_size!r} has z_dim={video_vae.z_dim}; {size} has {config.in_channels}"
    )
  if precision:
    model = networks.random_like(abstract_model(config, dtype, precision))
  else:
    model = jax.jit(random_dit, static_argnums=(0, 1))(config, dtype)
  if unroll:
    model = block_scan.unrolled(model)
  return model, random_decoder(video_vae, dtype, vae_precision)


def chunk_inputs(
  config: dit.WanConfig, sampling: Sampling, y: int, x: int
) -> sampler.ChunkInputs:
  """Zeros in the shapes of a chunk of one video."""
  frames = np.arange(sampling.frames_per_chunk, dtype=np.int32)[None]
  shot = np.zeros(1, np.int32)
  latents = np.zeros((*frames.shape, y, x, config.in_channels), np.float32)
  return sampler.ChunkInputs(
    noise=latents,
    text=np.zeros((1, config.text_len, config.text_dim), np.float32),
    negative=None,
    frames=frames,
    temporal=sampler.chunk_temporal(config, sampling, frames, shot),
    cut=shot > 0,
    known=np.zeros(frames.shape, bool),
    given=latents,
  )


def chunk_elsewhere(
  gpu: str, config: dit.WanConfig, dtype, precision: str, sampling: Sampling, y, x
) -> dict[str, object]:
  """Compiles a chunk for another GPU; what it calls, and the bytes it needs."""
  mesh = compile_for.described(gpu)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    model = abstract_model(config, dtype, precision)
  cache = jax.eval_shape(lambda: sampler.init_cache(model, sampling, 1, y, x))
  chunk = chunk_inputs(config, sampling, y, x)
  step = functools.partial(sampler.denoise_chunk, sampling=sampling)
  compiled = compile_for.compile_for(mesh, step, model, cache, chunk)
  memory = compiled.memory_analysis()
  return {
    "compile_for": gpu,
    "custom_calls": compile_for.custom_calls(compiled.as_text()),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }
