"""Formulas of operations and bytes against XLA's counts and the networks' own sizes."""

import dataclasses
import functools

import bench_stages
import jax
import jax.numpy as jnp
import pytest

from longlive_jax.checkpoint import store
from longlive_jax.generate import sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit, vae, vae_fp8
from longlive_jax.parallel import costs
from longlive_jax.quant import weights

FULL, FULL_VAE = dit.size("ti2v-5b"), vae.VAE_SIZES["wan2.2"]


def tree_bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def full_work(**changes) -> costs.Work:
  """A chunk of the 5B model at 704 x 1280, 4 steps, in BF16."""
  plain = costs.Work(
    rows=1, frames=8, window_frames=32, tokens=880, steps=4, itemsize=2
  )
  return dataclasses.replace(plain, **changes)


def test_operations_of_the_full_model():
  """As counted apart from this code: 61 and 73 TFLOP a forward."""
  stages = costs.transformer_stages(FULL, full_work())
  attention = stages["attention"].calls * stages["attention"].flops / 5
  assert attention == pytest.approx(73e12, rel=0.01)
  linear = ("qkv", "output", "ffn")
  products = sum(stages[name].calls * stages[name].flops for name in linear) / 5
  # Of cross-attention the two projections of the chunk's tokens.
  products += 30 * 2 * 2 * 7040 * 3072**2
  assert products == pytest.approx(61e12, rel=0.01)


def test_operations_of_the_full_vae():
  """531 TFLOP a chunk of 8 latent frames, 490 folded; 12.6 to encode one."""
  decoder = [*costs.decoder_convolutions(FULL_VAE, 44, 80)]
  assert 8 * sum(c.unfolded_flops for c in decoder) == pytest.approx(531e12, rel=2e-3)
  assert 8 * sum(c.flops for c in decoder) == pytest.approx(490e12, rel=2e-3)
  encoder = costs.encoder_convolutions(FULL_VAE, 44, 80)
  assert sum(c.flops for c in encoder) == pytest.approx(12.6e12, rel=2e-3)


def test_operations_are_those_that_xla_counts():
  """By stage; XLA's count has what is done element by element in it, too."""
  config = dataclasses.replace(dit.size("test"), dim=128, ffn_dim=256, layers=1)
  model = store.abstract_network("dit", config)
  sampling = Sampling(frames_per_chunk=2, window_frames=6, sink_frames=2)
  inputs = jax.eval_shape(
    lambda model: bench_stages.stage_inputs(model, sampling, 8, 8), model
  )
  stages = costs.transformer_stages(config, costs.Work(1, 2, 6, 16, 4, 4))
  checked = 0
  for case in bench_stages.transformer_cases(model, inputs):
    if want := stages[case.name].flops:
      counted = jax.jit(case.function).lower(*case.arguments).cost_analysis()["flops"]
      # The head is narrow: its norm shows.
      most = 1.15 if case.name == "head" else 1.04
      assert want <= counted <= most * want, case.name
      checked += 1
  assert checked == 9


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_operations_of_the_vae_are_those_that_xla_counts(way):
  """But for what it counts less at the borders, where a kernel sees padding."""
  config, side = vae.VAE_SIZES["test"], 16
  model = store.abstract_network("vae", config)
  init, chunk, convolutions, c, shape = {
    "decode": (
      vae.init_decoder_state, vae.decode_chunk, costs.decoder_convolutions,
      config.decoder_widths[0], (1, 1, side, side, config.z_dim),
    ),
    "encode": (
      vae.init_encoder_state, vae.encode_chunk, costs.encoder_convolutions,
      config.encoder_widths[-1], (1, 4, 16 * side, 16 * side, 3),
    ),
  }[way]  # fmt: skip
  state = jax.eval_shape(lambda model: init(model, 1, side, side), model)
  lowered = jax.jit(chunk).lower(model, state, jax.ShapeDtypeStruct(shape, jnp.float32))
  want = sum(conv.flops for conv in convolutions(config, side, side))
  want += costs.frame_attention(c, side, side, 4).flops
  assert lowered.cost_analysis()["flops"] == pytest.approx(want, rel=0.02)


def test_operations_of_the_parts_of_the_encoder():
  """What XLA counts less at the borders is more in small pictures."""
  config, side = vae.VAE_SIZES["test"], 16
  model = store.abstract_network("vae", config)
  x = jax.ShapeDtypeStruct((1, 4, 16 * side, 16 * side, 3), jnp.float32)
  counts = costs.encoder_part_flops(config, side, side)
  for part, want in zip(model.encoder.parts(), counts, strict=True):
    encode = jax.jit(functools.partial(vae.encode_chunk, part=part))
    start = functools.partial(
      vae.init_encoder_state, batch=1, y=side, x=side, part=part
    )
    state = jax.eval_shape(start, model)
    found = encode.lower(model, state, x).cost_analysis()["flops"]
    assert found == pytest.approx(want, rel=0.08)
    x, _ = jax.eval_shape(encode, model, state, x)


@pytest.mark.parametrize("size", ["test", "toy", "ti2v-5b"])
def test_numbers_of_a_transformer(size):
  model = store.abstract_network("dit", dit.size(size))
  assert costs.parameters(dit.size(size)) == sum(a.size for a in jax.tree.leaves(model))


@pytest.mark.parametrize("precision", ["", "w4a16", "w8a16", "fp8"])
def test_bytes_of_a_transformer(precision):
  config = dit.size("toy")
  model = store.abstract_network("dit", config, jnp.bfloat16)
  if precision:
    model = jax.eval_shape(
      lambda model: weights.quantise_weights(model, mode=precision), model
    )
  want = costs.transformer_bytes(config, precision, 2)
  # Scales of rows and of whole arrays do not show in the formula.
  assert tree_bytes(model) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("kv_format", ["", "fp8", "nvfp4"])
def test_bytes_of_a_cache(kv_format):
  sampling = Sampling(kv_format=kv_format, guidance=2.0)
  model = store.abstract_network("dit", dit.size("toy"), jnp.bfloat16)
  cache = jax.eval_shape(lambda: sampler.init_cache(model, sampling, 3, 16, 16))
  work = full_work(rows=6, tokens=64, kv_format=kv_format)
  want = costs.cache_bytes(dit.size("toy"), work)
  assert tree_bytes((cache.k, cache.v)) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("precision", ["", "fp8"])
@pytest.mark.parametrize("size", ["test", "wan2.2"])
def test_bytes_of_the_vae(size, precision):
  config = vae.VAE_SIZES[size]
  model = store.abstract_network("vae", config, jnp.bfloat16)
  model = jax.eval_shape(lambda model: vae_fp8.apply(model, precision), model)
  state = jax.eval_shape(lambda model: vae.init_decoder_state(model, 1, 4, 6), model)
  found = costs.decoder_state_bytes(config, 4, 6, 2, precision)
  assert tree_bytes(state.history) == found
  both = costs.decoder_bytes(config, 2, precision) + costs.encoder_bytes(config, 2)
  assert tree_bytes(model) == pytest.approx(both, rel=0.03)


def test_parts_of_a_chunk_on_several_devices():
  """Every device has a part of the work, and of the cache; nothing is done twice."""
  whole = costs.transformer_stages(FULL, full_work())
  part = costs.transformer_stages(FULL, full_work(split=4))
  for name in ("qkv", "attention", "output", "ffn"):
    assert 4 * part[name].flops == whole[name].flops
  assert 4 * costs.cache_bytes(FULL, full_work(split=4)) == costs.cache_bytes(
    FULL, full_work()
  )
  # 880 tokens a frame are filled up to 882 for three devices.
  assert full_work(split=3).chunk_tokens == 8 * 882


def test_weights_in_fewer_bits_are_read_in_fewer_bytes():
  def ffn(precision):
    work = full_work(precision=precision)
    return costs.transformer_stages(FULL, work)["ffn"]

  numbers = 2 * FULL.dim * FULL.ffn_dim
  assert ffn("").bytes - ffn("fp8").bytes == numbers
  # Unpacked in front of the product: written, and read again.
  assert ffn("w4a16").bytes - ffn("").bytes == (4.5 / 8 + 2) * numbers
  assert {cost.unit for cost in ffn("fp8").costs} == {"matrix_fp8", "matrix"}


def test_attention_in_eight_bits():
  plain, eight = (
    costs.transformer_stages(FULL, full_work(attention_format=name))["attention"]
    for name in ("", "fp8")
  )
  assert eight.flops == plain.flops and 2 * eight.bytes == plain.bytes
  assert eight.costs[0].unit == "attention_fp8"
