"""Numbers with their uncertainty: every rate, mean and comparison goes through here.

Plain NumPy in float64. An unscored item is NaN: it is left out and counted in `Estimate.unscored`,
never read as a zero.
Intervals of means are Student's t, so that three seeds are not reported with the confidence of
three hundred.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value, its standard error and its interval; NaN bounds where n is too small to know."""

  value: float
  stderr: float
  low: float
  high: float
  n: int
  unscored: int = 0

  @property
  def half_width(self) -> float:
    """Half the length of the interval, what follows the ± in a table."""
    return (self.high - self.low) / 2

  def excludes(self, value: float) -> bool:
    """Whether the interval lies wholly on one side of `value`; False while it is unknown."""
    return self.low > value or self.high < value


@dataclasses.dataclass(frozen=True)
class WinRate:
  """Counts of a comparison item by item, and (wins + ties / 2) / n with its Wilson interval."""

  wins: int
  ties: int
  losses: int
  rate: Estimate


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
  """One bin of a reliability diagram: `n` predictions, their mean confidence and their accuracy."""

  n: int
  confidence: float
  accuracy: float


def mean(values: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
  """Mean ± t · s/√n with s of ddof = 1; standard error 0 and unknown bounds for n < 2.

  values [n], NaN = unscored. ValueError on infinities or another rank.
  """
  scored, unscored = _scored(values)
  n = len(scored)
  stderr = float(scored.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
  return _student(scored, stderr, groups=n, unscored=unscored, confidence=confidence)


def clustered_mean(
  values: npt.ArrayLike, clusters: Sequence, *, confidence: float = 0.95
) -> Estimate:
  """Mean whose error lets the items of a cluster (paraphrases, turns of a talk) move together.

  SE = sqrt( C/(C-1) · Σ_c (Σ_{i∈c} (s_i - s̄))² ) / n over C clusters, 0 for C < 2; the interval is
  t with C - 1 degrees.
  values [n], NaN = unscored; clusters [n] hashable labels. ValueError on unequal lengths.
  """
  values = _vector(values)
  if len(clusters) != len(values):
    raise ValueError(f"clusters has {len(clusters)} labels for {len(values)} values.")
  scored, unscored = _scored(values)
  labels = [label for label, value in zip(clusters, values) if not math.isnan(value)]
  totals: dict = {}
  for deviation, label in zip(scored - _mean(scored), labels):
    totals[label] = totals.get(label, 0.0) + deviation
  groups = len(totals)
  squares = sum(total**2 for total in totals.values())
  stderr = math.sqrt(groups / (groups - 1) * squares) / len(scored) if groups > 1 else 0.0
  return _student(scored, stderr, groups=groups, unscored=unscored, confidence=confidence)


def paired_difference(
  values: npt.ArrayLike,
  baseline: npt.ArrayLike,
  *,
  clusters: Sequence | None = None,
  confidence: float = 0.95,
) -> Estimate:
  """Mean of values - baseline on the same items, with the error of the differences.

  values, baseline [n], NaN in either = unscored pair; clusters [n] as in `clustered_mean`.
  ValueError on unequal lengths.
  """
  values, baseline = _pair(values, baseline)
  if clusters is None:
    return mean(values - baseline, confidence=confidence)
  return clustered_mean(values - baseline, clusters, confidence=confidence)


def wilson_interval(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
  """Wilson's score interval of a proportion, (0, 1) for n = 0.

  (p + z²/2n ± z · sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = successes / n.
  Unlike p ± z·SE it keeps its width at p = 0 and p = 1. ValueError unless 0 <= successes <= n.
  """
  if not 0 <= successes <= n:
    raise ValueError(f"{successes} successes out of {n} is not a proportion.")
  if n == 0:
    return 0.0, 1.0
  z = _normal_quantile(confidence)
  p = successes / n
  scale = 1 + z**2 / n
  centre = (p + z**2 / (2 * n)) / scale
  half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
  # Rounding must not push the bound past the edge that it equals exactly.
  low = 0.0 if successes == 0 else max(0.0, centre - half)
  high = 1.0 if successes == n else min(1.0, centre + half)
  return low, high


def proportion(outcomes: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
  """Mean of outcomes within [0, 1] (booleans, or C/P/I graded 1/0.5/0) with Wilson's interval.

  outcomes [n], NaN = unscored. Graded outcomes vary less than 0/1 ones, so for them the interval is
  on the safe side.
  """
  scored, unscored = _scored(outcomes)
  if scored.size and not 0 <= scored.min() <= scored.max() <= 1:
    raise ValueError("outcomes of a proportion must lie within [0, 1].")
  n = len(scored)
  stderr = float(scored.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
  low, high = wilson_interval(float(scored.sum()), n, confidence=confidence)
  return Estimate(_mean(scored), stderr, low, high, n, unscored)


def wald(value: float, stderr: float, n: int, *, confidence: float = 0.95) -> Estimate:
  """value ± z · stderr of an estimate whose error is known to be normal; NaN bounds for stderr NaN."""
  half = _normal_quantile(confidence) * stderr
  return Estimate(value, stderr, value - half, value + half, n)


def difference_of_proportions(first: Estimate, second: Estimate) -> Estimate:
  """p₁ - p₂ of two independent shares by `proportion`, with the interval of their two Wilson ones.

  low = d - sqrt((p₁ - l₁)² + (u₂ - p₂)²), high = d + sqrt((u₁ - p₁)² + (p₂ - l₂)²): method 10 of
  Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I.
  NaN where either side is empty.
  """
  value = first.value - second.value
  low = value - math.hypot(first.value - first.low, second.high - second.value)
  high = value + math.hypot(first.high - first.value, second.value - second.low)
  return Estimate(value, math.hypot(first.stderr, second.stderr), low, high, first.n + second.n)


def win_rate(
  scores: npt.ArrayLike,
  baseline: npt.ArrayLike,
  *,
  tolerance: float = 0.0,
  confidence: float = 0.95,
) -> WinRate:
  """Share of items won against `baseline`, a tie (|difference| <= tolerance) counting half.

  scores, baseline [n], NaN in either = unscored. The interval is Wilson's, so it does not collapse
  when every item is won; ties, which vary less than wins and losses, narrow it as they should.
  """
  scores, baseline = _pair(scores, baseline)
  difference = scores - baseline
  outcome = np.where(np.abs(difference) <= tolerance, 0.5, (difference > 0).astype(float))
  outcome = np.where(np.isnan(difference), np.nan, outcome)
  wins, ties, losses = (int((outcome == value).sum()) for value in (1.0, 0.5, 0.0))
  rate = proportion(outcome, confidence=confidence)
  if ties:
    low, high = _interval_with_ties(rate, ties, confidence)
    rate = dataclasses.replace(rate, low=low, high=high)
  return WinRate(wins, ties, losses, rate)


def bootstrap(
  values: npt.ArrayLike,
  statistic: Callable[[np.ndarray], float],
  *,
  seed: int,
  resamples: int = 2000,
  confidence: float = 0.95,
) -> Estimate:
  """Percentile bootstrap of any statistic of rows, e.g. a ratio of two columns.

  The same seed gives the same interval.
  values [n, ...] resampled along axis 0; statistic: [n, ...] -> float. ValueError on an empty
  input.
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n == 0:
    raise ValueError("bootstrap needs at least one row.")
  rng = np.random.default_rng(seed)
  draws = np.array([statistic(values[rng.integers(n, size=n)]) for _ in range(resamples)])
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws, [tail, 1 - tail]) if n > 1 else (math.nan, math.nan)
  stderr = draws.std(ddof=1) if n > 1 else 0.0
  return Estimate(float(statistic(values)), float(stderr), float(low), float(high), n)


def calibration_bins(
  confidences: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = 10, equal_mass: bool = False
) -> tuple[CalibrationBin, ...]:
  """The non-empty bins of a reliability diagram.

  Equal width (a, b] with 0 in the first, or equal mass: as many predictions in each.
  confidences [n] within [0, 1]; correct [n] of 0/1.
  """
  confidences, correct = _pair(confidences, correct)
  if confidences.size and not 0 <= confidences.min() <= confidences.max() <= 1:
    raise ValueError("confidences must lie within [0, 1].")
  if equal_mass:
    parts = np.array_split(np.argsort(confidences, kind="stable"), bins)
  else:
    # Compared with i/bins itself: ceil(confidence · bins) would move 0.7 into the bin above 0.7.
    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, confidences, side="left")
    parts = [np.flatnonzero(place == b) for b in range(bins)]
  return tuple(
    CalibrationBin(len(part), float(confidences[part].mean()), float(correct[part].mean()))
    for part in parts
    if len(part)
  )


def expected_calibration_error(
  confidences: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = 10, equal_mass: bool = False
) -> float:
  """ECE = Σ_m n_m/N · |acc_m - conf_m| over `calibration_bins`; NaN for no predictions.

  Biased upward for small N. confidences [n] within [0, 1]; correct [n] of 0/1.
  """
  parts = calibration_bins(confidences, correct, bins=bins, equal_mass=equal_mass)
  total = sum(part.n for part in parts)
  gaps = sum(part.n * abs(part.accuracy - part.confidence) for part in parts)
  return gaps / total if total else math.nan


def brier_score(confidences: npt.ArrayLike, correct: npt.ArrayLike) -> float:
  """Mean of (c - y)²: a proper score, to be read beside the ECE. confidences, correct [n]."""
  confidences, correct = _pair(confidences, correct)
  return _mean((confidences - correct) ** 2)


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Chance that one of k draws is correct, 1 - C(n-c, k)/C(n, k); NaN for n < k.

  n samples of which `correct` are right, drawn without replacement (Chen et al. 2021).
  """
  _check_counts(n, correct, k)
  return 1 - math.comb(n - correct, k) / math.comb(n, k) if n >= k else math.nan


def pass_hat_k(n: int, correct: int, k: int) -> float:
  """Chance that all of k draws without replacement are correct, C(c, k)/C(n, k); NaN for n < k."""
  _check_counts(n, correct, k)
  return math.comb(correct, k) / math.comb(n, k) if n >= k else math.nan


def _interval_with_ties(rate: Estimate, ties: int, confidence: float) -> tuple[float, float]:
  """Wilson's interval at the sample size whose 0/1 outcomes would vary as little as these.

  The variance of an outcome is p(1-p) - t/4. The share of ties t is shrunk to ties/(n + z²), as
  Wilson shrinks p, so that ties alone are no proof of a rate of exactly one half.
  """
  p, n = rate.value, rate.n
  binary = p * (1 - p)
  size = n * binary / (binary - ties / (n + _normal_quantile(confidence) ** 2) / 4)
  return wilson_interval(p * size, size, confidence=confidence)


def _check_counts(n: int, correct: int, k: int) -> None:
  if not (0 <= correct <= n and k >= 1):
    raise ValueError(f"pass@k needs 0 <= correct <= n and k >= 1, not {correct=}, {n=}, {k=}.")


def _vector(values: npt.ArrayLike) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1:
    raise ValueError(f"one number an item is needed, not an array of shape {values.shape}.")
  if np.isinf(values).any():
    raise ValueError("an infinite value has no mean; mark an unscored item with NaN.")
  return values


def _scored(values: npt.ArrayLike) -> tuple[np.ndarray, int]:
  values = _vector(values)
  missing = np.isnan(values)
  return values[~missing], int(missing.sum())


def _pair(values: npt.ArrayLike, baseline: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  values, baseline = _vector(values), _vector(baseline)
  if len(values) != len(baseline):
    raise ValueError(f"paired items differ in number: {len(values)} and {len(baseline)}.")
  return values, baseline


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else math.nan


def _normal_quantile(confidence: float) -> float:
  if not 0 < confidence < 1:
    raise ValueError(f"confidence must lie within (0, 1), not {confidence}.")
  return float(special.ndtri((1 + confidence) / 2))


def _student(
  scored: np.ndarray, stderr: float, *, groups: int, unscored: int, confidence: float
) -> Estimate:
  value = _mean(scored)
  if groups < 2:
    return Estimate(value, 0.0, math.nan, math.nan, len(scored), unscored)
  _normal_quantile(confidence)  # validates
  half = float(special.stdtrit(groups - 1, (1 + confidence) / 2)) * stderr
  return Estimate(value, stderr, value - half, value + half, len(scored), unscored)
