"""A stream on disk: saved between chunks, resumed, rewound to, branched from.

  DIR/chunk_00004                the StreamState after 4 chunks, and a JSON record
  DIR/chunk_00004_frames_0.npy   frames that a full disk kept out of video 0

A checkpoint gets its name when it is whole, so that a failed save costs only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.checkpoint import store
from longlive_jax.generate.stream import StreamState


def save(
  folder: str | Path,
  chunk: int,
  state: StreamState,
  about: dict[str, Any],
  unwritten: Sequence[np.ndarray] = (),
) -> Path:
  """Saves the state after `chunk` chunks; an older save of it is replaced.

  Args:
    folder: of the snapshots.
    chunk: chunks done.
    state: only read.
    about: JSON record for whoever resumes.
    unwritten: per video, uint8 frames (t, h, w, 3) that belong in front of what a
      resumed run generates.

  Raises:
    OSError or ValueError: the disk refuses; earlier snapshots stay usable.
  """
  path = Path(folder) / f"chunk_{chunk:05d}"
  for old in _frame_files(path):
    old.unlink()
  for i, frames in enumerate(unwritten):
    np.save(path.with_name(f"{path.name}_frames_{i}.npy"), frames)
  store.save(path, state, about, overwrite=True)
  return path


def chunks(folder: str | Path) -> list[int]:
  """After how many chunks states were saved in a folder, ascending."""
  names = Path(folder).glob("chunk_" + "[0-9]" * 5)
  return sorted(int(path.name.removeprefix("chunk_")) for path in names)


def find(folder: str | Path, chunk: int | None = None) -> Path:
  """The snapshot after `chunk` chunks, or the latest.

  Raises:
    ValueError: there is none; lists those that exist.
  """
  saved = chunks(folder)
  if not saved:
    raise ValueError(
      f"resume={folder} holds no saved state; make one with --save_state"
    )
  if chunk is None:
    chunk = saved[-1]
  if chunk not in saved:
    raise ValueError(
      f"rewind_to={chunk} is not among the saved chunks {saved} of {folder}; use one "
      "of them, or save more often with --save_every"
    )
  return Path(folder) / f"chunk_{chunk:05d}"


def unwritten(path: Path) -> list[np.ndarray]:
  """Frames of each video that its MP4 lacks; empty when nothing is missing."""
  return [np.load(file) for file in _frame_files(path)]


def _frame_files(path: Path) -> list[Path]:
  files = path.parent.glob(f"{path.name}_frames_*.npy")
  return sorted(files, key=lambda file: int(file.stem.rsplit("_", 1)[1]))
