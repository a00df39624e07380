"""Draws the curves of training runs from metrics.jsonl into one PNG.

  python tools/plot_metrics.py outputs/train_toy/metrics.jsonl --out curves.png
  python tools/plot_metrics.py a/metrics.jsonl b/metrics.jsonl --keys loss mse_level3

One panel a metric, one line a file. Needs matplotlib (pip install matplotlib).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Curves of a metrics.jsonl by name: (steps, values); finite values only.

  Raises:
    ValueError: the file is missing or a line is no JSON object with a step.
  """
  try:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    steps = [line["step"] for line in lines]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"metrics={str(path)!r} cannot be read: {error}") from error
  curves = {}
  for name in sorted({name for line in lines for name in line} - {"step"}):
    pairs = [
      (step, line[name])
      for step, line in zip(steps, lines, strict=True)
      if isinstance(line.get(name), int | float) and np.isfinite(line[name])
    ]
    if pairs:
      curves[name] = tuple(np.array(column) for column in zip(*pairs, strict=True))
  return curves


def plot(
  runs: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
  out: Path,
  keys: list[str] | None = None,
) -> list[str]:
  """Draws the curves of runs (label -> curves); returns the metrics drawn.

  Raises:
    ValueError: a wanted metric is in none of the runs.
  """
  from matplotlib.figure import Figure  # optional dependency

  known = sorted({name for curves in runs.values() for name in curves})
  for key in keys or []:
    if key not in known:
      raise ValueError(f"metric {key!r} is in no file; choose from {', '.join(known)}")
  names = keys or known
  columns = min(3, len(names))
  rows = -(-len(names) // columns)
  figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  for panel, name in zip(panels, names, strict=False):
    for label, curves in runs.items():
      if name in curves:
        panel.plot(*curves[name], label=label, linewidth=1)
        if name == "loss" or name.startswith("mse"):
          panel.set_yscale("log")
    panel.set_title(name, fontsize=9)
    panel.grid(alpha=0.3)
  for panel in panels[len(names) :]:
    panel.axis("off")
  if len(runs) > 1:
    panels[0].legend(fontsize=7)
  figure.savefig(out, dpi=110)
  return names


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("files", nargs="+", type=Path, help="metrics.jsonl files")
  parser.add_argument("--out", type=Path, default=Path("metrics.png"))
  parser.add_argument("--keys", nargs="+", help="metrics to draw; default all")
  args = parser.parse_args(argv)
  try:
    runs = {str(path): read_metrics(path) for path in args.files}
    drawn = plot(runs, args.out, args.keys)
  except ImportError:
    sys.stderr.write("plot_metrics needs matplotlib: pip install matplotlib\n")
    return 1
  except ValueError as error:
    sys.stderr.write(f"{error}\n")
    return 1
  sys.stdout.write(f"wrote {args.out}: {', '.join(drawn)}\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
