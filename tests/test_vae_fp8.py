"""The VAE's decoder in FP8: codes, scales, and the picture they make."""

import functools
import json

import bench_decoder
import eval_decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import TINY_VAE, normal, random_vae

from longlive_jax.checkpoint import store
from longlive_jax.generate import networks
from longlive_jax.kernels import fp8_conv
from longlive_jax.models import vae, vae_blocks, vae_fp8
from longlive_jax.quant import fp8
from longlive_jax.quant.weights import weight_bytes

pytestmark = pytest.mark.usefixtures("quick_compiling")


@pytest.fixture(scope="module")
def plain() -> vae.VideoVAE:
  return random_vae()


@pytest.fixture(scope="module")
def quantised(plain) -> vae.VideoVAE:
  return vae_fp8.quantise_decoder(plain)


def tiny_conv(c_in: int = 3, c_out: int = 5, dtype=jnp.float32) -> vae_blocks.Conv:
  conv = vae_blocks.Conv(c_in, c_out, (3, 3, 3), dtype=dtype, rngs=nnx.Rngs(0))
  conv.bias[...] = jnp.asarray(normal(c_out), dtype)
  return conv


def with_codes(conv: vae_blocks.Conv, gamma) -> vae_blocks.Conv:
  conv = jax.tree.map(lambda leaf: leaf, conv)
  weight = vae_fp8.quantise(conv.weight[...], jnp.asarray(gamma, jnp.float32))
  conv.weight = conv.weight.replace(weight)
  return conv


@pytest.mark.parametrize("gamma", [[0.0], [1e-3, 0.5], [1.0] * 9, [-7.0, 3.0, 2.0]])
def test_no_input_can_leave_the_range_and_half_of_it_is_used(gamma):
  weight = vae_fp8.quantise(jnp.ones((2, 1, 1, 3, len(gamma))), jnp.array(gamma))
  scale = float(weight.input_scale)
  assert np.frexp(scale)[0] == 0.5  # a power of two
  # The largest that a norm can give: all of its input in one channel.
  largest = np.sqrt(len(gamma)) * np.abs(gamma).max()
  assert largest / scale <= fp8.LARGEST
  assert largest / scale > fp8.LARGEST / 2 - 1e-3 or largest == 0


def test_codes_of_inputs_and_what_is_too_large_for_them():
  weight = with_codes(tiny_conv(), [16.0, 1.0, 1.0]).weight.get_value()
  scale = float(weight.input_scale)
  x = jnp.array([0.0, 1.0, -1.3, 1e9, -jnp.inf, jnp.nan])
  codes = vae_blocks.read_by(weight, x)
  assert codes.dtype == weight.dtype == jnp.float8_e4m3fn
  numbers = np.asarray(codes, np.float32) * scale
  largest = fp8.LARGEST * scale
  want = [0.0, 1.0, -1.25, largest, -largest, np.nan]
  np.testing.assert_array_equal(numbers, np.float32(want))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolution_of_codes_is_that_of_their_numbers(dtype):
  """Beside a plain convolution of dequantised inputs and weights."""
  conv = tiny_conv(dtype=dtype)
  coded = with_codes(conv, [1.0, 2.0, 0.5])
  weight = coded.weight.get_value()
  x = jnp.asarray(normal(2, 4, 5, 6, 3), dtype)
  keep = vae_blocks.keep_mask(jnp.array([True, False]), 1, 4)
  y, history = jax.jit(vae_blocks.causal_conv)(
    coded, x, coded.zero_history(2, 5, 6), keep
  )
  assert history.dtype == jnp.float8_e4m3fn and y.dtype == dtype

  numbers = vae_blocks.read_by(weight, x).astype(jnp.float32) * weight.input_scale
  conv = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), conv)
  conv.weight[...] = fp8.dequantise(weight.weight)
  want, past = jax.jit(vae_blocks.causal_conv)(
    conv, numbers, conv.zero_history(2, 5, 6), keep
  )
  rounding = 2e-6 if dtype == jnp.float32 else 2e-2
  np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=0, atol=rounding)
  np.testing.assert_array_equal(
    history.astype(jnp.float32) * weight.input_scale, np.asarray(past)
  )


@pytest.mark.parametrize("sides", [(1, 1), (0, 1), (1, 0)])
def test_the_kernel_is_given_what_is_convolved_without_it(monkeypatch, sides):
  """Whole pictures, and bands of them, whose rows or columns need no zeros."""
  weight = with_codes(tiny_conv(), [1.0, 2.0, 0.5]).weight.get_value()
  x = vae_blocks.read_by(weight, jnp.asarray(normal(2, 4, 5, 6, 3)))
  found = []
  for runs in (False, True):
    monkeypatch.setattr(fp8_conv, "runs_here", lambda kernel, runs=runs: runs)
    found.append(vae_blocks.convolved(weight, x, sides, 1, jnp.dtype(jnp.float32)))
  assert found[0].shape == (2, 2, 3 + 2 * sides[0], 4 + 2 * sides[1], 5)
  np.testing.assert_allclose(*found, rtol=0, atol=2e-6)


def test_residual_blocks_of_the_decoder_and_nothing_else(plain, quantised):
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree.leaves_with_path(quantised)
    if leaf.dtype == jnp.float8_e4m3fn
  }
  blocks = ["middle/block0", "middle/block1"]
  blocks += [f"upsamples/{i}/blocks/{j}" for i in range(2) for j in range(2)]
  assert {name.split("/weight")[0] for name in found} == {
    f"decoder/{block}/{conv}" for block in blocks for conv in ("conv1", "conv2")
  }
  assert isinstance(plain.decoder.middle.block0.conv1.weight.get_value(), jax.Array)
  codes = weight_bytes(quantised)["float8_e4m3fn"]
  assert codes > sum(leaf.size for leaf in jax.tree.leaves(plain.decoder)) / 2
  with pytest.raises(ValueError, match="the decoder is quantised already"):
    vae_fp8.quantise_decoder(quantised)
  with pytest.raises(ValueError, match="vae_precision='fp4' is unknown; use 'fp8'"):
    vae_fp8.apply(plain, "fp4")
  assert vae_fp8.apply(plain, "") is plain


def pieces(model, sizes, tiles: int = 1, y: int = 2, x: int = 14):
  """Frames of two videos, decoded in pieces of so many latent frames."""
  step = jax.jit(functools.partial(vae.decode_chunk, tiles=tiles))
  latents = normal(2, sum(sizes), y, x, model.config.z_dim)
  state, frames, first = vae.init_decoder_state(model, 2, y, x), [], 0
  for size in sizes:
    piece, _, state = step(model, state, latents[:, first : first + size])
    frames.append(piece)
    first += size
  codes = [a for a in jax.tree.leaves(state) if a.dtype == jnp.float8_e4m3fn]
  assert len(codes) == 12  # two of every residual block
  return np.concatenate(frames, axis=1)


def test_pieces_and_tiles_are_the_whole_clip(plain, quantised):
  """But for codes that another order of sums rounds to their neighbour: few."""
  whole = pieces(quantised, [4])
  exact = jax.jit(vae.decode_chunk)(
    plain, vae.init_decoder_state(plain, 2, 2, 14), normal(2, 4, 2, 14, 8)
  )[0]
  error = np.abs(whole - exact).mean()
  assert 0.01 * whole.std() < np.abs(whole - exact).std() < 0.2 * whole.std()
  for other in (pieces(quantised, [1, 2, 1]), pieces(quantised, [4], tiles=2)):
    assert np.abs(other - whole).mean() < 0.01 * error


def test_networks_are_loaded_so(tmp_path, plain):
  store.save_network(tmp_path / "vae", plain)
  choice = networks.Choice(
    size="test", vae="test", text="test", dit_weights="random", text_weights="random",
    weights="random", vae_weights=str(tmp_path / "vae"), vae_precision="fp8",
  )  # fmt: skip
  source = networks.find_all(choice).vae
  loaded, abstract = (
    make(source, "float32") for make in (networks.load, networks.abstract)
  )
  want = vae_fp8.quantise_decoder(plain)
  jax.tree.map(np.testing.assert_array_equal, loaded, want)
  assert jax.tree.structure(abstract) == jax.tree.structure(loaded)
  pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(loaded), strict=True)
  for told, leaf in pairs:
    assert (told.shape, told.dtype) == (leaf.shape, leaf.dtype)


def test_bytes_of_the_state():
  """Of the published decoder at 704 x 1280: 3.2 GB in 16 bits."""
  model = store.abstract_network("vae", vae.VAE_SIZES["wan2.2"], jnp.bfloat16)

  def size(model):
    state = jax.eval_shape(lambda: vae.init_decoder_state(model, 1, 44, 80))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

  before, after = size(model), size(jax.eval_shape(vae_fp8.quantise_decoder, model))
  assert 3.1e9 < before < 3.3e9 and 0.5 < after / before < 0.6


def test_the_toy_decoder_keeps_its_picture():
  """At least 40 dB; README has what tools/eval_decoder.py found of whole clips."""
  model = store.load_vae(networks.SHIPPED / "vae", "float32")
  model.encoder = model.conv1 = None
  state = vae.init_decoder_state(model, 1, 2, 2)
  latents = normal(1, 2, 2, 2, model.config.z_dim)
  decode = jax.jit(lambda m, s: vae.decode_chunk(m, s, latents)[0])
  eight = vae_fp8.quantise_decoder(model)
  frames = decode(eight, vae.init_decoder_state(eight, 1, 2, 2))
  assert 40 < eval_decoder.psnr(np.asarray(frames), np.asarray(decode(model, state)))


# ------------------------------------------------------------------ tools


def output_of(tool, capsys, *flags: str) -> dict:
  tool._FLAGS(["tool", *flags])
  tool.main([])
  tool._FLAGS.unparse_flags()
  return json.loads(capsys.readouterr().out)


def test_decoder_alone(capsys, monkeypatch):
  monkeypatch.setitem(vae.VAE_SIZES, "test", TINY_VAE)
  small = ("--height=16", "--width=16", "--calls=2")
  found = output_of(bench_decoder, capsys, *small, "--vae_precision=fp8")
  assert found["vae_precision"] == "fp8" and found["ms_a_latent_frame"] > 0
  counted = ("convolutions", "fp8_convolutions", "triton_convolutions")
  assert [found[name] for name in counted] == [0, 0, 0]  # a CPU calls no library
  assert found["state_bytes"] < output_of(bench_decoder, capsys, *small)["state_bytes"]


def test_convolutions_of_codes_are_counted():
  call = '%{n} = (bf16[2], u8[0]) custom-call({a}, %w), custom_call_target="{t}"'
  text = "\n".join([
    "%codes.1 = f8e4m3fn[4,8]{1,0} fusion(%p), kind=kLoop",
    "%w = f8e4m3fn[4]{0} parameter(1)",
    "%plain = bf16[4]{0} parameter(2)",
    call.format(n="a", a="%codes.1", t="__cudnn$convForwardGraph"),
    call.format(n="b", a="f8e4m3fn[4,8] %codes.1", t="__cudnn$convForwardGraph"),
    call.format(n="c", a="%plain", t="__cudnn$convForward").replace("%w", "%plain"),
    call.format(n="d", a="%codes.1", t="__cublas$lt$matmul$f8"),
    *(
      call.format(n=n, a="%codes.1", t="triton_kernel_call")
      + f', metadata={{op_name="jit(_decode)/{kernel}/triton_kernel_call"}}'
      for n, kernel in (("e", "fp8_conv"), ("f", "fp8_rows"))
    ),
  ])  # fmt: skip
  found = bench_decoder.convolutions(text)
  assert found == {
    "convolutions": 4, "fp8_convolutions": 3, "triton_convolutions": 1
  }  # fmt: skip


def test_psnr_of_decoders(capsys, monkeypatch):
  monkeypatch.setitem(vae.VAE_SIZES, "test", TINY_VAE)
  monkeypatch.setattr(networks, "_build", lambda source, dtype: random_vae())
  flags = ("--vae=test", "--vae_weights=random", "--clips=1", "--latents=2")
  found = output_of(eval_decoder, capsys, *flags, "--height=16", "--width=16")
  assert found["latents"] == [1, 2, 4, 4, 8]
  assert found["psnr_db"].keys() == eval_decoder.DECODERS.keys()
  assert 20 < found["psnr_db"]["fp8"] < 60
  half = np.full(8, 0.5)
  assert eval_decoder.psnr(half, half - 0.02) == pytest.approx(40)
