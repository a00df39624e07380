"""A precision, applied: which layers and steps are packed, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from random_weights import fill

from longlive_jax.generate import precision, sampler
from longlive_jax.generate.precision import Precision
from longlive_jax.models import dit
from longlive_jax.quant import nvfp4, weights

CONFIG = dataclasses.replace(dit.SIZES["test"], layers=3)  # one is in the middle


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return fill(jax.eval_shape(lambda: dit.CausalDiT(CONFIG, rngs=nnx.Rngs(0))))


def test_by_layer_the_edges_stay_plain(model):
  packed = precision.apply(model, Precision("w4a4", plain_edges=1), 4)
  first, middle, last = dit.block_runs(packed)
  for name in ("fc1", "fc2"):
    found = getattr(middle.ffn, name).weight.get_value()
    assert isinstance(found, weights.W4A4) and found.weight.shape[0] == 1
    plain = getattr(model.blocks.ffn, name).weight[...]
    for run, layer in ((first, 0), (last, 2)):
      kept = getattr(run.ffn, name).weight[...]
      np.testing.assert_array_equal(kept[0], plain[layer])
  assert isinstance(middle.self_attn.q.weight.get_value(), weights.W4A4)


def test_by_step_both_are_kept(model):
  found = precision.apply(model, Precision("w4a16", plain_steps=(0, -1)), 4)
  assert isinstance(found, sampler.StepModels) and found.choice == (0, 1, 1, 0, 1)
  plain, packed = found.models
  assert plain is model
  value = packed.blocks.cross_attn.k.weight.get_value()
  assert isinstance(value, nvfp4.NVFP4Array)


def test_no_mode_is_no_change(model):
  assert precision.apply(model, Precision(plain_steps=(0,)), 4) is model


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"plain_edges": 2}, "plain_edges=2 must leave some of 3 layers; use at most 1"),
    ({"plain_steps": (4,)}, r"plain_steps=\[4\] must lie within the 4 solver steps"),
    (
      {"plain_edges": 1, "patterns": ("*ffn/fc1",)},
      r"patterns=\['\*ffn/fc1'\] must start with 'blocks/' for plain_edges=1",
    ),
    ({"rule": "best"}, "rule='best' is unknown"),
    ({"patterns": ("blocks/mlp/*",)}, "matches no linear layer"),
  ],
  ids=str,
)
def test_settings_that_do_not_fit(model, settings, message):
  with pytest.raises(ValueError, match=message):
    precision.apply(model, Precision("w4a4", **settings), 4)
