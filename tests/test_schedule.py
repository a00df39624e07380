"""Times and solvers against the reference's numbers and against what must hold."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.generate import sampler, schedule

GOLDEN = Path(__file__).parent / "golden" / "schedule"


def rollout(table, x, velocity):
  """Trajectory (steps, ...) of a solver driven by velocity(x, timestep)."""

  def body(state, xs):
    row, timestep = xs
    state = schedule.solver_step(row, state, velocity(state.x, timestep))
    return state, state.x

  xs = (table.rows, table.timesteps.astype(np.float32))
  return jax.jit(lambda x: jax.lax.scan(body, schedule.solver_init(x), xs)[1])(x)


def solver_cases():
  names = [k[:-5] for k in np.load(GOLDEN / "solvers.npz") if k.endswith(".traj")]
  assert len(names) == 15
  return sorted(names)


@pytest.mark.parametrize("case", solver_cases())
def test_solver_follows_the_reference(case):
  golden = np.load(GOLDEN / "solvers.npz")
  solver, steps, *shift = case.split(".")
  table = schedule.solver_table(
    {"unipc": "unipc", "dpmpp": "dpm++"}[solver],
    int(steps.removeprefix("steps")),
    float(shift[0].removeprefix("shift")) if shift else 5.0,
  )
  np.testing.assert_array_equal(table.timesteps, golden[f"{case}.timesteps"])
  np.testing.assert_array_equal(table.sigmas, golden[f"{case}.sigmas"])
  a = golden["a"]

  def velocity(x, t):
    return 0.7 * jnp.sin(1.3 * x) + t / 1000 * a - 0.2 * x * jnp.cos(3 * t / 1000)

  trajectory = rollout(table, golden["x_init"], velocity)
  np.testing.assert_allclose(trajectory, golden[f"{case}.traj"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [5.0, 1.0])
def test_training_grid_follows_the_reference(shift):
  golden = np.load(GOLDEN / "flow_match.npz")
  case = f"shift{int(shift)}"
  grid = schedule.training_grid(shift)
  for name in ("sigmas", "timesteps", "weights"):
    every = getattr(grid, name)[::37]
    np.testing.assert_allclose(every, golden[f"{case}.{name}"], rtol=1e-6, atol=1e-6)
  t = golden["timesteps_query"]
  sigma = schedule.sigma_at(t, grid=grid, reference=True)
  noisy = schedule.add_noise(golden["clean"], golden["noise"], sigma)
  np.testing.assert_allclose(noisy, golden[f"{case}.add_noise"], rtol=1e-5, atol=1e-6)
  weight = schedule.training_weight(grid, t)
  np.testing.assert_allclose(weight, golden[f"{case}.training_weight"], atol=1e-6)


@pytest.mark.parametrize("shift", [5.0, 1.0])
def test_euler_follows_the_reference(shift):
  golden = np.load(GOLDEN / "flow_match.npz")
  table = schedule.solver_table("euler", 7, shift)
  sigmas = golden[f"shift{int(shift)}.sigmas7"]
  np.testing.assert_allclose(table.sigmas[:-1], sigmas, rtol=1e-6)
  for i, expected in zip(
    (0, 3, 6), golden[f"shift{int(shift)}.euler_step"], strict=True
  ):
    row = jax.tree.map(lambda a, i=i: a[i], table.rows)
    state = schedule.solver_init(jnp.asarray(golden["clean"][0]))
    x = schedule.solver_step(row, state, golden["noise"][0]).x
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_lists_follow_the_reference():
  golden = np.load(GOLDEN / "lists.npz")
  lists = [[1000, 750, 500, 250], [1000, 946, 854, 681, 0], [999, 500, 1]]
  for i, listed in enumerate(lists):
    warped = schedule.warp_timesteps(listed, 5.0)
    np.testing.assert_allclose(warped, golden[f"warped{i}"], rtol=1e-6)
  for steps, shift in ((4, 5), (2, 5), (8, 3)):
    expected = golden[f"default_steps{steps}_shift{shift}"]
    np.testing.assert_array_equal(schedule.few_step_list(steps, shift), expected)


def test_timestep_zero_is_clean_unless_the_reference_is_asked_for():
  assert schedule.sigma_at(jnp.zeros(3)).max() == 0
  grid = schedule.training_grid(5.0)
  sigma = schedule.sigma_at(jnp.zeros(()), grid=grid, reference=True)
  np.testing.assert_allclose(sigma, 0.00498, atol=1e-5)
  with pytest.raises(ValueError, match="grid=training_grid"):
    schedule.sigma_at(jnp.zeros(()), reference=True)


def test_conversions_are_inverse():
  clean, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  sigma = np.array([0.1, 0.5, 1.0], np.float32)
  noisy = schedule.add_noise(clean, noise, sigma)
  velocity = schedule.clean_to_velocity(noisy, clean, sigma)
  np.testing.assert_allclose(velocity, noise - clean, atol=1e-5)
  back = schedule.velocity_to_clean(noisy, velocity, sigma)
  np.testing.assert_allclose(back, clean, atol=1e-6)


@pytest.mark.parametrize("solver", schedule.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_perfect_prediction_ends_at_the_clean_sample(solver, steps):
  """Where the network always names the same clean sample, every solver lands on it."""
  clean = np.float32([1.5, -2.0])
  table = schedule.solver_table(solver, steps, 5.0)
  noise = np.float32([0.3, 0.7])
  state = schedule.solver_init(jnp.asarray(noise))
  for i in range(steps):
    row = jax.tree.map(lambda a, i=i: a[i], table.rows)
    state = schedule.solver_step(row, state, (state.x - clean) / row.sigma)
  np.testing.assert_allclose(state.x, clean, rtol=1e-6)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_second_order_solvers_beat_euler(solver):
  x = np.float32([0.5, -1.0, 2.0])

  def velocity(x, t):
    return jnp.sin(x) + t / 1000

  def last(name, steps):
    timesteps = 1000 * schedule.flow_sigmas(steps, 3.0)
    return rollout(schedule.solver_table_at(name, timesteps), x, velocity)[-1]

  truth = last("unipc", 400)
  errors = {n: np.abs(last(n, 32) - truth).max() for n in (solver, "euler")}
  assert errors[solver] < 0.2 * errors["euler"]


def test_few_step_list_makes_a_table():
  listed = schedule.warp_timesteps([1000, 750, 500, 250, 0], 5.0)
  table = schedule.solver_table_at("dpm++", listed)
  standard = schedule.solver_table("dpm++", 4, 5.0)
  np.testing.assert_allclose(table.rows.predictor, standard.rows.predictor, atol=1e-5)
  for solver in schedule.SOLVERS:  # sigma 1 has an infinite log signal-to-noise ratio
    rows = schedule.solver_table_at(solver, listed).rows
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rows))
  times = tuple(listed[:-1].tolist())
  chosen = sampler.Sampling(steps=4, solver="dpm++", timesteps=times).solver_table()
  jax.tree.map(np.testing.assert_array_equal, chosen.rows, table.rows)


def test_one_program_serves_all_solvers():
  traces = []

  @jax.jit
  def step(row, state):
    traces.append(1)
    return schedule.solver_step(row, state, state.x)

  for solver in schedule.SOLVERS:
    row = jax.tree.map(lambda a: a[1], schedule.solver_table(solver, 4, 5.0).rows)
    step(row, schedule.solver_init(jnp.ones(3)))
  assert len(traces) == 1


def test_bad_values_are_refused():
  with pytest.raises(ValueError, match=r"solver='heun'.*unipc, dpm\+\+, euler"):
    schedule.solver_table("heun", 4, 5.0)
  with pytest.raises(ValueError, match="steps=0"):
    schedule.solver_table("unipc", 0, 5.0)
  with pytest.raises(ValueError, match="shift=0"):
    schedule.solver_table("euler", 4, 0)
  with pytest.raises(ValueError, match="strictly"):
    schedule.solver_table_at("euler", [500, 500])
  with pytest.raises(ValueError, match="strictly"):
    schedule.solver_table_at("unipc", [])
  with pytest.raises(ValueError, match="1000"):
    schedule.warp_timesteps([1001], 5.0)
