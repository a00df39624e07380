"""What fewer solver steps cost in quality, with and without distilled adapters.

Every variant makes the same videos from the same noise: `shots`, four shots of two
chunks, prompts that training never saw, later shots named "the same subject"; and
`minute`, 60 seconds of 12 shots. Scores are those of tools/eval_toy.py, over all shots
of the first and in the last shot of the second. Beside them stand

  motion amount   pixels that the subject moves a frame, over those of the teacher
  drift           mean difference to the background beside the subject, in the last
                  shot of the minute, and in its first

  python tools/eval_steps.py
  python tools/eval_steps.py --lora=4:outputs/distill_toy_4/model/lora \
      --only='4*' --videos=16 --minutes=0

The teacher is the network as it was trained, with 50 steps and guidance. Without an
adapter fewer steps are guided, too, which costs two passes a step; with one they are
not. An adapter of the next larger number serves where a number has none of its own
(the one of 4 steps also makes 3).
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import eval_toy
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from variants import choose, detecting_pool, table

from longlive_jax.data import detectors, scores, toy_world
from longlive_jax.data.detectors import Detection
from longlive_jax.data.toy_world import Scene
from longlive_jax.generate import networks, report
from longlive_jax.generate.sampler import Sampling

_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(Path(__file__).parents[1] / "configs" / "generate.py") + ":toy",
  "Networks and sampling; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_LORA = flags.DEFINE_multi_string(
  "lora", [f"{n}:{networks.SHIPPED / f'lora_{n}'}" for n in (4, 2)],
  "STEPS:PATH of an adapter.", flag_values=_FLAGS,
)  # fmt: skip
_ONLY = flags.DEFINE_multi_string(
  "only", ["*"], "Variants: patterns of their names.", flag_values=_FLAGS
)
_VIDEOS = flags.DEFINE_integer("videos", 200, "Of four shots.", 1, flag_values=_FLAGS)
_MINUTES = flags.DEFINE_integer(
  "minutes", 50, "Of a minute; 0 leaves them out.", 0, flag_values=_FLAGS
)
_BATCH = flags.DEFINE_integer("batch", 50, "Made together.", 1, flag_values=_FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string(
  "out", "outputs/eval_steps.json", "Report.", flag_values=_FLAGS
)

TEACHER = "50 steps"
FEW = (4, 3, 2, 1)
NVFP4 = (("precision", "w4a4"), ("kv_format", "nvfp4"))


@dataclasses.dataclass(frozen=True)
class Variant:
  """How videos are made.

  Attributes:
    steps: of the solver.
    settings: of the config, beside the number of steps.
  """

  steps: int
  settings: tuple[tuple[str, Any], ...] = ()


def adapter_for(steps: int, adapters: Mapping[int, str]) -> str:
  """Path of the adapter of so many steps, or of the next larger number; '': none."""
  return adapters[min(able)] if (able := [n for n in adapters if n >= steps]) else ""


def variants(adapters: Mapping[int, str]) -> dict[str, Variant]:
  """All variants by name, the teacher first."""
  found = {TEACHER: Variant(50), f"{TEACHER}, NVFP4": Variant(50, NVFP4)}
  for steps in FEW:
    name = f"{steps} step{'s' if steps > 1 else ''}"
    found[name] = Variant(steps)
    if path := adapter_for(steps, adapters):
      few = (("guidance", 1.0), ("loras", (path,)))
      found[f"{name}, distilled"] = Variant(steps, few)
      found[f"{name}, distilled, NVFP4"] = Variant(steps, few + NVFP4)
  return found


def parse_adapters(given: Sequence[str]) -> dict[int, str]:
  """'STEPS:PATH' to path by steps; raises ValueError for anything else."""
  found = {}
  for each in given:
    steps, _, path = each.partition(":")
    if not steps.isdecimal() or int(steps) < 1 or not path:
      raise ValueError(f"lora={each!r} must be STEPS:PATH, such as 4:outputs/lora")
    found[int(steps)] = path
  return found


def chosen_variants(
  patterns: Sequence[str], adapters: Mapping[int, str]
) -> dict[str, Variant]:
  """Those whose names fit a pattern, the teacher first; all are compared with it."""
  known = variants(adapters)
  return {name: known[name] for name in choose(patterns, known, TEACHER)}


def shot_scores(
  shots: Sequence[Scene], found: Sequence[Sequence[Detection]], pixels: float
) -> dict[str, float]:
  """Of the videos of four shots; `pixels` is how far the teacher's subjects move."""
  moved = detectors.motion_amount(itertools.chain(*found))
  kept = scores.score_identity(found)["subject kept"]
  return {
    **scores.score_all_shots(shots, found),
    "subject kept": kept,
    "motion amount": moved / pixels,
  }


def minute_scores(
  scenes: Sequence[Scene], found: Sequence[Sequence[Detection]]
) -> dict[str, float]:
  """Of the videos of a minute, of which the first and the last shot were looked at."""
  last = scores.score_last_shot(scenes, found)
  return {
    "minute: all four": last["all four"],
    "minute: subject kept": scores.score_subject(found)["subject kept"],
    "drift": last["drift"],
    "drift, first shot": float(np.mean([row[0].drift for row in found])),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  chosen = chosen_variants(_ONLY.value, parse_adapters(_LORA.value))
  began = time.perf_counter()
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  config = _CONFIG.value
  if config.loras:
    raise ValueError(f"loras={config.loras}: the teacher has none; give them by --lora")
  plain = eval_toy.load_networks(config)
  first = _SEED.value * 1_000_000
  shots, minutes = (
    [toy_world.heldout_scene(first + i, lengths) for i in range(count)]
    for lengths, count in (
      (eval_toy.FOUR_SHOTS, _VIDEOS.value), (eval_toy.MINUTE, _MINUTES.value),
    )
  )  # fmt: skip
  rows: dict[str, dict[str, float]] = {}
  pixels = 0.0
  with detecting_pool() as pool:
    for name, variant in chosen.items():
      settings = config.copy_and_resolve_references()
      settings.update(steps=variant.steps, **dict(variant.settings))
      choice = networks.Choice(**networks.pick(networks.Choice, settings))
      model = networks.load(networks.find_all(choice).dit, settings.dtype)
      generate = functools.partial(
        eval_toy.generate,
        dataclasses.replace(plain, model=model),
        Sampling(**networks.pick(Sampling, settings)),
        seed=_SEED.value,
        size=settings.height,
        negative_prompt=settings.negative_prompt,
      )
      found = eval_toy.detect_shots(generate, shots, _BATCH.value, pool)
      pixels = pixels or detectors.motion_amount(itertools.chain(*found))
      rows[name] = shot_scores(shots, found, pixels)
      if minutes:
        ends = (0, len(eval_toy.MINUTE) - 1)
        found = eval_toy.detect_shots(generate, minutes, _BATCH.value, pool, ends)
        rows[name] |= minute_scores(minutes, found)
      logging.info("%s: %s", name, json.dumps(rows[name]))
      content = {
        "results": rows,
        "adapters": list(_LORA.value),
        "videos": len(shots),
        "minutes": len(minutes),
        "seed": _SEED.value,
        "config": config.to_dict(),
        "seconds": time.perf_counter() - began,
        **report.environment(),
      }
      report.write_json(out, content)
  print(table(rows))


if __name__ == "__main__":
  app.run(main)
