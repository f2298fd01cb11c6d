"""Calibration of confidences: what a reliability diagram shows, and scores that it cannot fool.

Confidences are those of the answer that was given (of a pair, σ(|r⁺ - r⁻|) of the side that a reward
model prefers), outcomes whether that answer was right: 1, 0, or between them where the label itself is
soft. Bins are `statistics.calibration_bins`: (a, b], or equal mass.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from align_jax.evals import logistic, statistics
from align_jax.evals.statistics import CalibrationBin, Estimate

RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Brier:
  """brier = reliability - resolution + uncertainty + within; `within` is what binning leaves out."""

  value: float
  reliability: float
  resolution: float
  uncertainty: float
  within: float


@dataclasses.dataclass(frozen=True)
class Calibration:
  """How far confidences can be believed. Intervals are percentile bootstraps over items."""

  n: int
  confidence: float  # mean
  accuracy: Estimate
  ece: Estimate  # equal width
  ece_equal_mass: Estimate
  ece_expected: float  # of a calibrated forecaster with these confidences, n and equal-width bins
  ece_debiased: float  # ece - ece_expected
  squared_error_debiased: float | None  # Σ n_m/n (acc - conf)² without its bias, equal-mass bins
  max_error: float  # of an equal-width bin
  brier: Brier
  nll: float | None  # nats; infinite for a certainty that was wrong
  auroc: Estimate  # of confidence for being right
  bins: tuple[CalibrationBin, ...]
  bins_equal_mass: tuple[CalibrationBin, ...]


@dataclasses.dataclass(frozen=True)
class Temperature:
  """T* that minimises the NLL of σ(logit / T), and what it does to the NLL and the ECE."""

  value: float
  low: float | None  # NaN: not finite
  high: float | None
  nll: float
  nll_scaled: float
  ece_scaled: float


def calibration(
  confidences: npt.ArrayLike, outcomes: npt.ArrayLike, *, bins: int = 10, seed: int = 0
) -> Calibration:
  """All of the above for confidences [n] and outcomes [n], both within [0, 1].

  ECE is biased upward, and is proper in no way: read it beside the debiased ones, Brier and NLL.
  ValueError for no items, or values outside [0, 1].
  """
  c, y = _checked(confidences, outcomes)
  rows = np.stack([c, y], axis=1)

  def resampled(statistic) -> Estimate:
    return statistics.bootstrap(rows, statistic, seed=seed, resamples=RESAMPLES)

  def ece(equal_mass: bool):
    return resampled(
      lambda r: statistics.expected_calibration_error(*r.T, bins=bins, equal_mass=equal_mass)
    )

  wide = ece(False)
  expected = expected_ece(c, y, bins=bins)
  found = statistics.calibration_bins(c, y, bins=bins)
  return Calibration(
    n=len(c),
    confidence=float(c.mean()),
    accuracy=statistics.proportion(y),
    ece=wide,
    ece_equal_mass=ece(True),
    ece_expected=expected,
    ece_debiased=wide.value - expected,
    squared_error_debiased=squared_error(c, y, bins=bins),
    max_error=max(abs(b.accuracy - b.confidence) for b in found),
    brier=brier(c, y, bins=bins),
    nll=nll(c, y),
    auroc=resampled(lambda r: auroc(*r.T)),
    bins=found,
    bins_equal_mass=statistics.calibration_bins(c, y, bins=bins, equal_mass=True),
  )


def expected_ece(confidences: npt.ArrayLike, outcomes: npt.ArrayLike, *, bins: int = 10) -> float:
  """The ECE that a calibrated forecaster would show on so few items: what an ECE is to be beaten by.

  Σ_m n_m/n · sqrt(2/π · Σ_{i∈m} c_i (1 - c_i)) / n_m, the mean of |N(0, σ²)| per equal-width bin. An
  outcome that is not 0 or 1 is not drawn, and adds no noise.
  """
  c, y = _checked(confidences, outcomes)
  noise = np.where((y == 0) | (y == 1), c * (1 - c), 0.0)
  place = np.searchsorted(np.arange(1, bins) / bins, c, side="left")
  variances = np.bincount(place, noise, minlength=bins)
  return float(np.sqrt(2 / np.pi * variances).sum() / len(c))


def squared_error(confidences: npt.ArrayLike, outcomes: npt.ArrayLike, *, bins: int = 10) -> float:
  """Σ_m n_m/n · ((acc_m - conf_m)² - acc_m (1 - acc_m) / (n_m - 1)) over equal-mass bins.

  Unbiased for the squared calibration error of the binned forecaster, so below 0 half the time where
  that is 0 (Kumar, Liang, Ma 2019, https://arxiv.org/abs/1909.10155). A bin of one item is left out;
  NaN where all are.
  """
  c, y = _checked(confidences, outcomes)
  parts = statistics.calibration_bins(c, y, bins=bins, equal_mass=True)
  parts = [part for part in parts if part.n > 1]
  total = sum(part.n for part in parts)
  terms = (
    part.n
    * ((part.accuracy - part.confidence) ** 2 - part.accuracy * (1 - part.accuracy) / (part.n - 1))
    for part in parts
  )
  return sum(terms) / total if total else math.nan


def brier(confidences: npt.ArrayLike, outcomes: npt.ArrayLike, *, bins: int = 10) -> Brier:
  """Mean (c - y)² split over equal-width bins into parts that add up to it exactly.

  reliability Σ n_m/n (conf_m - acc_m)², resolution Σ n_m/n (acc_m - acc)², uncertainty acc (1 - acc)
  (Murphy 1973, https://doi.org/10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2); `within` is the
  rest, the variance inside bins minus twice its covariance with the outcome (Stephenson et al. 2008).
  Soft outcomes vary less than 0/1 ones: the difference is in `within`, too.
  """
  c, y = _checked(confidences, outcomes)
  value, base = statistics.brier_score(c, y), float(y.mean())
  parts = statistics.calibration_bins(c, y, bins=bins)
  reliability = sum(p.n * (p.confidence - p.accuracy) ** 2 for p in parts) / len(c)
  resolution = sum(p.n * (p.accuracy - base) ** 2 for p in parts) / len(c)
  uncertainty = base * (1 - base)
  within = value - (reliability - resolution + uncertainty)
  return Brier(value, reliability, resolution, uncertainty, within)


def nll(confidences: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
  """-mean y log c + (1 - y) log(1 - c) in nats; infinite for a certainty that was wrong."""
  c, y = _checked(confidences, outcomes)
  with np.errstate(divide="ignore", invalid="ignore"):
    terms = np.where(y > 0, y * np.log(c), 0.0) + np.where(y < 1, (1 - y) * np.log1p(-c), 0.0)
  return float(-terms.mean())


def auroc(confidences: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
  """P(the confidence of a right answer is above that of a wrong one), ties counting half.

  An outcome y counts as y of a right answer and 1 - y of a wrong one. NaN if all are alike.
  """
  c, y = _checked(confidences, outcomes)
  _, place = np.unique(c, return_inverse=True)
  right, wrong = np.bincount(place, y), np.bincount(place, 1 - y)
  below = np.cumsum(wrong) - wrong / 2
  total = right.sum() * wrong.sum()
  return float(right @ below / total) if total else math.nan


def temperature(
  logits: npt.ArrayLike, outcomes: npt.ArrayLike, *, bins: int = 10, confidence: float = 0.95
) -> Temperature | None:
  """T* = argmin_T -mean y log σ(z/T) + (1 - y) log σ(-z/T) (Guo et al. 2017, arxiv.org/abs/1706.04599).

  z/T is a logistic regression without intercept: 1/T is its slope, whose robust interval is turned
  into one of T. None where no T > 0 does it: the logits are no better than chance, or never wrong.

  logits [n], of the outcome's being 1; a pair's is r⁺ - r⁻ and its outcome 1. outcomes [n] in [0, 1].
  """
  z, y = np.asarray(logits, np.float64), np.asarray(outcomes, np.float64)
  scale = float(np.abs(z).mean()) or 1.0
  try:
    found = logistic.fit(z[:, None] / scale, y)
  except ValueError:
    return None
  slope = found.estimate(0, confidence=confidence)
  if not slope.value > 0:
    return None
  p, scaled = logistic.sigmoid(z), found.predict(z[:, None] / scale)
  return Temperature(
    value=scale / slope.value,
    low=scale / slope.high,
    high=scale / slope.low if slope.low > 0 else math.nan,
    nll=nll(p, y),
    nll_scaled=nll(scaled, y),
    ece_scaled=statistics.expected_calibration_error(*preferred(scaled, y), bins=bins),
  )


def preferred(probabilities: npt.ArrayLike, outcomes: npt.ArrayLike):
  """(confidence of the answer given, whether it is right) of P(y = 1) [n] and outcomes [n].

  The answer is the likelier of the two; at one half it is neither, and right by half.
  """
  p, y = _checked(probabilities, outcomes)
  right = np.where(p > 0.5, y, np.where(p < 0.5, 1 - y, 0.5))
  return np.maximum(p, 1 - p), right


def _checked(confidences: npt.ArrayLike, outcomes: npt.ArrayLike):
  c, y = np.asarray(confidences, np.float64), np.asarray(outcomes, np.float64)
  if c.ndim != 1 or c.shape != y.shape or not len(c):
    raise ValueError(f"confidences and outcomes must be [n] with n > 0, not {c.shape}, {y.shape}.")
  if not (((c >= 0) & (c <= 1)).all() and ((y >= 0) & (y <= 1)).all()):
    raise ValueError("confidences and outcomes must lie within [0, 1].")
  return c, y
