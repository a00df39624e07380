"""Compares this project with recorded numbers of the reference, case by case.

  python tools/parity.py --cases ../shared/parity [--only dit_train]

Runs every case folder under DIR and prints one row a case: what was compared, the
largest absolute error, the largest error relative to the largest expected value of
its array, the tolerance, and the verdict. Exit status 1 if any case FAILs.

The verdict is on the reference's behaviour, which the library offers as options. Where
the library's own behaviour differs, a report at the end says so.
"""

import dataclasses
import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from parity_runners import RUNNERS
from parity_runners.common import Case, Result

_CASES = flags.DEFINE_string("cases", None, "Folder of case folders.")
_ONLY = flags.DEFINE_string("only", "", "Runs cases with this in their names.")

DIFFERENCES = """\
Where the library's defaults differ from the reference:
- The sigma of a timestep t is t / 1000, and 0 for a clean latent. The reference takes
  the nearest entry of its training grid, whose smallest is 0.00498 with shift 5.
  Option: schedule.sigma_at(reference=True).
- Pinned frames are never evicted and always attended. The reference loses them when
  capacity and sinks are no multiples of the chunk, or when its window is smaller than
  its cache. Option: Sampling.reference, CacheRules.reference.
- Every sample of a batch has its own cuts. The reference takes those of sample 0.
- An FP4 value that would round to 8 becomes 6. The reference stores code 8, which
  reads as zero. Errors of four over six do not over- or underflow.
  Option: nvfp4.quantise(reference=True).
- An NVFP4 cache has a tensor scale for every frame and keeps the keys' mean over tokens
  beside them. The reference has one scale a chunk, and subtracts the mean over channels
  from the new chunk's keys only. Options: Sampling.reference, kv_smoothing.
- Activations of W4A4 have a tensor scale for every video of a batch. The reference has
  one for all. Option: W4A4.per_sample.
- Distillation scores a noised chunk behind the video's own clean chunks, as the teacher
  was trained, each chunk at a noise level of its own. The reference puts noised chunks
  behind noised chunks, all at one level. Options: DistillSettings.teacher_forcing,
  timesteps.
- A chunk does not count in distillation if its first frame was encoded anew. The
  reference leaves out the first chunk of every rollout that is not the shortest."""


@dataclasses.dataclass(frozen=True)
class Error:
  """How far an array is from the expected one.

  Attributes:
    absolute: largest absolute error.
    relative: the same over the largest absolute expected value.
    tolerance: in words.
    passed: verdict.
  """

  absolute: float
  relative: float
  tolerance: str
  passed: bool


def compare(found: Any, expected: np.ndarray, tolerance: dict[str, float]) -> Error:
  """Compares two arrays under a tolerance as parity/README.md defines it."""
  found = np.asarray(found)
  text = " ".join(f"{name}={value:g}" for name, value in tolerance.items())
  if found.shape != expected.shape:
    text = f"shape {found.shape} instead of {expected.shape}"
    return Error(np.inf, np.inf, text, False)
  found, expected = found.astype(np.float64), expected.astype(np.float64)
  with np.errstate(invalid="ignore"):  # infinities
    difference = np.where(found == expected, 0.0, np.abs(found - expected))
    bound = tolerance.get("atol", 0.0) + tolerance.get("rtol", 0.0) * np.abs(expected)
  largest = np.max(np.abs(expected), initial=0.0)
  absolute = np.max(difference, initial=0.0)
  relative = absolute / largest if largest else absolute
  if "rel_to_max" in tolerance:
    passed = absolute <= tolerance["rel_to_max"] * largest
  else:
    broken = (difference != 0) & ~(difference <= bound)  # NaN is broken
    share = broken.sum() / max(broken.size, 1)
    passed = share <= tolerance.get("mismatch_fraction", 0.0)
  return Error(float(absolute), float(relative), text, bool(passed))


def tolerance_of(name: str, tolerances: dict[str, dict[str, float]]) -> dict:
  """The tolerance of an output: that of the longest key within its name."""
  keys = [key for key in tolerances if key in name and key != "default"]
  return tolerances[max(keys, key=len, default="default")]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What came of a case: errors by output, failed checks, what was left out."""

  errors: dict[str, Error]
  checks: dict[str, bool]
  missing: list[str]
  note: str = ""

  @property
  def passed(self) -> bool:
    whole = bool(self.errors or self.checks) and not self.missing
    good = all(error.passed for error in self.errors.values())
    return whole and good and all(self.checks.values())


def judge(case: Case, result: Result) -> Verdict:
  """Compares a result with the case's outputs."""
  tolerances = case.record.get("tolerances") or {}
  tolerances = {"default": {"rtol": 1e-4, "atol": 1e-5}, **tolerances}
  errors = {}
  for name, expected in case.outputs.items():
    if name in result.values:
      expected = result.expected.get(name, expected)
      tolerance = tolerance_of(name, tolerances)
      errors[name] = compare(result.values[name], expected, tolerance)
  missing = [n for n in case.outputs if n not in errors and n not in result.informative]
  return Verdict(errors, result.checks, missing, result.note)


def row(name: str, verdict: Verdict) -> str:
  """The table's line, and a line for everything that is wrong."""
  errors = verdict.errors
  parts = [f"{len(errors)} arrays"] if errors else []
  parts += [f"{len(verdict.checks)} checks"] if verdict.checks else []
  what = ", ".join(parts)
  worst = max((e.absolute for e in errors.values()), default=0.0)
  relative = max((e.relative for e in errors.values()), default=0.0)
  tolerance = "; ".join(sorted({e.tolerance for e in errors.values()})) or "exact"
  mark = "pass" if verdict.passed else "FAIL"
  lines = [f"{name:<57} {what:<20} {worst:9.2e} {relative:9.2e} {mark}  {tolerance}"]
  for output, error in errors.items():
    if not error.passed:
      numbers = f"abs {error.absolute:.2e}, rel {error.relative:.2e}"
      lines.append(f"    {output}: {numbers}, {error.tolerance}")
  lines += [f"    wrong: {check}" for check, good in verdict.checks.items() if not good]
  lines += [f"    {verdict.note}"] if verdict.note else []
  if verdict.missing:
    lines.append(f"    not computed: {verdict.missing}")
  return "\n".join(lines)


def find_cases(root: Path) -> list[Case]:
  """All case folders under a folder, sorted; those named _* are shared weights."""
  found = []
  for file in sorted(root.rglob("case.json")):
    parts = file.parent.relative_to(root).parts
    if not any(part.startswith("_") for part in parts):
      # A folder of the tree may be given alone: the kind is the parent's name.
      found.append(Case(file.parent, "/".join(file.parent.resolve().parts[-2:])))
  return found


def runner_of(name: str) -> tuple[Callable[[Case], Result] | None, bool]:
  for pattern, runner, has_options in RUNNERS:
    if fnmatch.fnmatchcase(name, pattern):
      return runner, has_options
  return None, False


def run(root: Path, only: str = "") -> int:
  """Prints the table and the report; returns how many cases failed."""
  cases = [case for case in find_cases(root) if only in case.name]
  if not cases:
    raise ValueError(f"cases={root} holds no case.json below it; check the path")
  print(f"{'case':<57} {'compared':<20} {'max abs':>9} {'max rel':>9}       tolerance")
  failed, passed, differing = 0, 0, []
  for case in cases:
    runner, has_options = runner_of(case.name)
    if runner is None:
      print(f"{case.name:<57} no runner")
      continue
    try:
      verdict = judge(case, runner(case))
    except Exception as error:
      failed += 1
      print(f"{case.name:<57} FAIL  {type(error).__name__}: {error}", flush=True)
      continue
    failed, passed = failed + (not verdict.passed), passed + verdict.passed
    print(row(case.name, verdict), flush=True)
    if has_options:
      differing += own_behaviour(case, runner)
  left = len(cases) - failed - passed
  print(f"\n{passed} pass, {failed} FAIL, {left} no runner\n\n{DIFFERENCES}")
  if differing:
    print("Seen in these cases, beyond their tolerance:")
    print("\n".join(differing))
  return failed


def own_behaviour(case: Case, runner: Callable[[Case], Result]) -> list[str]:
  """Where the library as it is by default leaves a case's tolerance, in words."""
  own = dataclasses.replace(case, reference=False)
  try:
    errors = judge(own, runner(own)).errors
  except Exception as error:  # a row of the report, not the end of the table
    return [f"  {case.name}: refused: {error}"]
  broken = {name: error for name, error in errors.items() if not error.passed}
  if not broken:
    return []
  by_sigma = [name for name in broken if name.endswith(("x0", "add_noise"))]
  parts = []
  for what, names in (
    ("by the sigma", by_sigma),
    ("by what is attended", [name for name in broken if name not in by_sigma]),
  ):
    if names:
      worst = max(broken[name].absolute for name in names)
      parts.append(f"{len(names)} arrays {what}, up to {worst:.2e}")
  return [f"  {case.name}: {'; '.join(parts)}"]


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # JAX lists the devices it lacks
  # A GPU multiplies float32 in TF32 unless told otherwise.
  jax.config.update("jax_default_matmul_precision", "highest")
  sys.exit(1 if run(Path(_CASES.value), _ONLY.value) else 0)


if __name__ == "__main__":
  flags.mark_flags_as_required(["cases"])
  app.run(main)
