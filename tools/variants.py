"""What studies of variants share: which of them run, detectors beside, the table."""

import concurrent.futures
import fnmatch
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence


def choose(patterns: Sequence[str], names: Iterable[str], baseline: str) -> list[str]:
  """Names that fit a pattern, the baseline first; all are compared with it.

  Raises:
    ValueError: nothing fits.
  """
  names = list(names)
  fits = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
  if not fits:
    raise ValueError(f"only={list(patterns)} fits none of {', '.join(names)}")
  return [baseline, *(name for name in fits if name != baseline)]


def detecting_pool() -> concurrent.futures.Executor:
  """Processes, one a core, that look at videos while others are made."""
  # spawn: forking a process in which JAX runs threads can deadlock.
  spawn = multiprocessing.get_context("spawn")
  return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """Markdown, one row a variant: shares in percent, all else as it is."""
  names = list(next(iter(rows.values())))
  lines = ["| variant | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
  for variant, row in rows.items():
    cells = (_cell(name, value) for name, value in row.items())
    lines.append(f"| {variant} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _cell(name: str, value: float) -> str:
  plain = any(part in name for part in ("drift", "amount", "error"))
  return f"{value:.3f}" if plain else f"{100 * value:.1f}%"
