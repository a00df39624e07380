"""Names and shapes of PyTorch checkpoints, and the parameters they fill.

One table a network, read in both directions: PyTorch's name | our parameter path.
Blocks that are stacked here (dit, umt5) are separate tensors there: `{layer}` is the
index on the leading axis. Numbers are never changed. Shapes differ by axes of size
one and by the flattened patch of the patch embedding, and the VAE's kernels by the
order of their axes: a tensor is always a view of the parameter.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import store
from longlive_jax.checkpoint.torch_files import Tensor
from longlive_jax.models import dit, umt5, vae

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a table.

  Attributes:
    torch, path: the two names; {holes} stand for what both have in common.
    view: of the parameter (of one layer) as PyTorch's tensor, given the network's
      configuration; shares its memory.
  """

  torch: str
  path: str
  view: Callable[[Any, np.ndarray], np.ndarray] = lambda config, array: array

  @property
  def stacked(self) -> bool:
    """Whether one parameter holds the tensors of all layers."""
    return "{layer}" in self.torch

  def shape(self, config: Any, shape: Shape) -> Shape:
    """The tensor's shape, given that of the parameter (of one layer)."""
    # Of stride 0: a view needs a shape, not memory.
    return self.view(config, np.broadcast_to(np.zeros(()), shape)).shape


def _lead(config: Any, array: np.ndarray) -> np.ndarray:
  return array[None]


def _patch(config: dit.WanConfig, array: np.ndarray) -> np.ndarray:
  return array.reshape(-1, config.in_channels, 1, config.patch, config.patch)


def _gamma(config: Any, array: np.ndarray) -> np.ndarray:
  return array[:, None, None, None]


def _frame_gamma(config: Any, array: np.ndarray) -> np.ndarray:
  return array[:, None, None]


def _conv(config: Any, array: np.ndarray) -> np.ndarray:
  """Kernel (out, ky, kx[, kt], in) -> (out, in[, kt], ky, kx); a bias as it is."""
  return array if array.ndim == 1 else np.moveaxis(array, (-1, 1, 2), (1, -2, -1))


_HOLES = {
  "layer": r"\d+", "i": r"\d+", "j": r"\d+", "last": r"\d+",
  "p": "weight|bias", "attn": "self_attn|cross_attn",
  "m": "q|k|v|o|norm_q|norm_k", "norm": "norm1|norm2", "fc": "fc1|fc2",
  "side": "encoder|decoder", "conv": "to_qkv|proj",
}  # fmt: skip

_DIT = (
  Rule("patch_embedding.weight", "patch_embedding.weight", _patch),
  Rule("patch_embedding.bias", "patch_embedding.bias"),
  Rule("text_embedding.0.{p}", "text_embedding.fc1.{p}"),
  Rule("text_embedding.2.{p}", "text_embedding.fc2.{p}"),
  Rule("time_embedding.0.{p}", "time_embedding.fc1.{p}"),
  Rule("time_embedding.2.{p}", "time_embedding.fc2.{p}"),
  Rule("time_projection.1.{p}", "time_projection.{p}"),
  Rule("blocks.{layer}.modulation", "blocks.modulation", _lead),
  Rule("blocks.{layer}.{attn}.{m}.{p}", "blocks.{attn}.{m}.{p}"),
  Rule("blocks.{layer}.norm3.{p}", "blocks.norm3.{p}"),
  Rule("blocks.{layer}.ffn.0.{p}", "blocks.ffn.fc1.{p}"),
  Rule("blocks.{layer}.ffn.2.{p}", "blocks.ffn.fc2.{p}"),
  Rule("head.modulation", "head.modulation", _lead),
  Rule("head.head.{p}", "head.linear.{p}"),
)

_UMT5 = (
  Rule("token_embedding.weight", "token_embedding.weight"),
  Rule("blocks.{layer}.{norm}.weight", "blocks.{norm}.weight"),
  Rule("blocks.{layer}.attn.{m}.weight", "blocks.attn.{m}.weight"),
  Rule("blocks.{layer}.ffn.gate.0.weight", "blocks.ffn.gate.weight"),
  Rule("blocks.{layer}.ffn.{fc}.weight", "blocks.ffn.{fc}.weight"),
  Rule("blocks.{layer}.pos_embedding.embedding.weight", "blocks.pos_embedding.weight"),
  Rule("norm.weight", "norm.weight"),
)


def _residual(torch: str, path: str) -> tuple[Rule, ...]:
  """A residual block of the VAE, whose layers are numbered in a Sequential."""
  return (
    Rule(f"{torch}.residual.0.gamma", f"{path}.norm1.gamma", _gamma),
    Rule(f"{torch}.residual.2.{{p}}", f"{path}.conv1.{{p}}", _conv),
    Rule(f"{torch}.residual.3.gamma", f"{path}.norm2.gamma", _gamma),
    Rule(f"{torch}.residual.6.{{p}}", f"{path}.conv2.{{p}}", _conv),
    Rule(f"{torch}.shortcut.{{p}}", f"{path}.shortcut.{{p}}", _conv),
  )


def _stages(side: str, word: str) -> tuple[Rule, ...]:
  """The stages of one side; in PyTorch, resampling is the block after the `last`."""
  torch, path = f"{side}.{word}.{{i}}.{word}", f"{side}.{word}.{{i}}"
  return (
    *_residual(f"{torch}.{{j}}", f"{path}.blocks.{{j}}"),
    Rule(f"{torch}.{{last}}.resample.1.{{p}}", f"{path}.resample.{{p}}", _conv),
    Rule(f"{torch}.{{last}}.time_conv.{{p}}", f"{path}.time_conv.{{p}}", _conv),
  )


_VAE = (
  Rule("conv1.{p}", "conv1.{p}", _conv),
  Rule("conv2.{p}", "conv2.{p}", _conv),
  Rule("{side}.conv1.{p}", "{side}.conv1.{p}", _conv),
  *_stages("encoder", "downsamples"),
  *_stages("decoder", "upsamples"),
  *_residual("{side}.middle.0", "{side}.middle.block0"),
  Rule("{side}.middle.1.norm.gamma", "{side}.middle.attention.norm.gamma",
       _frame_gamma),
  Rule("{side}.middle.1.{conv}.{p}", "{side}.middle.attention.{conv}.{p}", _conv),
  *_residual("{side}.middle.2", "{side}.middle.block1"),
  Rule("{side}.head.0.gamma", "{side}.head.norm.gamma", _gamma),
  Rule("{side}.head.2.{p}", "{side}.head.conv.{p}", _conv),
)  # fmt: skip

TABLES: dict[str, tuple[Rule, ...]] = {"dit": _DIT, "vae": _VAE, "umt5": _UMT5}
# Parameters that no PyTorch file holds as tensors.
_OWN = {"vae": ("latent_mean", "latent_std")}

# Names of the light VAE's files, in this order, into those of the published VAE.
_LIGHT = (
  (r"^quant_conv\.", "conv1."),
  (r"^post_quant_conv\.", "conv2."),
  (r"\.conv_in\.", ".conv1."),
  (r"\.norm_out\.", ".head.0."),
  (r"\.conv_out\.", ".head.2."),
  (r"(resnets\.\d+)\.norm1\.", r"\1.residual.0."),
  (r"(resnets\.\d+)\.conv1\.", r"\1.residual.2."),
  (r"(resnets\.\d+)\.norm2\.", r"\1.residual.3."),
  (r"(resnets\.\d+)\.conv2\.", r"\1.residual.6."),
  (r"\.conv_shortcut\.", ".shortcut."),
  (r"\.mid_block\.resnets\.0\.", ".middle.0."),
  (r"\.mid_block\.attentions\.0\.", ".middle.1."),
  (r"\.mid_block\.resnets\.1\.", ".middle.2."),
  (r"\.down_blocks\.(\d+)\.resnets\.", r".downsamples.\1.downsamples."),
  (r"\.down_blocks\.(\d+)\.downsampler\.", r".downsamples.\1.downsamples.2."),
  (r"\.up_blocks\.(\d+)\.resnets\.", r".upsamples.\1.upsamples."),
  (r"\.up_blocks\.(\d+)\.upsampler\.", r".upsamples.\1.upsamples.3."),
)


def light_vae_name(name: str) -> str | None:
  """The published VAE's name for a light VAE's tensor; None: it is not needed.

  Names that are the published ones already stay as they are.
  """
  if name.startswith("dynamic_feature_projection_heads."):
    return None
  for pattern, replacement in _LIGHT:
    name = re.sub(pattern, replacement, name)
  return name


def published_vae_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A VAE's tensors under the published names, those it does not need left out.

  Raises:
    ValueError: two tensors get the same name.
  """
  names = {name: light_vae_name(name) for name in tensors}
  renamed = {new: tensors[old] for old, new in names.items() if new is not None}
  if len(renamed) < sum(new is not None for new in names.values()):
    raise ValueError("source holds tensors under the light VAE's names and the other's")
  return renamed


# ---------------------------------------------------------------------- one name
def parameter_path(kind: str, name: str) -> tuple[str, int | None] | None:
  """Parameter path and layer of a PyTorch name; None for an unknown name."""
  for rule in TABLES[kind]:
    if match := _pattern(rule.torch).fullmatch(name):
      holes = match.groupdict()
      layer = holes.get("layer")
      return rule.path.format(**holes), None if layer is None else int(layer)
  return None


def module_names(kind: str, path: str, layers: int) -> list[str]:
  """PyTorch's names of the layers whose weight is the parameter `path`, in order.

  Args:
    layers: how many are stacked in it; without effect where none are.
  """
  rule, holes = _rule(kind, path)
  count = layers if rule.stacked else 1
  names = (rule.torch.format(layer=i, **holes) for i in range(count))
  return [name.removesuffix(".weight") for name in names]


def torch_tensors(
  kind: str, config: Any, path: str, shape: Shape
) -> list[tuple[str, Shape]]:
  """Names and shapes of the tensors that a parameter is made of.

  Args:
    path, shape: of the parameter, layers stacked.

  Returns:
    One entry, or one a layer. None at all for a parameter of ours only.
  """
  if path in _OWN.get(kind, ()):
    return []
  rule, holes = _rule(kind, path)
  if "last" in _holes(rule.torch):
    holes["last"] = config.num_res_blocks + path.startswith("decoder")
  if not rule.stacked:
    return [(rule.torch.format(**holes), rule.shape(config, shape))]
  one = rule.shape(config, shape[1:])
  return [(rule.torch.format(layer=i, **holes), one) for i in range(shape[0])]


def torch_views(
  kind: str, config: Any, path: str, array: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a parameter as views into its array: (PyTorch name, view)."""
  rule, _ = _rule(kind, path)
  parts = array if rule.stacked else [array]
  names = torch_tensors(kind, config, path, array.shape)
  for (name, _), part in zip(names, parts, strict=True):
    yield name, rule.view(config, part)


def _rule(kind: str, path: str) -> tuple[Rule, dict[str, str]]:
  for rule in TABLES[kind]:
    if match := _pattern(rule.path).fullmatch(path):
      return rule, match.groupdict()
  raise KeyError(f"{path} of {kind!r} is in no table")


def _holes(template: str) -> list[str]:
  return re.findall(r"\{(\w+)\}", template)


@functools.cache
def _pattern(template: str) -> re.Pattern:
  parts = re.split(r"\{(\w+)\}", template)
  regex = [
    f"(?P<{part}>{_HOLES[part]})" if i % 2 else re.escape(part)
    for i, part in enumerate(parts)
  ]
  return re.compile("".join(regex))


# ---------------------------------------------------------------------- all names
def torch_shapes(kind: str, config: Any) -> dict[str, Shape]:
  """Every tensor of a network's PyTorch checkpoint, by name."""
  tree = store.named_leaves(store.abstract_network(kind, config))
  return dict(
    tensor
    for path, leaf in tree.items()
    for tensor in torch_tensors(kind, config, path, leaf.shape)
  )


def check_names(kind: str, config: Any, found: Shapes) -> None:
  """Raises ValueError that names every tensor missing, too many or misshapen."""
  wanted = torch_shapes(kind, config)
  problems = [f"{n} {s} is missing" for n, s in wanted.items() if n not in found]
  problems += [f"{n} {s} is unknown" for n, s in found.items() if n not in wanted]
  problems += [
    f"{n} has shape {found[n]} instead of {s}"
    for n, s in wanted.items()
    if n in found and tuple(found[n]) != s
  ]
  if problems:
    raise ValueError(
      f"source does not fit the {kind!r} network {config}, in {len(problems)} tensors; "
      "check --kind and --size:\n  " + "\n  ".join(problems)
    )


def read_leaves(
  kind: str, config: Any, tensors: Mapping[str, Tensor], dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads and stacks the parameters of a network, one after the other.

  Args:
    tensors: by PyTorch name; call `check_names` first.
    dtype: of all parameters; as stored if not given.

  Yields:
    (parameter path, array).

  Raises:
    ValueError: the layers of one parameter are stored in different dtypes.
  """
  tree = store.named_leaves(store.abstract_network(kind, config))
  for path, leaf in tree.items():
    names = torch_tensors(kind, config, path, leaf.shape)
    if not names:
      continue
    stored = {tensors[name].dtype for name, _ in names}
    if len(stored) > 1 and dtype is None:
      raise ValueError(
        f"{names[0][0]} and its like are stored as {sorted(map(str, stored))}; "
        "give --dtype to convert all"
      )
    out = np.empty(leaf.shape, dtype or stored.pop())
    for name, view in torch_views(kind, config, path, out):
      _fill(tensors[name], view)
    yield path, out


def network_from_torch(
  kind: str, config: Any, tensors: Mapping[str, Any], dtype: Any = None
) -> Any:
  """A network filled from tensors or numpy arrays by PyTorch name.

  Parameters that PyTorch files lack (latent statistics of the VAE) have the values
  that a new network has.

  Raises:
    ValueError: names or shapes differ, see `check_names`.
  """
  tensors = {name: as_tensor(value) for name, value in tensors.items()}
  check_names(kind, config, {name: t.shape for name, t in tensors.items()})
  leaves = dict(read_leaves(kind, config, tensors, dtype))
  leaves.update(own_leaves(kind, config))
  tree = store.abstract_network(kind, config, dtype or jnp.float32)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(leaves[store.path_name(path)]), tree
  )


def as_tensor(value: Any) -> Tensor:
  """A numpy array as a `Tensor`; a Tensor stays."""
  if isinstance(value, Tensor):
    return value
  array = np.asarray(value)
  return Tensor(array.shape, array.dtype, lambda out: np.copyto(out, array))


def main_dtype(tensors: Mapping[str, Tensor]) -> np.dtype:
  """The dtype of most numbers."""
  sizes: dict[np.dtype, int] = {}
  for tensor in tensors.values():
    sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
  return max(sizes, key=sizes.__getitem__)


def own_leaves(
  kind: str, config: Any, metadata: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
  """Parameters that are no tensors in PyTorch: the VAE's latent statistics.

  Args:
    metadata: header of a safetensors file; `own_metadata` writes them there.
  """
  if kind != "vae":
    return {}
  z = config.z_dim
  published = z == len(vae.WAN_LATENT_MEAN)
  values = {
    "latent_mean": vae.WAN_LATENT_MEAN if published else np.zeros(z),
    "latent_std": vae.WAN_LATENT_STD if published else np.ones(z),
  }
  for name in values:
    if metadata and name in metadata:
      values[name] = json.loads(metadata[name])
  return {name: np.asarray(value, np.float32) for name, value in values.items()}


def own_metadata(kind: str, leaves: Mapping[str, np.ndarray]) -> dict[str, str]:
  """The parameters of `own_leaves` as strings for a file's header."""
  names = _OWN.get(kind, ())
  return {name: json.dumps([float(v) for v in leaves[name]]) for name in names}


def _fill(tensor: Tensor, out: np.ndarray) -> None:
  if tensor.dtype == out.dtype and out.flags.c_contiguous:
    tensor.fill(out)
  else:
    out[...] = tensor.read()


# ---------------------------------------------------------------------- sizes
def infer_config(
  kind: str, shapes: Shapes, record: Mapping[str, Any] | None = None
) -> Any:
  """Reads a network's configuration off the shapes of its PyTorch tensors.

  Args:
    record: config.json of the published folder; it knows the number of heads.

  Raises:
    ValueError: tensors that tell the sizes are missing, or the number of heads is
      not to be known.
  """
  try:
    return _INFER[kind](shapes, record)
  except KeyError as error:
    raise ValueError(
      f"source is no {kind!r} checkpoint: it lacks {error}; it holds "
      f"{len(shapes)} tensors such as {sorted(shapes)[:3]}; check --kind"
    ) from error


def wan_config(record: Mapping[str, Any]) -> dit.WanConfig:
  """A transformer's configuration from the published config.json's fields."""
  return dit.WanConfig(
    dim=record["dim"],
    ffn_dim=record["ffn_dim"],
    heads=record["num_heads"],
    layers=record["num_layers"],
    in_channels=record["in_dim"],
    out_channels=record["out_dim"],
    freq_dim=record["freq_dim"],
    text_dim=record.get("text_dim", 4096),
    text_len=record["text_len"],
    patch=tuple(record.get("patch_size", (1, 2, 2)))[1],
    eps=record["eps"],
  )


def _layers(shapes: Shapes) -> int:
  found = [re.match(r"blocks\.(\d+)\.", name) for name in shapes]
  return 1 + max((int(m[1]) for m in found if m), default=-1)


def _infer_dit(shapes: Shapes, record: Mapping[str, Any] | None) -> dit.WanConfig:
  if record and "num_heads" in record:
    return wan_config(record)
  dim, in_channels, _, patch, _ = shapes["patch_embedding.weight"]
  config = dit.WanConfig(
    dim=dim,
    ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
    heads=max(dim // 128, 1),
    layers=_layers(shapes),
    in_channels=in_channels,
    out_channels=shapes["head.head.weight"][0] // patch**2,
    freq_dim=shapes["time_embedding.0.weight"][1],
    text_dim=shapes["text_embedding.0.weight"][1],
    patch=patch,
  )
  # No shape tells heads and text_len: take them from the size with all others equal.
  for known in dit.SIZES.values():
    if dataclasses.replace(known, heads=config.heads, text_len=512) == config:
      return known
  if dim % 128:
    raise ValueError(
      f"dim={dim} is no multiple of 128 and of no known size, so that the number of "
      f"heads is unknown; give --size, one of {sorted(dit.SIZES)}, or a folder with "
      "config.json"
    )
  return config


def _infer_umt5(shapes: Shapes, record: Mapping[str, Any] | None) -> umt5.UMT5Config:
  vocab_size, dim = shapes["token_embedding.weight"]
  buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
  config = umt5.UMT5Config(
    vocab_size=vocab_size,
    dim=dim,
    dim_attn=shapes["blocks.0.attn.q.weight"][0],
    dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
    heads=heads,
    layers=_layers(shapes),
    buckets=buckets,
  )
  for known in umt5.UMT5_SIZES.values():  # no shape tells text_len
    if dataclasses.replace(known, text_len=config.text_len) == config:
      return known
  return config


def _infer_vae(shapes: Shapes, record: Mapping[str, Any] | None) -> vae.VAEConfig:
  found = {name: parameter_path("vae", name) for name in shapes}
  return vae.vae_config_from_shapes(
    {found[name][0]: shape for name, shape in shapes.items() if found[name]}
  )


_INFER = {"dit": _infer_dit, "umt5": _infer_umt5, "vae": _infer_vae}
