"""Checks that generation on several devices gives the video of one.

  python tools/check_parallel.py --processes 8 --output tools/results/parallel_cpu.json
  python tools/check_parallel.py --pairs         every two settings meet in some case

Makes videos of a tiny transformer (24 heads, float32) on 8 fake CPU devices, in all
combinations of the settings below, and prints how far the latents are from those of
one device: the root of the mean square of differences over that of the latents.
Quantised numbers may differ by a step where rounding differs in the last bit, so their
bound is wider. Exit status 1 if a case is beyond its bound.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.generate import stream as streams
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit
from longlive_jax.parallel import mesh as meshes

_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")
_PAIRS = flags.DEFINE_bool("pairs", False, "A few cases that cover every two settings.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "That share the cases.", 1)

CONFIG = dit.WanConfig(
  dim=384, ffn_dim=64, heads=24, layers=2, in_channels=4, out_channels=4,
  freq_dim=32, text_dim=24, text_len=8,
)  # fmt: skip
FRAMES, Y, X, CHUNKS = 2, 4, 6, 4  # 6 tokens a frame: 4 and 8 devices do not divide
SETTINGS: dict[str, tuple[Any, ...]] = {
  "sequence_devices": (2, 3, 4, 6, 8),
  "kv_format": ("", "fp8", "nvfp4"),
  "image": (False, True),
  "relative_rope": (False, True),
  "guidance": ("off", "together", "apart"),  # apart: branches on different devices
  "batch": (1, 2),
}
BOUNDS = {"": 1e-5, "fp8": 1e-2, "nvfp4": 5e-2}

Case = Mapping[str, Any]


def use_fake_devices(count: int) -> None:
  """CPU devices of this process; JAX must not have started yet."""
  # A program runs four times: the time to make it fast would not come back.
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


def all_cases() -> list[Case]:
  """Combinations of the settings that 8 devices allow."""
  cases = (
    dict(zip(SETTINGS, values, strict=True))
    for values in itertools.product(*SETTINGS.values())
  )
  return [case for case in cases if devices_of(case) <= 8]


def devices_of(case: Case) -> int:
  return case["sequence_devices"] * (2 if case["guidance"] == "apart" else 1)


def pairwise(cases: Sequence[Case]) -> list[Case]:
  """Some of the cases in which every two values that meet in any case meet, too."""
  left = set(itertools.chain.from_iterable(map(_pairs, cases)))
  chosen: list[Case] = []
  while left:
    known = [single(case) for case in chosen]  # what one device has to be asked anyway
    chosen.append(
      max(cases, key=lambda case: (len(left & _pairs(case)), single(case) in known))
    )
    left -= _pairs(chosen[-1])
  return chosen


def _pairs(case: Case) -> set[tuple[Any, ...]]:
  return set(itertools.combinations(case.items(), 2))


def sampling_of(case: Case) -> Sampling:
  return Sampling(
    frames_per_chunk=FRAMES,
    window_frames=3 * FRAMES,
    sink_frames=FRAMES,
    steps=2,
    guidance=1.0 if case["guidance"] == "off" else 2.0,
    relative_rope=case["relative_rope"],
    kv_format=case["kv_format"],
  )


@functools.cache
def transformer() -> dit.CausalDiT:
  """Random weights, none of them zero, and of sizes that keep numbers around 1."""
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    name = jax.tree_util.keystr(path)
    if "norm" in name and "weight" in name:
      return jnp.asarray(1 + 0.2 * noise)
    scale = leaf.shape[-1] ** -0.5 if "weight" in name else 0.3
    return jnp.asarray(scale * noise)

  abstract = jax.eval_shape(lambda: dit.CausalDiT(CONFIG, rngs=nnx.Rngs(0)))
  return jax.tree_util.tree_map_with_path(draw, abstract)


def story_of(batch: int) -> streams.Story:
  """Random prompts; the videos are cut at different times."""
  rng = np.random.default_rng(1)
  cut = np.zeros((CHUNKS, batch), bool)
  for video in range(batch):
    cut[1 + video, video] = True
  return streams.Story(
    embeddings=rng.standard_normal((4, 5, CONFIG.text_dim)).astype(np.float32),
    negative=rng.standard_normal((5, CONFIG.text_dim)).astype(np.float32),
    prompt_index=rng.integers(0, 4, (CHUNKS, batch)).astype(np.int32),
    cut=cut,
    shot=np.cumsum(cut, axis=0).astype(np.int32),
  )


def new_state(sampling: Sampling, batch: int, mesh: Mesh | None) -> streams.StreamState:
  """The state before the first chunk."""
  key, samples = jax.random.key(0), np.arange(batch)
  return streams.init_state(
    transformer(), None, sampling, key=key, samples=samples, y=Y, x=X, mesh=mesh
  )


def random_latents(batch: int, frames: int) -> np.ndarray:
  shape = (batch, frames, Y, X, CONFIG.in_channels)
  return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def latents_of(case: Case, devices: int) -> np.ndarray:
  """The videos of a case on all of its devices, or on one: (b, f, y, x, c)."""
  sampling, batch = sampling_of(case), case["batch"]
  sequence = min(case["sequence_devices"], devices)
  mesh = meshes.generation_mesh(1, devices // sequence, sequence)
  chunks = streams.stream(
    meshes.replicate(transformer(), mesh),
    None,
    new_state(sampling, batch, mesh),
    story_of(batch),
    sampling,
    image=random_latents(batch, 1) if case["image"] else None,
    mesh=mesh,
  )
  return np.concatenate([np.asarray(chunk.latents) for chunk in chunks], axis=1)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
  """Root mean square of differences over that of what is wanted."""
  return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@functools.cache
def _on_one(items: tuple[tuple[str, Any], ...]) -> np.ndarray:
  return latents_of(dict(items), 1)


def on_one(case: Case) -> np.ndarray:
  """The videos of a case on one device; each made once."""
  return _on_one(tuple(single(case).items()))


def single(case: Case) -> Case:
  """The case on one device that has the same latents."""
  guidance = "off" if case["guidance"] == "off" else "together"
  return {**case, "sequence_devices": 1, "guidance": guidance}


def check(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
  """Each case with its error, bound and verdict."""
  for case in cases:
    error = difference(latents_of(case, devices_of(case)), on_one(case))
    bound = BOUNDS[case["kv_format"]]
    yield {**case, "error": error, "bound": bound, "passed": error <= bound}


def check_all(cases: Sequence[Case], processes: int) -> Iterator[dict[str, Any]]:
  """`check` in processes of 8 fake devices each."""
  groups: dict[tuple[Any, ...], list[Case]] = {}  # each makes one video on one device
  for case in cases:
    groups.setdefault(tuple(single(case).items()), []).append(case)
  # spawn: a fork would share the parent's JAX.
  with concurrent.futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context("spawn"), use_fake_devices, (8,)
  ) as pool:
    done = [pool.submit(_check_group, group) for group in groups.values()]
    for each in done:
      yield from each.result()


def _check_group(cases: Sequence[Case]) -> list[dict[str, Any]]:
  return list(check(cases))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  start, rows = time.monotonic(), []
  cases = pairwise(all_cases()) if _PAIRS.value else all_cases()
  for row in check_all(cases, _PROCESSES.value):
    if not rows:
      print("  ".join(f"{name:>16}" for name in row))
    rows.append(row)
    print("  ".join(f"{value!s:>16.16}" for value in row.values()), flush=True)
  worst = {
    name or "plain": max(r["error"] for r in rows if r["kv_format"] == name)
    for name in SETTINGS["kv_format"]
  }
  report = {
    "command": " ".join(["python", *sys.argv]),
    "machine": f"{platform.machine()}, CPU, 8 fake devices",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "config": dataclasses.asdict(CONFIG),
    "cases": len(rows),
    "failed": sum(not row["passed"] for row in rows),
    "worst_error": worst,
    "seconds": round(time.monotonic() - start),
    "rows": rows,
  }
  print(json.dumps({k: report[k] for k in ("cases", "failed", "worst_error")}))
  if _OUTPUT.value:
    Path(_OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n")
  sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
  app.run(main)
