"""lora/*: merged adapters, and the names in published checkpoints."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import (
  four_over_six,
  lora,
  quantised,
  store,
  torch_files,
  torch_names,
)
from longlive_jax.models import dit
from longlive_jax.quant import nvfp4, weights
from parity_runners.common import Arrays, Case, Result, channels_last


def merge(case: Case) -> Result:
  base = case.transformer("base_weights")
  config = case.record["config"]
  adapter = lora.lora_from_torch(
    case.weights(), base.config.layers, config.get("alpha")
  )
  merged = lora.merge_lora(base, adapter)
  latents = channels_last(case.inputs["x"], 2)
  forward = jax.jit(
    functools.partial(
      dit.train_forward,
      noisy=latents,
      time=dit.time_features(case.inputs["t"], base.config.freq_dim),
      text=case.inputs["context"].reshape(
        len(latents), -1, *case.inputs["context"].shape[1:]
      ),
      frames_per_chunk=case.frames_per_chunk,
    )
  )
  flows = {
    "flow_base": forward(base),
    "flow_adapter": forward(lora.attach_lora(base, adapter)),
    "flow_merged": forward(merged),
  }
  values = {name: np.moveaxis(np.asarray(flow), -1, 2) for name, flow in flows.items()}
  for path, leaf in store.named_leaves(merged).items():
    views = torch_names.torch_views("dit", base.config, path, np.asarray(leaf))
    values |= {f"merged.{name}": view for name, view in views}
  wanted = {name: values[name] for name in case.outputs if name in values}
  checks = {}
  if changed := case.record.get("changed_parameters"):
    names = {f"{name}.weight": name for name in _adapted_modules(adapter, base.config)}
    checks["changed parameters"] = set(names) == set(changed)
  return Result(wanted, checks=checks)


def _adapted_modules(adapter: lora.Lora, config: dit.WanConfig) -> set[str]:
  tree = store.named_leaves(store.abstract_network("dit", config))
  return {
    name.removesuffix(".weight")
    for path in adapter.factors
    for name, _ in torch_names.torch_tensors("dit", config, path, tree[path].shape)
  }


def key_map(case: Case) -> Result:
  """Names, shapes and containers, and one layer as FourOverSix stores it."""
  listing = case.json("key_map.json")
  shapes = {
    key: {name: tuple(entry["shape"]) for name, entry in listing[key].items()}
    for key in listing
    if isinstance(listing[key], dict) and _is_listing(listing[key])
  }
  kinds = {key: _kind(key) for key in shapes}
  configs: dict[str, Any] = {}
  for key, kind in kinds.items():
    record = listing["transformer_config"] if kind == "dit" else None
    configs[key] = torch_names.infer_config(kind, shapes[key], record)
  checks = {
    f"{key}: {len(shapes[key])} tensors": shapes[key]
    == torch_names.torch_shapes(kinds[key], configs[key])
    for key in shapes
  }
  checks |= _containers(shapes["transformer"])
  checks |= _lora_container(configs["transformer"], listing["lora_checkpoint"])
  if packed := listing.get("nvfp4_checkpoint"):
    checks |= _quantised_names(configs["transformer"], packed)
  values = _quantised_layer(case)
  # The software quantiser leaves a 0-d amax where the format has shape (1,).
  expected = {n: a.reshape(1) for n, a in case.outputs.items() if n.endswith("_amax")}
  return Result(values, expected, checks)


def _quantised_names(
  config: dit.WanConfig, listing: dict[str, Any]
) -> dict[str, bool]:
  """Every tensor of an export at full size, by name, shape and dtype."""
  network = store.abstract_network("dit", config, jnp.bfloat16)
  tree = jax.eval_shape(weights.quantise_weights, network)
  specs = four_over_six.tensor_specs(config, quantised.stored_leaves(tree))
  found = {n: (shape, np.dtype(dtype).name) for n, (shape, dtype) in specs.items()}
  wanted = {
    name: (tuple(entry["shape"]), entry["dtype"])
    for name, entry in listing["transformer_quantized_state_dict"].items()
  }
  end = f".{four_over_six.PREFIX}values"
  modules = {name.removesuffix(end) for name in found if name.endswith(end)}
  return {
    f"NVFP4: {len(wanted)} tensors": found == wanted,
    "NVFP4: quantised modules": modules == set(listing["quantized_modules"]),
  }


def _quantised_layer(case: Case) -> Arrays:
  """The stored tensors of the layers among the outputs, from the shared weights."""
  found = {}
  plain, rule = case.weights(), case.record.get("rule", "mse")
  for name in case.outputs:
    module, _, end = name.rpartition(".")
    if end == "bias":
      found[name] = plain[name].astype(jnp.bfloat16)
      continue
    weight = jnp.asarray(plain[f"{module}.weight"]).astype(jnp.bfloat16)
    packed = nvfp4.quantise(weight, rule=rule, reference=True)
    buffer = four_over_six.to_buffers(packed)[end.removeprefix(four_over_six.PREFIX)]
    raw = case.outputs[name].dtype == np.uint8  # how the case stores 8-bit floats
    found[name] = buffer.view(np.uint8) if raw else buffer
  return found


def _is_listing(entry: dict[str, Any]) -> bool:
  return all(isinstance(value, dict) and "shape" in value for value in entry.values())


def _kind(key: str) -> str:
  if "vae" in key:
    return "vae"
  return "umt5" if "umt5" in key else "dit"


def _containers(shapes: dict[str, tuple[int, ...]]) -> dict[str, bool]:
  """Unwraps a state dict of these names from everything it may be wrapped in."""
  tensors = {name: torch_names.as_tensor(np.empty(0)) for name in shapes}
  other = {"model.other": torch_names.as_tensor(np.empty(0))}
  prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
  mark = "_fsdp_wrapped_module."
  marked = {
    mark + name.replace("blocks.", f"blocks.{mark}"): tensor
    for name, tensor in prefixed.items()
  }
  wrappings = {
    "bare": (tensors, False),
    "prefix model.": (prefixed, False),
    "under model": ({"model": prefixed}, False),
    "under generator": ({"generator": prefixed, "critic": other}, False),
    "under generator_ema": ({"generator": other, "generator_ema": marked}, True),
    "ema asked for, not there": ({"generator": prefixed}, True),
    "ema there, not asked for": (
      {"generator": prefixed, "generator_ema": other},
      False,
    ),
    "merged": ({"generator": prefixed, "merged_lora": True}, False),
  }
  return {
    f"container: {name}": set(torch_files.state_dict(content, ema)) == set(shapes)
    for name, (content, ema) in wrappings.items()
  }


def _lora_container(config: dit.WanConfig, record: dict[str, Any]) -> dict[str, bool]:
  rank = record.get("real_rank", 4)
  factors = {
    "base_model.model.blocks.0.self_attn.q.lora_A.weight": (rank, config.dim),
    "base_model.model.blocks.0.self_attn.q.lora_B.weight": (config.dim, rank),
  }
  bare = {name: np.zeros(shape, np.float32) for name, shape in factors.items()}
  named = {
    name.replace(".weight", ".default.weight"): array for name, array in bare.items()
  }
  wrappings = {
    "bare": bare,
    "adapter named default": named,
    "under generator_lora": {"generator_lora": bare, "critic_lora": {}, "step": 1},
  }
  checks = {}
  for name, content in wrappings.items():
    found = lora.lora_from_torch(content, config.layers)
    fits = set(found.factors) == {"blocks.self_attn.q.weight"} and found.rank == rank
    checks[f"LoRA container: {name}"] = fits
  return checks
