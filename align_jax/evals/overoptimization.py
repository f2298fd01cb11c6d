"""Over-optimisation: the laws of gold reward against distance, fitted, extrapolated and compared.

With d = √KL(π ‖ π_init) and a gold reward that is 0 at d = 0, Gao et al. 2022
(https://arxiv.org/abs/2210.10760) found

  best of n:  R(d) = d (α − β d)        with its peak at d* = α/2β,           R* = α²/4β
  RL:         R(d) = d (α − β log d)    with its peak at d* = exp(α/β − 1),   R* = β exp(α/β − 1)

Both are linear in (α, β), so that a fit is weighted least squares. The paper gives no tables: α and β
are compared with nothing here but themselves.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy import special

from align_jax.evals import best_of_n
from align_jax.evals.statistics import Estimate

FORMS = ("bon", "rl")
RL_FIRST_DISTANCE = 1.0  # √nats


@dataclasses.dataclass(frozen=True)
class Fit:
  """A law fitted to points; a peak is NaN where the fitted curve has none."""

  form: str
  points: int
  alpha: Estimate
  beta: Estimate
  peak_distance: Estimate  # √nats
  peak_gain: Estimate
  r_squared: float | None  # weighted; None where the gains do not vary
  chi_squared: float  # Σ ((R − R̂) / SE)²
  aic: float


@dataclasses.dataclass(frozen=True)
class Extrapolation:
  """Both laws fitted to the nearer points and asked for the farther ones."""

  form: str  # the law that ought to hold
  fitted_to: float  # the largest distance that was fitted
  fitted: int
  held_out: int
  rmse: float  # of the held-out gains
  bias: float  # mean of predicted − measured
  aic: float
  other_rmse: float  # of the other law
  other_aic: float

  @property
  def prefers_its_form(self) -> bool:
    """Whether the law that ought to hold predicts the held-out points better."""
    return self.aic < self.other_aic


def predict(form: str, alpha: float, beta: float, distances: npt.ArrayLike) -> np.ndarray:
  """R(d) of a law; its limit 0 at d = 0. distances in √nats, any shape."""
  return _design(form, distances) @ np.array([alpha, beta])


def peak(form: str, alpha: float, beta: float) -> tuple[float, float]:
  """(d*, R*) of a law's interior maximum; (nan, nan) where it has none.

  bon has one for α > 0 and β > 0, rl for β > 0. One that is farther away than a float can say is none.
  """
  _check_form(form)
  if not beta > 0 or (form == "bon" and not alpha > 0):
    return math.nan, math.nan
  if form == "bon":
    return alpha / (2 * beta), alpha**2 / (4 * beta)
  if alpha / beta > 700:
    return math.nan, math.nan
  place = math.exp(alpha / beta - 1)
  return place, beta * place


def fit(
  form: str,
  distances: npt.ArrayLike,
  gains: npt.ArrayLike,
  stderrs: npt.ArrayLike,
  *,
  first_distance: float = RL_FIRST_DISTANCE,
  confidence: float = 0.95,
) -> Fit:
  """Weighted least squares of R on [d, −d²] (bon) or [d, −d log d] (rl), weights 1/SE².

  cov(α, β) = (XᵀWX)⁻¹ · max(1, χ²/(n − 2)): what the errors of the points say, or what their scatter
  about the curve says where that is more. Intervals are Student's t with n − 2 degrees; those of the
  peak are by the delta method. AIC = χ² + 2·2 for Gaussian errors of known size, so that it compares
  laws on the same points only. Where one pool of samples gave all points they move together: χ² and AIC
  are then too sure of themselves, and `fit_prompts` has the intervals.

  Args:
    form: "bon" or "rl".
    distances: [n] √KL, √nats, positive.
    gains: [n] gold reward over that of the initial policy.
    stderrs: [n] of the gains, positive.
    first_distance: an rl fit refuses points below it: d log d has an infinite slope at 0, so that the
      nearest points, where every policy is alike, would decide α and β; Gao et al. leave them out too.
    confidence: of all intervals.

  Raises:
    ValueError: for an unknown form, fewer than 3 points, values that are not finite or not positive
      where they must be, or an rl point below first_distance.
  """
  x, y, se = _points(form, distances, gains, stderrs)
  if form == "rl" and x.min() < first_distance:
    raise ValueError(
      f"the rl law is not fitted below d = {first_distance:g} (there are {(x < first_distance).sum()} "
      "such points): d log d has an infinite slope at 0."
    )
  design, weights = _design(form, x), 1 / se**2
  normal = np.linalg.inv(design.T @ (weights[:, None] * design))
  alpha, beta = coefficients = normal @ design.T @ (weights * y)
  residuals = y - design @ coefficients
  chi_squared = float(np.sum(weights * residuals**2))
  covariance = normal * max(1.0, chi_squared / (len(x) - 2))
  quantile = special.stdtrit(len(x) - 2, (1 + confidence) / 2)
  total = np.sum(weights * (y - np.average(y, weights=weights)) ** 2)

  def estimate(value: float, gradient: npt.ArrayLike) -> Estimate:
    error = float(np.sqrt(np.asarray(gradient) @ covariance @ np.asarray(gradient)))
    return Estimate(float(value), error, value - quantile * error, value + quantile * error, len(x))

  place, height = peak(form, alpha, beta)
  at, of = _peak_gradients(form, alpha, beta)
  return Fit(
    form=form,
    points=len(x),
    alpha=estimate(alpha, (1, 0)),
    beta=estimate(beta, (0, 1)),
    peak_distance=estimate(place, at),
    peak_gain=estimate(height, of),
    r_squared=float(1 - chi_squared / total) if total > 0 else None,
    chi_squared=chi_squared,
    aic=chi_squared + 4,
  )


def fit_prompts(
  form: str,
  distances: npt.ArrayLike,
  gains: npt.ArrayLike,
  *,
  seed: int,
  resamples: int = 2000,
  first_distance: float = RL_FIRST_DISTANCE,
  confidence: float = 0.95,
) -> Fit:
  """`fit` to the means over prompts, with percentile intervals from resampling whole prompts.

  A prompt keeps its place on all points, so that their correlation is in the intervals. Where a part of
  the resamples larger than 1 − confidence has no peak, its upper bounds are unknown (NaN).

  Args:
    form: as in `fit`, as first_distance and confidence.
    distances: [n].
    gains: [P, n], prompt by prompt.
    seed: of the resampling.
    resamples: how many.

  Raises:
    ValueError: as `fit`, or for fewer than 2 prompts.
  """
  gains = np.asarray(gains, np.float64)
  if gains.ndim != 2 or len(gains) < 2:
    raise ValueError(f"gains must be [P, n] of two prompts or more, not of shape {gains.shape}.")
  stderrs = gains.std(axis=0, ddof=1) / math.sqrt(len(gains))
  found = fit(form, distances, gains.mean(axis=0), stderrs, first_distance=first_distance)
  design, weights = _design(form, distances), 1 / stderrs**2
  solve = np.linalg.solve(design.T @ (weights[:, None] * design), design.T * weights)
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=resamples)
  drawn = counts @ gains / len(gains) @ solve.T
  peaks = np.array([peak(form, alpha, beta) for alpha, beta in drawn])

  def bounds(estimate: Estimate, draws: np.ndarray) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.nan_to_num(draws, nan=np.inf), [tail, 1 - tail], method="nearest")
    finite = draws[np.isfinite(draws)]
    error = finite.std(ddof=1) if len(finite) > 1 else math.nan
    return dataclasses.replace(
      estimate, stderr=float(error), low=_known(low), high=_known(high), n=len(gains)
    )

  return dataclasses.replace(
    found,
    alpha=bounds(found.alpha, drawn[:, 0]),
    beta=bounds(found.beta, drawn[:, 1]),
    peak_distance=bounds(found.peak_distance, peaks[:, 0]),
    peak_gain=bounds(found.peak_gain, peaks[:, 1]),
  )


def extrapolate(
  form: str,
  distances: npt.ArrayLike,
  gains: npt.ArrayLike,
  stderrs: npt.ArrayLike,
  *,
  limit: float,
  first_distance: float = RL_FIRST_DISTANCE,
) -> Extrapolation:
  """Fits both laws to the points with first_distance ≤ d ≤ limit and predicts those beyond.

  AIC = Σ ((R − R̂)/SE)² + 2·2 of the held-out points. Both laws see the same points, without the nearest
  ones, for which the rl law has no good form (see `fit`).

  Raises:
    ValueError: as `fit`, or where no point is beyond `limit`.

  References:
    Gao et al. 2022 fitted n ≤ 1,000 and predicted up to n = 60,000.
  """
  x, y, se = _points(form, distances, gains, stderrs)
  near, far = (x >= first_distance) & (x <= limit), x > limit
  if not far.any():
    raise ValueError(f"no point is beyond d = {limit:g}: there is nothing to extrapolate to.")
  errors = {}
  for name in FORMS:
    found = fit(name, x[near], y[near], se[near], first_distance=first_distance)
    errors[name] = predict(name, found.alpha.value, found.beta.value, x[far]) - y[far]
  rmse = {name: float(np.sqrt(np.mean(e**2))) for name, e in errors.items()}
  aic = {name: float(np.sum((e / se[far]) ** 2)) + 4 for name, e in errors.items()}
  other = FORMS[1 - FORMS.index(form)]
  return Extrapolation(
    form=form,
    fitted_to=float(x[near].max()),
    fitted=int(near.sum()),
    held_out=int(far.sum()),
    rmse=rmse[form],
    bias=float(errors[form].mean()),
    aic=aic[form],
    other_rmse=rmse[other],
    other_aic=aic[other],
  )


def tied_kl(proxy: npt.ArrayLike, n: int) -> np.ndarray:
  """KL from the policy to best-of-n of it where responses tie, nats a response.

  log n − (n−1)/n is exact without ties and an upper bound with them: a policy that says one thing half
  of the time cannot be moved far by choosing. A response of share p whose score has F of the mass at or
  below it is the best of n with probability w = Fⁿ − (F − p)ⁿ, and KL = Σ w log(w/p). With p and F of N
  samples both sums are short near n = N, so that the bound is scaled by their ratio:
  KL = (log n − (n−1)/n) · Σ w log(w/p) with ties / Σ w log(w/p) without.

  Args:
    proxy: [P, N] scores, equal exactly where the responses are.
    n: 1 to N.

  Returns:
    [P] float64, from 0 to the bound.

  References:
    The bound: Beirami et al. 2024, https://arxiv.org/abs/2401.01879. The correction is ours.
  """
  proxy = np.asarray(proxy, np.float64)
  if proxy.ndim != 2 or not 1 <= n <= proxy.shape[1] or not np.isfinite(proxy).all():
    raise ValueError(f"proxy must be finite [P, N] and n in [1, N], got {proxy.shape} and n = {n}.")
  if n == 1:
    return np.zeros(len(proxy))
  scale = best_of_n.best_of_n_kl(n) / _kl_of_shares(np.ones(proxy.shape[1], int), n)
  return scale * np.array(
    [_kl_of_shares(np.unique(row, return_counts=True)[1], n) for row in proxy]
  )


def standardise_members(
  members: npt.ArrayLike, reference: npt.ArrayLike | None = None
) -> np.ndarray:
  """Every member with mean 0 and deviation 1 (ddof 0) over `reference`, or over its own scores.

  members [K, ...]; reference [K, ...] scores of the same members on samples of the initial policy. The
  offset and scale of a reward model are arbitrary; min and variance over members are not.
  """
  members = np.asarray(members, np.float64)
  of = members if reference is None else np.asarray(reference, np.float64)
  axes = tuple(range(1, of.ndim))
  mean, std = of.mean(axis=axes), of.std(axis=axes)
  if not (std > 0).all():
    raise ValueError("a member that scores everything alike cannot be standardised.")
  shape = (-1, *(1,) * (members.ndim - 1))
  return (members - mean.reshape(shape)) / std.reshape(shape)


def error_correlations(members: npt.ArrayLike, gold: npt.ArrayLike) -> np.ndarray:
  """[K, K], how alike the errors of reward models are: Pearson's r of what is left of each beside gold.

  Scores are centred within their prompt, which best-of-n never compares with another, and the part that
  is linear in gold is taken off. Members whose errors agree cannot see each other's exploits: an
  ensemble of them is one model (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244).

  Args:
    members: [K, P, N].
    gold: [P, N].

  Raises:
    ValueError: on other shapes, or a member without error.
  """
  members, gold = np.asarray(members, np.float64), np.asarray(gold, np.float64)
  if members.ndim != 3 or gold.shape != members.shape[1:]:
    raise ValueError(f"members must be [K, P, N] and gold [P, N]: {members.shape}, {gold.shape}.")
  flat = (members - members.mean(axis=2, keepdims=True)).reshape(len(members), -1)
  truth = (gold - gold.mean(axis=1, keepdims=True)).reshape(-1)
  norm = truth @ truth
  errors = flat - np.outer(flat @ truth / norm, truth) if norm > 0 else flat
  lengths = np.linalg.norm(errors, axis=1)
  if not (lengths > 1e-9 * np.linalg.norm(flat, axis=1)).all():
    raise ValueError("a member without errors has no correlation of them.")
  return errors @ errors.T / np.outer(lengths, lengths)


def disagreement(members: npt.ArrayLike) -> np.ndarray:
  """[P], the deviation (ddof 0) of K members about their mean, averaged over a prompt's N samples.

  members [K, P, N], standardised: see `standardise_members`.
  """
  return np.asarray(members, np.float64).std(axis=0).mean(axis=1)


def _kl_of_shares(counts: np.ndarray, n: int) -> float:
  """Σ w log(w/p) of responses in groups of equal score, sizes from below; within a group at random."""
  total = counts.sum()
  above = np.cumsum(counts) / total
  weights = above**n - (above - counts / total).clip(0) ** n
  return float(special.xlogy(weights, weights * total / counts).sum())


def _design(form: str, distances: npt.ArrayLike) -> np.ndarray:
  _check_form(form)
  d = np.asarray(distances, np.float64)
  bend = d**2 if form == "bon" else special.xlogy(d, d)
  return np.stack([d, -bend], axis=-1)


def _peak_gradients(form: str, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
  """Gradients of d* and R* in (α, β)."""
  place, _ = peak(form, alpha, beta)
  if form == "bon":
    at = np.array([1 / (2 * beta), -alpha / (2 * beta**2)])
    return at, np.array([alpha / (2 * beta), -(alpha**2) / (4 * beta**2)])
  at = place * np.array([1 / beta, -alpha / beta**2])
  return at, place * np.array([1.0, 1 - alpha / beta])


def _points(form: str, distances, gains, stderrs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  _check_form(form)
  x, y, se = (np.asarray(v, np.float64) for v in (distances, gains, stderrs))
  if not x.shape == y.shape == se.shape or x.ndim != 1 or len(x) < 3:
    raise ValueError(
      f"a law is fitted to 3 points or more, of shape [n] each: {x.shape}, {y.shape}, {se.shape}."
    )
  if not np.isfinite([x, y, se]).all() or x.min() <= 0 or se.min() <= 0:
    raise ValueError("distances and standard errors must be positive, and all values finite.")
  return x, y, se


def _check_form(form: str) -> None:
  if form not in FORMS:
    raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}.")


def _known(bound: float) -> float:
  return float(bound) if math.isfinite(bound) else math.nan
