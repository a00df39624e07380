"""What every runner needs: a case's files, and the networks they name."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import torch_files, torch_names
from longlive_jax.generate import schedule
from longlive_jax.models import dit

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
  """A case folder.

  Attributes:
    folder: where it is.
    name: its path in the tree, "dit_train/teacher_forcing".
    reference: whether the reference's behaviour is switched on where it differs from
      the library's.
  """

  folder: Path
  name: str
  reference: bool = True

  @functools.cached_property
  def record(self) -> dict[str, Any]:
    return self.json("case.json")

  @functools.cached_property
  def inputs(self) -> Arrays:
    return read_arrays(self.folder / "inputs.safetensors")

  @functools.cached_property
  def outputs(self) -> Arrays:
    return read_arrays(self.folder / "outputs.safetensors")

  def json(self, name: str) -> Any:
    return json.loads((self.folder / name).read_text(encoding="utf-8"))

  def setting(self, name: str, default: Any = None) -> Any:
    """A setting by its canonical name; `default` where the case does not say."""
    return self.record.get("settings", {}).get(name, default)

  def weights(self, key: str = "weights") -> Arrays:
    return read_arrays(self.folder / self.record[key])

  @functools.cached_property
  def frames_per_chunk(self) -> int:
    known = self.setting("frames_per_chunk")
    if known is None:  # some kinds have the reference's words only
      known = self.record["config"]["num_frame_per_block"]
    return known

  def transformer(self, key: str = "weights") -> dit.CausalDiT:
    """The case's transformer in float32."""
    config = self.record.get("model_config")
    if config is None:
      beside = (self.folder / self.record[key]).parent / "case.json"
      config = json.loads(beside.read_text())["model_config"]
    return torch_names.network_from_torch(
      "dit", torch_names.wan_config(config), self.weights(key), jnp.float32
    )

  @property
  def grid(self) -> schedule.TrainingGrid:
    """The training grid, for looking sigmas up as the reference does."""
    return schedule.training_grid(self.setting("shift", 5.0))

  def sigma(self, timestep: np.ndarray) -> jax.Array:
    """Sigma of a timestep, by nearest grid entry or, in the library's way, exact."""
    return schedule.sigma_at(timestep, grid=self.grid, reference=self.reference)


@dataclasses.dataclass(frozen=True)
class Result:
  """What a runner computed.

  Attributes:
    values: output name -> array.
    expected: replaces the stored output of that name, where it cannot be compared as
      it lies in the file.
    checks: what was asked -> whether it holds, for what is not numbers.
    informative: stored outputs that are not to be compared.
    note: for the reader of the table.
  """

  values: Arrays = dataclasses.field(default_factory=dict)
  expected: Arrays = dataclasses.field(default_factory=dict)
  checks: dict[str, bool] = dataclasses.field(default_factory=dict)
  informative: frozenset[str] = frozenset()
  note: str = ""


def read_arrays(path: Path) -> Arrays:
  """All arrays of a safetensors file; none if there is no such file."""
  if not path.exists():
    return {}
  return {n: t.read() for n, t in torch_files.open_safetensors(path)[0].items()}


def channels_last(x: np.ndarray, axis: int) -> np.ndarray:
  return np.moveaxis(x, axis, -1).astype(np.float32)


def frame_offsets(offset: Any, b: int, start: int, f: int) -> np.ndarray:
  """A RoPE offset of any shape that SPEC 2.1 allows, as (b, f) or broadcastable."""
  offset = np.asarray(offset, np.float64)
  if offset.ndim != 1:
    return offset  # one number, or (b, f)
  if len(offset) == f:
    return offset[None]
  if len(offset) >= start + f:
    return offset[None, start : start + f]
  return offset[:, None]
