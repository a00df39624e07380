"""Measures how each recache rule follows a prompt that changes inside a shot.

A toy video of a held-out combination runs for --before chunks; then its prompt names
another motion (or background) of the same subject, and the video goes on once under
each rule, from the same state and with the same noise. The toy world's detectors look
at single chunks after the change:

  follows      what changed is as the new prompt says, in chunk 1, 2 and 4 after it
  keeps        what else the prompt names is right in the last one
  identity     shape and colour are those of the subject in the last one
  sharp        one minus the mean difference to the background beside the subject

The row `cut` is for comparison: the same prompt, but as a new shot.

  python tools/eval_switch.py --videos=16
  python tools/eval_switch.py --change=background --rules=none,window --videos=8

Networks and sampling are those of launch/generate.py (--config); by default the
networks that ship with the package. The table is printed, and written with all settings
to --out after every video, so that a run that is stopped has its results.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from longlive_jax.data import detectors, toy_render, toy_world
from longlive_jax.data.detectors import Detection
from longlive_jax.data.toy_world import Scene
from longlive_jax.generate import recache, report
from longlive_jax.generate import session as sessions
from longlive_jax.generate.commands import Cut, Prompt
from longlive_jax.generate.engine import Engine, load_engine

CUT = "cut"
RULES = ("none", "last:1", "last:2", "window", "window+sinks", "blend:2", CUT)
LOOKED_AT = (1, 2, 4)  # chunks after the change
CHANGES = ("motion", "background", "colour")

# Flags belong to the process only when this file is the program: tests import it.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(Path(__file__).parents[1] / "configs" / "generate.py") + ":toy",
  "Networks and sampling; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_RULES = flags.DEFINE_list("rules", list(RULES), "Recache rules.", flag_values=_FLAGS)
_CHANGE = flags.DEFINE_enum(
  "change", "motion", CHANGES, "What the new prompt changes.", flag_values=_FLAGS
)
_VIDEOS = flags.DEFINE_integer("videos", 16, "Videos a rule.", 1, flag_values=_FLAGS)
_BEFORE = flags.DEFINE_integer(
  "before", 4, "Chunks before the change.", 1, flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string(
  "out", "tools/results/eval_switch.json", "Report.", flag_values=_FLAGS
)


def changed_scene(scene: Scene, change: str, seed: int) -> Scene:
  """The scene's only shot with one thing changed, and its caption."""
  subject, (shot,) = scene.subject, scene.shots
  words = {
    "motion": toy_world.MOTION_WORDS,
    "background": toy_world.BACKGROUND_WORDS,
    "colour": toy_render.COLOURS,
  }[change]
  was = subject.colour if change == "colour" else getattr(shot, change)
  others = [name for name in words if name != was]
  other = others[np.random.default_rng((seed, 3)).integers(len(others))]
  if change == "colour":
    subject = dataclasses.replace(subject, colour=other)
  else:
    shot = dataclasses.replace(shot, **{change: other})
  caption = toy_world.describe(subject, shot.background, shot.motion)
  return Scene(subject, (dataclasses.replace(shot, caption=caption),))


def command_of(rule: str, caption: str) -> Prompt | Cut:
  """What a session is told; raises ValueError for an unknown rule."""
  return Cut(caption) if rule == CUT else Prompt(caption, recache.parse(rule))


def follow(
  engine: Engine, caption: str, changed: str, rules: Sequence[str], before: int,
  seed: int,
) -> Iterator[dict[int, Detection]]:
  """One video whose caption changes, under each rule in turn.

  Yields:
    What the chunks of LOOKED_AT show, by their number.
  """  # fmt: skip
  session = sessions.start(engine, caption, seed)
  for _ in range(before):
    session, _ = sessions.advance(engine, session)
  for rule in rules:
    told = sessions.branch(engine, session)
    told = sessions.apply(engine, told, command_of(rule, changed))
    found = {}
    for after in range(1, max(LOOKED_AT) + 1):
      told, chunk = sessions.advance(engine, told)
      if after in LOOKED_AT:
        found[after] = detectors.detect(chunk.frames)
    yield found


def score(scene: Scene, change: str, found: dict[int, Detection]) -> dict[str, float]:
  """Of one video with the changed scene: 1 for right, 0 for wrong."""
  (shot,) = scene.shots
  right = {n: detectors.matches(d, scene.subject, shot) for n, d in found.items()}
  last = max(found)
  others = [value for name, value in right[last].items() if name != change]
  return {
    **{f"follows after {n}": float(right[n][change]) for n in found},
    "keeps": float(all(others)),
    "identity": float(right[last]["shape"] and right[last]["colour"]),
    "sharp": 1 - found[last].drift,
  }


def table(results: dict[str, list[dict[str, float]]]) -> str:
  """Markdown: a row a rule, means over videos; sharp as a number, shares in percent."""
  names = list(next(iter(results.values()))[0])
  lines = ["| rule | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
  for rule, rows in results.items():
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    cells = [f"{m:.3f}" if n == "sharp" else f"{100 * m:.0f}%"
             for n, m in means.items()]  # fmt: skip
    lines.append(f"| {rule} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  config, began = _CONFIG.value, time.perf_counter()
  rules = _RULES.value
  for rule in rules:
    command_of(rule, "")  # a wrong one is known before any network is read
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  engine = load_engine(config, history_chunks=0)
  results: dict[str, list[dict[str, float]]] = {rule: [] for rule in rules}
  scenes = toy_world.heldout_prompts(_VIDEOS.value, _SEED.value)
  chosen = (_RULES, _CHANGE, _VIDEOS, _BEFORE, _SEED)
  for number, scene in enumerate(scenes):
    seed = _SEED.value * 1_000_000 + number
    changed = changed_scene(scene, _CHANGE.value, seed)
    captions = scene.shots[0].caption, changed.shots[0].caption
    each = follow(engine, *captions, rules, _BEFORE.value, seed)
    for rule, found in zip(rules, each, strict=True):
      row = score(changed, _CHANGE.value, found)
      results[rule].append(row)
      logging.info("video %d, %s: %s", number, rule, row)
    content: dict[str, Any] = {
      "results": results,
      "flags": {flag.name: flag.value for flag in chosen},
      "config": config.to_dict(),
      "seconds": time.perf_counter() - began,
      **report.environment(),
    }
    report.write_json(out, content)
  print(table(results))


if __name__ == "__main__":
  app.run(main)
