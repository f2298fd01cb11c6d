"""What the over-optimisation laboratory found: curves of gold against distance, their laws and peaks."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from align_jax import config as config_lib
from align_jax.evals import best_of_n, overoptimization, results, statistics
from align_jax.evals.overoptimization import Extrapolation, Fit
from align_jax.evals.statistics import Estimate
from align_jax.worlds import label_ceiling

TRAITS = ("correct", "malformed", "harmful", "courteous", "rude", "fillers", "length")
_TINY = 1e-9  # an error below it is rounding: nothing was found to vary


@dataclasses.dataclass(frozen=True)
class Point:
  """Best of n by one proxy: gains over n = 1, paired prompt by prompt."""

  n: int
  distance: float  # √KL with ties, √nats
  bound: float  # √(log n − (n−1)/n)
  gold: Estimate
  proxy: Estimate  # in deviations of the proxy under the policy


@dataclasses.dataclass(frozen=True)
class Peak:
  """Where gold is highest, and how far it has fallen at the end.

  `fall` is fair: the peak of every half of the prompts is measured on the other half.
  """

  n: int  # or the iteration, of online learning
  distance: float
  gain: Estimate
  fall: Estimate | None

  @property
  def is_interior(self) -> bool:
    """Whether gold falls behind its peak by more than chance."""
    return self.fall is not None and self.fall.low > 0


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """On held-out pairs with labels as noisy as the training's; the chance of each is known exactly."""

  labels: Estimate  # agreement with a label: p of the preferred side, averaged
  ceiling: Estimate  # mean max(p, 1 − p): what no model can pass
  gap: Estimate  # ceiling − agreement, paired
  gold: Estimate  # agreement with the sign of the gold difference, ties left out


@dataclasses.dataclass(frozen=True)
class Curve:
  """Best-of-n by one kind of proxy, the mean over its seeds; or by an ensemble of them."""

  name: str
  arm: str
  size: str
  parameters: int
  comparisons: int
  temperature: float  # of the labeller
  seeds: int
  combine: str | None
  points: tuple[Point, ...]
  peak: Peak
  seed_peaks: tuple[float, ...]  # the highest gain of every seed; of an ensemble none
  law: Fit | None
  extrapolation: Extrapolation | None
  accuracy: Accuracy | None  # mean over seeds; of an ensemble none
  over_less: Estimate | None  # peak gain over that of the arm's fewest comparisons, paired
  over_smaller: Estimate | None  # and over that of the smallest size, labels and amount alike
  over_single: Estimate | None  # of an ensemble: at the largest n, over the mean of its members
  error_correlation: float | None  # of its members
  disagreement: Estimate | None  # of its members, over prompts


@dataclasses.dataclass(frozen=True)
class Behaviour:
  """What the gold judge finds in the choices of one proxy, its first seed, at one n."""

  name: str  # of the curve
  n: int
  found: dict[str, Estimate]  # of TRAITS, means over prompts


@dataclasses.dataclass(frozen=True)
class RlPoint:
  """A window of iterations."""

  step: float
  distance: float  # √KL, k1 of the sampled responses
  gold: Estimate  # gain over the initial policy
  proxy: Estimate  # in deviations under the initial policy


@dataclasses.dataclass(frozen=True)
class RlCurve:
  """One run of online learning."""

  name: str
  arm: str
  comparisons: int
  kl_coef: float
  combine: str | None
  points: tuple[RlPoint, ...]
  peak: Peak
  law: Fit | None
  extrapolation: Extrapolation | None


@dataclasses.dataclass(frozen=True)
class Report:
  """All of the laboratory."""

  policy: str
  prompts: int
  samples: int  # to a prompt
  distinct: Estimate  # share of a prompt's samples that differ
  start: Estimate  # gold of one sample, on the pool's prompts
  rl_start: Estimate | None  # and on those of online learning
  fit_up_to: int
  curves: tuple[Curve, ...]
  ensembles: tuple[Curve, ...]
  behaviours: tuple[Behaviour, ...]
  rl: tuple[RlCurve, ...]


@dataclasses.dataclass(frozen=True)
class Gains:
  """A proxy's choices: [P, n] over the sizes of n, the first of them n = 1."""

  sizes: tuple[int, ...]
  gold: np.ndarray
  proxy: np.ndarray  # in its deviations
  kl: np.ndarray  # with ties

  @classmethod
  def of(cls, proxy: np.ndarray, gold: np.ndarray, sizes: Sequence[int]) -> "Gains":
    """proxy, gold [P, N]."""
    ordered = tuple(sorted({1, *sizes}))
    scaled = (proxy - proxy.mean()) / (proxy.std() or 1.0)
    columns = [
      (
        best_of_n.best_of_n_scores(proxy, gold, n),
        best_of_n.best_of_n_scores(proxy, scaled, n),
        overoptimization.tied_kl(proxy, n),
      )
      for n in ordered
    ]
    chosen, own, kl = (np.stack(part, axis=1) for part in zip(*columns))
    return cls(ordered, chosen - chosen[:, :1], own - own[:, :1], kl)

  @classmethod
  def mean(cls, members: Sequence["Gains"]) -> "Gains":
    """Over seeds, prompt by prompt."""
    parts = {
      name: np.mean([getattr(m, name) for m in members], axis=0) for name in ("gold", "proxy", "kl")
    }
    return cls(members[0].sizes, **parts)

  @property
  def points(self) -> tuple[Point, ...]:
    return tuple(
      Point(
        n,
        math.sqrt(self.kl[:, i].mean()),
        math.sqrt(best_of_n.best_of_n_kl(n)),
        statistics.mean(self.gold[:, i]),
        statistics.mean(self.proxy[:, i]),
      )
      for i, n in enumerate(self.sizes)
    )


def peak_of(gains: Gains) -> Peak:
  """The highest mean, and its fall to the largest n, cross-fitted over even and odd prompts."""
  points, places = gains.points, np.arange(len(gains.gold)) % 2
  best = int(np.argmax(gains.gold.mean(axis=0)))
  fall = np.zeros(len(places))
  for half in (0, 1):
    chosen = int(np.argmax(gains.gold[places != half].mean(axis=0)))
    rows = gains.gold[places == half]
    fall[places == half] = rows[:, chosen] - rows[:, -1]
  return Peak(points[best].n, points[best].distance, points[best].gold, statistics.mean(fall))


def peak_difference(gains: Gains, other: Gains) -> Estimate:
  """How much higher the peak is, each at its own best n, paired prompt by prompt."""
  highest, theirs = (g.gold[:, int(np.argmax(g.gold.mean(axis=0)))] for g in (gains, other))
  return statistics.paired_difference(highest, theirs)


def bon_law(gains: Gains, fit_up_to: int, seed: int = 0) -> tuple[Fit | None, Extrapolation | None]:
  """The law of best-of-n fitted to all n > 1, and to those up to `fit_up_to`; None where it cannot be."""
  d = np.sqrt(gains.kl.mean(axis=0))[1:]
  gold = gains.gold[:, 1:]
  errors = gold.std(axis=0, ddof=1) / math.sqrt(len(gold))
  usable = (errors > _TINY) & (d > 0)
  if usable.sum() < 3:
    return None, None
  d, gold, errors = d[usable], gold[:, usable], errors[usable]
  sizes = np.array(gains.sizes[1:])[usable]
  law = overoptimization.fit_prompts("bon", d, gold, seed=seed)
  limit = d[sizes <= fit_up_to].max(initial=0.0)
  return law, _extrapolated("bon", d, gold.mean(axis=0), errors, limit)


def _extrapolated(form: str, d, gains, errors, limit: float) -> Extrapolation | None:
  near = (d >= overoptimization.RL_FIRST_DISTANCE) & (d <= limit)
  if near.sum() < 3 or not (d > limit).any():
    return None
  return overoptimization.extrapolate(form, d, gains, errors, limit=limit)


def accuracy_of(
  rewards: Sequence[np.ndarray], probabilities: np.ndarray, gold: np.ndarray
) -> Accuracy:
  """Mean over seeds. rewards: [n, 2] of each; probabilities [n] that a label prefers the first reply;
  gold [n], how far the first is ahead."""
  ahead = [(np.sign(r[:, 0] - r[:, 1]) + 1) / 2 for r in rewards]
  agrees = np.mean([a * probabilities + (1 - a) * (1 - probabilities) for a in ahead], axis=0)
  best = np.maximum(probabilities, 1 - probabilities)
  known = gold != 0
  right = np.mean([np.where(gold > 0, a, 1 - a) for a in ahead], axis=0)[known]
  ceiling = statistics.mean(best)
  assert math.isclose(ceiling.value, label_ceiling(probabilities), abs_tol=1e-9)
  return Accuracy(
    statistics.mean(agrees),
    ceiling,
    statistics.paired_difference(best, agrees),
    statistics.proportion(right),
  )


def rl_points(
  kl: np.ndarray, gold: np.ndarray, proxy: np.ndarray, start: float, window: int
) -> tuple[RlPoint, ...]:
  """Means of `window` iterations; an error is that of the run's noise from one iteration to the next.

  kl, gold, proxy [T] of the iterations; start: gold of the initial policy. A window's error is
  sd(x_{t+1} − x_t) / √2 / √window: its own scatter would also count that the policy moves.
  """
  distances = np.sqrt(np.maximum(_windows(kl, window).mean(axis=1), 0.0))
  columns = (
    [_estimate(v, _noise(x) / math.sqrt(window), window) for v in _windows(x, window).mean(axis=1)]
    for x in (gold - start, proxy)
  )
  return tuple(
    RlPoint((i + 0.5) * window - 0.5, float(d), *pair)
    for i, (d, *pair) in enumerate(zip(distances, *columns))
  )


def rl_peak(points: Sequence[RlPoint], gold: np.ndarray, window: int) -> Peak:
  """The highest window, and the fall from it to the last tenth of the windows.

  The fall is fair: the window that is highest by its even iterations is measured by its odd ones, and
  the other way round; it is 0 where that window is one of the last. points: of `rl_points`; gold [T].
  """
  best = max(range(len(points)), key=lambda i: points[i].gold.value)
  windows = _windows(gold, window)
  last = max(1, len(windows) // 10)
  falls = []
  for half in (0, 1):
    chosen = int(np.argmax(windows[:, 1 - half :: 2].mean(axis=1)))
    own = windows[:, half::2].mean(axis=1)
    falls.append(own[chosen] - own[-last:].mean() if chosen < len(windows) - last else 0.0)
  error = _noise(gold) * math.sqrt((1 + 1 / last) / window)
  fall = _estimate(float(np.mean(falls)), error, len(gold))
  return Peak(round(points[best].step), points[best].distance, points[best].gold, fall)


def _windows(values: np.ndarray, window: int) -> np.ndarray:
  """[T // window, window]."""
  count = len(values) // window
  return values[: count * window].reshape(count, window)


def _noise(values: np.ndarray) -> float:
  """Of one iteration, from the differences of neighbours."""
  return float(np.diff(values).std(ddof=1) / math.sqrt(2)) if len(values) > 2 else 0.0


def _estimate(value: float, error: float, n: int) -> Estimate:
  return Estimate(float(value), error, float(value - 1.96 * error), float(value + 1.96 * error), n)


def rl_law(points: Sequence[RlPoint], share: float) -> tuple[Fit | None, Extrapolation | None]:
  """The RL law of the windows beyond d = 1, and its extrapolation from `share` of the largest d."""
  far = [p for p in points if p.distance >= overoptimization.RL_FIRST_DISTANCE]
  if len(far) < 4 or any(p.gold.stderr <= _TINY for p in far):
    return None, None
  d, gold, errors = (
    np.array(x) for x in zip(*((p.distance, p.gold.value, p.gold.stderr) for p in far))
  )
  return (
    overoptimization.fit("rl", d, gold, errors),
    _extrapolated("rl", d, gold, errors, share * d.max()),
  )


def load(folder: str | pathlib.Path) -> Report:
  """Reads overoptimization.json; InputError that names the file and the field at fault."""
  file = pathlib.Path(folder) / "overoptimization.json"
  return config_lib.build(Report, results.read_json(file), str(file), finite=False)
