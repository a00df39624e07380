"""Decoding in tiles: the frames and the state of whole pictures, from less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import fill, normal

from longlive_jax.checkpoint import store
from longlive_jax.models import vae, vae_tiles

pytestmark = pytest.mark.usefixtures("quick_compiling")

ONE = vae.VAEConfig(2, 2, 3, (1,), 1, ())
THREE = vae.VAEConfig(2, 2, 3, (1, 2, 2), 1, (True, True))


def random_decoder(config: vae.VAEConfig) -> vae.VideoVAE:
  abstract = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  abstract.encoder = abstract.conv1 = None
  return fill(abstract, seed=1, gain=0.3)


def two_chunks(model: vae.VideoVAE, y: int, x: int, tiles: int):
  """Frames of two chunks, and the state after them."""
  step = jax.jit(functools.partial(vae.decode_chunk, tiles=tiles), donate_argnums=1)
  state = vae.init_decoder_state(model, 1, y, x)
  latents = normal(2, 1, 1, y, x, model.config.z_dim)
  first, _, state = step(model, state, latents[0])
  second, _, state = step(model, state, latents[1])
  return first, second, state.history


def difference(a, b) -> float:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(np.abs(p - q).max()) for p, q in pairs)


@pytest.mark.parametrize(
  ("config", "y", "x", "tiles"),
  [
    (ONE, 10, 2, 2),  # rows
    (THREE, 2, 14, 4),  # columns, after a stage on whole frames
  ],
)
def test_tiles_leave_no_seam(config, y, x, tiles):
  """Tiles are as narrow as they may be."""
  model = random_decoder(config)
  whole, tiled = vae_tiles.split_stages(model.decoder.upsamples)
  halo = vae_tiles.halo(tiled, model.decoder.head)
  assert (max(y, x) << len(whole)) // tiles == halo
  want = two_chunks(model, y, x, 1)
  assert 0.2 < float(np.std(want[1])) < 5  # or the tolerance would mean nothing
  found = two_chunks(model, y, x, tiles)
  assert difference(found, want) < 2e-6


def test_halos_of_the_published_decoder():
  decoder = store.abstract_network("vae", vae.VAE_SIZES["wan2.2"]).decoder
  stages = [decoder.upsamples[i:] for i in range(4)]
  assert [vae_tiles.halo(tail, decoder.head) for tail in stages] == [13, 12, 10, 7]
  whole, tiled = vae_tiles.split_stages(decoder.upsamples)
  assert len(whole) == len(tiled) == 2
  vae_tiles.check(decoder.upsamples, decoder.head, 44, 80, 32)
  with pytest.raises(ValueError, match=r"decode_tiles=3 .* at least 10 wide, .* \(320"):
    vae_tiles.check(decoder.upsamples, decoder.head, 44, 80, 3)
  with pytest.raises(ValueError, match=r"use one of \[1, 2, 4, 5, 8, 10, 16, 20, 32\]"):
    vae_tiles.check(decoder.upsamples, decoder.head, 44, 80, 64)


def test_tiles_need_less_memory():
  config = vae.VAEConfig(2, 16, 3, (1, 1), 1, (True,))
  model = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  state = jax.eval_shape(lambda: vae.init_decoder_state(model, 1, 32, 320))
  latents = jax.ShapeDtypeStruct((1, 1, 32, 320, 3), jnp.float32)

  def needed(tiles):
    step = jax.jit(functools.partial(vae.decode_chunk, tiles=tiles), donate_argnums=1)
    memory = step.lower(model, state, latents).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.alias_size_in_bytes

  (whole, _), (tiled, replaced) = needed(1), needed(8)
  history = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.history))
  assert replaced >= history  # in place, and not copied before:
  assert tiled < 0.4 * whole and tiled < 0.5 * history
