"""What sessions share, from a config: checked before it is read, prompts kept."""

import numpy as np
import pytest

from configs import generate
from longlive_jax.generate.engine import load_engine


def test_the_shipped_networks_make_an_engine():
  config = generate.get_config("toy")
  engine = load_engine(config, history_chunks=3)
  assert engine.latent_shape == (8, 8, 24) and engine.history_chunks == 3
  assert engine.chunk_seconds == pytest.approx(32 / 24)
  assert (engine.decoder_chunks, engine.sink_chunks) == (5, 1)
  red = engine.embed("A red star.")
  assert red.shape == (48, 128) and red.dtype == np.float32
  assert engine.embed("A red star.") is red
  assert not np.array_equal(engine.embed("A blue star."), red)
  np.testing.assert_array_equal(engine.negative, engine.embed(config.negative_prompt))


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"devices": 2}, "devices=2 must be 1: sessions share one device"),
    ({"decode_on": "other"}, "decode_on='other' must be 'same'"),
    ({"independent_first_frame": True}, "independent_first_frame=True cannot be had"),
    ({"height": 100}, "height=100 must be a multiple of 32; use 96"),
    ({"weights": "/nowhere"}, "dit weights=/nowhere/dit cannot be used"),
  ],
)
def test_what_cannot_be_is_found_before_any_network_is_read(
  change, error, monkeypatch
):
  monkeypatch.setattr("longlive_jax.generate.networks.load", None)
  config = generate.get_config("toy")
  config.update(change)
  with pytest.raises(ValueError, match=error):
    load_engine(config)
