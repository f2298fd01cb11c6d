"""How much of a reward is length: correlations, splits, gains at equal length, and what removes it.

A reward r is *residualised* as r - λ (tokens - mean tokens), λ the slope of r on tokens within prompts
over reference responses: `fit_residual`. Online learning uses it without any code of its own, as two
terms of `config.rewards`, the mean being a constant that no estimator sees:

  rewards = {"model": {"kind": "model", "weight": 1.0}, "length": {"kind": "length", "weight": -λ}}
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from align_jax.evals import logistic, statistics
from align_jax.evals.statistics import Estimate

RESAMPLES = 500
BIN_WIDTH = 20  # tokens (Singhal et al. 2023)
MATCHED = 0.1  # lengths count as equal when they differ by at most this share of the longer


@dataclasses.dataclass(frozen=True)
class Correlation:
  """Reward and tokens within prompts: both less their prompt's mean, all prompts together."""

  pearson: Estimate  # NaN where either side does not vary
  spearman: Estimate  # of the ranks of the same deviations
  slope: Estimate  # reward a token
  prompts: int  # that have two responses or more


@dataclasses.dataclass(frozen=True)
class Split:
  """Accuracy where the chosen response is the longer, and where it is the shorter."""

  longer: Estimate
  shorter: Estimate
  gap: Estimate  # longer - shorter: 0 without a bias, 1 for "longer wins"
  matched: Estimate  # accuracy at equal length, equal up to MATCHED


@dataclasses.dataclass(frozen=True)
class Residual:
  """r - slope · (tokens - mean_tokens): a reward without the part of it that tokens explain."""

  slope: float  # λ, reward a token
  mean_tokens: float
  correlation: (
    float | None
  )  # Pearson's within prompts, before; after, it is 0 on the fitted responses

  def apply(self, rewards: npt.ArrayLike, lengths: npt.ArrayLike) -> np.ndarray:
    """Residualised rewards [n] of rewards [n] and lengths [n] in tokens."""
    tokens = np.asarray(lengths, np.float64)
    return np.asarray(rewards, np.float64) - self.slope * (tokens - self.mean_tokens)


@dataclasses.dataclass(frozen=True)
class Gain:
  """What a reward gained between two sets of responses, and how much of that at equal length."""

  gain: Estimate  # ΔR
  non_length: Estimate  # NRG
  explained: Estimate  # 1 - NRG / ΔR, the share that the change of length explains
  shared: float  # of all responses, the share that lies in bins which both sets have


@dataclasses.dataclass(frozen=True)
class ControlledWinRate:
  """A win rate, and what it would be at equal length."""

  raw: Estimate
  controlled: Estimate
  length_coefficient: Estimate  # of tanh(Δtokens / deviation), in nats


def correlation(
  rewards: npt.ArrayLike, lengths: npt.ArrayLike, prompts: npt.ArrayLike, *, seed: int = 0
) -> Correlation:
  """Pearson's and Spearman's correlation of reward and tokens within prompts, and the slope.

  For pairs Pearson's is Σ Δr Δl / sqrt(Σ Δr² Σ Δl²), without centring: which side is first does not
  matter. Intervals are percentile bootstraps over prompts.

  rewards [n]; lengths [n] in tokens; prompts [n], which of them share a prompt. ValueError on unequal
  lengths, or where no prompt has two responses.
  """
  r, tokens, group = _within(rewards, lengths, prompts)
  # Responses alone at their prompt deviate by 0 from its mean: they must not enter the ranks.
  ranked = [stats.rankdata(side) for side in (r, tokens)]
  centred = [side - side.mean() for side in ranked]
  moments = _moments(r, tokens, group)
  return Correlation(
    pearson=_resampled(moments, _pearson, seed),
    spearman=_resampled(_moments(*centred, group), _pearson, seed),
    slope=_resampled(moments, lambda m: _ratio(m[:, 2].sum(), m[:, 1].sum()), seed),
    prompts=int(group.max()) + 1,
  )


def length_split(margins: npt.ArrayLike, chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> Split:
  """Accuracy by which side is longer, a margin of 0 counting one half.

  margins [n], reward of the chosen minus that of the rejected; chosen, rejected [n] in tokens.
  """
  correct = ahead(margins)
  chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
  longer = statistics.proportion(correct[chosen > rejected])
  shorter = statistics.proportion(correct[chosen < rejected])
  return Split(
    longer=longer,
    shorter=shorter,
    gap=statistics.difference_of_proportions(longer, shorter),
    matched=statistics.proportion(correct[matched(chosen, rejected)]),
  )


def matched(
  first: npt.ArrayLike, second: npt.ArrayLike, *, tolerance: float = MATCHED
) -> np.ndarray:
  """Whether two lengths [n] differ by at most `tolerance` times the longer one, [n] bool."""
  a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
  return np.abs(a - b) <= tolerance * np.maximum(a, b)


def fit_residual(
  rewards: npt.ArrayLike, lengths: npt.ArrayLike, prompts: npt.ArrayLike
) -> Residual:
  """λ = Σ (r - r̄_x)(l - l̄_x) / Σ (l - l̄_x)² over reference responses to prompts x.

  The prompt's mean is taken off both first, so that prompts which call for long answers and are liked
  do not pass for a bias. λ is 0 where no prompt has responses of different length.

  rewards [n]; lengths [n] in tokens; prompts [n], which of them share a prompt.
  """
  r, tokens, group = _within(rewards, lengths, prompts)
  m = _moments(r, tokens, group)
  slope = _ratio(m[:, 2].sum(), m[:, 1].sum())
  return Residual(
    slope=0.0 if math.isnan(slope) else slope,
    mean_tokens=float(np.mean(lengths)),
    correlation=_pearson(m),
  )


def non_length_gain(
  rewards_before: npt.ArrayLike,
  lengths_before: npt.ArrayLike,
  rewards_after: npt.ArrayLike,
  lengths_after: npt.ArrayLike,
  *,
  width: int = BIN_WIDTH,
  seed: int = 0,
) -> Gain:
  """NRG = Σ_b w_b (R̄_after,b - R̄_before,b) over bins of length, 1 - NRG/ΔR of it due to length.

  Bins are [b·width, (b + 1)·width) tokens; w_b is the share of both sets' responses in bin b, over bins
  that both sets have (Singhal et al. 2023, https://arxiv.org/abs/2310.03716, bins of 20; the text
  leaves the weighting open). Responses outside shared bins say nothing: `shared` is how many are
  inside. Intervals are bootstraps over prompts. `explained` means little while `gain` may be 0.

  All [P] or [P, G]: the same P prompts in both sets. ValueError otherwise.
  """
  sides = [
    np.asarray(side, np.float64)
    for side in (rewards_before, lengths_before, rewards_after, lengths_after)
  ]
  if any(side.shape != sides[0].shape for side in sides) or not sides[0].size or width < 1:
    raise ValueError(
      "rewards and lengths must have one shape and some items, and width be positive."
    )
  rows = np.stack([side.reshape(len(side), -1) for side in sides], axis=-1)
  rows[..., 1::2] = np.floor(rows[..., 1::2] / width)
  bins = int(rows[..., 1::2].max()) + 1

  def resampled(statistic) -> Estimate:
    return statistics.bootstrap(
      rows, lambda r: statistic(*_gains(r, bins)[:2]), seed=seed, resamples=RESAMPLES
    )

  return Gain(
    gain=resampled(lambda gain, nrg: gain),
    non_length=resampled(lambda gain, nrg: nrg),
    explained=resampled(lambda gain, nrg: 1 - _ratio(nrg, gain)),
    shared=_gains(rows, bins)[2],
  )


def controlled_win_rate(
  wins: npt.ArrayLike,
  lengths: npt.ArrayLike,
  baseline_lengths: npt.ArrayLike,
  *,
  difficulty: npt.ArrayLike | None = None,
) -> ControlledWinRate:
  """The win rate that P(win) = σ(θ + φ tanh(Δ / s) + ψ d) gives with the length term set to 0.

  Δ = tokens - baseline tokens, s its standard deviation (Dubois et al. 2024,
  https://arxiv.org/abs/2404.04475). There ψ d is the difficulty of the instruction, estimated from many
  models, and the coefficients are regularised; here d is given or left out, and nothing is shrunk but
  for a prior of deviation 10 that keeps a clean sweep finite.

  wins [n] within [0, 1], 0.5 for a tie; lengths [n] in tokens; difficulty [n].
  """
  y = np.asarray(wins, np.float64)
  extra = np.asarray(lengths, np.float64) - np.asarray(baseline_lengths, np.float64)
  columns = [np.ones(len(y)), np.tanh(extra / (extra.std() or 1.0))]
  if difficulty is not None:
    columns.append(np.asarray(difficulty, np.float64))
  x = np.stack(columns, axis=1)
  found = logistic.fit(x, y, l2=0.01)
  equal = x.copy()
  equal[:, 1] = 0
  p = found.predict(equal)
  slope = (p * (1 - p)) @ equal / len(y)
  error = float(np.sqrt(slope @ found.covariance @ slope))
  rate = statistics.wald(float(p.mean()), error, len(y))
  return ControlledWinRate(
    raw=statistics.proportion(y),
    controlled=dataclasses.replace(rate, low=max(0.0, rate.low), high=min(1.0, rate.high)),
    length_coefficient=found.estimate(1),
  )


def flip_toward_longer(
  probabilities: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike, *, share: float
) -> np.ndarray:
  """P(first is chosen) [n] when `share` of the labels go to the longer side, whatever else is true.

  share · [first is longer] + (1 - share) · p; as it was where both are equally long.
  probabilities, first, second [n]; lengths in tokens. ValueError unless 0 <= share <= 1.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share must lie within [0, 1], not {share}.")
  p = np.asarray(probabilities, np.float64)
  extra = np.asarray(first, np.float64) - np.asarray(second, np.float64)
  return np.where(extra == 0, p, share * (extra > 0) + (1 - share) * p)


def gold_gap(
  agreement: npt.ArrayLike, gold_margins: npt.ArrayLike, extra: npt.ArrayLike
) -> Estimate:
  """How much oftener labels go the gold way where the gold side is the longer than where not.

  With labels that are right by a chance independent of length, `share` of which are then flipped toward
  the longer side, it is `share` exactly: share + (1 - share) a - (1 - share) a.

  agreement [n], 1 where the label (or a model's preference) goes the gold way, 0 where not, or its
  probability; gold_margins [n] and extra [n], gold reward and tokens of one side less the other's.
  """
  side = np.sign(np.asarray(gold_margins, np.float64)) * np.sign(np.asarray(extra, np.float64))
  right = np.asarray(agreement, np.float64)
  return statistics.difference_of_proportions(
    statistics.proportion(right[side > 0]), statistics.proportion(right[side < 0])
  )


def ahead(margins: npt.ArrayLike) -> np.ndarray:
  """1 where a margin is positive, 0 where it is negative, 0.5 where it is 0."""
  return (np.sign(np.asarray(margins, np.float64)) + 1) / 2


def _within(rewards, lengths, prompts):
  """Deviations from the prompt's mean, and the prompt's number, of prompts with two responses up."""
  r, tokens = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
  _, group, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
  if r.ndim != 1 or not r.shape == tokens.shape == group.shape:
    raise ValueError("rewards, lengths and prompts must be [n], one of each for every response.")
  kept = counts[group] > 1
  if not kept.any():
    raise ValueError("no prompt has two responses: nothing varies within prompts.")
  _, group = np.unique(group[kept], return_inverse=True)
  counts = np.bincount(group)
  r, tokens = (
    side[kept] - (np.bincount(group, side[kept]) / counts)[group] for side in (r, tokens)
  )
  return r, tokens, group


def _moments(x, y, group) -> np.ndarray:
  """Σ x², Σ y² and Σ xy of every prompt, [P, 3]."""
  return np.stack([np.bincount(group, z) for z in (x * x, y * y, x * y)], axis=1)


def _pearson(moments: np.ndarray) -> float:
  xx, yy, xy = moments.sum(axis=0)
  return _ratio(xy, math.sqrt(xx * yy))


def _ratio(a: float, b: float) -> float:
  return float(a / b) if b else math.nan


def _resampled(rows: np.ndarray, statistic, seed: int) -> Estimate:
  return statistics.bootstrap(rows, statistic, seed=seed, resamples=RESAMPLES)


def _gains(rows: np.ndarray, bins: int) -> tuple[float, float, float]:
  """(ΔR, NRG, share of responses in shared bins) of [P, G, (r, bin, r', bin')]."""
  r, place, r_after, place_after = (rows[..., i].ravel() for i in range(4))
  counts, sums = [], []
  for values, where in ((r, place), (r_after, place_after)):
    where = where.astype(int)
    counts.append(np.bincount(where, minlength=bins))
    sums.append(np.bincount(where, values, minlength=bins))
  both = (counts[0] > 0) & (counts[1] > 0)
  weights = (counts[0] + counts[1])[both]
  gains = sums[1][both] / counts[1][both] - sums[0][both] / counts[0][both]
  nrg = _ratio(weights @ gains, weights.sum())
  return float(r_after.mean() - r.mean()), nrg, float(weights.sum() / (2 * len(r)))
