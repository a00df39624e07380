"""The planner's part in a run: what the user did not set, it fills in.

A setting counts as set when it was asked for on the command line, or when it is not
the plain one of `plan.Plan`. `decode_frames` is an upper bound unless it was asked for.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from longlive_jax.checkpoint import store
from longlive_jax.generate import networks
from longlive_jax.generate.report import peak_bytes
from longlive_jax.generate.request import SPATIAL
from longlive_jax.parallel import hardware, plan

# What of `plan.Plan` the planner fills in. The rest is as the config has it:
# `attention_format` and `exchange_format` change numbers: never chosen for speed.
SETTINGS = (
  *plan.LAYOUT,
  "precision", "kv_format", "decode_frames",
)  # fmt: skip
# What a saved state was made with, so that a resumed run keeps it.
NUMBERS = ("precision", "kv_format")


@dataclasses.dataclass(frozen=True)
class Planned:
  """The plan of a run.

  Attributes:
    prediction: of it.
    changes: settings that the planner filled in, where they differ from the config's.
  """

  prediction: plan.Prediction
  changes: dict[str, Any]


def plan_run(
  config: Mapping[str, Any],
  sources: networks.Sources,
  batch: int,
  asked: Collection[str] = (),
  *,
  resumed: bool = False,
) -> Planned | None:
  """The plan of a run on the devices that there are; None if config.plan is 'off'.

  Args:
    config: of configs/generate.py. Its `plan` is 'auto', 'off', or the path of a report
      of tools/bench_generate.py, whose rates are then used.
    sources: the networks.
    batch: videos.
    asked: settings that were set on the command line.
    resumed: the numbers are those of a saved state.

  Raises:
    ValueError: as `plan.choose`; a report that is none.
  """
  if config["plan"] in ("", "off"):
    return None
  machine = hardware.this_machine()
  if config["plan"] != "auto":
    rates = hardware.measured_hardware(config["plan"])
    machine = dataclasses.replace(rates, memory=machine.memory, count=machine.count)
  fixed = fixed_settings(config, {*asked, *(NUMBERS if resumed else ())})
  if _is_packed(sources.dit):
    fixed["precision"] = config["precision"] or "w4a16"  # what is stored
  chosen = plan.choose(
    workload(config, sources, batch),
    machine,
    fixed,
    decode_frames=config["decode_frames"],
  )
  filled = {n: getattr(chosen.plan, n) for n in SETTINGS if n not in fixed}
  return Planned(chosen, {n: v for n, v in filled.items() if v != config[n]})


def fixed_settings(
  config: Mapping[str, Any], asked: Collection[str]
) -> dict[str, Any]:
  """Settings of a plan that are not the planner's to choose."""
  counts = [name for name in plan.LAYOUT if name.endswith("devices")]
  if any(name in asked or config[name] > 1 for name in counts):
    asked = {*asked, *plan.LAYOUT}  # whoever set one means the others, too
  fixed = {}
  for field in dataclasses.fields(plan.Plan):
    value = config.get(field.name, field.default)
    bound = field.name == "decode_frames"
    chosen = field.name in asked or (value != field.default and not bound)
    if field.name not in SETTINGS or chosen:
      fixed[field.name] = value
  return fixed


def workload(
  config: Mapping[str, Any], sources: networks.Sources, batch: int
) -> plan.Workload:
  """What the planner has to know of a run."""
  return plan.Workload(
    dit=sources.dit.config,
    vae=sources.vae.config,
    y=config["height"] // SPATIAL,
    x=config["width"] // SPATIAL,
    frames_per_chunk=config["frames_per_chunk"],
    window_frames=config["window_frames"],
    steps=config["steps"],
    branches=1 if config["guidance"] == 1.0 else 2,
    batch=batch,
    itemsize=jnp.dtype(config["dtype"]).itemsize,
    encoder=True,
    plain_copy=bool(config["precision_plain_steps"]),
    adapter_parameters=sum(adapter.parameters for adapter in sources.dit.loras),
    vae_precision=sources.vae.vae_precision,
    decode_tiles=config["decode_tiles"],
    unrolled=sources.dit.unrolled,
    relative_rope=config["relative_rope"],
  )


def kept_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
  """The config that a state was saved with, but for what is its machine's.

  A resumed run may have other devices: it plans anew, or is told.

  Args:
    saved: metadata of a snapshot.
  """
  planned = set(saved.get("planned", ())) - set(NUMBERS)
  left = planned | {*plan.LAYOUT, "plan", "cache_dir", "programs_dir"}
  return {name: value for name, value in saved["config"].items() if name not in left}


def comparison(planned: Planned | None, fps: float | None) -> dict[str, Any] | None:
  """Predicted beside measured, for the report of a run.

  Args:
    fps: video frames a second after the first chunk, if there were any.
  """
  if planned is None:
    return None
  p = planned.prediction
  return {
    "plan": dataclasses.asdict(p.plan),
    "filled_in": planned.changes,
    "rates": p.hardware.source,
    "predicted": {
      "fps": p.fps,
      "peak_bytes": p.peak,
      "bytes": p.memory,
      "stage_seconds": p.stages,
    },
    "measured": {"fps": fps, "peak_bytes": peak_bytes()},
  }


def _is_packed(source: networks.Source) -> bool:
  return source.path is not None and store.is_packed(store.load_metadata(source.path))
