"""Logistic regression with standard errors that hold when the model is wrong: plain NumPy, float64."""

import dataclasses

import numpy as np
import numpy.typing as npt

from align_jax.evals import statistics
from align_jax.evals.statistics import Estimate

_STEPS = 100
_NO_MAXIMUM = (
  "logistic regression has no single maximum: classes are separated, or columns depend on each other; "
  "set l2."
)


@dataclasses.dataclass(frozen=True)
class Fit:
  """Coefficients [k] of P(y = 1) = σ(x · w), and their covariance [k, k]."""

  coefficients: np.ndarray
  covariance: np.ndarray
  n: int

  def estimate(self, index: int, *, confidence: float = 0.95) -> Estimate:
    """Coefficient `index` with its Wald interval."""
    value, error = self.coefficients[index], float(np.sqrt(self.covariance[index, index]))
    return statistics.wald(float(value), error, self.n, confidence=confidence)

  def predict(self, x: npt.ArrayLike) -> np.ndarray:
    """P(y = 1) of rows x [n, k]."""
    return sigmoid(np.asarray(x, np.float64) @ self.coefficients)


def sigmoid(x: npt.ArrayLike) -> np.ndarray:
  """1 / (1 + e^-x) without overflow."""
  return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def fit(
  x: npt.ArrayLike, y: npt.ArrayLike, *, l2: float = 0.0, clusters: npt.ArrayLike | None = None
) -> Fit:
  """Maximises Σ y log σ(x·w) + (1 - y) log σ(-x·w) - l2/2 |w|² by damped Newton steps.

  The covariance is the sandwich H⁻¹ (Σ_c s_c s_cᵀ) H⁻¹ of scores s summed within clusters, so that it
  holds for soft labels and for pairs that share a prompt (White 1982,
  https://doi.org/10.2307/1912526). It is too small where classes are all but separated; so with labels of
  0 and 1 a variance is at least that of the information, H⁻¹. There is no intercept: give a column of
  ones for one.

  x [n, k]; y [n] within [0, 1]; clusters [n] labels, None: every row is its own. ValueError on other
  shapes or ranges, and where the likelihood has no maximum (separated classes without l2).
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
    raise ValueError(f"x must be [n, k] and y [n] with n > 0, not {x.shape} and {y.shape}.")
  if not np.isfinite(x).all() or not ((y >= 0) & (y <= 1)).all():
    raise ValueError("x must be finite and y lie within [0, 1].")
  w = np.zeros(x.shape[1])
  for _ in range(_STEPS):
    gradient, hessian = _derivatives(x, y, w, l2)
    step = _solve(hessian, gradient)
    w, done = _damped(x, y, w, step, l2)
    if done:
      break
  else:
    raise ValueError(_NO_MAXIMUM)
  return Fit(w, _sandwich(x, y, w, l2, clusters), len(y))


def _derivatives(x, y, w, l2: float):
  p = sigmoid(x @ w)
  hessian = (x * (p * (1 - p))[:, None]).T @ x + l2 * np.eye(x.shape[1])
  return x.T @ (y - p) - l2 * w, hessian


def _objective(x, y, w, l2: float) -> float:
  z = x @ w
  return float(-(np.logaddexp(0, -z) * y + np.logaddexp(0, z) * (1 - y)).sum() - l2 / 2 * w @ w)


def _damped(x, y, w, step, l2: float):
  """(the next point, whether it is the maximum): half the step until it does not lead down."""
  before = _objective(x, y, w, l2)
  for _ in range(40):
    if _objective(x, y, w + step, l2) >= before - 1e-12 * abs(before):
      break
    step = step / 2
  return w + step, bool(np.abs(step).max() < 1e-9 * (1 + np.abs(w).max()))


def _solve(hessian, right):
  try:
    return np.linalg.solve(hessian, right)
  except np.linalg.LinAlgError as error:
    raise ValueError(_NO_MAXIMUM) from error


def _sandwich(x, y, w, l2: float, clusters):
  scores = x * (y - sigmoid(x @ w))[:, None]
  if clusters is not None:
    _, group = np.unique(np.asarray(clusters), return_inverse=True)
    summed = np.zeros((group.max() + 1, x.shape[1]))
    np.add.at(summed, group, scores)
    scores = summed
  bread = np.linalg.inv(_derivatives(x, y, w, l2)[1])
  found = bread @ (scores.T @ scores) @ bread
  if np.isin(y, (0, 1)).all():
    raised = np.sqrt(np.maximum(1, np.diag(bread) / np.diag(found)))
    found = found * np.outer(raised, raised)
  return found
