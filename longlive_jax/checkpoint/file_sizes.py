"""The sizes of a checkpoint's files, written beside them.

A copy that was cut short is noticed by them at once, not when its last array is read.
"""

import json
from pathlib import Path

_LIST = "sizes.json"  # name -> bytes


def write(folder: Path) -> None:
  """Lists the files of a finished checkpoint."""
  beside = folder / f".{_LIST}"
  beside.write_text(json.dumps(_found(folder), indent=1) + "\n")
  beside.rename(folder / _LIST)  # half a list would condemn a whole checkpoint


def check(folder: Path) -> None:
  """Raises ValueError for files that are missing or of another size than listed."""
  if not (folder / _LIST).exists():  # saved by plain Orbax
    return
  have = _found(folder)
  try:
    wanted = json.loads((folder / _LIST).read_text())
    wrong = [
      f"{name} has {have.get(name, 0)} bytes instead of {size}"
      for name, size in wanted.items()
      if have.get(name, 0) != size
    ]
  except (ValueError, AttributeError):
    wrong = [f"{_LIST} cannot be read"]
  if wrong:
    raise ValueError(
      f"checkpoint {folder} is damaged: {'; '.join(wrong[:5])}; copy or convert it "
      "again"
    )


def _found(folder: Path) -> dict[str, int]:
  files = (file for file in folder.rglob("*") if file.is_file())
  return {
    file.relative_to(folder).as_posix(): file.stat().st_size
    for file in files
    if not file.name.endswith(_LIST)
  }
