"""A planner: which devices do what, in which numbers, so that it fits and is fastest.

  prediction = choose(workload, hardware, fixed={"decode_on": "same"})
  prediction.plan.sequence_devices, prediction.fps, prediction.memory

All plans that are valid are weighed by a cost model: the sum over stages of the greater
of operations / rate and bytes / bandwidth (parallel/costs.py), divided by the share of
such a floor that whole chunks reach, and the exchange between devices. Work on
different devices overlaps; on the same one it adds up.

Quality comes first: precision and cache format stay as asked if any layout fits that
way. Only else the cache gives way, then the weights, the fewest bits last, and the plan
says so. What changes numbers beyond rounding is never chosen for speed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from longlive_jax.models.dit import WanConfig
from longlive_jax.models.vae import VAEConfig
from longlive_jax.parallel import costs
from longlive_jax.parallel.costs import Work
from longlive_jax.parallel.hardware import GB, Hardware

# The rest an allocator cannot hand out, being in pieces between arrays.
USABLE = 0.95
# What a plan must be faster by to be worth more devices.
WORTH = 0.02
# Of 2 and 4 H200s in one host (tools/results/bench_5b_h200_x*.json): seconds of a
# collective that moves nothing, what is in front of it and behind it included; and what
# a decoder reaches away from the transformer, or split, of what it does beside it.
LATENCY = 6e-5
APART = 0.78

# From all bits to few: tried in this order.
PRECISIONS = ("", "w8a16", "w4a16")
KV_FORMATS = ("", "fp8", "nvfp4")
# Where work is done: these change no number beyond rounding.
LAYOUT = ("devices", "sequence_devices", "guidance_devices", "decode_on")


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is to be generated.

  Attributes:
    dit, vae: sizes of the networks; without a VAE only latents come out.
    y, x: rows and columns of latents.
    frames_per_chunk, window_frames, steps: of `sampler.Sampling`.
    branches: 2 with guidance.
    batch: videos.
    itemsize: bytes of a number that is not quantised.
    encoder: the VAE's encoder is in memory, too.
    plain_copy: so are the plain weights beside quantised ones (precision by step).
    adapter_parameters: of the adapters beside the weights.
    vae_precision: of the VAE's decoder, as the config names it.
    decode_tiles: of it; a picture that devices share has no other parts.
    unrolled: layers are run one by one.
    relative_rope: of `sampler.Sampling`; no layer then holds its window.
  """

  dit: WanConfig
  vae: VAEConfig | None
  y: int
  x: int
  frames_per_chunk: int = 8
  window_frames: int = 32
  steps: int = 4
  branches: int = 1
  batch: int = 1
  itemsize: int = 2
  encoder: bool = False
  plain_copy: bool = False
  adapter_parameters: int = 0
  vae_precision: str = ""
  decode_tiles: int = 1
  unrolled: bool = False
  relative_rope: bool = False

  @property
  def video_frames(self) -> int:
    """Video frames of a chunk, of all videos."""
    factor = self.vae.temporal_factor if self.vae else 4
    return self.batch * self.frames_per_chunk * factor

  @property
  def frame_bytes(self) -> int:
    """Of those, uint8."""
    factor = self.vae.spatial_factor if self.vae else 16
    return self.video_frames * self.y * self.x * factor**2 * 3


@dataclasses.dataclass(frozen=True)
class Plan:
  """Settings of a run, by their names in the config.

  Attributes:
    devices: groups of devices; each has its share of the videos.
    sequence_devices: of a group, that share the tokens and heads of a chunk.
    guidance_devices: of a group, that share the branches of guidance.
    decode_on: 'same' device as denoises, an'other' one, or 'split' over all of them.
    decode_frames: latent frames that are decoded together.
    precision, kv_format: of weights and of cache.
    attention_format: of what attention to the window multiplies.
    exchange_format: of keys and values on the way between devices.
  """

  devices: int = 1
  sequence_devices: int = 1
  guidance_devices: int = 1
  decode_on: str = "same"
  decode_frames: int = 1
  precision: str = ""
  kv_format: str = ""
  attention_format: str = ""
  exchange_format: str = ""

  @property
  def group(self) -> int:
    """Devices that generate the same videos."""
    return self.sequence_devices * self.guidance_devices

  @property
  def total(self) -> int:
    """Devices in use."""
    return self.devices * self.group + (self.decode_on == "other")

  @property
  def picture_devices(self) -> int:
    """Devices that decode a picture together."""
    return self.total if self.decode_on == "split" else 1


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a plan is expected to cost.

  Attributes:
    plan, hardware: what it is about.
    stages: seconds of a chunk by stage, of one device.
    seconds: of a chunk, from noise to frames on the host.
    denoise_seconds: of it without decoding.
    fps, denoise_fps: video frames a second of all videos, with and without decoding.
    memory: bytes by part of a device that denoises.
    decoder_memory: of the other device that decodes, if there is one.
  """

  plan: Plan
  hardware: Hardware
  stages: dict[str, float]
  seconds: float
  denoise_seconds: float
  fps: float
  denoise_fps: float
  memory: dict[str, float]
  decoder_memory: dict[str, float]

  @property
  def peak(self) -> float:
    """Bytes of the fullest device."""
    return max(sum(self.memory.values()), sum(self.decoder_memory.values()))

  @property
  def fits(self) -> bool:
    return self.peak <= USABLE * self.hardware.memory


# ------------------------------------------------------------------ cost model
def work_of(workload: Workload, plan: Plan) -> Work:
  """What each device that denoises does."""
  return Work(
    rows=workload.batch // plan.devices * workload.branches // plan.guidance_devices,
    frames=workload.frames_per_chunk,
    window_frames=workload.window_frames,
    tokens=workload.dit.tokens_per_frame(workload.y, workload.x),
    steps=workload.steps,
    itemsize=workload.itemsize,
    precision=plan.precision,
    kv_format=plan.kv_format,
    attention_format=plan.attention_format,
    split=plan.sequence_devices,
    unrolled=workload.unrolled and not workload.relative_rope,
  )


def predict(workload: Workload, hardware: Hardware, plan: Plan) -> Prediction:
  """Speed and memory of one plan."""
  if hardware.shared:  # what devices do at the same time takes as long as in turn
    hardware = hardware.slower(plan.total)
  stages = dict(_denoise_seconds(workload, hardware, work_of(workload, plan)))
  stages["exchange"] = exchange_seconds(workload, hardware, plan)
  denoise = sum(stages.values())
  stages["vae"] = decode_seconds(workload, hardware, plan)
  stages["host_copy"] = workload.frame_bytes / hardware.host if workload.vae else 0.0
  apart = plan.decode_on == "other"
  seconds = max(denoise, stages["vae"]) if apart else denoise + stages["vae"]
  seconds = max(seconds, stages["host_copy"])  # copied while the next chunk is made
  memory, decoder_memory = memory_of(workload, plan)
  return Prediction(
    plan=plan,
    hardware=hardware,
    stages=stages,
    seconds=seconds,
    denoise_seconds=denoise,
    fps=workload.video_frames / seconds,
    denoise_fps=workload.video_frames / denoise,
    memory=memory,
    decoder_memory=decoder_memory,
  )


@functools.lru_cache(maxsize=256)
def _denoise_seconds(
  workload: Workload, hardware: Hardware, work: Work
) -> tuple[tuple[str, float], ...]:
  stages = costs.transformer_stages(workload.dit, work)
  unrolled = workload.unrolled
  share = hardware.unrolled_share if unrolled else hardware.denoise_share
  return tuple((n, s.calls * hardware.floor(s) / share) for n, s in stages.items())


def exchange_seconds(workload: Workload, hardware: Hardware, plan: Plan) -> float:
  """Collectives of a chunk: heads for tokens in every layer, branches in every step."""
  work, n = work_of(workload, plan), plan.sequence_devices
  seconds = 0.0
  if n > 1:
    numbers = work.rows * work.chunk_tokens // n * workload.dit.dim * (n - 1) / n
    keys = costs.CACHE_BITS.get(plan.exchange_format, 8 * work.itemsize) / 8
    moved = numbers * (2 * work.itemsize + 2 * keys)  # q and out, k and v
    calls = workload.dit.layers * (work.steps + 1)
    seconds += calls * (moved / hardware.link + 4 * LATENCY)  # q, k, v and out
  if plan.guidance_devices > 1:
    latents = work.frames * workload.y * workload.x * workload.dit.in_channels
    seconds += work.steps * (4 * work.rows * latents / hardware.link + LATENCY)
  return seconds


@functools.lru_cache(maxsize=256)
def decode_seconds(workload: Workload, hardware: Hardware, plan: Plan) -> float:
  """Decoding a chunk on the device, or the devices, that do."""
  if workload.vae is None:
    return 0.0
  stage = costs.decode_stage(
    workload.vae,
    workload.y,
    workload.x,
    videos=decoded_videos(workload, plan),
    frames=workload.frames_per_chunk,
    frames_per_call=min(plan.decode_frames, workload.frames_per_chunk),
    itemsize=workload.itemsize,
    precision=workload.vae_precision,
  )
  seconds = stage.calls * hardware.floor(stage) / hardware.decode_share
  apart = 1.0 if plan.decode_on == "same" else APART
  return seconds / plan.picture_devices / apart


def decoded_videos(workload: Workload, plan: Plan) -> int:
  """Videos that a decoder has a part in."""
  if plan.decode_on == "same":
    return workload.batch // plan.devices
  return workload.batch


def memory_of(
  workload: Workload, plan: Plan
) -> tuple[dict[str, float], dict[str, float]]:
  """Bytes by part: of a device that denoises, of the other one that decodes ({})."""
  work, size = work_of(workload, plan), workload.itemsize
  weights = costs.transformer_bytes(workload.dit, plan.precision, size)
  weights += size * workload.adapter_parameters
  if workload.plain_copy and plan.precision:
    weights += costs.transformer_bytes(workload.dit, "", size)
    weights += size * workload.adapter_parameters
  memory = {"weights": weights, "cache": costs.cache_bytes(workload.dit, work)}
  denoising = costs.forward_bytes(workload.dit, work)
  vae = workload.vae
  if vae is None:
    return memory | {"temporaries": denoising}, {}
  videos, parts = decoded_videos(workload, plan), plan.picture_devices
  grid, precision = (workload.y, workload.x), workload.vae_precision
  vae_weights = costs.decoder_bytes(vae, size, precision)
  if workload.encoder:
    vae_weights += costs.encoder_bytes(vae, size)
  state = costs.decoder_state_bytes(vae, *grid, size, precision)
  decoder = {
    "vae": vae_weights,
    "decoder_state": videos * state / parts,
    # One chunk on its way to the host, one being made.
    "frames": 2 * workload.frame_bytes * videos / workload.batch / parts,
  }
  together = min(plan.decode_frames, workload.frames_per_chunk)
  decoding = videos * costs.decoding_bytes(vae, *grid, together, size)
  decoding /= parts
  if plan.decode_on == "other":
    return memory | {"temporaries": denoising}, decoder | {"temporaries": decoding}
  # One program after the other: the memory of the first serves the second.
  return memory | decoder | {"temporaries": max(denoising, decoding)}, {}


# ------------------------------------------------------------------ choice
def problem(workload: Workload, hardware: Hardware, plan: Plan) -> str:
  """Why a plan is impossible, whatever the memory; '' if it is not."""
  heads = workload.dit.heads
  if workload.batch % plan.devices:
    return f"devices={plan.devices} must divide the {workload.batch} videos"
  if heads % plan.sequence_devices:
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    return (
      f"sequence_devices={plan.sequence_devices} must divide the {heads} heads; use "
      f"one of {fitting}"
    )
  if workload.branches % plan.guidance_devices:
    return f"guidance_devices={plan.guidance_devices} needs guidance; use 1"
  if plan.decode_on not in ("same", "other", "split"):
    return f"decode_on={plan.decode_on!r} is unknown; use 'same', 'other' or 'split'"
  if plan.decode_on == "split" and workload.decode_tiles > 1:
    return (
      f"decode_on='split' needs decode_tiles=1, not {workload.decode_tiles}; use "
      "'same' or 'other'"
    )
  if plan.decode_on == "split" and plan.total == 1:
    return "decode_on='split' needs several devices; use 'same'"
  if workload.y % plan.picture_devices and workload.x % plan.picture_devices:
    return (
      f"decode_on='split' cannot share {workload.y} rows or {workload.x} columns of "
      f"latents evenly among {plan.total} devices; use 'same'"
    )
  if plan.decode_on != "same" and workload.vae is None:
    return f"decode_on={plan.decode_on!r} needs a VAE"
  if plan.total > hardware.count:
    return (
      f"{_settings(plan)} need {plan.total} devices, but there are {hardware.count}"
    )
  return ""


def layouts(
  workload: Workload, hardware: Hardware, fixed: Mapping[str, Any], decode_frames: int
) -> Iterator[Plan]:
  """All plans with the fixed settings, but for precision, possible or not."""
  up_to = range(1, hardware.count + 1)
  options: dict[str, Any] = {
    "devices": [n for n in up_to if workload.batch % n == 0],
    "sequence_devices": [n for n in up_to if workload.dit.heads % n == 0],
    "guidance_devices": [n for n in up_to if workload.branches % n == 0],
    "decode_on": ("same", "other", "split") if workload.vae else ("same",),
  }
  if hardware.shared:
    options = {name: (getattr(Plan(), name),) for name in options}
  fewer = range(decode_frames, 0, -1)
  options["decode_frames"] = [n for n in fewer if decode_frames % n == 0]
  options |= {name: (value,) for name, value in fixed.items()}
  for values in itertools.product(*options.values()):
    yield Plan(**dict(zip(options, values, strict=True)))


def formats(workload: Workload, fixed: Mapping[str, Any]) -> Iterator[dict[str, str]]:
  """Precision and cache format, from all bits to few: the order of the rule above."""
  blocks = workload.dit.head_dim % 16 == 0  # what 4 bits need
  precisions = [fixed["precision"]] if "precision" in fixed else PRECISIONS
  caches = [fixed["kv_format"]] if "kv_format" in fixed else KV_FORMATS
  for precision, kv_format in itertools.product(precisions, caches):
    if blocks or kv_format != "nvfp4" or "kv_format" in fixed:
      yield {"precision": precision, "kv_format": kv_format}


def choose(
  workload: Workload,
  hardware: Hardware,
  fixed: Mapping[str, Any] | None = None,
  *,
  decode_frames: int = 1,
) -> Prediction:
  """The fastest plan that fits, with as many bits as fit.

  Args:
    fixed: settings, by the names of `Plan`, that are not the planner's to choose.
    decode_frames: at most so many, or a divisor of it, to need less memory.

  Raises:
    ValueError: a fixed setting is impossible, or nothing fits: says by how much, and
      what would fit.
  """
  fixed = dict(fixed or {})
  found = _choose(workload, hardware, fixed, decode_frames)
  if found.fits:
    return found
  short = (found.peak - USABLE * hardware.memory) / GB
  raise ValueError(
    f"{_settings(found.plan)} needs {found.peak / GB:.1f} GB a device, {short:.1f} GB "
    f"more than a {hardware.kind} has to give ({USABLE:.0%} of "
    f"{hardware.memory / GB:.1f} GB); {_advice(workload, hardware, fixed)}, "
    "or try with plan='off'"
  )


def _choose(workload, hardware, fixed, decode_frames=1) -> Prediction:
  """The fastest that fits, or the smallest of all."""
  possible, first_problem = [], ""
  for plan in layouts(workload, hardware, fixed, decode_frames):
    why_not = problem(workload, hardware, plan)
    first_problem = first_problem or why_not
    if not why_not:
      possible.append(plan)
  if not possible:
    raise ValueError(first_problem)
  smallest = None
  for numbers in formats(workload, fixed):
    plans = [dataclasses.replace(plan, **numbers) for plan in possible]
    predictions = [predict(workload, hardware, plan) for plan in plans]
    if fitting := [p for p in predictions if p.fits]:
      fastest = min(p.seconds for p in fitting)
      near = [p for p in fitting if p.seconds <= (1 + WORTH) * fastest]
      return min(
        near, key=lambda p: (p.plan.total, p.plan.decode_on != "same", p.seconds)
      )
    smallest = min([*predictions, *([smallest] if smallest else [])],
                   key=lambda p: p.peak)  # fmt: skip
  return smallest


def _advice(workload: Workload, hardware: Hardware, fixed: Mapping[str, Any]) -> str:
  """Which settings would make a workload fit that does not."""
  names = sorted(fixed, key=lambda name: name == "precision")  # the weights last
  fewer = [{k: v for k, v in fixed.items() if k != name} for name in names]
  for free in [*fewer, {}]:
    found = _choose(workload, hardware, free)
    if found.fits:
      return f"{_settings(found.plan)} would fit"
  for count in (n for n in (2, 4, 8) if n > hardware.count and not hardware.shared):
    found = _choose(workload, dataclasses.replace(hardware, count=count), {})
    if found.fits:
      return f"on {count} devices {_settings(found.plan)} would fit"
  n = workload.frames_per_chunk  # at least: global sink, shot sink, the chunk
  for window in range(workload.window_frames - n, 2 * n, -n):
    found = _choose(dataclasses.replace(workload, window_frames=window), hardware, {})
    if found.fits:
      return f"window_frames={window} {_settings(found.plan)} would fit"
  return "use a smaller height and width"


def _settings(plan: Plan) -> str:
  """What differs from the plain plan, as settings."""
  changed = [
    f"{field.name}={getattr(plan, field.name)!r}"
    for field in dataclasses.fields(Plan)
    if getattr(plan, field.name) != field.default
  ]
  return " ".join(changed) or "one device with plain numbers"


def describe(prediction: Prediction) -> str:
  """One line for people: settings, speed, memory."""
  p = prediction
  parts = {**p.memory, **{f"other {n}": size for n, size in p.decoder_memory.items()}}
  sizes = ", ".join(f"{name} {size / GB:.3g}" for name, size in parts.items())
  return (
    f"plan: {_settings(p.plan)}; predicted {p.fps:.1f} FPS ({p.denoise_fps:.1f} "
    f"without decoding), {p.peak / GB:.3g} of {p.hardware.memory / GB:.4g} GB a device "
    f"({sizes}); {p.hardware.kind} x {p.plan.total}, rates {p.hardware.source}"
  )
