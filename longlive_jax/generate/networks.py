"""Which weights a run uses: found and checked first, loaded one after the other."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import longlive_jax
from longlive_jax.checkpoint import quantised, store
from longlive_jax.checkpoint.lora import Lora
from longlive_jax.generate import adapters
from longlive_jax.generate import precision as precisions
from longlive_jax.generate.precision import PLAIN, Precision
from longlive_jax.generate.step_models import StepModels, models_of
from longlive_jax.models import block_scan, vae_fp8
from longlive_jax.models.text import Tokenizer
from longlive_jax.quant.fp8 import FP8Array
from longlive_jax.quant.weights import BLOCK_LINEARS, FP8_MODES

SHIPPED = Path(longlive_jax.__file__).parent / "assets" / "toy"


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which networks a run asks for.

  Attributes:
    size, vae, text: names in the tables of sizes.
    weights: folder with dit, vae, text and tokenizer.json; '' for what ships with the
      package (toy only), 'random' for no weights at all.
    dit_weights, vae_weights, text_weights, tokenizer: replace single parts of it.
    precision: of `weights.MODES`, quantises the transformer while it is loaded, or uses
      one that is quantised already in this way; '' leaves it as its checkpoint is.
    precision_rule: of `nvfp4.RULES`, for `precision` in NVFP4; of a quantised
      checkpoint, its own.
    precision_layers, precision_plain_edges, precision_plain_steps: of `Precision`;
      a quantised checkpoint has its own.
    vae_precision: of `vae_fp8.PRECISIONS`, quantises the VAE's decoder while it is
      loaded.
    steps: of the solver; the plain ones are among them.
    unroll: whether the transformer's layers are run one by one and not scanned, see
      models/block_scan.py: 'yes', 'no', or 'auto': in FP8 on a GPU.
    loras: adapters beside the transformer's weights, of any format: 'PATH' or
      'PATH:WEIGHT', files or checkpoint folders.
  """

  size: str = "toy"
  vae: str = "toy"
  text: str = "toy"
  weights: str = ""
  dit_weights: str = ""
  vae_weights: str = ""
  text_weights: str = ""
  tokenizer: str = ""
  precision: str = ""
  precision_rule: str = "mse"
  precision_layers: tuple[str, ...] = BLOCK_LINEARS
  precision_plain_edges: int = 0
  precision_plain_steps: tuple[int, ...] = ()
  vae_precision: str = ""
  steps: int = 4
  unroll: str = "no"
  loras: tuple[str, ...] = ()

  def __post_init__(self):
    if self.unroll not in ("yes", "no", "auto"):
      raise ValueError(f"unroll={self.unroll!r} is unknown; use 'yes', 'no' or 'auto'")


@dataclasses.dataclass(frozen=True)
class Source:
  """A network before it is built.

  Attributes:
    kind: 'dit', 'vae' or 'umt5'.
    config: its sizes.
    path: checkpoint folder, or None for random weights.
    precision: how to quantise it on loading, or to use it if it is quantised.
    steps: solver steps, which precision may depend on.
    loras: of a transformer.
    unrolled: whether every layer of a transformer is a run of its own.
    vae_precision: of a VAE's decoder.
  """

  kind: str
  config: Any
  path: Path | None
  precision: Precision = PLAIN
  steps: int = 4
  loras: tuple[adapters.Adapter, ...] = ()
  unrolled: bool = False
  vae_precision: str = ""


@dataclasses.dataclass(frozen=True)
class Sources:
  """The networks of a run before they are built.

  Attributes:
    tokenizer: None where the text encoder has random weights.
  """

  dit: Source
  vae: Source
  text: Source
  tokenizer: Tokenizer | None


def pick(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The entries of `settings` that are fields of the dataclass `kind`."""
  names = [field.name for field in dataclasses.fields(kind)]
  return {name: settings[name] for name in names if name in settings}


def find_all(choice: Choice) -> Sources:
  """Finds the networks of a run; reads only their records.

  Raises:
    ValueError: as `Precision`, `vae_fp8.check` and `find`, or they do not fit each
      other.
  """
  vae_fp8.check(choice.vae_precision)
  precision = Precision(
    choice.precision,
    rule=choice.precision_rule,
    activation_rule=choice.precision_rule,
    layers=choice.precision_layers,
    plain_edges=choice.precision_plain_edges,
    plain_steps=choice.precision_plain_steps,
  )
  parts = (choice.dit_weights, choice.vae_weights, choice.text_weights)
  needs_folder = not all(parts) or not choice.tokenizer
  folder = folder_of(choice.weights, choice.size) if needs_folder else None

  def weights(chosen: str, part: str) -> str | Path:
    return chosen or (folder / part if folder else "random")

  dit = find(
    "dit",
    choice.size,
    weights(choice.dit_weights, "dit"),
    precision=precision,
    steps=choice.steps,
  )
  loras = tuple(adapters.find(given, dit.config) for given in choice.loras)
  fast = choice.precision == "fp8" and jax.default_backend() == "gpu"
  unrolled = choice.unroll == "yes" or (choice.unroll == "auto" and fast)
  dit = dataclasses.replace(dit, loras=loras, unrolled=unrolled)
  vae = find("vae", choice.vae, weights(choice.vae_weights, "vae"))
  vae = dataclasses.replace(vae, vae_precision=choice.vae_precision)
  text = find("umt5", choice.text, weights(choice.text_weights, "text"))
  check_together(dit, vae, text)
  tokenizer = None
  if text.path is not None:
    path = choice.tokenizer or (folder or text.path.parent) / "tokenizer.json"
    tokenizer = Tokenizer(path, text.config.text_len)
  return Sources(dit, vae, text, tokenizer)


def find(
  kind: str,
  size: str,
  weights: str | Path,
  *,
  precision: Precision = PLAIN,
  steps: int = 4,
) -> Source:
  """Finds a network's weights; reads only their record.

  Args:
    kind: 'dit', 'vae' or 'umt5'.
    size: a name in the kind's table of sizes.
    weights: checkpoint folder, or 'random'.
    precision: of a transformer, quantises it on loading, activations by the rule of the
      weights; of weights that are quantised by it already, says what they are used for.
    steps: solver steps.

  Raises:
    ValueError: unknown size; a precision that it cannot have (`precision.check`); a
      folder that is missing, damaged, or holds something else; a precision for weights
      that are quantised already in another way.
  """
  sizes = store.NETWORKS[kind][2]
  if size not in sizes:
    raise ValueError(f"{kind} size={size!r} is unknown; use one of {sorted(sizes)}")
  if precision.mode and kind != "dit":
    raise ValueError(
      f"precision={precision.mode!r} is for transformers ('dit'), not for {kind!r}"
    )
  precisions.check(precision, sizes[size], steps)
  if weights == "random":
    return Source(kind, sizes[size], None, precision, steps)
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
  if precision.mode and store.is_packed(record):
    check_packed(path, quantised.packed_rule(record), precision)
  return Source(kind, config, path, precision, steps)


def check_packed(path: Path, rule: str, precision: Precision) -> None:
  """What weights that are quantised already by `rule` can still be used for.

  Raises:
    ValueError: a precision in FP8 or of another rule, or one that chooses layers or
      needs plain weights.
  """
  if precision.mode in FP8_MODES:
    raise ValueError(
      f"precision={precision.mode!r} cannot be had of dit weights={path}, which are "
      "quantised to NVFP4 already; give the weights they were made from"
    )
  if precision.rule != rule:
    raise ValueError(
      f"dit weights={path} are quantised already by rule={rule!r} and cannot be again "
      f"by {precision.rule!r}; use precision_rule={rule!r} for "
      f"precision={precision.mode!r} with the numbers they have, or give the weights "
      "they were made from"
    )
  for name in ("layers", "plain_edges", "plain_steps"):
    value = getattr(precision, name)
    if value != getattr(PLAIN, name):
      raise ValueError(
        f"precision_{name}={value} cannot be chosen for dit weights={path}, which are "
        "quantised already; leave it out, or give the weights they were made from"
      )


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


def abstract(source: Source, dtype: str) -> Any:
  """The network that `load` gives, with shapes for arrays; reads its record only.

  An array that stands in two places is one object here, too.
  """
  packed = None
  if source.path is not None and store.is_packed(store.load_metadata(source.path)):
    mode = source.precision.mode
    packed = quantised.abstract_network(source.path, source.kind, dtype, mode=mode)
  loras = adapters.describe(source.loras, source.config)
  places = []

  def build(packed: Any, loras: Sequence[Lora]) -> Any:
    network = packed
    if packed is None:
      plain = _build(source, dtype)
      network = precisions.apply(plain, source.precision, source.steps)
    network = vae_fp8.apply(network, source.vae_precision)
    network = _arranged(adapters.attach(network, source.loras, loras), source)
    ids = [id(leaf) for leaf in jax.tree.leaves(network)]
    places.extend(map(ids.index, ids))
    return network

  leaves, structure = jax.tree.flatten(jax.eval_shape(build, packed, loras))
  return structure.unflatten([leaves[place] for place in places])


def load(source: Source, dtype: str) -> Any:
  """The network with its weights and adapters, committed to the first device.

  A quantised checkpoint is loaded as it is; a precision then says what its weights are
  multiplied with.
  """
  loras = adapters.load(source.loras, source.config)
  network = vae_fp8.apply(_load_base(source, dtype), source.vae_precision)
  network = adapters.attach(network, source.loras, loras)
  return _arranged(network, source)


def _arranged(network: Any, source: Source) -> Any:
  if not source.unrolled:
    return network
  models = [block_scan.unrolled(model) for model in models_of(network)]
  if not isinstance(network, StepModels):
    return models[0]
  return dataclasses.replace(network, models=tuple(models))


def _load_base(source: Source, dtype: str) -> Any:
  kind, path, precision = source.kind, source.path, source.precision
  if path is None:
    return _random(source, dtype)
  if store.is_packed(store.load_metadata(path)):
    return quantised.load_network(path, kind, dtype, mode=precision.mode)
  if not precision.mode or precision.plain_steps:
    plain = store.load_network(path, kind, dtype)
    return precisions.apply(plain, precision, source.steps)
  # Without plain steps the device never holds the whole plain network.
  packed = quantised.quantise_network(
    path,
    kind,
    dtype,
    mode=precision.mode,
    rule=precision.rule,
    layers=precision.layers,
  )
  if not precision.plain_edges:
    return packed
  plain = _edges_on_host(source, dtype)
  mixed = precisions.keep_edges(packed, plain, precision.plain_edges)
  # The edges are not committed yet.
  return jax.device_put(mixed, jax.local_devices()[0])


def _edges_on_host(source: Source, dtype: str) -> Any:
  """The plain transformer's first and last layers, numpy; one array is read at a time.

  All that is not in its layers is left abstract.
  """
  edges = source.precision.plain_edges
  network = store.abstract_network(source.kind, source.config, jnp.dtype(dtype))
  wanted = store.named_leaves({"blocks": network.blocks})
  kept = {
    name: np.concatenate([array[:edges], array[-edges:]]).astype(wanted[name].dtype)
    for name, array in store.load_leaves(source.path, wanted)
  }
  network.blocks = jax.tree.unflatten(jax.tree.structure(network.blocks), kept.values())
  return network


def _build(source: Source, dtype: str) -> Any:
  # rbg: threefry compiles for seconds on a CPU, and again for every shape.
  rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
  module = store.NETWORKS[source.kind][0]
  return module(source.config, dtype=jnp.dtype(dtype), rngs=rngs)


def _random(source: Source, dtype: str) -> Any:
  if source.precision.mode:
    plain = dataclasses.replace(source, loras=(), unrolled=False)
    return random_like(abstract(plain, dtype))
  return jax.device_put(_build(source, dtype), jax.local_devices()[0])


def random_like(abstract: Any) -> Any:
  """A network with random weights, quantised ones too, drawn one array at a time.

  Quantising random weights would need the plain ones first, and the peak of memory
  would be theirs: a device that holds the quantised network may not hold those.

  Args:
    abstract: the network with shapes for arrays, as `abstract` gives it: what is one
      object in two places is one array, too.

  Returns:
    The same tree of arrays, committed to the first device: codes of all values (FP8:
    of half of them, below 2), block scales of one, all else (other scales and plain
    weights) around 0.02.
  """
  leaves, structure = jax.tree.flatten(abstract, is_leaf=_is_fp8)
  # rbg for the reason given above.
  places = [id(leaf.codes if _is_fp8(leaf) else leaf) for leaf in leaves]
  distinct = dict(zip(places, leaves, strict=True))
  keys = jax.random.split(jax.random.key(0, impl="rbg"), len(distinct))
  drawn = {
    place: jax.device_put(_draw(leaf, key), jax.local_devices()[0])
    for (place, leaf), key in zip(distinct.items(), keys, strict=True)
  }
  return jax.tree.unflatten(structure, [drawn[place] for place in places])


def _is_fp8(node: Any) -> bool:
  return isinstance(node, FP8Array)


@functools.partial(jax.jit, static_argnums=0)
def _draw(leaf: jax.ShapeDtypeStruct | FP8Array, key: jax.Array) -> Any:
  if _is_fp8(leaf):
    # Without the highest bit of the exponent: no code is NaN.
    bits = jax.random.bits(key, leaf.shape, jnp.uint8) & 0b1011_1111
    codes = jax.lax.bitcast_convert_type(bits, leaf.codes.dtype)
    return FP8Array(codes, _draw(leaf.scale, key))
  if leaf.dtype == jnp.uint8:
    return jax.random.bits(key, leaf.shape, jnp.uint8)
  if leaf.dtype == jnp.float8_e4m3fn:
    return jnp.ones(leaf.shape, leaf.dtype)
  return (0.02 * (1 + jax.random.normal(key, leaf.shape))).astype(leaf.dtype)


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
