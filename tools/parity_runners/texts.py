"""t5/* and prompts/*: the text encoder, cleaning, prompt lists."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import torch_names
from longlive_jax.generate import storyboard
from longlive_jax.models import text, umt5
from parity_runners.common import Case, Result


def encoder(case: Case) -> Result:
  weights = case.weights()
  shapes = {name: array.shape for name, array in weights.items()}
  config = torch_names.infer_config("umt5", shapes)
  ids, mask = (case.inputs[name].astype(np.int32) for name in ("ids", "mask"))
  config = dataclasses.replace(config, text_len=ids.shape[1])
  model = torch_names.network_from_torch("umt5", config, weights, jnp.float32)
  values = {
    "hidden": jax.jit(lambda m, i, k: m.hidden(i, k))(model, ids, mask),
    "hidden_zeroed": jax.jit(lambda m, i, k: m(i, k))(model, ids, mask),
  }
  if "relative_position_bucket" in case.outputs:
    count = len(case.outputs["relative_position_bucket"])
    values["relative_position_bucket"] = umt5.relative_position_bucket(
      np.arange(count) - count // 2, config.buckets
    )
  return Result(values)


def cleaning(case: Case) -> Result:
  checks = {}
  for entry in case.json("strings.json"):
    for mode in ("whitespace", "lower", "canonicalize"):
      found = text.clean_text(entry["input"], mode)
      checks[f"{mode} of {entry['input']!r}"] = found == entry[mode]
  return Result(checks=checks)


def prompt_lists(case: Case) -> Result:
  checks = {}
  for i, entry in enumerate(case.json("cases.json")):
    checks[f"{i}: {entry.get('note', entry['kind'])}"] = (
      _read_prompts(entry) == entry["output"]
    )
  if (case.folder / "encode_blocks.json").exists():
    for i, entry in enumerate(case.json("encode_blocks.json")["cases"]):
      checks[f"encoder order {i}"] = _encoder_order(entry)
  if (case.folder / "shot_boundary.json").exists():
    entry = case.json("shot_boundary.json")
    found = [
      storyboard.is_shot_boundary(entry["prompts"], chunk)
      for chunk in range(len(entry["is_boundary"]))
    ]
    checks["shot boundary"] = found == entry["is_boundary"]
  return Result(checks=checks)


def _read_prompts(entry: dict[str, Any]) -> Any:
  """What the readers make of a case's files; the expected error, if there is one."""
  with tempfile.TemporaryDirectory() as folder:
    for name, content in entry["files"].items():
      file = Path(folder, name)
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(content, encoding="utf-8")
    path = Path(folder, entry.get("path", "p.txt"))
    options = entry.get("options", {})
    if entry["kind"] == "simple_text":
      return storyboard.read_lines(path)
    if entry["kind"] == "text":
      return storyboard.read_text_prompts(path, **options)
    try:
      found = storyboard.read_image_prompts(path, **options)
    except ValueError:
      return entry["output"] if "error" in entry["output"] else None
    return [{"image": image.name, "prompts": prompts} for image, prompts in found]


def _encoder_order(entry: dict[str, Any]) -> bool:
  try:
    flat, blocks = storyboard.encoder_order(entry["input"], entry["batch"])
  except ValueError:
    return "error" in entry
  return "error" not in entry and [flat, blocks] == [
    entry["flat_order"],
    entry["per_block"],
  ]
