"""The video VAE against SPEC 10 written out frame by frame, and its invariants."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.train_vae import get_config
from launch import train_vae as launch
from longlive_jax.data.clip import save_latents
from longlive_jax.models import pixels, vae, vae_blocks
from longlive_jax.train import vae as train_vae
from longlive_jax.train.state import OptimizerSettings, init_state, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compiling")

CONFIG = vae.VAEConfig(dim=2, dec_dim=2, z_dim=3, num_res_blocks=1)
# Fewer stages compile faster: 8 pixels and 4 frames a latent; 4 pixels and 2 frames.
SHORT = vae.VAEConfig(2, 2, 3, (1, 2, 2), 1, (True, True))
TINY = vae.VAEConfig(2, 2, 3, (1, 1), 1, (True,))
decode_chunk = jax.jit(vae.decode_chunk)
encode_chunk = jax.jit(vae.encode_chunk)


def _model(config: vae.VAEConfig) -> vae.VideoVAE:
  """Random weights, biases, norms and statistics: nothing hides a missing term."""
  rng = np.random.default_rng(1)
  abstract = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))

  def draw(leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    return jnp.asarray(1 + 0.2 * noise if leaf.ndim == 1 else 0.2 * noise)

  return jax.tree.map(draw, abstract)


@pytest.fixture(scope="module")
def model() -> vae.VideoVAE:
  return _model(CONFIG)


@pytest.fixture(scope="module")
def short() -> vae.VideoVAE:
  return _model(SHORT)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Reference:
  """SPEC 10 in NumPy for one sample: one latent frame at a time, a cache per layer.

  The clip start is a branch here, where the model has masks. Arrays are (t, y, x, c).
  """

  def __init__(self, model: vae.VideoVAE):
    self.model = model
    self.cache: dict[int, np.ndarray] = {}

  def conv3(self, conv, x: np.ndarray, spatial: int = 1) -> np.ndarray:
    past = self.cache.get(id(conv), np.zeros_like(x[:1].repeat(2, 0)))
    x = np.concatenate([past, x])
    self.cache[id(conv)] = x[-2:]
    return _convolve(conv, np.pad(x, ((0, 0), (spatial,) * 2, (spatial,) * 2, (0, 0))))

  def block(self, block, x: np.ndarray) -> np.ndarray:
    h = self.conv3(block.conv1, _silu(_norm(block.norm1, x)))
    h = self.conv3(block.conv2, _silu(_norm(block.norm2, h)))
    return h + (x if block.shortcut is None else _convolve(block.shortcut, x))

  def middle(self, middle, x: np.ndarray) -> np.ndarray:
    x = self.block(middle.block0, x)
    rows = []
    for frame in x:
      pixels = _norm(middle.attention.norm, frame).reshape(-1, x.shape[-1])
      q, k, v = np.split(_matmul(middle.attention.to_qkv, pixels), 3, axis=-1)
      logits = q @ k.T / np.sqrt(x.shape[-1])
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      h = _matmul(middle.attention.proj, weights @ v).reshape(frame.shape)
      rows.append(frame + h)
    return self.block(middle.block1, np.stack(rows))

  def head(self, head, x: np.ndarray) -> np.ndarray:
    return self.conv3(head.conv, _silu(_norm(head.norm, x)))

  def up(self, stage, x: np.ndarray, start: bool) -> np.ndarray:
    h = functools.reduce(lambda h, block: self.block(block, h), stage.blocks, x)
    if stage.resample is None:
      return h
    ft = 1 if stage.time_conv is None else 2
    if stage.time_conv is not None and not start:
      both = self.conv3(stage.time_conv, h, spatial=0)
      h = np.stack(np.split(both, 2, axis=-1), axis=1).reshape(-1, *h.shape[1:])
    h = h.repeat(2, axis=1).repeat(2, axis=2)
    h = _convolve(stage.resample, np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0))))
    c_out = h.shape[-1]
    skip = np.zeros((x.shape[0] * ft, *h.shape[1:]), np.float32)
    repeats = c_out * ft * 4 // x.shape[-1]
    for c in range(c_out):
      for t, r, q in np.ndindex(ft, 2, 2):
        source = (((c * ft + t) * 2 + r) * 2 + q) // repeats
        skip[t::ft, r::2, q::2, c] = x[..., source]
    return h + (skip[ft - 1 :] if start else skip)

  def down(self, stage, x: np.ndarray, start: bool) -> np.ndarray:
    h = functools.reduce(lambda h, block: self.block(block, h), stage.blocks, x)
    fs = 1 if stage.resample is None else 2
    if stage.resample is not None:
      h = np.pad(h, ((0, 0), (0, 1), (0, 1), (0, 0)))
      h = _convolve(stage.resample, h)[:, ::2, ::2]
    ft = 1
    if stage.time_conv is not None:
      ft = 2
      last = h[-1:]
      if not start:
        joined = np.concatenate([self.cache[id(stage.time_conv)], h])
        h = _convolve(stage.time_conv, joined)[::2]
      self.cache[id(stage.time_conv)] = last
    x = np.concatenate([np.zeros((-len(x) % ft, *x.shape[1:]), np.float32), x])
    folded = [
      x[t::ft, r::fs, q::fs, c]
      for c, t, r, q in np.ndindex(x.shape[-1], ft, fs, fs)
    ]
    groups = np.split(np.stack(folded, axis=-1), h.shape[-1], axis=-1)
    return h + np.stack([g.mean(-1) for g in groups], axis=-1)

  def decode(self, z: np.ndarray) -> np.ndarray:
    decoder = self.model.decoder
    centre, std = self.model.latent_mean[...], self.model.latent_std[...]
    z = z * np.asarray(std) + np.asarray(centre)
    frames = []
    for i in range(len(z)):
      h = self.conv3(decoder.conv1, _convolve(self.model.conv2, z[i : i + 1]))
      h = self.middle(decoder.middle, h)
      for stage in decoder.upsamples:
        h = self.up(stage, h, start=i == 0)
      frames.append(self.head(decoder.head, h))
    return np.concatenate(frames)

  def encode(self, x: np.ndarray) -> np.ndarray:
    encoder = self.model.encoder
    moments = []
    for i in range(0, len(x), 4):
      h = self.conv3(encoder.conv1, x[max(i - 3, 0) : i + 1])
      for stage in encoder.downsamples:
        h = self.down(stage, h, start=i == 0)
      h = self.head(encoder.head, self.middle(encoder.middle, h))
      moments.append(_convolve(self.model.conv1, h))
    mean = np.concatenate(moments)[..., : self.model.config.z_dim]
    centre, std = self.model.latent_mean[...], self.model.latent_std[...]
    return (mean - np.asarray(centre)) / np.asarray(std)


def _convolve(conv, x: np.ndarray) -> np.ndarray:
  """Valid cross-correlation with stride 1."""
  weight = np.asarray(conv.weight[...])
  weight = weight[:, :, :, None] if weight.ndim == 4 else weight
  o, ky, kx, kt, _ = weight.shape
  sizes = [n - k + 1 for n, k in zip(x.shape, (kt, ky, kx), strict=False)]
  y = np.zeros((*sizes, o), np.float32) + np.asarray(conv.bias[...])
  for i, j, k in np.ndindex(kt, ky, kx):
    patch = x[i : i + sizes[0], j : j + sizes[1], k : k + sizes[2]]
    y += patch @ weight[:, j, k, i].T
  return y


def _matmul(conv, x: np.ndarray) -> np.ndarray:
  weight = np.asarray(conv.weight[...])
  return x @ weight[:, 0, 0].T + np.asarray(conv.bias[...])


def _norm(norm, x: np.ndarray) -> np.ndarray:
  length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return x / length * np.sqrt(x.shape[-1]) * np.asarray(norm.gamma[...])


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def _fold(video: np.ndarray) -> np.ndarray:
  """Channel c * 4 + column * 2 + row of the patch, entry by entry."""
  t, h, w, _ = video.shape
  patch = np.zeros((t, h // 2, w // 2, 12), np.float32)
  for c, column, row in np.ndindex(3, 2, 2):
    patch[..., c * 4 + column * 2 + row] = video[:, row::2, column::2, c]
  return patch


def test_decode_matches_reference(model):
  z = _random(1, 3, 2, 3, 3)
  state = vae.init_decoder_state(model, 1, 2, 3)
  frames, dropped, _ = decode_chunk(model, state, z)
  assert frames.shape == (1, 12, 32, 48, 3) and dropped.tolist() == [3]
  expected = Reference(model).decode(z[0])
  got = np.asarray(vae.fold_pixels(frames)[0, 3:])
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert 0.1 < np.abs(expected).max() < 100  # or the tolerance would mean nothing


def test_encode_matches_reference(model):
  video = _random(1, 10, 32, 48, 3)  # the tenth frame completes no group: ignored
  got = jax.jit(vae.encode)(model, video)
  assert got.shape == (1, 3, 2, 3, 3) and got.dtype == jnp.float32
  expected = Reference(model).encode(_fold(video[0, :9]))
  np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-4)
  assert 0.1 < np.abs(expected).max() < 100


def test_whole_clip_equals_pieces(short):
  """Five latent frames as one call and as a scan of calls of two (the last is cut)."""
  decode = jax.jit(vae.decode, static_argnames="frames_per_call")
  encode = jax.jit(vae.encode, static_argnames="frames_per_call")
  z = _random(1, 5, 1, 2, 3)
  whole, pieces = decode(short, z), decode(short, z, frames_per_call=2)
  assert whole.shape == (1, 17, 8, 16, 3) and np.abs(whole).max() == 1.0
  np.testing.assert_allclose(pieces, whole, atol=1e-4)
  video = _random(1, 17, 8, 16, 3)
  whole, pieces = encode(short, video), encode(short, video, frames_per_call=2)
  np.testing.assert_allclose(pieces, whole, atol=1e-4)


def test_large_frames_are_convolved_one_at_a_time(short, monkeypatch):
  """The same numbers and the same state, also where one sample's clip starts later."""
  state = vae.init_decoder_state(short, 2, 1, 2)
  _, _, running = decode_chunk(short, state, _random(2, 1, 1, 2, 3))
  state = _first_from(running, state)
  z = _random(2, 3, 1, 2, 3, seed=1)
  want = decode_chunk(short, state, z)
  video = _random(2, 8, 8, 16, 3)
  coded = encode_chunk(short, vae.init_encoder_state(short, 2, 1, 2), video)
  monkeypatch.setattr(vae_blocks, "MOST_BYTES", 1)
  few = jax.jit(lambda *args: vae.decode_chunk(*args))
  assert few.lower(short, state, z).as_text().count("convolution") > 2 * (
    decode_chunk.lower(short, state, z).as_text().count("convolution")
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), few(short, state, z), want
  )
  few = jax.jit(lambda *args: vae.encode_chunk(*args))
  got = few(short, vae.init_encoder_state(short, 2, 1, 2), video)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, coded)


def test_no_kernel_is_transposed(short):
  """A transposed kernel would be held twice. (Foldings of pixels have 7 or 8 axes.)"""
  state = vae.init_decoder_state(short, 1, 1, 2)
  programs = [
    decode_chunk.lower(short, state, _random(1, 2, 1, 2, 3)),
    encode_chunk.lower(
      short, vae.init_encoder_state(short, 1, 1, 2), _random(1, 8, 8, 16, 3)
    ),
  ]
  for program in programs:
    axes = re.findall(r"stablehlo.transpose .* dims = \[(.*?)\]", program.as_text())
    assert {len(order.split(",")) for order in axes} == {7, 8}


def test_state_keeps_structure_and_program(short):
  traces = []

  @jax.jit
  def step(model, state, z):
    traces.append(1)
    return vae.decode_chunk(model, state, z)

  state = vae.init_decoder_state(short, 2, 1, 2)
  described = jax.tree.map(lambda a: (a.shape, a.dtype), state)
  for i in range(3):
    _, dropped, state = step(short, state, _random(2, 2, 1, 2, 3, seed=i))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == described
    assert dropped.tolist() == [0 if i else 3] * 2
  assert len(traces) == 1


def _first_from(running, fresh):
  """Sample 0 of one state beside sample 1 of another."""
  return jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), running, fresh)


def test_each_sample_starts_its_own_clip(short):
  """Sample 0 in mid-clip beside sample 1 that starts: as if each were alone."""
  z = _random(2, 4, 1, 2, 3)
  fresh = vae.init_decoder_state(short, 2, 1, 2)
  _, _, running = decode_chunk(short, fresh, z[:, :2])
  goes_on, _, _ = decode_chunk(short, running, z[:, 2:])
  starts, _, _ = decode_chunk(short, fresh, z[:, 2:])
  mixed = _first_from(running, fresh)
  frames, dropped, state = decode_chunk(short, mixed, z[:, 2:])
  assert dropped.tolist() == [0, 3] and state.started.all()
  np.testing.assert_allclose(frames[0], goes_on[0], atol=1e-5)
  np.testing.assert_allclose(frames[1, 3:], starts[1, 3:], atol=1e-5)
  assert np.abs(goes_on - starts).max() > 0.01

  video = _random(2, 16, 8, 16, 3)
  fresh = vae.init_encoder_state(short, 2, 1, 2)
  _, running = encode_chunk(short, fresh, video[:, :8])
  goes_on, _ = encode_chunk(short, running, video[:, 8:])
  starts, _ = encode_chunk(short, fresh, video[:, 8:])
  latents, _ = encode_chunk(short, _first_from(running, fresh), video[:, 8:])
  np.testing.assert_allclose(latents[0], goes_on[0], atol=1e-5)
  np.testing.assert_allclose(latents[1], starts[1], atol=1e-5)


def test_placeholders_do_not_matter(short):
  groups = _random(2, 8, 8, 16, 3)
  other = groups.copy()
  other[:, :3] = 1e3
  state = vae.init_encoder_state(short, 2, 1, 2)
  first, second = (encode_chunk(short, state, g) for g in (groups, other))
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_gradients_are_finite_and_skip_the_statistics():
  def loss(model, video):
    return jnp.mean(jnp.square(vae.decode(model, vae.encode(model, video)) - video))

  video = _random(1, 5, 4, 8, 3)
  video[:, 1:4] = 0  # zero vectors reach the norms
  grads = jax.jit(jax.grad(loss))(_model(TINY), video)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert not np.any(grads.latent_mean[...]) and not np.any(grads.latent_std[...])
  assert np.any(grads.encoder.conv1.weight[...])


def test_upsample_equals_nearest_then_conv(model):
  conv = model.decoder.upsamples[0].resample
  x = _random(2, 2, 3, 4, 8)
  nearest = x.repeat(2, axis=2).repeat(2, axis=3)
  padded = np.pad(nearest, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
  expected = np.stack([_convolve(conv, clip) for clip in padded])
  np.testing.assert_allclose(vae_blocks.upsample(conv, x), expected, atol=1e-4)


def test_folding_inverts():
  video = _random(2, 1, 4, 6, 3)
  patch = vae.fold_pixels(video)
  np.testing.assert_array_equal(patch[0], _fold(video[0]))
  np.testing.assert_array_equal(vae.unfold_pixels(patch), video)


def test_to_uint8():
  got = pixels.to_uint8(jnp.array([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]))
  assert got.dtype == jnp.uint8 and got.tolist() == [0, 0, 128, 191, 255, 255]


def _shapes(config: vae.VAEConfig) -> dict[str, tuple[int, ...]]:
  tree = jax.eval_shape(lambda: vae.VideoVAE(config, rngs=nnx.Rngs(0)))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"):
    leaf.shape for path, leaf in leaves
  }


@pytest.mark.parametrize("size", sorted(vae.VAE_SIZES))
def test_config_is_read_off_the_shapes(size):
  shapes = _shapes(vae.VAE_SIZES[size])
  assert len(shapes) == 196 + 2
  assert vae.vae_config_from_shapes(shapes) == vae.VAE_SIZES[size]


def test_published_shapes():
  """One of each kind of layer, with the axes of kernels as they are here."""
  shapes = _shapes(vae.VAE_SIZES["wan2.2"])
  expected = {
    "encoder.conv1.weight": (160, 3, 3, 3, 12),
    "encoder.downsamples.1.blocks.0.shortcut.weight": (320, 1, 1, 1, 160),
    "encoder.downsamples.2.blocks.0.conv1.weight": (640, 3, 3, 3, 320),
    "encoder.downsamples.0.resample.weight": (160, 3, 3, 160),
    "encoder.downsamples.2.time_conv.weight": (640, 1, 1, 3, 640),
    "encoder.head.conv.weight": (96, 3, 3, 3, 640),
    "conv1.weight": (96, 1, 1, 1, 96),
    "conv2.weight": (48, 1, 1, 1, 48),
    "decoder.conv1.weight": (1024, 3, 3, 3, 48),
    "decoder.middle.attention.to_qkv.weight": (3072, 1, 1, 1024),
    "decoder.middle.attention.norm.gamma": (1024,),
    "decoder.upsamples.0.time_conv.weight": (2048, 1, 1, 3, 1024),
    "decoder.upsamples.2.resample.weight": (512, 3, 3, 512),
    "decoder.upsamples.3.blocks.0.norm1.gamma": (512,),
    "decoder.upsamples.3.blocks.2.conv2.weight": (256, 3, 3, 3, 256),
    "decoder.head.conv.weight": (12, 3, 3, 3, 256),
    "latent_std": (48,),
  }
  assert {name: shapes[name] for name in expected} == expected
  absent = ("encoder.downsamples.0.time_conv", "decoder.upsamples.3.resample")
  assert not any(name.startswith(absent) for name in shapes)
  assert sum(np.prod(s) for s in shapes.values()) == 704_688_668 + 2 * 48


def test_toy_fits_the_package():
  assert sum(np.prod(s) for s in _shapes(vae.VAE_SIZES["toy"]).values()) <= 5_100_000


def test_errors_name_field_value_and_remedy(model):
  with pytest.raises(ValueError, match=r"temporal_downsample=\(True,\) must have one"):
    vae.VAEConfig(dim=8, dec_dim=8, z_dim=8, temporal_downsample=(True,))
  with pytest.raises(ValueError, match=r"height=40 must be a multiple of 16; use 32"):
    vae.encode(model, np.zeros((1, 1, 40, 32, 3), np.float32))
  with pytest.raises(ValueError, match=r"missing \['decoder.conv1.weight'\]"):
    shapes = _shapes(CONFIG)
    del shapes["decoder.conv1.weight"]
    vae.vae_config_from_shapes(shapes)


def _settings() -> train_vae.VAESettings:
  optimizer = OptimizerSettings(steps=40, learning_rate=5e-3, beta1=0.9)
  return train_vae.VAESettings(optimizer, kl=1e-3)


def test_training_steps_lower_the_loss_and_repeat_exactly():
  settings = _settings()
  videos = np.clip(127 + 60 * _random(3, 9, 1, 1, 3), 0, 255).repeat(8, 2).repeat(8, 3)
  videos = videos.astype(np.uint8)  # flat colours that change in time

  def run(state, steps):
    losses = []
    for step in steps:
      batch = train_vae.window_batch(videos, step, batch=2, frames=5, seed=0)
      state, metrics = train_vae.train_step(state, batch, settings)
      losses.append(float(metrics["loss"]))
    return state, losses

  def start():
    network = train_vae.quiet_posterior(_model(TINY))
    return init_state(network, make_optimizer(settings.optimizer))

  state, losses = run(start(), range(30))
  assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
  half, first = run(start(), range(15))
  again, rest = run(jax.tree.map(jnp.array, jax.device_get(half)), range(15, 30))
  assert first + rest == losses
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_statistics_normalise_the_latents():
  tiny = _model(TINY)
  videos = (255 * np.random.default_rng(0).random((4, 5, 8, 8, 3))).astype(np.uint8)
  mean, std = train_vae.measure_statistics(
    train_vae.with_statistics(tiny, np.zeros(3), np.ones(3)), videos, batch=2
  )
  model = train_vae.with_statistics(tiny, mean, std)
  z = np.asarray(jax.jit(vae.encode)(model, train_vae.to_unit(videos)))
  np.testing.assert_allclose(z.mean((0, 1, 2, 3)), 0, atol=1e-4)
  np.testing.assert_allclose(z.std((0, 1, 2, 3)), 1, atol=1e-4)
  result = train_vae.measure_psnr(model, videos, batch=2)
  video = np.asarray(train_vae.to_unit(videos))
  error = np.asarray(jax.jit(vae.decode)(model, z)) - video
  assert result["psnr"] == pytest.approx(10 * np.log10(4 / np.mean(error**2)), abs=1e-3)


def test_window_batch_depends_on_the_step_only():
  videos = np.arange(2 * 9, dtype=np.uint8).reshape(2, 9, 1, 1, 1)
  draw = functools.partial(train_vae.window_batch, videos, batch=4, frames=5, seed=0)
  first, again, other = draw(3), draw(3), draw(4)
  np.testing.assert_array_equal(first, again)
  assert first.shape == (4, 5, 1, 1, 1) and not np.array_equal(first, other)
  assert (np.diff(first[..., 0, 0, 0].astype(int), axis=1) == 1).all()


def test_launch_refuses_latents(tmp_path):
  (tmp_path / "latents").mkdir()
  save_latents(tmp_path / "latents" / "x.npz", np.zeros((8, 2, 2, 8)), ["a"])
  config = get_config("test")
  config.data.folder = str(tmp_path)
  with pytest.raises(ValueError, match="holds latents; give the folder of videos"):
    launch.read_videos(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"size": "huge"}, r"size='huge' is unknown; use"),
    ({"dtype": "float16"}, r"dtype='float16'; use 'bfloat16' or 'float32'"),
    ({"frames": 16}, r"frames=16 must be 1 \+ 4 k; use 17"),
    ({"frames": 9}, r"frames=9 is more than the 5 frames of .*; use at most 5"),
    ({"steps": 0}, r"steps=0 must be at least 1"),
    ({"data.width": 40}, r"data.width=40 must be a multiple of 16"),
  ],
)
def test_launch_refuses_bad_settings(changes, message):
  config = get_config("test")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    launch.check(config)
