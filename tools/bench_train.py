"""Measures training steps on clips of several lengths, with random weights.

  python tools/bench_train.py --size=ti2v-5b --vae=wan2.2 --height=704 --width=1280 \
    --seconds=16 --what=step --remat=attention --out=train_16s.json

prints a table and writes JSON. A case is a length with each of --precisions, --layouts,
--remat, --layers and --encode. The step is that of launch/train.py, float32 master
weights included, on all devices (or --devices). Prompts are embedded beforehand, one
for each chunk, and videos lie on the devices, so neither the text encoder nor a disk is
measured. A case that does not fit into memory says so, and the next one follows. JAX
takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.

  --what=step       loss, gradients, AdamW, average. The 5B model needs 80 GB for its
                    state and gradients, shared by the devices.
  --what=gradients  loss and gradients alone, which on one GPU leaves room for a clip.
                    No training step, and called what it is.
  --layers=4,8      fewer layers; from several such numbers a straight line gives all
                    of the layers, in a row of its own that says "extrapolated".
  --layouts         none: a sample for each device; plain, balanced: all devices share
                    one, see longlive_jax/parallel/balanced.py.
  --encode          '' is without; whole: each device encodes all of its clip; spans:
                    its own part (longlive_jax/parallel/halo.py), if a layout makes
                    them share it. A row's seconds are then those of both, one after
                    the other; `halo_cost` is what each part of the encoder computes
                    besides its span, in operations of whole spans.

Utilisation is the model's operations, three times those of a forward pass, over what
the devices' published peaks allow in 16 bits: what remat computes again does not count.
Tokens are those of clips, once. `program_bytes` is what the compiled step takes on a
device; the peak is of the process: for that of a case, start a process for it.
Communication is the share of a profiled step in which collectives run, and the part of
it in which nothing else does (GPU only).
"""

import dataclasses
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import bench_networks
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.generate import report
from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.layers import remat as remats
from longlive_jax.models import dit, vae
from longlive_jax.parallel import balanced, costs, halo, hardware
from longlive_jax.parallel import mesh as meshes
from longlive_jax.quant import training, weights
from longlive_jax.train import flow, step
from longlive_jax.train import state as train_state

Array = jax.Array

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_SIZE = flags.DEFINE_string("size", "test", "Transformer size.", flag_values=_FLAGS)
_VAE = flags.DEFINE_string("vae", "test", "VAE size.", flag_values=_FLAGS)
_HEIGHT = flags.DEFINE_integer("height", 64, "Pixels.", flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", 64, "Pixels.", flag_values=_FLAGS)
_CHUNK = flags.DEFINE_integer(
  "frames_per_chunk", 8, "Latent frames.", flag_values=_FLAGS
)
_SECONDS = flags.DEFINE_list(
  "seconds", ["16"], "Lengths of clips at 24 FPS.", flag_values=_FLAGS
)
_WHAT = flags.DEFINE_enum(
  "what", "step", ["step", "gradients"], "What is timed.", flag_values=_FLAGS
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of computation.", flag_values=_FLAGS
)
_PRECISIONS = flags.DEFINE_list(
  "precisions", [""], "'', nvfp4 (simulated), fp8.", flag_values=_FLAGS
)
_LAYOUTS = flags.DEFINE_list(
  "layouts", ["none"], "none, plain, balanced.", flag_values=_FLAGS
)
_REMAT = flags.DEFINE_list(
  "remat", ["attention"], "Of layers/remat.py.", flag_values=_FLAGS
)
_LAYERS = flags.DEFINE_list("layers", [], "Fewer of them.", flag_values=_FLAGS)
_ENCODE = flags.DEFINE_list("encode", [""], "'', whole, spans.", flag_values=_FLAGS)
_DEVICES = flags.DEFINE_integer("devices", 0, "0: all.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 3, "Timed; median.", 1, flag_values=_FLAGS)
_PROGRAMS = flags.DEFINE_string(
  "programs", "", "Folder that keeps compiled programs.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=_FLAGS)


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of the table.

  Attributes:
    seconds: of the clip, rounded up to whole chunks.
    frames: latent frames of that.
    what, precision, layout, remat, encode: as the flags.
    layers: of the transformer.
    devices: that take part.
  """

  seconds: float
  frames: int
  what: str
  precision: str
  layout: str
  remat: str
  layers: int
  encode: str
  devices: int

  @property
  def samples(self) -> int:
    return self.devices if self.layout == "none" else 1

  def mesh(self) -> Mesh | None:
    return meshes.training_mesh(self.samples, self.devices // self.samples)


def cases(config: dit.WanConfig) -> Iterator[Case]:
  """All combinations of the flags.

  Raises:
    ValueError: a setting that does not exist, or does not go with another.
  """
  devices = _DEVICES.value or jax.device_count()
  for name, given, known in (
    ("precisions", _PRECISIONS.value, ("", *training.MODES)),
    ("layouts", _LAYOUTS.value, ("none", *balanced.LAYOUTS)),
    ("remat", _REMAT.value, remats.NAMES),
    ("encode", _ENCODE.value, ("", "whole", "spans")),
  ):
    for value in given:
      if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use {', '.join(known)}")
  for seconds, precision, layout, remat, layers, encode in itertools.product(
    map(float, _SECONDS.value), _PRECISIONS.value, _LAYOUTS.value, _REMAT.value,
    map(int, _LAYERS.value or [config.layers]), _ENCODE.value,
  ):  # fmt: skip
    frames = -(-round(6 * seconds) // _CHUNK.value) * _CHUNK.value
    if layout != "none":
      balanced.check(frames, _CHUNK.value, config.heads, devices, layout)
    elif encode == "spans":
      continue
    yield Case(
      seconds, frames, _WHAT.value, precision, layout, remat, layers, encode, devices
    )


# ------------------------------------------------------------------ one case
def measure(case: Case, config: dit.WanConfig, y: int, x: int) -> dict[str, Any]:
  """Figures of a case; without those of a run if it does not fit."""
  config = dataclasses.replace(config, layers=case.layers)
  mesh = case.mesh()
  flops = clip_flops(case, config, y, x)
  row: dict[str, Any] = {**dataclasses.asdict(case), "flops": flops}
  try:
    run, carry, batch = prepare(case, config, mesh, y, x)
    began = time.perf_counter()
    compiled = run.lower(carry, batch, None).compile()
    row["compile_s"] = time.perf_counter() - began
    memory = compiled.memory_analysis()
    row["program_bytes"] = (
      memory.argument_size_in_bytes + memory.temp_size_in_bytes
      + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    encode = None
    if case.encode:
      encode, spans = make_encode(case, mesh)
      row["halo_cost"] = halo.halo_cost(vae.VAE_SIZES[_VAE.value], spans, y, x)
    row |= timed(compiled, carry, batch, encode, mesh)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row | {"does_not_fit": str(error).splitlines()[0]}
  return row | rates(row) | {"peak_bytes": report.peak_bytes()}


def prepare(
  case: Case, config: dit.WanConfig, mesh: Mesh | None, y: int, x: int
) -> tuple[Any, Any, dict[str, Array]]:
  """run(carry, batch, None) -> (carry, metrics), jitted, its carry, and a batch."""
  loss_settings = step.LossSettings(
    flow.FlowSettings(_CHUNK.value),
    dtype=_DTYPE.value,
    sp_layout="balanced" if case.layout == "none" else case.layout,
    remat=case.remat,
    quantise=training.MODES[case.precision]() if case.precision else None,
    quantised_layers=weights.BLOCK_LINEARS,
  )
  settings = step.StepSettings(train_state.OptimizerSettings(steps=1000, warmup=1))
  optimizer = train_state.make_optimizer(settings.optimizer)
  loss_fn = step.make_loss(config, loss_settings, mesh)

  def build() -> Any:
    params = {"dit": bench_networks.random_dit(config, jnp.float32)}
    if case.what == "gradients":
      return params
    return train_state.fresh_state(params, optimizer)

  specs = meshes.last_axis_specs(jax.eval_shape(build), mesh)
  carry = on_mesh(build, specs, mesh)()
  chunks = case.frames // _CHUNK.value

  def make_batch() -> dict[str, Array]:
    b, f, key = case.samples, case.frames, jax.random.key(0, impl="rbg")
    text = (b, chunks, config.text_len, config.text_dim)
    return {
      "latents": jax.random.normal(key, (b, f, y, x, config.in_channels)),
      "mask": jnp.ones((b, f)),
      "text": jax.random.normal(key, text, _DTYPE.value),
    }

  batch = on_mesh(make_batch, meshes.CLIPS, mesh)()
  if case.what == "step":
    return step.make_step(loss_fn, settings, optimizer, specs, mesh), carry, batch
  gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def run(params: Any, batch: dict[str, Array], base: None) -> tuple[Any, Any]:
    (loss, _), gradients = gradient_fn(params, batch, jax.random.key(0))
    gradients = meshes.constrain(gradients, specs, mesh)
    return params, {"loss": loss, "gradients": gradients}

  return jax.jit(run, donate_argnums=0), carry, batch


def latent_grid() -> tuple[int, int]:
  """Rows and columns of a latent frame."""
  scale = vae.VAE_SIZES[_VAE.value].spatial_factor
  return _HEIGHT.value // scale, _WIDTH.value // scale


def on_mesh(make: Callable[[], Any], specs: Any, mesh: Mesh | None) -> Any:
  """`make`, jitted, that puts its outputs where they belong."""
  if mesh is None:
    return jax.jit(make)
  shardings = jax.tree.map(functools.partial(meshes.sharding, mesh), specs)
  return jax.jit(make, out_shardings=shardings)


def make_encode(
  case: Case, mesh: Mesh | None
) -> tuple[Callable[[], Array], halo.Spans]:
  """encode() -> the latents of the case's clips, of random video on the devices."""
  config, n = vae.VAE_SIZES[_VAE.value], _CHUNK.value
  shared = 1 if mesh is None else mesh.shape[meshes.SEQUENCE]
  network = jax.jit(bench_networks.random_vae, static_argnums=(0, 1))(
    config, jnp.dtype(_DTYPE.value)
  )
  network.decoder = network.conv2 = None
  network = meshes.replicate(network, mesh)
  by_spans = case.encode == "spans"
  spans = halo.make_spans(
    network, latents=case.frames, devices=shared if by_spans else 1, frames_per_call=n
  )
  frames = spans.devices * spans.padded_frames
  shape = (case.samples, frames, _HEIGHT.value, _WIDTH.value, 3)
  make = functools.partial(
    jax.random.bits, jax.random.key(1, impl="rbg"), shape, jnp.uint8
  )
  video = on_mesh(make, meshes.CLIPS if by_spans else P(meshes.DATA), mesh)()
  if by_spans:
    return lambda: halo.encode_spans(network, video, spans, mesh), spans
  whole = jax.jit(halo.encode_span, static_argnums=3)

  def encode() -> Array:
    return meshes.spread(whole(network, video, 0, spans), meshes.CLIPS, mesh)

  return encode, spans


def timed(
  run: Any, carry: Any, batch: dict[str, Array], encode: Any, mesh: Mesh | None
) -> dict[str, Any]:
  """Median seconds of a step, of encoding, and the shares of communication."""
  seconds, encoding = [], []
  for _ in range(1 + _STEPS.value):  # in the first one encoding compiles
    began = time.perf_counter()
    if encode:
      batch = {**batch, "latents": jax.block_until_ready(encode())}
      encoding.append(time.perf_counter() - began)
    carry, metrics = run(carry, batch, None)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - began)
  figures: dict[str, Any] = {
    "step_seconds": float(np.median(seconds[1:])),
    "each_step_seconds": seconds[1:],
    "loss": float(metrics["loss"]),
  }
  if encode:
    figures["encode_seconds"] = float(np.median(encoding[1:]))
  if mesh is not None:
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        jax.block_until_ready(run(carry, batch, None))
      figures |= communication(folder)
  return figures


# ------------------------------------------------------------------ figures
def clip_flops(case: Case, config: dit.WanConfig, y: int, x: int) -> dict[str, int]:
  """Operations of all samples, forward and backward."""
  layout = ClipLayout.of_frames(
    case.frames, _CHUNK.value, config.tokens_per_frame(y, x)
  )
  prompts = case.frames // _CHUNK.value
  forward = costs.clip_flops(config, layout, case.frames, prompts)
  return {name: 3 * case.samples * flops for name, flops in forward.items()}


def rates(row: dict[str, Any]) -> dict[str, float]:
  """What follows from the seconds of a step."""
  flops, seconds = sum(row["flops"].values()), row["step_seconds"]
  here = hardware.this_machine()
  peak = next((p for k, p in hardware.PEAKS.items() if k in here.kind), here.matrix)
  y, x = latent_grid()
  tokens = row["frames"] * dit.size(_SIZE.value).tokens_per_frame(y, x)
  samples = row["devices"] if row["layout"] == "none" else 1
  return {
    "tokens_per_second": samples * tokens / seconds,
    "utilisation": flops / (seconds * row["devices"] * peak),
    "peak_flops": peak,
  }


def extrapolated(
  rows: Iterable[dict[str, Any]], config: dit.WanConfig, y: int, x: int
) -> Iterator[dict[str, Any]]:
  """For rows that differ in layers only, a line through them, at all layers."""
  names = [field.name for field in dataclasses.fields(Case) if field.name != "layers"]

  def key(row: dict[str, Any]) -> str:
    return repr([row[name] for name in names])

  every, done = config.layers, [row for row in rows if "step_seconds" in row]
  for _, group in itertools.groupby(sorted(done, key=key), key):
    group = list(group)
    layers = [row["layers"] for row in group]
    if len(set(layers)) < 2 or every in layers:
      continue
    case = Case(**{name: group[0][name] for name in names}, layers=every)
    line = {
      name: float(np.poly1d(np.polyfit(layers, [r[name] for r in group], 1))(every))
      for name in ("step_seconds", "program_bytes")
    }
    row = {**dataclasses.asdict(case), "extrapolated_from_layers": layers, **line}
    row["flops"] = clip_flops(case, config, y, x)
    yield row | rates(row)


Event = tuple[str, float, float]  # name, start and end


def communication(folder: str) -> dict[str, float]:
  """The larger shares of any GPU of a profile; none if it has no GPU."""
  (path,) = Path(folder).rglob("*.xplane.pb")
  found: list[dict[str, float]] = []
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    if plane.name.startswith("/device:GPU"):
      events = [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
      ]
      found += [shares(events)] if events else []
  return {name: max(row[name] for row in found) for name in (found or [{}])[0]}


def shares(events: Iterable[Event]) -> dict[str, float]:
  """Shares, of the time that events span, of collectives and of those alone."""
  events = list(events)
  collectives = [event for event in events if "nccl" in event[0].lower()]
  others = [event for event in events if "nccl" not in event[0].lower()]
  span = max(e[2] for e in events) - min(e[1] for e in events)
  return {
    "communication_share": covered(collectives) / span,
    "communication_alone_share": (covered(events) - covered(others)) / span,
  }


def covered(events: Iterable[Event]) -> float:
  """Length of the union of intervals."""
  total, reached = 0.0, -np.inf
  for _, start, end in sorted(events, key=lambda event: event[1]):
    total += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return total


# ------------------------------------------------------------------ report
COLUMNS = {
  "seconds": "g", "precision": "", "layout": "", "remat": "", "encode": "",
  "layers": "d", "step_seconds": ".3f", "encode_seconds": ".3f",
  "tokens_per_second": ".0f", "utilisation": ".3f", "communication_share": ".3f",
  "communication_alone_share": ".3f", "program_bytes": ".3g", "peak_bytes": ".3g",
}  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> str:
  """For people; what a row does not have is left blank."""
  lines = [[*COLUMNS, ""]]
  for row in rows:
    cells = [
      "" if row.get(name) is None else format(row[name], form)
      for name, form in COLUMNS.items()
    ]
    note = "does not fit" if "does_not_fit" in row else ""
    if "extrapolated_from_layers" in row:
      note = f"extrapolated from {row['extrapolated_from_layers']} layers"
    lines.append([*cells, note])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    for line in lines
  )


def main(argv: list[str]) -> None:
  del argv
  if _PROGRAMS.value:
    jax.config.update("jax_compilation_cache_dir", _PROGRAMS.value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  config = dit.size(_SIZE.value)
  y, x = latent_grid()
  rows = []
  content = {"size": _SIZE.value, "pixels": f"{_HEIGHT.value}x{_WIDTH.value}"}
  for case in [*cases(config)]:
    rows.append(measure(case, config, y, x))
    print(json.dumps(rows[-1]), flush=True)
    if _OUT.value:  # after every case: a machine may be taken away
      report.write_json(_OUT.value, {**content, "rows": rows, **report.environment()})
  rows += extrapolated(rows, config, y, x)
  print(f"\n{_WHAT.value}, {jax.devices()[0].device_kind}\n{table(rows)}")
  if _OUT.value:
    report.write_json(_OUT.value, {**content, "rows": rows, **report.environment()})


if __name__ == "__main__":
  app.run(main)
