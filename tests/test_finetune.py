"""Training from converted checkpoints: settings of the 5B model, tiny networks."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_balanced import result, start
from test_train import compile_cache, get_config, losses, random_network, script  # noqa: F401

from longlive_jax.checkpoint import lora, store
from longlive_jax.data.video import VideoWriter
from longlive_jax.models import dit, umt5, vae
from longlive_jax.models.text import train_toy_tokenizer
from longlive_jax.train import step

pytestmark = pytest.mark.usefixtures("quick_compiling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three clips of 4 chunks of 2 latent frames, and checkpoints of all networks."""
  root = tmp_path_factory.mktemp("finetune")
  (root / "clips" / "videos").mkdir(parents=True)
  captions = [f"a clip of number {i}" for i in range(3)]
  for i, caption in enumerate(captions):
    frames = np.random.default_rng(i).integers(0, 255, (29, 40, 40, 3), np.uint8)
    with VideoWriter(root / "clips" / "videos" / f"c{i}.mp4", fps=24) as writer:
      writer.append(frames)
    own = root / "clips" / "caption" / f"c{i}"
    own.mkdir(parents=True)
    (own / "0.json").write_text(json.dumps({"caption": caption}))
  weights = root / "weights"
  small_vae = vae.VAEConfig(2, 2, 8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
  for name, kind, config in (
    ("dit", "dit", dit.SIZES["test"]),
    ("text", "umt5", umt5.UMT5_SIZES["test"]),
    ("vae", "vae", small_vae),
  ):
    store.save_network(weights / name, random_network(kind, config, 0))
  train_toy_tokenizer(captions, weights / "tokenizer.json", 64)
  return root


def make_config(folder, workdir, arg="ti2v-5b", **changes):
  """The settings of the 5B model but for sizes, folders and what makes it exact."""
  config = get_config(arg)
  config.size = config.vae = config.text = "test"
  config.weights, config.workdir = str(folder / "weights"), str(workdir)
  config.data.folder, config.programs_dir = str(folder / "clips"), ""
  config.data.height = config.data.width = 32
  config.data.frames_per_chunk, config.data.threads = 2, 1
  config.data.chunks = config.view.window = 4
  config.dtype = config.export_dtype = "float32"
  config.steps, config.log_every, config.ema_start = 2, 1, 1
  config.sequence_devices = 1
  config.update_from_flattened_dict(changes)
  return config


def test_the_loss_of_the_full_size_is_traced_and_its_state_divides():
  config = get_config("ti2v-5b")
  size = dit.size(config.size)
  loss_fn = step.make_loss(size, script.loss_settings(config))
  params = {"dit": store.abstract_network("dit", size)}
  chunks, frames = config.view.window, config.view.window * config.data.frames_per_chunk
  y, x = config.data.height // 16, config.data.width // 16
  array = jax.ShapeDtypeStruct
  batch = {
    "latents": array((1, frames, y, x, size.in_channels), jnp.float32),
    "mask": array((1, frames), jnp.float32),
    "text": array((1, chunks, size.text_len, size.text_dim), jnp.bfloat16),
  }
  gradient = jax.value_and_grad(loss_fn, has_aux=True)
  key = jax.random.key(0)
  (loss, _), gradients = jax.eval_shape(gradient, params, batch, key)
  assert loss.shape == () and frames == 96
  assert jax.tree.structure(gradients) == jax.tree.structure(params)
  adapted = get_config("ti2v-5b,lora,i2v,nvfp4")
  assert (adapted.lora.rank, adapted.flow.conditioning_frames) == (128, 1)
  assert adapted.quantise.mode == "nvfp4" and adapted.train_text == "frozen"


def test_a_checkpoint_is_tuned_as_a_whole(folder, tmp_path):
  script.train(make_config(folder, tmp_path, "ti2v-5b,i2v"))
  assert sorted(losses(tmp_path)) == [1, 2]
  names = store.describe(tmp_path / "checkpoints" / "2")
  assert not any(".text." in name for name in names)
  made, given = (
    {part: store.load(root / part) for part in ("dit", "text")}
    for root in (tmp_path / "model", folder / "weights")
  )
  for part, largest in (("dit", 1e-4), ("text", 0)):
    apart = [np.abs(made[part][n] - given[part][n]).max() for n in given[part]]
    assert (max(apart) > 0) == (largest > 0) and max(apart) <= largest
  tokenizers = [
    (root / "tokenizer.json").read_text()
    for root in (tmp_path / "model", folder / "weights")
  ]
  assert tokenizers[0] == tokenizers[1]


ADAPTER = {
  "precision": "w4a16", "lora.rank": 4, "lora.layers": ("blocks/self_attn/*",),
  "batch_size": 2, "checkpoint_every": 1,
}  # fmt: skip

TWO = """
jax.config.update("jax_num_cpu_devices", 2)

from pathlib import Path

from test_finetune import ADAPTER, make_config, script

folder, workdir = sys.argv[1:]
changes = {**ADAPTER, "sequence_devices": 2}
script.train(make_config(Path(folder), workdir, "ti2v-5b,lora", **changes))
print("{}")
"""


def test_an_adapter_is_tuned_on_two_devices_and_goes_on_on_one(folder, tmp_path):
  both, one = tmp_path / "both", tmp_path / "one"
  result(start(TWO, folder, both))
  shutil.copytree(both / "checkpoints" / "1", one / "checkpoints" / "1")
  script.train(make_config(folder, one, "ti2v-5b,lora", **ADAPTER))
  assert list(losses(one)) == [2]
  np.testing.assert_allclose(losses(both)[2], losses(one)[2], rtol=1e-5)
  found, want = (lora.load_lora(path / "model" / "lora", 2) for path in (both, one))
  for name, factors in want.factors.items():
    for a, b in zip(found.factors[name], factors, strict=True):
      # Adam divides by the root of a square: tiny gradients make large differences.
      np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max(), err_msg=name)
  assert not (both / "model" / "dit").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"weights": "nowhere"}, r"dit weights=nowhere/dit cannot be used: no checkpoint"),
    ({"vae_weights": "nowhere"}, r"vae weights=nowhere cannot be used: no checkpoint"),
    ({"text_weights": "nowhere"}, r"umt5 weights=nowhere cannot be used"),
    ({"tokenizer": "nowhere"}, "nowhere"),
    ({"vae_weights": "random"}, "the VAE has random weights"),
    ({"weights": ""}, "weights='' ships only with size='toy'"),
    ({"size": "toy"}, "are of size 'test', but size='toy'"),
    ({"data.height": 20}, "height=20 must be a multiple of 32"),
  ],
)
def test_what_is_missing_is_found_at_once(folder, tmp_path, changes, message):
  config = make_config(folder, tmp_path / "out", **changes)
  with pytest.raises(ValueError, match=message):
    script.check(config)


def test_packed_weights_cannot_be_trained_whole(folder, monkeypatch):
  monkeypatch.setattr(store, "is_packed", lambda record: record["kind"] == "dit")
  with pytest.raises(ValueError, match="are quantised and cannot be trained whole"):
    script.check(make_config(folder, "out"))
