"""The chunk step over the devices of a mesh: videos, guidance and tokens apart.

One `shard_map` around all of a chunk. Weights, text and latents are whole on the
devices that share a video; the cache is split by rows and heads, and stays where it is.
Kernels run on each device's own arrays: outside of a shard_map XLA would gather theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.generate import sampler
from longlive_jax.layers import kv_cache
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.mesh import BRANCH, DATA, SEQUENCE
from longlive_jax.parallel.sequence import Layout
from longlive_jax.quant import weights

Array = jax.Array


def mesh_for(
  *,
  devices: int,
  guidance_devices: int,
  sequence_devices: int,
  batch: int,
  heads: int,
  guidance: float,
) -> Mesh | None:
  """The mesh on which so many devices share the work; None is a single device.

  Args:
    devices: that share the videos.
    guidance_devices: that share the rows of a video with and without prompt.
    sequence_devices: that share its tokens and heads.
    batch, heads, guidance: videos, heads of the transformer, guidance scale.

  Raises:
    ValueError: numbers that do not divide, or more devices than there are.
  """
  if devices < 1 or batch % devices:
    raise ValueError(
      f"devices={devices} must divide the {batch} videos; use sequence_devices for "
      "several devices a video"
    )
  if guidance_devices not in (1, 2):
    raise ValueError(
      f"guidance_devices={guidance_devices} must be 1 or 2: there are rows with and "
      "without prompt"
    )
  if guidance_devices == 2 and guidance == 1.0:
    raise ValueError(
      "guidance_devices=2 needs guidance, but guidance=1.0 turns it off; use "
      "guidance_devices=1"
    )
  if sequence_devices < 1 or heads % sequence_devices:
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    raise ValueError(
      f"sequence_devices={sequence_devices} must divide the {heads} heads of the "
      f"transformer; use one of {fitting}"
    )
  return meshes.generation_mesh(devices, guidance_devices, sequence_devices)


def cache_specs(cache: kv_cache.KVCache) -> kv_cache.KVCache:
  """Where the parts of a cache live, as PartitionSpecs."""
  return kv_cache.specs(cache, (DATA, BRANCH), SEQUENCE)


def denoise_chunk(
  model: sampler.Model,
  cache: kv_cache.KVCache,
  chunk: sampler.ChunkInputs,
  sampling: sampler.Sampling,
  mesh: Mesh | None,
) -> tuple[Array, kv_cache.KVCache]:
  """`sampler.denoise_chunk` over a mesh of `mesh.generation_mesh`, or without one."""
  if mesh is None:
    return sampler.denoise_chunk(model, cache, chunk, sampling)
  specs = cache_specs(cache)

  def step(model: sampler.Model, cache: Any, chunk: Any, layout: Layout) -> Any:
    return sampler.denoise_chunk(model, cache, chunk, sampling, layout)

  run = _over(mesh, step, (P(), specs, P(DATA)), (P(DATA), specs))
  return run(model, cache, chunk)


def clean_pass(
  model: sampler.Model,
  cache: kv_cache.KVCache,
  latents: Array,
  chunk: sampler.ChunkInputs,
  sampling: sampler.Sampling,
  mesh: Mesh | None,
) -> kv_cache.KVCache:
  """`sampler.clean_pass`, likewise."""
  if mesh is None:
    return sampler.clean_pass(model, cache, latents, chunk, sampling)
  specs = cache_specs(cache)

  def step(model: Any, cache: Any, latents: Array, chunk: Any, layout: Layout) -> Any:
    return sampler.clean_pass(model, cache, latents, chunk, sampling, layout=layout)

  run = _over(mesh, step, (P(), specs, P(DATA), P(DATA)), specs)
  return run(model, cache, latents, chunk)


def _over(
  mesh: Mesh, step: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """step(model, ..., layout=) as a function of global arrays."""
  sizes = mesh.shape
  layout = Layout(sizes[SEQUENCE], sizes[BRANCH], sizes[DATA])

  # check_vma: latents are equal on the devices that share a video, as all of these
  # gather the same velocities; JAX cannot know.
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
  def run(model: Any, *arrays: Any) -> Any:
    return step(weights.spread(model, layout.axes, (DATA, BRANCH)), *arrays, layout)

  return run
