"""From a prompt to the rows that condition the video model (SPEC 11).

`clean_text` -> `Tokenizer` -> UMT5 -> `embed_prompts`, which keeps results on disk so
that the text encoder (11 GB at full size) is loaded only for prompts never seen.
"""

from __future__ import annotations

import hashlib
import html
import os
import string
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ftfy
import jax
import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from longlive_jax.models.umt5 import UMT5Encoder

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def clean_text(text: str, mode: str = "whitespace") -> str:
  """Normalises a prompt before tokenisation (SPEC 11).

  Args:
    text: any string.
    mode: 'whitespace' (what the model uses): broken unicode repaired, HTML unescaped
      twice, every run of white space one blank. 'lower': then lower-cased.
      'canonicalize': underscores become blanks, ASCII punctuation goes, lower case.

  Raises:
    ValueError: unknown mode.
  """
  if mode not in ("whitespace", "lower", "canonicalize"):
    raise ValueError(
      f"mode={mode!r} is unknown; use 'whitespace', 'lower' or 'canonicalize'"
    )
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  if mode == "canonicalize":
    text = text.replace("_", " ")
    text = text.translate(str.maketrans("", "", string.punctuation))
  text = " ".join(text.split())
  return text if mode == "whitespace" else text.lower()


class Tokenizer:
  """Token ids of cleaned text, from a `tokenizer.json`.

  Args:
    path: the file; it must hold the tokens `<pad>` and `</s>`.
    text_len: slots per prompt; longer prompts are cut, the end token stays.

  Raises:
    ValueError: the file is missing, no tokenizer, or lacks a special token.
  """

  def __init__(self, path: str | os.PathLike, text_len: int):
    self.path = Path(path)
    self.text_len = text_len
    if not self.path.is_file():
      raise ValueError(f"tokenizer={self.path} does not exist; give a tokenizer.json")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
    except Exception as error:  # the library raises plain Exception
      raise ValueError(
        f"tokenizer={self.path} is not a readable tokenizer.json ({error})"
      ) from error
    # Settings stored in the file would fight with the padding done here.
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._pad, self._eos = (self._tokenizer.token_to_id(t) for t in (PAD, EOS))
    if self._pad is None or self._eos is None:
      raise ValueError(f"tokenizer={self.path} must define the tokens {PAD} and {EOS}")

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.get_vocab_size()

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask (1 = real token), both (b, text_len) int32."""
    ids = np.full((len(texts), self.text_len), self._pad, np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
      tokens = self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids
      tokens = [*tokens[: self.text_len - 1], self._eos]
      ids[row, : len(tokens)] = tokens
      mask[row, : len(tokens)] = 1
    return ids, mask


def train_toy_tokenizer(
  captions: Iterable[str], path: str | os.PathLike, vocab_size: int = 512
) -> None:
  """Learns a small word tokenizer from captions and writes it to `path`.

  Text is lower-cased and split at white space and punctuation. A word that the
  captions never used becomes `<unk>`, so every text can be tokenised.
  `<pad>` is 0, `</s>` 1, `<unk>` 2; the more frequent the word, the lower its number.
  """
  tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=UNK))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Lowercase()]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  trainer = trainers.WordLevelTrainer(
    vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK], show_progress=False
  )
  tokenizer.train_from_iterator((clean_text(c) for c in captions), trainer)
  tokenizer.save(str(path))


def fingerprint(*paths: str | os.PathLike) -> str:
  """Identity of files or folders: a hash of names, sizes, times and both file ends.

  Reading 11 GB to find that nothing changed would cost more than encoding, so large
  files count by their size, time of change, and first and last megabyte.

  Raises:
    ValueError: a path does not exist.
  """
  megabyte = 1 << 20
  digest = hashlib.sha256()
  for root in map(Path, paths):
    if not root.exists():
      raise ValueError(f"path={root} does not exist")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*"))
    for file in files:
      if not file.is_file():
        continue
      size = file.stat().st_size
      digest.update(f"{file.relative_to(root)}|{size}|".encode())
      with file.open("rb") as stream:
        digest.update(stream.read(megabyte))
        if size > 2 * megabyte:
          digest.update(f"{file.stat().st_mtime_ns}|".encode())
        if size > megabyte:
          stream.seek(max(megabyte, size - megabyte))
          digest.update(stream.read())
  return digest.hexdigest()


@jax.jit
def _encode(encoder: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
  return encoder(ids, mask)


def embed_prompts(
  prompts: Sequence[str],
  tokenizer: Tokenizer,
  load_encoder: Callable[[], UMT5Encoder],
  *,
  encoder_id: str = "",
  cache_dir: str | os.PathLike | None = None,
) -> np.ndarray:
  """Embeds prompts, reading from the disk those that were embedded before.

  The encoder is loaded only if a prompt is missing from the cache, and is released
  when this function returns: load the video model afterwards. One prompt is encoded
  per call, so there is one compiled program and memory does not grow.

  Args:
    prompts: strings; equal strings are encoded once.
    tokenizer: makes the ids; its `text_len` is k.
    load_encoder: called without arguments, at most once.
    encoder_id: changes when the encoder's weights or the tokenizer do (`fingerprint`).
    cache_dir: folder of the cache, created if needed; None keeps nothing.

  Returns:
    float32 (len(prompts), k, dim); rows behind the last token are zero. float32 holds
    every bfloat16 exactly, so casting back loses nothing.

  Raises:
    ValueError: the tokenizer knows more tokens than the encoder.
  """
  if not prompts:
    raise ValueError("prompts is empty; give at least one")
  texts = [clean_text(p) for p in prompts]
  rows: dict[str, np.ndarray] = {}  # the real tokens' rows only
  files: dict[str, Path] = {}
  if cache_dir is not None:
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    for text in dict.fromkeys(texts):
      name = repr((text, encoder_id, tokenizer.text_len)).encode()
      files[text] = Path(cache_dir) / f"{hashlib.sha256(name).hexdigest()}.npy"
      cached = _read(files[text])
      if cached is not None:
        rows[text] = cached
  missing = [text for text in dict.fromkeys(texts) if text not in rows]
  if missing:
    encoder = load_encoder()
    if tokenizer.vocab_size > encoder.config.vocab_size:
      # Out-of-range ids would be clamped silently by the gather.
      raise ValueError(
        f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the encoder's "
        f"vocab_size={encoder.config.vocab_size}; use the tokenizer it was trained with"
      )
    for text in missing:
      ids, mask = tokenizer([text])
      hidden = np.asarray(_encode(encoder, ids, mask)[0], np.float32)
      rows[text] = hidden[: int(mask.sum())]
      if text in files:
        _write(files[text], rows[text])
    del encoder
  width = rows[texts[0]].shape[1]
  embeddings = np.zeros((len(texts), tokenizer.text_len, width), np.float32)
  for i, text in enumerate(texts):
    embeddings[i, : len(rows[text])] = rows[text]
  return embeddings


def _read(file: Path) -> np.ndarray | None:
  try:
    array = np.load(file)
  except (OSError, ValueError, EOFError):  # absent or damaged: encode again
    return None
  return array if array.ndim == 2 else None


def _write(file: Path, array: np.ndarray) -> None:
  # Beside, then renamed: another process never reads half a file.
  with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as beside:
    try:
      np.save(beside, array)
    except BaseException:
      os.unlink(beside.name)
      raise
  os.replace(beside.name, file)
