"""An audit of a reward model: where it is right, what its scores are spread over, where it drifts.

Pure functions on arrays; calibration, length and features have files of their own. Every accuracy
stands beside that of "the longer response wins" on the same pairs, and, where a world or several
labellers tell, beside the most that any model could reach on them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from align_jax import config as config_lib
from align_jax.evals import length_bias, results, statistics
from align_jax.evals.audit_calibration import Calibration, Temperature
from align_jax.evals.features import Regression
from align_jax.evals.length_bias import ControlledWinRate, Correlation, Gain, Residual, Split
from align_jax.evals.statistics import Estimate

TAIL = 0.005  # of the reference's scores on either side, outside of which a score is out of range


@dataclasses.dataclass(frozen=True)
class Pairs:
  """n labelled pairs as arrays [n]: what the scorer says, and all that is known of the labels."""

  margins: np.ndarray  # score of the chosen response minus that of the rejected one
  chosen: np.ndarray  # tokens
  rejected: np.ndarray
  prompts: np.ndarray  # which pairs share a prompt
  label_prob: np.ndarray  # that the chosen is the better; of several labellers, the share of votes
  # Several labellers: whether label_prob is a share of votes.
  votes: bool = False
  # A world: P(the chosen is chosen) by the labeller's own formula, and the gold reward's difference.
  probabilities: np.ndarray | None = None
  gold: np.ndarray | None = None

  def __post_init__(self):
    arrays = (getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "votes")
    shapes = {np.shape(x) for x in arrays if x is not None}
    if shapes != {(len(self.margins),)} or not len(self.margins):
      raise ValueError(f"an audit needs one number a pair and a pair at least, not {shapes}.")

  @property
  def extra(self) -> np.ndarray:
    """Tokens of the chosen minus those of the rejected."""
    return np.asarray(self.chosen, np.float64) - self.rejected

  @property
  def settled(self) -> np.ndarray:
    """Whether either side is labelled the better: of a tie, which is "chosen" says nothing."""
    return np.asarray(self.label_prob) != 0.5


@dataclasses.dataclass(frozen=True)
class Group:
  """Accuracy on some of the pairs, a level margin counting half, beside what it is to be read by."""

  name: str
  n: int
  accuracy: Estimate  # on the labels, pairs labelled as ties left out
  longer: Estimate  # of preferring the longer
  votes: Estimate | None  # agreement with a labeller drawn at random; None without several
  gold: Estimate | None  # the model against the gold preference, gold ties left out
  ceiling: float | None  # the most any model can agree with labels (or votes) like these
  gold_judge: float | None  # how often such labels go the gold way, in closed form


@dataclasses.dataclass(frozen=True)
class Category:
  """Scores of the responses to one kind of prompt; the interval is over prompts."""

  name: str
  score: Estimate
  deviation: float
  tokens: float


@dataclasses.dataclass(frozen=True)
class Spread:
  """Where the variance of scores lies: three parts that add up to it exactly."""

  variance: float
  between_categories: float  # shares of the variance
  between_prompts: float  # of one category
  within_prompts: float  # the only part that a preference between two answers can use
  categories: tuple[Category, ...]


@dataclasses.dataclass(frozen=True)
class LengthBin:
  """Pairs of unequal length by how much longer one is: the share that prefer the longer one."""

  low: float  # tokens more, the least and the most in the bin
  high: float
  labels: Estimate
  model: Estimate
  gold: Estimate | None  # gold ties count half
  planted: float | None  # of labels, in closed form


@dataclasses.dataclass(frozen=True)
class Length:
  """What length has to do with the scores."""

  correlation: Correlation
  split: Split
  gold_split: Split | None  # the gold judge as the scorer, on the same labels
  labels_gap: Estimate | None  # length_bias.gold_gap of labels: excess of gold agreement if longer
  labels_gap_planted: float | None  # the same in closed form
  model_gap: Estimate | None  # of the model's preferences
  residual: Residual
  residual_accuracy: Estimate  # of the residualised scores, on the labels
  residual_gold: Estimate | None
  residual_matched: Estimate  # at equal length
  residual_correlation: float | None
  bins: tuple[LengthBin, ...]


@dataclasses.dataclass(frozen=True)
class Drift:
  """Scores of one policy's samples, beside those of the first policy's on the same prompts."""

  name: str
  n: int
  score: Estimate
  deviation: float
  tokens: Estimate
  out_of_range: Estimate  # outside the middle 99 % of the first policy's scores
  shift: float  # of the mean score, in deviations of the first policy's
  distance: float  # Kolmogorov–Smirnov: the most that the two distributions differ
  correlation: Correlation | None  # None with one response a prompt
  gain: Gain  # over the first policy, and how much of it at equal length
  win_rate: ControlledWinRate  # against the first policy's answer to the same prompt
  gold: Estimate | None
  gold_win_rate: Estimate | None
  accuracy: Estimate | None  # against gold, of pairs of answers to one prompt; gold ties left out
  longer: Estimate | None  # the same, of preferring the longer


@dataclasses.dataclass(frozen=True)
class Audit:
  """All that was found; parts for which there was no data are empty or None."""

  scorer: str
  data: str
  n: int
  truncated: float  # share of responses that were cut to fit
  groups: dict[str, tuple[Group, ...]]  # "all", "category", "length", "agreement"
  calibration: Calibration
  temperature: Temperature | None
  spread: Spread | None
  length: Length
  features: dict[str, dict[str, Regression]]  # feature set -> "labels", "model" -> what it found
  planted: dict[str, float]  # judge's feature -> the labeller's own coefficient
  drift: tuple[Drift, ...]


def group(name: str, pairs: Pairs, rows: npt.ArrayLike | None = None) -> Group:
  """Accuracy on the pairs that `rows` selects (mask or indices; None: all)."""
  rows = slice(None) if rows is None else np.asarray(rows)
  margins, gold = pairs.margins[rows], None if pairs.gold is None else pairs.gold[rows]
  p = pairs.label_prob[rows] if pairs.votes else None
  known = p if pairs.probabilities is None else pairs.probabilities[rows]
  right, labelled = length_bias.ahead(margins), pairs.settled[rows]
  return Group(
    name=name,
    n=len(margins),
    accuracy=statistics.proportion(right[labelled]),
    longer=statistics.proportion(length_bias.ahead(pairs.extra[rows])[labelled]),
    votes=None if p is None else statistics.proportion(right * p + (1 - right) * (1 - p)),
    gold=None if gold is None else gold_accuracy(margins, gold),
    ceiling=None if known is None else float(np.maximum(known, 1 - known).mean()),
    gold_judge=None
    if gold is None or pairs.probabilities is None
    else float(_goes_with(gold, pairs.probabilities[rows]).mean()),
  )


def gold_accuracy(margins: npt.ArrayLike, gold: npt.ArrayLike) -> Estimate:
  """Share of pairs whose margin goes the gold way, of those with a gold preference; both [n]."""
  sign = np.sign(np.asarray(gold, np.float64))
  return statistics.proportion(length_bias.ahead(np.asarray(margins) * sign)[sign != 0])


def by_category(pairs: Pairs, categories: Sequence[str], *, fewest: int = 1) -> tuple[Group, ...]:
  """One group a category of at least `fewest` pairs, in order of name. categories [n]."""
  labels = np.asarray(categories)
  names, counts = np.unique(labels, return_counts=True)
  kept = names[counts >= fewest]
  return tuple(group(str(name), pairs, labels == name) for name in kept)


def by_length(pairs: Pairs, *, bins: int = 6) -> tuple[Group, ...]:
  """Groups of about equal size by tokens of the chosen minus those of the rejected."""
  return tuple(group(_span(pairs.extra[r]), pairs, r) for r in quantile_parts(pairs.extra, bins))


def by_agreement(pairs: Pairs) -> tuple[Group, ...]:
  """Groups by the share of votes (or the labeller's probability) that the likelier side has."""
  p = pairs.label_prob if pairs.votes else pairs.probabilities
  if p is None:
    return ()
  share = np.maximum(p, 1 - p)
  if pairs.votes:
    values = np.unique(np.round(share, 6))
    return tuple(group(f"{100 * v:.0f} %", pairs, np.isclose(share, v)) for v in values)
  edges = ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0 + 1e-9))
  parts = (
    (f"{100 * low:.0f}–{100 * high:.0f} %", (share >= low) & (share < high)) for low, high in edges
  )
  return tuple(group(name, pairs, rows) for name, rows in parts if rows.any())


def quantile_parts(values: npt.ArrayLike, parts: int) -> list[np.ndarray]:
  """Indices of about equally many values in every part, equal ones in the same; none is empty."""
  values = np.asarray(values, np.float64)
  edges = np.unique(np.quantile(values, np.arange(1, parts) / parts))
  place = np.searchsorted(edges, values, side="left")
  return [rows for b in range(len(edges) + 1) if len(rows := np.flatnonzero(place == b))]


def spread(
  scores: npt.ArrayLike,
  tokens: npt.ArrayLike,
  prompts: npt.ArrayLike,
  categories: Sequence[str],
) -> Spread:
  """Var = between categories + between prompts of a category + within prompts, population variances.

  Each part is Σ (mean of its group - mean of the group around it)² / n over responses.
  scores, tokens, prompts, categories [n]; a prompt belongs to one category. ValueError otherwise.
  """
  scores, tokens = np.asarray(scores, np.float64), np.asarray(tokens, np.float64)
  names, kind = np.unique(np.asarray(categories), return_inverse=True)
  _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
  if not len(scores) or not scores.shape == tokens.shape == kind.shape == prompt.shape:
    raise ValueError("scores, tokens, prompts and categories must be [n], one for each response.")
  if len(np.unique(np.stack([prompt, kind]), axis=1).T) != prompt.max() + 1:
    raise ValueError("a prompt belongs to two categories.")
  of_kind, of_prompt = _means(scores, kind), _means(scores, prompt)
  variance = float(scores.var())
  parts = (of_kind - scores.mean(), of_prompt - of_kind, scores - of_prompt)
  shares = [float((part**2).mean() / variance) if variance else 0.0 for part in parts]
  found = []
  for i, name in enumerate(names):
    rows = np.flatnonzero(kind == i)
    mean = statistics.clustered_mean(scores[rows], prompt[rows].tolist())
    found.append(Category(str(name), mean, float(scores[rows].std()), float(tokens[rows].mean())))
  return Spread(variance, *shares, tuple(found))


def length(pairs: Pairs, scores: npt.ArrayLike, *, bins: int = 6, seed: int = 0) -> Length:
  """All that is said of length. scores [n, 2] of (chosen, rejected).

  What residualising does to accuracy and correlation is measured with a λ that was fitted on the other
  half of the prompts; the λ that is reported is that of all.
  """
  scores = np.asarray(scores, np.float64)
  tokens = np.stack([pairs.chosen, pairs.rejected], axis=1).astype(np.float64)
  prompts = np.repeat(pairs.prompts, 2).reshape(-1, 2)
  residual = fit_on(scores, tokens, prompts, slice(None))
  left = _residualised(scores, tokens, prompts, seed)
  margins = left[:, 0] - left[:, 1]
  gold, extra = pairs.gold, pairs.extra
  settled = pairs.settled
  close = length_bias.matched(pairs.chosen, pairs.rejected) & settled
  gap = functools.partial(length_bias.gold_gap, gold_margins=gold, extra=extra)
  after = fit_on(left, tokens, prompts, slice(None))
  return Length(
    correlation=length_bias.correlation(scores.ravel(), tokens.ravel(), prompts.ravel(), seed=seed),
    split=length_bias.length_split(
      pairs.margins[settled], pairs.chosen[settled], pairs.rejected[settled]
    ),
    gold_split=None
    if gold is None
    else length_bias.length_split(gold, pairs.chosen, pairs.rejected),
    labels_gap=None if gold is None else gap((gold > 0).astype(float)),
    labels_gap_planted=None
    if gold is None or pairs.probabilities is None
    else gap(_goes_with(gold, pairs.probabilities)).value,
    model_gap=None if gold is None else gap(length_bias.ahead(pairs.margins * np.sign(gold))),
    residual=residual,
    residual_accuracy=statistics.proportion(length_bias.ahead(margins[settled])),
    residual_gold=None if gold is None else gold_accuracy(margins, gold),
    residual_matched=statistics.proportion(length_bias.ahead(margins)[close]),
    residual_correlation=after.correlation,
    bins=length_bins(pairs, bins),
  )


def fit_on(scores, tokens, prompts, rows) -> Residual:
  """`length_bias.fit_residual` on some of the pairs; scores, tokens and prompts [n, 2]."""
  return length_bias.fit_residual(scores[rows].ravel(), tokens[rows].ravel(), prompts[rows].ravel())


def _residualised(scores, tokens, prompts, seed: int) -> np.ndarray:
  """Scores [n, 2] less length, each half of the prompts by the λ of the other half."""
  _, number = np.unique(prompts[:, 0], return_inverse=True)
  half = np.random.default_rng(seed).permutation(number.max() + 1)[number] % 2
  left = np.zeros_like(scores)
  for side in (0, 1):
    fitted = fit_on(scores, tokens, prompts, half != side)
    left[half == side] = fitted.apply(scores[half == side], tokens[half == side])
  return left


def length_bins(pairs: Pairs, bins: int) -> tuple[LengthBin, ...]:
  """By how many tokens longer: how often labels, model and gold prefer the longer response."""
  rows = np.flatnonzero((pairs.extra != 0) & pairs.settled)
  if not len(rows):
    return ()
  extra, side = np.abs(pairs.extra[rows]), np.sign(pairs.extra[rows])
  model = length_bias.ahead(pairs.margins[rows] * side)
  gold = None if pairs.gold is None else length_bias.ahead(pairs.gold[rows] * side)
  p = None if pairs.probabilities is None else pairs.probabilities[rows]
  planted = None if p is None else np.where(side > 0, p, 1 - p)
  return tuple(
    LengthBin(
      low=float(extra[part].min()),
      high=float(extra[part].max()),
      labels=statistics.proportion(side[part] > 0),
      model=statistics.proportion(model[part]),
      gold=None if gold is None else statistics.proportion(gold[part]),
      planted=None if planted is None else float(planted[part].mean()),
    )
    for part in quantile_parts(extra, bins)
  )


def drift(
  samples: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]],
  *,
  width: int = length_bias.BIN_WIDTH,
  seed: int = 0,
) -> tuple[Drift, ...]:
  """Every policy's samples beside the first one's.

  samples: policy -> (scores, tokens, gold or None), [P, G] each: G answers to the same P prompts.
  width: of the bins of length, for what is gained at equal length.
  """
  start = next(iter(samples.values()))
  return tuple(
    _drift(name, found, start, width=width, seed=seed) for name, found in samples.items()
  )


def _drift(name: str, found, start, *, width: int, seed: int) -> Drift:
  (scores, tokens, gold), (first, first_tokens, first_gold) = found, start
  low, high = np.quantile(first, [TAIL, 1 - TAIL])
  prompts = np.repeat(np.arange(len(scores)), scores.shape[1])
  several = scores.shape[1] > 1
  versus = statistics.win_rate(scores[:, 0], first[:, 0])
  wins = length_bias.ahead(scores[:, 0] - first[:, 0])
  controlled = length_bias.controlled_win_rate(wins, tokens[:, 0], first_tokens[:, 0])
  deviation = float(first.std())
  judged = gold is not None and several
  return Drift(
    name=name,
    n=scores.size,
    score=statistics.clustered_mean(scores.ravel(), prompts.tolist()),
    deviation=float(scores.std()),
    tokens=statistics.clustered_mean(tokens.ravel(), prompts.tolist()),
    out_of_range=statistics.proportion(((scores < low) | (scores > high)).ravel()),
    shift=float((scores.mean() - first.mean()) / deviation) if deviation else 0.0,
    distance=ks_distance(scores, first),
    correlation=length_bias.correlation(scores.ravel(), tokens.ravel(), prompts, seed=seed)
    if several
    else None,
    gain=length_bias.non_length_gain(first, first_tokens, scores, tokens, width=width, seed=seed),
    win_rate=dataclasses.replace(controlled, raw=versus.rate),
    gold=None if gold is None else statistics.clustered_mean(gold.ravel(), prompts.tolist()),
    gold_win_rate=None if gold is None else statistics.win_rate(gold[:, 0], first_gold[:, 0]).rate,
    accuracy=gold_accuracy(neighbours(scores), neighbours(gold)) if judged else None,
    longer=gold_accuracy(neighbours(tokens), neighbours(gold)) if judged else None,
  )


def neighbours(values: np.ndarray) -> np.ndarray:
  """Differences of the answers (0, 1), (2, 3), ... to every prompt: independent pairs of [P, G]."""
  even = values.shape[1] // 2 * 2
  return (values[:, 0:even:2] - values[:, 1:even:2]).ravel()


def ks_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """sup |F - G| of the two empirical distributions."""
  a, b = np.sort(np.ravel(first)), np.sort(np.ravel(second))
  places = np.concatenate([a, b])
  shares = [np.searchsorted(x, places, side="right") / len(x) for x in (a, b)]
  return float(np.abs(shares[0] - shares[1]).max())


def load(folder: str | pathlib.Path) -> Audit:
  """Reads audit.json; InputError that names the file and the field at fault."""
  file = pathlib.Path(folder) / "audit.json"
  return config_lib.build(Audit, results.read_json(file), str(file), finite=False)


def _goes_with(gold: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
  """P(a label goes the gold way) [n] of P(the chosen is chosen); one half of a gold tie."""
  return np.where(gold > 0, probabilities, np.where(gold < 0, 1 - probabilities, 0.5))


def _means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """The mean of every value's group, [n]."""
  return (np.bincount(groups, values) / np.bincount(groups))[groups]


def _span(values: np.ndarray) -> str:
  low, high = (
    f"{value:+.0f}".replace("-", "−") if value else "0" for value in (values.min(), values.max())
  )
  return low if low == high else f"{low} to {high}"
