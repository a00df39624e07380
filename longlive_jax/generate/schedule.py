"""Flow-matching times and solvers.

The forward process mixes a clean latent with noise,
`x = (1 - sigma) clean + sigma noise`. The network predicts `velocity = noise - clean`
and is told the timestep `t = 1000 sigma`.

Every solver here is one linear multistep method in x0-prediction. A step first turns
the velocity into `m0 = x - sigma velocity`, then optionally corrects the sample it
stands on, then moves to the next sigma. Both are weighted sums of at most five arrays,

    x  <- c0 x + c1 last + c2 m0 + c3 m1 + c4 m2      (corrector)
    x' <- p0 x + p1 m0 + p2 m1                        (predictor)

whose weights depend on the sigmas alone. So the weights are computed once on the host
in float64 (differences of log signal-to-noise ratios cancel badly in float32) and the
part that is compiled, `solver_step`, has no branch and no solver in it. Sources:
SPEC 1 and 5; UniPC (arXiv 2302.04867), DPM-Solver++ (arXiv 2211.01095).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SOLVERS = ("unipc", "dpm++", "euler")
NUM_TRAIN_TIMESTEPS = 1000

# The largest entry of UniPC's base grid: 1 - 1/1000 as float32 stores it.
_UNIPC_SIGMA_MAX = float(np.float32(0.999))


# ---------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------


def shift_sigma(sigma: np.ndarray, shift: float) -> np.ndarray:
  """Moves sigmas towards noise: shift * s / (1 + (shift - 1) * s)."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def flow_sigmas(steps: int, shift: float) -> np.ndarray:
  """`steps` float64 sigmas from 1 downwards, the final 0 left out."""
  if steps < 1:
    raise ValueError(f"steps={steps} must be at least 1; use for example 4")
  if not 0 < shift < np.inf:
    raise ValueError(f"shift={shift} must be positive; the usual value is 5.0")
  return shift_sigma(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)


def few_step_list(steps: int, shift: float) -> np.ndarray:
  """Integer timesteps (steps + 1,) used when only a step count is given; ends in 0."""
  timesteps = (NUM_TRAIN_TIMESTEPS * flow_sigmas(steps, shift)).astype(np.int64)
  return np.append(timesteps, 0)


def warp_timesteps(listed: Sequence[int], shift: float) -> np.ndarray:
  """Maps listed timesteps in [0, 1000] to the shifted grid, float32."""
  listed = np.asarray(listed)
  if listed.size and not (0 <= listed.min() and listed.max() <= NUM_TRAIN_TIMESTEPS):
    raise ValueError(f"timesteps {listed.tolist()} must lie in [0, 1000]")
  with_zero = np.append(training_grid(shift).timesteps, np.float32(0))
  return with_zero[NUM_TRAIN_TIMESTEPS - listed]


@dataclasses.dataclass(frozen=True)
class TrainingGrid:
  """The 1000 times that training draws from. Index 0 is the noisiest.

  Attributes:
    sigmas: (1000,) float32, descending.
    timesteps: (1000,) float32, 1000 * sigmas.
    weights: (1000,) float32 loss weights, a bell around t = 500, mean 1.
  """

  sigmas: np.ndarray
  timesteps: np.ndarray
  weights: np.ndarray


def training_grid(shift: float) -> TrainingGrid:
  """The training times for a shift (SPEC 1)."""
  sigmas = flow_sigmas(NUM_TRAIN_TIMESTEPS, shift).astype(np.float32)
  timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.float32)
  bell = np.exp(-2 * ((timesteps.astype(np.float64) - 500) / 1000) ** 2)
  bell -= bell.min()
  weights = bell * (NUM_TRAIN_TIMESTEPS / bell.sum())
  return TrainingGrid(sigmas, timesteps, weights.astype(np.float32))


def nearest_index(grid: TrainingGrid, timestep: jax.Array) -> jax.Array:
  """Index of the grid entry nearest to each timestep; ties go to the larger sigma."""
  distance = jnp.abs(jnp.asarray(grid.timesteps) - timestep[..., None])
  return jnp.argmin(distance, axis=-1)


def sigma_at(
  timestep: jax.Array, *, grid: TrainingGrid | None = None, reference: bool = False
) -> jax.Array:
  """The noise level that belongs to a timestep, float32.

  The exact answer is t / 1000, so that t = 0 is a clean latent. The reference looks up
  the nearest entry of its training grid instead, which has no 0: with shift 5 its
  t = 0 still carries sigma 0.00498. `reference=True` reproduces that and needs `grid`.
  """
  if not reference:
    return jnp.asarray(timestep, jnp.float32) / NUM_TRAIN_TIMESTEPS
  if grid is None:
    raise ValueError("reference=True needs grid; pass grid=training_grid(shift)")
  return jnp.asarray(grid.sigmas)[nearest_index(grid, jnp.asarray(timestep))]


def training_weight(grid: TrainingGrid, timestep: jax.Array) -> jax.Array:
  """Loss weight of each timestep, float32, by nearest grid entry."""
  return jnp.asarray(grid.weights)[nearest_index(grid, jnp.asarray(timestep))]


# ---------------------------------------------------------------------------
# Conversions between clean, noisy and velocity
# ---------------------------------------------------------------------------


def expand_like(values: jax.Array, x: jax.Array) -> jax.Array:
  """Appends unit axes so that per-sample or per-frame values broadcast against x."""
  return jnp.reshape(values, values.shape + (1,) * (x.ndim - values.ndim))


def add_noise(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """(1 - sigma) clean + sigma noise; sigma has the leading axes of clean."""
  sigma = expand_like(sigma, clean)
  return (1 - sigma) * clean + sigma * noise


def velocity_to_clean(
  noisy: jax.Array, velocity: jax.Array, sigma: jax.Array
) -> jax.Array:
  """x0 = x - sigma v."""
  return noisy - expand_like(sigma, noisy) * velocity


def clean_to_velocity(
  noisy: jax.Array, clean: jax.Array, sigma: jax.Array
) -> jax.Array:
  """v = (x - x0) / sigma; sigma must be positive."""
  return (noisy - clean) / expand_like(sigma, noisy)


# ---------------------------------------------------------------------------
# Solvers: weights on the host
# ---------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverRow:
  """What one solver step needs; stacked on a leading axis it is the xs of a scan.

  Attributes:
    sigma: () float32, noise level of the sample that the step starts from.
    corrector: (5,) float32 weights of [x, last, m0, m1, m2].
    predictor: (3,) float32 weights of [corrected x, m0, m1].
  """

  sigma: jax.Array
  corrector: jax.Array
  predictor: jax.Array


@dataclasses.dataclass(frozen=True)
class SolverTable:
  """A solver for a fixed list of sigmas.

  Attributes:
    timesteps: (k,) float64, what the network is told; whole numbers for UniPC and
      DPM-Solver++, as in the reference.
    sigmas: (k + 1,) float32, the last one 0.
    rows: SolverRow with a leading axis k.
  """

  timesteps: np.ndarray
  sigmas: np.ndarray
  rows: SolverRow

  @property
  def steps(self) -> int:
    return len(self.timesteps)


def solver_table(
  name: str, steps: int, shift: float, timesteps: Sequence[float] = ()
) -> SolverTable:
  """The standard times of a solver with `steps` steps, or given ones, and its weights.

  Raises:
    ValueError: unknown solver name, steps < 1 or shift <= 0; timesteps that are not as
      many as steps, or as for `solver_table_at`.
  """
  _check_solver(name)
  if timesteps:
    if len(timesteps) != steps:
      raise ValueError(
        f"timesteps={tuple(timesteps)} are {len(timesteps)}, steps={steps}; give as "
        "many, or none for the solver's own"
      )
    return solver_table_at(name, timesteps)
  sigmas = flow_sigmas(steps, shift)
  if name == "unipc":
    base = np.linspace(_UNIPC_SIGMA_MAX, 0.0, steps + 1)[:-1]
    sigmas = shift_sigma(base, shift)
  timesteps = NUM_TRAIN_TIMESTEPS * sigmas
  if name != "euler":
    timesteps = np.trunc(timesteps)
  return _table(name, timesteps, sigmas)


def solver_table_at(name: str, timesteps: Sequence[float]) -> SolverTable:
  """A solver for a few-step list; a final 0 in it is allowed and ignored.

  Raises:
    ValueError: unknown solver, or timesteps not strictly falling within (0, 1000].
  """
  _check_solver(name)
  timesteps = np.asarray(timesteps, np.float64)
  if timesteps.size > 1 and timesteps[-1] == 0:
    timesteps = timesteps[:-1]
  inside = timesteps.size and 0 < timesteps.min() <= timesteps.max() <= 1000
  if not inside or np.any(np.diff(timesteps) >= 0):
    raise ValueError(
      f"timesteps={timesteps.tolist()} must fall strictly within (0, 1000]; "
      "use for example 1000, 937.5, 833.3, 625"
    )
  return _table(name, timesteps, timesteps / NUM_TRAIN_TIMESTEPS)


def _check_solver(name: str) -> None:
  if name not in SOLVERS:
    raise ValueError(f"solver={name!r} is unknown; choose from {', '.join(SOLVERS)}")


def _table(name: str, timesteps: np.ndarray, sigmas: np.ndarray) -> SolverTable:
  # The weights must belong to the sigmas that the state is really at: the float32 ones.
  sigmas = np.append(sigmas, 0.0).astype(np.float32)
  steps = len(timesteps)
  s = sigmas.astype(np.float64)
  with np.errstate(divide="ignore"):
    snr = np.log1p(-s) - np.log(s)  # lambda: -inf at sigma 1, +inf at sigma 0
  # First and last step are first order: no history yet, and no error left to cancel
  # where x becomes m0.
  orders = [1 if name == "euler" or i in (0, steps - 1) else 2 for i in range(steps)]
  corrector = np.tile([1.0, 0, 0, 0, 0], (steps, 1))
  predictor = np.zeros((steps, 3))
  for i in range(steps):
    predictor[i] = _predictor(s, snr, i, orders[i])
    if name == "unipc" and i > 0:
      corrector[i] = _unipc_corrector(s, snr, i, orders[i - 1])
  rows = SolverRow(
    sigma=sigmas[:-1],
    corrector=corrector.astype(np.float32),
    predictor=predictor.astype(np.float32),
  )
  return SolverTable(timesteps=timesteps, sigmas=sigmas, rows=rows)


def _predictor(
  s: np.ndarray, snr: np.ndarray, i: int, order: int
) -> tuple[float, float, float]:
  """Weights of [x, m0, m1] that move from sigma i to i + 1.

  The exponential integrator of UniPC's and DPM-Solver++'s predictor; the two coincide
  at second order, and at first order this is the Euler step. With sigma 1 behind it
  the slope has infinite length, so its weight falls to 0 by itself.
  """
  h = snr[i + 1] - snr[i]
  gain = -(1 - s[i + 1]) * np.expm1(-h)
  slope = 0.0
  if order == 2:
    slope = 0.5 * gain * h / (snr[i] - snr[i - 1])  # of (m0 - m1)
  return s[i + 1] / s[i], gain + slope, -slope


def _unipc_corrector(
  s: np.ndarray, snr: np.ndarray, i: int, order: int
) -> tuple[float, float, float, float, float]:
  """Weights of [x, last, m0, m1, m2] that redo the step to sigma i, knowing m0."""
  h = snr[i] - snr[i - 1]
  gain = -(1 - s[i]) * np.expm1(-h)
  if order == 1:
    rho_old, rho_new, r = 0.0, 0.5, -1.0
  else:
    r = (snr[i - 2] - snr[i - 1]) / h
    phi2 = -np.expm1(-h) / h - 1
    phi3 = -phi2 / h - 0.5
    b1, b2 = phi2 / np.expm1(-h), 2 * phi3 / np.expm1(-h)
    rho_old = (b1 - b2) / (1 - r)  # solves [[1, 1], [r, 1]] rho = [b1, b2]
    rho_new = b1 - rho_old
  old, new = gain * rho_old / r, gain * rho_new
  return 0.0, s[i] / s[i - 1], new, gain - new - old, old


# ---------------------------------------------------------------------------
# Solvers: the compiled step
# ---------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
  """State between two steps; all arrays have the shape of the sample, float32.

  Attributes:
    x: the current sample, not yet corrected.
    last: the corrected sample that the last step started from.
    m1: the last clean prediction.
    m2: the clean prediction before that.
  """

  x: jax.Array
  last: jax.Array
  m1: jax.Array
  m2: jax.Array


def solver_init(noise: jax.Array) -> SolverState:
  """State before the first step. Rebuild it for every chunk: history is per chunk."""
  x = noise.astype(jnp.float32)
  # The first rows weigh the history with 0; zeros keep 0 * history from being NaN.
  return SolverState(x, jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x))


def solver_step(row: SolverRow, state: SolverState, velocity: jax.Array) -> SolverState:
  """One step of any solver, from `row.sigma` to the next sigma.

  Args:
    row: one row of `SolverTable.rows`.
    state: SolverState.
    velocity: network output at `state.x`, which is the uncorrected sample.
  """
  m0 = state.x - row.sigma * velocity.astype(jnp.float32)
  c, p = row.corrector, row.predictor
  corrected = (
    c[0] * state.x + c[1] * state.last + c[2] * m0 + c[3] * state.m1 + c[4] * state.m2
  )
  x = p[0] * corrected + p[1] * m0 + p[2] * state.m1
  return SolverState(x=x, last=corrected, m1=m0, m2=state.m1)
