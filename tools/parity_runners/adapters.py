"""lora/*: merged adapters, and the names in published checkpoints."""

import functools
from typing import Any

import jax
import numpy as np

from longlive_jax.checkpoint import lora, store, torch_files, torch_names
from longlive_jax.models import dit
from parity_runners.common import Case, Result, channels_last


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
  """Names, shapes and containers. The NVFP4 buffers come with NVFP4."""
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
  return Result(
    checks=checks,
    informative=frozenset(case.outputs),
    note="compared: names and containers; the NVFP4 buffers have no runner yet",
  )


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
