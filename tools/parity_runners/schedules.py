"""schedule/*: the training grid, step lists and solvers."""

import re

import jax
import numpy as np

from longlive_jax.generate import schedule
from parity_runners.common import Case, Result

SOLVERS = {"unipc": "unipc", "dpmpp": "dpm++", "euler": "euler"}


def flow_match(case: Case) -> Result:
  clean, noise = case.inputs["clean"], case.inputs["noise"]
  query = case.inputs["timesteps_query"]
  values = {}
  for shift in case.record["shifts"]:
    grid = schedule.training_grid(shift)
    sigma = schedule.sigma_at(query, grid=grid, reference=case.reference)
    own = {
      "sigmas": grid.sigmas,
      "timesteps": grid.timesteps,
      "weights": grid.weights,
      "add_noise": schedule.add_noise(clean, noise, sigma),
      "training_weight": schedule.training_weight(grid, query),
    }
    prefix = f"shift{shift:g}."
    for name in case.outputs:
      if name.startswith(prefix) and (match := re.search(r"\.sigmas(\d+)$", name)):
        steps = int(match[1])
        own[f"sigmas{steps}"] = schedule.flow_sigmas(steps, shift)
        own["euler_step"] = _euler_steps(steps, shift, clean[0], noise[0])
    values |= {prefix + name: value for name, value in own.items()}
  return Result(values)


def _euler_steps(steps: int, shift: float, x, velocity) -> np.ndarray:
  """Single steps from the first, the middle and the last entry of a grid."""
  rows = schedule.solver_table("euler", steps, shift).rows
  out = []
  for i in (0, steps // 2, steps - 1):
    row = jax.tree.map(lambda a, i=i: a[i], rows)
    out.append(schedule.solver_step(row, schedule.solver_init(x), velocity).x)
  return np.stack(out)


def solvers(case: Case) -> Result:
  start, a = case.inputs["x_init"], case.inputs["a"]
  values = {}
  for name in case.outputs:
    if not name.endswith(".traj"):
      continue
    prefix = name.removesuffix("traj")
    steps = int(re.search(r"steps(\d+)", name)[1])
    shift = re.search(r"shift([\d.]+)\.", name)
    table = schedule.solver_table(
      SOLVERS[name.split(".")[0]], steps, float(shift[1]) if shift else 5.0
    )
    state = schedule.solver_init(start)
    trajectory = []
    for i, t in enumerate(np.float32(table.timesteps)):
      x = state.x
      velocity = 0.7 * np.sin(1.3 * x) + t / 1000 * a - 0.2 * x * np.cos(3 * t / 1000)
      row = jax.tree.map(lambda rows, i=i: rows[i], table.rows)
      state = schedule.solver_step(row, state, velocity)
      trajectory.append(state.x)
    values |= {
      prefix + "timesteps": table.timesteps,
      prefix + "sigmas": table.sigmas,
      prefix + "traj": np.stack(trajectory),
    }
  return Result(values)


def step_lists(case: Case) -> Result:
  shift = case.setting("shift", 5.0)
  values = {}
  for i, listed in enumerate(case.record["lists"]):
    values[f"warped{i}"] = schedule.warp_timesteps(listed, shift)
  for name in case.outputs:
    if match := re.fullmatch(r"default_steps(\d+)_shift([\d.]+)", name):
      values[name] = schedule.few_step_list(int(match[1]), float(match[2]))
  return Result(values)
