"""Which weights a run uses: found and checked first, loaded one after the other."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import longlive_jax
from longlive_jax.checkpoint import store

SHIPPED = Path(longlive_jax.__file__).parent / "assets" / "toy"


@dataclasses.dataclass(frozen=True)
class Source:
  """A network before it is built.

  Attributes:
    kind: 'dit', 'vae' or 'umt5'.
    config: its sizes.
    path: checkpoint folder, or None for random weights.
  """

  kind: str
  config: Any
  path: Path | None


def find(kind: str, size: str, weights: str | Path) -> Source:
  """Finds a network's weights; reads only their record.

  Args:
    kind: 'dit', 'vae' or 'umt5'.
    size: a name in the kind's table of sizes.
    weights: checkpoint folder, or 'random'.

  Raises:
    ValueError: unknown size; a folder that is missing, damaged, or holds something
      else.
  """
  sizes = store.NETWORKS[kind][2]
  if size not in sizes:
    raise ValueError(f"{kind} size={size!r} is unknown; use one of {sorted(sizes)}")
  if weights == "random":
    return Source(kind, sizes[size], None)
  path = Path(weights).expanduser()
  try:
    record = store.load_metadata(path)
    if record.get("kind") != kind:
      raise ValueError(f"it holds {record.get('kind', 'no network')!r}, not {kind!r}")
    config = store.network_config(kind, record["config"])
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f"{kind} weights={path} cannot be used: {error}") from error
  # The VAE's and the encoder's widths are read from the checkpoint; the transformer's
  # size was asked for by name.
  if kind == "dit" and config != sizes[size]:
    raise ValueError(
      f"dit weights={path} are of size {record.get('size')!r}, but size={size!r}; give "
      "matching --config.size and --config.dit_weights"
    )
  return Source(kind, config, path)


def folder_of(weights: str, size: str) -> Path | None:
  """The folder that holds dit, vae, text and tokenizer.json; None for 'random'.

  Args:
    weights: folder, 'random', or '' for what ships with the package.
    size: of the transformer, named in the error.

  Raises:
    ValueError: '' for anything but the toy.
  """
  if weights == "random":
    return None
  if not weights and size != "toy":
    raise ValueError(
      f"weights='' ships only with size='toy'; for size={size!r} convert checkpoints "
      "with tools/convert_checkpoint.py and give their folder with --config.weights, "
      "or 'random' to measure speed"
    )
  return Path(weights).expanduser() if weights else SHIPPED


def check_together(dit: Source, vae: Source, text: Source) -> None:
  """The networks must fit each other.

  Raises:
    ValueError: latent channels, text width or text length differ.
  """
  pairs = (
    ("latent channels", dit.config.in_channels, "vae", vae.config.z_dim),
    ("text_dim", dit.config.text_dim, "text encoder", text.config.dim),
  )
  for what, wanted, name, got in pairs:
    if wanted != got:
      raise ValueError(
        f"the transformer has {what}={wanted}, the {name} {got}; use networks that "
        "were trained together"
      )
  if text.config.text_len > dit.config.text_len:
    raise ValueError(
      f"the text encoder gives text_len={text.config.text_len} rows, the transformer "
      f"takes {dit.config.text_len}"
    )


def load(source: Source, dtype: str) -> Any:
  """The network with its weights, on the default device."""
  if source.path is not None:
    return store.load_network(source.path, source.kind, dtype)
  module = store.NETWORKS[source.kind][0]
  # rbg: threefry compiles for seconds on a CPU, and again for every shape.
  rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
  return module(source.config, dtype=jnp.dtype(dtype), rngs=rngs)


def random_embeddings(prompts: Sequence[str], source: Source) -> np.ndarray:
  """Stands in for a text encoder without weights: noise that depends on the prompt.

  Returns:
    float32 (len(prompts), text_len, dim).
  """
  shape = (source.config.text_len, source.config.dim)
  return np.stack(
    [
      np.random.default_rng(
        int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
      ).standard_normal(shape, np.float32)
      for prompt in prompts
    ]
  )
