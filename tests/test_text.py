import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from longlive_jax.models.text import (
  Tokenizer,
  clean_text,
  embed_prompts,
  fingerprint,
  train_toy_tokenizer,
)
from longlive_jax.models.umt5 import UMT5_SIZES, UMT5Encoder

GOLDEN = pathlib.Path(__file__).parent / "golden" / "text_cleaning.json"
CAPTIONS = ["A red circle moves left.", "a blue square, on a green wall; it spins"]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
  train_toy_tokenizer(CAPTIONS, tmp_path / "tokenizer.json", vocab_size=97)
  return Tokenizer(tmp_path / "tokenizer.json", text_len=16)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text("utf-8")))
def test_golden_cleaning(case):
  for mode in ("whitespace", "lower", "canonicalize"):
    assert clean_text(case["input"], mode) == case[mode]


def test_unknown_mode():
  with pytest.raises(ValueError, match=r"mode='upper'.*use 'whitespace'"):
    clean_text("a", "upper")


def test_tokens_end_and_padding(tokenizer):
  ids, mask = tokenizer(["a RED  circle", ""])
  assert ids.dtype == mask.dtype == np.int32
  assert ids.shape == mask.shape == (2, 16)
  assert mask.sum(1).tolist() == [4, 1]
  assert ids[0, 3] == ids[1, 0] == 1
  assert not ids[0, 4:].any()
  assert (ids[0, :3] > 2).all()
  np.testing.assert_array_equal(ids[0], tokenizer(["A red circle"])[0][0])


def test_long_prompts_keep_the_end_token(tokenizer):
  ids, mask = tokenizer(["red " * 100])
  assert mask.sum() == 16 and ids[0, -1] == 1


def test_any_text_tokenises(tokenizer):
  ids, mask = tokenizer(["ein Füchslein 一只猫 😀 </s> x_y \x00"])
  assert ids.max() < tokenizer.vocab_size and 2 in ids and mask.sum() > 4


def test_training_is_repeatable(tmp_path, tokenizer):
  train_toy_tokenizer(CAPTIONS, tmp_path / "again.json", vocab_size=97)
  assert (tmp_path / "again.json").read_bytes() == tokenizer.path.read_bytes()


def test_unusable_tokenizer_files(tmp_path):
  with pytest.raises(ValueError, match=r"does not exist; give a tokenizer\.json"):
    Tokenizer(tmp_path / "none.json", 8)
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ValueError, match="not a readable tokenizer"):
    Tokenizer(tmp_path / "bad.json", 8)


class Loader:
  """Counts how often the encoder is loaded."""

  def __init__(self, seed: int = 0):
    self.count, self.seed = 0, seed

  def __call__(self) -> UMT5Encoder:
    self.count += 1
    return UMT5Encoder(UMT5_SIZES["test"], rngs=nnx.Rngs(self.seed))


def test_embeddings_are_cached_on_disk(tmp_path, tokenizer):
  load = Loader()
  cache = tmp_path / "cache"
  kwargs = dict(encoder_id="v1", cache_dir=cache)
  prompts = ["a red circle", "a  red circle", "blue"]
  first = embed_prompts(prompts, tokenizer, load, **kwargs)
  assert first.shape == (3, 16, 24) and first.dtype == np.float32
  assert load.count == 1 and len(list(cache.iterdir())) == 2
  np.testing.assert_array_equal(first[0], first[1])
  assert not first[2, 2:].any() and first[2, :2].any()

  again = embed_prompts(prompts, tokenizer, load, **kwargs)
  np.testing.assert_array_equal(again, first)
  assert load.count == 1  # nothing missing: the encoder is not even loaded
  embed_prompts(["a red circle", "new"], tokenizer, load, **kwargs)
  assert load.count == 2 and len(list(cache.iterdir())) == 3

  other = embed_prompts(prompts, tokenizer, Loader(1), encoder_id="v2", cache_dir=cache)
  assert np.abs(other - first).max() > 0.01


def test_damaged_cache_file_is_made_again(tmp_path, tokenizer):
  cache = tmp_path / "cache"
  first = embed_prompts(["red"], tokenizer, Loader(), cache_dir=cache)
  (file,) = cache.iterdir()
  file.write_bytes(file.read_bytes()[:-50])
  load = Loader()
  again = embed_prompts(["red"], tokenizer, load, cache_dir=cache)
  np.testing.assert_array_equal(again, first)
  assert load.count == 1


def test_embedding_without_cache_equals_the_encoder(tokenizer):
  encoder = Loader()()
  ids, mask = tokenizer(["a red circle"])
  out = embed_prompts(["a red circle"], tokenizer, lambda: encoder)
  np.testing.assert_allclose(
    out, jax.jit(lambda m, i, k: m(i, k))(encoder, ids, mask), atol=1e-6
  )


def test_tokenizer_larger_than_the_encoder(tmp_path):
  words = [f"w{i}x" for i in range(200)]
  train_toy_tokenizer(words, tmp_path / "t.json", vocab_size=200)
  with pytest.raises(ValueError, match="has 200 tokens, the encoder's vocab_size=97"):
    embed_prompts(["a"], Tokenizer(tmp_path / "t.json", 8), Loader())


def test_fingerprint_follows_content(tmp_path):
  (tmp_path / "a").write_bytes(b"x" * 3_000_000)
  before = fingerprint(tmp_path)
  assert fingerprint(tmp_path) == before
  (tmp_path / "a").write_bytes(b"x" * 2_999_999 + b"y")
  changed = fingerprint(tmp_path)
  assert changed != before
  (tmp_path / "b").write_bytes(b"")
  assert fingerprint(tmp_path) != changed
  with pytest.raises(ValueError, match="does not exist"):
    fingerprint(tmp_path / "none")
