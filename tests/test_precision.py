"""A precision, applied, loaded and run: what is packed, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from packed_weights import quantise, same
from random_weights import fill

from configs.generate import get_config
from launch import generate
from longlive_jax.checkpoint import quantised, store
from longlive_jax.generate import networks, precision, resuming, step_models
from longlive_jax.generate.precision import Precision
from longlive_jax.models import block_scan, dit
from longlive_jax.quant import nvfp4, weights

pytestmark = pytest.mark.usefixtures("quick_compiling")

CONFIG = dataclasses.replace(dit.SIZES["test"], layers=3)  # one is in the middle


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return fill(jax.eval_shape(lambda: dit.CausalDiT(CONFIG, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("plain") / "dit"
  store.save_network(path, model)
  return path


@pytest.fixture(autouse=True)
def three_layers(monkeypatch):
  monkeypatch.setitem(dit.SIZES, "three", CONFIG)


def test_by_layer_the_edges_stay_plain(model):
  packed = precision.apply(model, Precision("w4a4", plain_edges=1), 4)
  first, middle, last = block_scan.block_runs(packed)
  for name in ("fc1", "fc2"):
    found = getattr(middle.ffn, name).weight.get_value()
    assert isinstance(found, weights.W4A4) and found.weight.shape[0] == 1
    plain = getattr(model.blocks.ffn, name).weight[...]
    for run, layer in ((first, 0), (last, 2)):
      kept = getattr(run.ffn, name).weight[...]
      np.testing.assert_array_equal(kept[0], plain[layer])
  assert isinstance(middle.self_attn.q.weight.get_value(), weights.W4A4)
  # The middle has the numbers that it has without edges.
  whole = block_scan.split_blocks(precision.apply(model, Precision("w4a4"), 4), [1, 2])
  assert same(middle, whole.blocks[1])


def test_by_step_both_are_kept(model):
  found = precision.apply(model, Precision("w4a16", plain_steps=(0, -1)), 4)
  assert isinstance(found, step_models.StepModels) and found.choice == (0, 1, 1, 0, 1)
  plain, packed = found.models
  assert plain is model
  value = packed.blocks.cross_attn.k.weight.get_value()
  assert isinstance(value, nvfp4.NVFP4Array)


def test_layers_are_chosen_by_pattern(model):
  chosen = Precision("w4a16", layers=("*ffn/fc1", "head/linear"), plain_edges=1)
  found = precision.apply(model, chosen, 4)
  first, middle, last = block_scan.block_runs(found)
  packed = [
    isinstance(layer.weight.get_value(), nvfp4.NVFP4Array)
    for layer in (first.ffn.fc1, middle.ffn.fc1, last.ffn.fc1, found.head.linear)
  ]
  assert packed == [False, True, False, True]
  assert isinstance(middle.ffn.fc2.weight.get_value(), jax.Array)


def test_no_mode_is_no_change(model):
  assert precision.apply(model, precision.PLAIN, 4) is model


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"layers": ("blocks/ffn/*",)},
    {"plain_edges": 1},
    {"plain_steps": (0,)},
    {"plain_edges": 1, "plain_steps": (-1,)},
  ],
  ids=str,
)
def test_loading_is_applying(model, saved, settings):
  """Packed while they are read, or from the whole plain network: the same numbers."""
  wanted = Precision("w4a4", "static_6", "static_6", **settings)
  source = networks.find("dit", "three", saved, precision=wanted, steps=2)
  found = networks.load(source, "bfloat16")
  plain = store.load_dit(saved, "bfloat16")
  assert same(found, precision.apply(plain, wanted, 2))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
  check_abstract(networks.abstract(source, "bfloat16"), found)
  # Random weights have these shapes, too.
  source = networks.find("dit", "three", "random", precision=wanted, steps=2)
  check_abstract(networks.abstract(source, "bfloat16"), found)
  check_abstract(found, networks.load(source, "bfloat16"))


def places(network) -> list[int]:
  """For every array where it stands first."""
  ids = [id(leaf) for leaf in jax.tree.leaves(network)]
  return list(map(ids.index, ids))


def check_abstract(abstract, network) -> None:
  """The very tree, so that what is compiled for one is for the other, too."""
  assert jax.tree.structure(abstract) == jax.tree.structure(network)
  for one, other in zip(*map(jax.tree.leaves, (abstract, network)), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert other.committed and other.devices() == {jax.devices()[0]}
  assert places(abstract) == places(network)


def test_plain_edges_are_read_one_array_at_a_time(saved, monkeypatch):
  """Without plain steps the plain network is neither on the device nor on the host."""
  requests, read = [], store.ocp.load

  def load(path, request):
    requests.append(request)
    return read(path, request)

  monkeypatch.setattr(store.ocp, "load", load)
  wanted = Precision("w4a16", plain_edges=1)
  source = networks.find("dit", "three", saved, precision=wanted)
  first, _, last = block_scan.block_runs(networks.load(source, "float32"))
  assert {len(request) for request in requests} == {1}
  assert all(isinstance(array, np.ndarray) for r in requests for array in r.values())
  monkeypatch.undo()
  plain = store.load_dit(saved, "float32").blocks.ffn.fc1.weight[...]
  np.testing.assert_array_equal(first.ffn.fc1.weight[...], plain[:1])
  np.testing.assert_array_equal(last.ffn.fc1.weight[...], plain[-1:])


def test_from_start_to_end(saved, tmp_path, capsys):
  """A video by layer and step; both copies of the weights are counted."""
  config = get_config("toy,w4a4,random")
  config.update(
    size="three", vae="test", text="test", dit_weights=str(saved), height=32, width=64,
    frames_per_chunk=2, window_frames=6, sink_frames=2, steps=2, decode_frames=2,
    cache_dir=str(tmp_path / "cache"),
  )  # fmt: skip

  def go(name):
    output, states = str(tmp_path / name), str(tmp_path / f"{name}_states")
    result = generate.run(
      config,
      generate.Options(prompt=("a",), chunks=1, output=output, save_state=states),
    )
    assert not result["error"] and result["speed"]["frames"] == 5
    keys = store.load(result["state"])["cache.k"].astype(np.float32)
    return result, result["bytes"]["transformer"], keys

  _, packed, keys = go("packed")
  config.precision_plain_edges = 1
  config.precision_plain_steps = (0,)
  result, both, other = go("both")
  assert np.abs(keys - other).max() > 1e-3  # what is remembered of another video

  model = store.load_dit(saved)
  plain, layers = (weights.weight_bytes(m)["float32"] for m in (model, model.blocks))
  assert both["nvfp4"] == packed["nvfp4"] / 3
  # All of the plain network, and of the other one its layers: the rest is shared.
  matrices = plain - packed["float32"]  # of three layers
  assert both["float32"] == plain + layers - matrices / 3
  assert f"transformer {both['float32'] / 1e6:,.1f} MB" in capsys.readouterr().err

  # A resumed run goes on with the settings, which JSON made lists, and may change them.
  made_with = store.load_metadata(result["state"])["config"]
  assert made_with["precision_plain_steps"] == [0]
  asked = {"precision_plain_edges": 0}
  config.update(resuming.resumed_settings(get_config(), made_with, asked))
  assert config.precision_plain_steps == (0,) and config.precision_plain_edges == 0
  resuming.check_resumed(config, made_with)


def test_a_packed_checkpoint_has_layers_of_its_own(model, tmp_path):
  quantised.save_network(tmp_path / "q", quantise(model, "w4a16"), rule="mse")

  def find(**settings):
    wanted = Precision("w4a4", **settings)
    return networks.find("dit", "three", tmp_path / "q", precision=wanted)

  assert find().precision.mode == "w4a4"
  for settings, value in (
    ({"layers": ("blocks/ffn/*",)}, r"\('blocks/ffn/\*',\)"),
    ({"plain_edges": 1}, "1"),
    ({"plain_steps": (0,)}, r"\(0,\)"),
  ):
    (name,) = settings
    message = f"precision_{name}={value} cannot be chosen for dit weights=.*/q, which"
    with pytest.raises(ValueError, match=message):
      find(**settings)


def refusals(mode: str, **settings) -> dict[str, str]:
  """What describing, checking and applying a precision raise."""
  raised = {}
  try:
    wanted = Precision(mode, **settings)
  except ValueError as error:
    return {"describe": str(error)}
  model = store.abstract_network("dit", CONFIG)
  for name, act in (
    ("check", lambda: precision.check(wanted, CONFIG, 4)),
    ("apply", lambda: jax.eval_shape(lambda m: precision.apply(m, wanted, 4), model)),
  ):
    with pytest.raises(ValueError) as error:
      act()
    raised[name] = str(error.value)
  return raised


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"mode": "fp5"}, "precision='fp5' is unknown; use w4a16, w4a4, w4a4_native, w8a"),
    ({"rule": "best"}, "rule='best' is unknown"),
    ({"activation_rule": "best"}, "rule='best' is unknown"),
    ({"mode": "", "plain_edges": 1}, "precision_plain_edges=1 needs a precision, but"),
    ({"mode": "", "plain_steps": (0,)}, "precision_plain_steps=(0,) needs a precision"),
    ({"plain_edges": -1}, "precision_plain_edges=-1 must not be negative"),
    ({"plain_edges": 2}, "precision_plain_edges=2 must leave some of 3 layers between"),
    ({"plain_steps": (0, 4)}, "(0, 4) must lie within the 4 solver steps, but [4] do"),
    ({"plain_steps": (-5,)}, "precision_plain_steps=(-5,) must lie within the 4 sol"),
    ({"plain_steps": (0.5,)}, "precision_plain_steps=(0.5,) must be whole numbers"),
    ({"layers": ("blocks/mlp/*",)}, "['blocks/mlp/*'] matches no linear layer; there"),
    ({"layers": ("text_embedding/fc1",)}, "has 24 inputs, which must be a multiple"),
  ],
  ids=str,
)
def test_settings_that_do_not_fit(settings, message):
  raised = refusals(**{"mode": "w4a4", **settings})
  assert raised and all(message in found for found in raised.values()), raised
  if "layers" in settings:
    assert raised["check"].startswith("precision_layers cannot be used: ")


def test_arithmetic_that_this_machine_lacks():
  with pytest.raises(ValueError, match="mode='w4a4_native' needs a Blackwell"):
    precision.check(Precision("w4a4_native"), CONFIG, 4)
