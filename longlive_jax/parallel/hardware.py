"""Kinds of devices and how fast they are, for the planner and the benchmark."""

import dataclasses
import json
import os
from pathlib import Path

import jax

from longlive_jax.parallel.costs import Stage

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Devices of one kind, and how fast one of them is.

  Attributes:
    kind: as JAX names it.
    source: where the rates are from.
    memory: bytes of a device.
    matrix, matrix_fp8, matrix_fp4, attention, attention_fp8, convolution,
      convolution_fp8: operations a second.
    copy: bytes a second, read and written.
    link, host: bytes a second to another device, and to the host.
    denoise_share, decode_share: of the floor by these rates that whole chunks reach.
    unrolled_share: the first, of layers that are not run by a scan.
    count: devices.
    shared: they are parts of one processor, so that more of them are not faster.
  """

  kind: str
  source: str
  memory: float
  matrix: float
  matrix_fp8: float
  matrix_fp4: float
  attention: float
  attention_fp8: float
  convolution: float
  convolution_fp8: float
  copy: float
  link: float
  host: float
  denoise_share: float
  decode_share: float
  unrolled_share: float
  count: int = 1
  shared: bool = False

  def floor(self, stage: Stage) -> float:
    """Seconds of one call if nothing but these rates stood in its way."""
    return sum(
      max(cost.flops / getattr(self, cost.unit), cost.bytes / self.copy)
      for cost in stage.costs
    )

  def slower(self, factor: int) -> "Hardware":
    """One of so many devices that share what this one has."""
    names = (
      "matrix", "matrix_fp8", "matrix_fp4", "attention", "attention_fp8",
      "convolution", "convolution_fp8", "copy",
    )  # fmt: skip
    return dataclasses.replace(self, **{n: getattr(self, n) / factor for n in names})


# Dense 16-bit operations a second as published: what utilisation is a share of.
PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12}

# Rates were measured with jax 0.11.2 at the 5B model's shapes: a product with fc1,
# attention of a chunk to its window, 3x3 convolutions over frames side by side, in FP8
# by kernels/fp8_conv.py, copies of 270 MB. The shares are of the BF16 run in
# tools/results/bench_5b_h200_nvfp4.json, that of unrolled layers is of
# bench_5b_h200_fp8_held.json.
H200 = Hardware(
  kind="NVIDIA H200",
  source="measured; links and memory published",
  memory=141e9,
  matrix=788e12,
  matrix_fp8=1486e12,
  matrix_fp4=788e12,  # no such units: products are of unpacked numbers
  attention=681e12,
  attention_fp8=1022e12,
  convolution=800e12,
  convolution_fp8=1480e12,
  copy=4.2e12,
  link=450e9,
  host=55e9,
  denoise_share=0.83,
  decode_share=0.72,
  unrolled_share=0.92,
)


def _published(
  kind: str, memory: float, dense: float, dense_fp4: float, copy: float, link: float
) -> Hardware:
  """A device that was not measured: its peaks, and what an H200 reaches of its own."""
  share = dense / PEAKS["H200"]
  return dataclasses.replace(
    H200,
    kind=kind,
    source="published peaks, at the shares that an H200 reaches of its own",
    memory=memory,
    matrix=share * H200.matrix,
    matrix_fp8=share * H200.matrix_fp8,
    matrix_fp4=dense_fp4 * H200.matrix / PEAKS["H200"],
    attention=share * H200.attention,
    attention_fp8=share * H200.attention_fp8,
    convolution=share * H200.convolution,
    convolution_fp8=share * H200.convolution_fp8,
    copy=copy * H200.copy / 4.8e12,
    link=link,
  )


HARDWARE = {
  "H200": H200,
  "H100": _published("NVIDIA H100", 80e9, PEAKS["H100"], 989e12, 3.35e12, 450e9),
  "B200": _published("NVIDIA B200", 180e9, PEAKS["B200"], 9000e12, 8e12, 900e9),
  # Two cores, the toy model in float32; tools/bench_generate.py measures others.
  "cpu": Hardware(
    kind="cpu", source="those of two cores", memory=16e9, matrix=1.7e11,
    matrix_fp8=1.7e11, matrix_fp4=1.7e11, attention=5.5e10, attention_fp8=5.5e10,
    convolution=1.6e11, convolution_fp8=1.6e11, copy=4.2e10, link=2e10, host=4.2e10,
    denoise_share=0.67, decode_share=0.37, unrolled_share=0.67, shared=True,
  ),
}  # fmt: skip


def this_machine() -> Hardware:
  """The devices that JAX sees, with the memory that they have for it.

  A GPU that the table lacks counts as an H100 with memory of its own.
  """
  devices = jax.devices()
  kind = devices[0].device_kind
  known = [name for name in HARDWARE if name in kind]
  hardware = HARDWARE[known[0] if known else "H100"]
  source = hardware.source if known else f"assumed: those of an {hardware.kind}"
  if hardware.shared:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  else:
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit", hardware.memory)
  return dataclasses.replace(
    hardware, kind=kind, source=source, memory=float(memory), count=len(devices)
  )


def measured_hardware(path: str | Path) -> Hardware:
  """The hardware with its rates as a report of tools/bench_generate.py has it.

  Raises:
    ValueError: no such report.
  """
  try:
    found = json.loads(Path(path).read_text())["hardware"]
    # Reports of before had one share and one rate of convolutions for both kinds.
    before = {
      "unrolled_share": found.get("denoise_share"),
      "convolution_fp8": found.get("convolution"),
    }
    return Hardware(**{**before, **found})
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"plan={path} is no report of tools/bench_generate.py ({error}); use 'auto' or "
      "'off'"
    ) from error
