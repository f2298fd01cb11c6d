"""What online runs logged of their scores while they trained, and whether the one fell that nobody
learned from while the one that was learned from went on rising: over-optimisation."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax.errors import InputError
from align_jax.evals import report, results, statistics
from align_jax.evals.statistics import Estimate

BINS = 20  # at most, of the steps of a run
_LEAST = 2  # steps a bin


@dataclasses.dataclass(frozen=True)
class Curves:
  """What one run logged at every step: all [steps]."""

  kl: np.ndarray  # nats a response
  scores: Mapping[str, np.ndarray]  # by the name of the reward
  learned: tuple[str, ...]  # the rewards of a weight other than 0


@dataclasses.dataclass(frozen=True)
class Fall:
  """A judge that nobody learned from, at its best and at the end; over seeds."""

  judge: str
  root_kl: float  # √nats, where the mean over seeds is best
  best: Estimate  # gain over the first steps there
  fall: Estimate  # best minus end
  rise: Mapping[str, Estimate]  # of every score that is learned from, over the same steps

  @property
  def shown(self) -> bool:
    """Whether both intervals exclude 0: the judge fell while what is learned from rose."""
    return self.fall.low > 0 and any(e.low > 0 for e in self.rise.values())


def read(folder: pathlib.Path) -> Curves | None:
  """The curves of a run; None if it logs no KL or no score by name, as a preference run does."""
  if not (folder / "metrics.jsonl").exists():
    return None
  metrics = report.read_metrics(folder / "metrics.jsonl")
  rewards = results.read_json(folder / "config.json").get("rewards", {})
  names = [name for name in rewards if f"score/{name}" in metrics]
  if "kl/ref" not in metrics or not names:
    return None
  scores = {name: metrics[f"score/{name}"].values for name in names}
  learned = tuple(name for name in names if rewards[name].get("weight", 1.0))
  return Curves(metrics["kl/ref"].values, scores, learned)


def binned(runs: Sequence[Curves]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(root_kl [bins], {name: scores [runs, bins]}): means over stretches of steps of equal length.

  Runs of different lengths are read up to the end of the shortest. √KL is that of the mean KL over the
  runs and steps of a bin. At most `BINS` bins, of two steps each or more where there are so many.

  Raises:
    InputError: if there is no run, or they log different rewards.
  """
  if not runs or any(run.scores.keys() != runs[0].scores.keys() for run in runs):
    raise InputError("the curves of a variant need runs that log the same rewards")
  steps = min(len(run.kl) for run in runs)
  count = max(1, min(BINS, steps // _LEAST))
  edges = np.linspace(0, steps, count + 1).astype(int)

  def means(values: np.ndarray) -> np.ndarray:
    return np.array([values[a:b].mean() for a, b in zip(edges, edges[1:])])

  kl = np.mean([means(run.kl) for run in runs], axis=0)
  scores = {name: np.stack([means(run.scores[name]) for run in runs]) for name in runs[0].scores}
  return np.sqrt(np.maximum(kl, 0.0)), scores


def over_optimisation(runs: Sequence[Curves]) -> list[Fall]:
  """How far every judge of weight 0 fell from its best, and what the learned scores did meanwhile.

      fall = mean_i [ g_i(t_i) − g_i(T) ],   t_i = argmax_t Σ_{j≠i} g_j(t)

  where g_i(t) is seed i's mean score in bin t of `binned`, T the last bin, and the interval Student's
  over seeds. The best bin of a seed is chosen by the other seeds: chosen by its own curve, noise alone
  would make every fall positive. A judge that still rises at the end falls by 0.

  Args:
    runs: the seeds of one variant, of which it takes two at least; with fewer there is no answer.

  References:
    Gao et al. 2022 (gold against √KL), https://arxiv.org/abs/2210.10760.
  """
  if len(runs) < 2 or not runs[0].learned:
    return []
  root_kl, scores = binned(runs)
  judges = [name for name in scores if name not in runs[0].learned]
  return [_fall(name, root_kl, scores, runs[0].learned) for name in judges]


def _fall(judge: str, root_kl, scores: Mapping[str, np.ndarray], learned) -> Fall:
  gold = scores[judge]
  others = gold.sum(axis=0, keepdims=True) - gold
  at, rows = others.argmax(axis=1), np.arange(len(gold))

  def since(values: np.ndarray) -> np.ndarray:
    return values[:, -1] - values[rows, at]

  return Fall(
    judge,
    float(root_kl[gold.mean(axis=0).argmax()]),
    best=statistics.mean(gold[rows, at] - gold[:, 0]),
    fall=statistics.mean(-since(gold)),
    rise={name: statistics.mean(since(scores[name])) for name in learned},
  )


def as_row(variant: str, found: Fall) -> list[str]:
  """The cells of a table: variant, judge, √KL at its best, gain there, fall, rise of the others."""
  rises = "; ".join(f"{name} {_text(e)}" for name, e in found.rise.items())
  return [
    variant,
    found.judge,
    report.number(found.root_kl),
    _text(found.best),
    _text(found.fall),
    rises,
    "yes" if found.shown else "no",
  ]


HEADS = (
  "variant",
  "judge",
  "√KL at its best",
  "gain there",
  "fall to the end",
  "what is learned from, since then",
  "over-optimised",
)
CAPTION = (
  "Scores while training, on the prompts of training: a judge that nobody learns from, from its first "
  "steps to its best and from there to the end, and how the scores that are learned from changed "
  "meanwhile. 95 % Student intervals over seeds; a seed's best is where the other seeds are best. "
  "Over-optimised: the judge fell and what is learned from rose, both intervals without 0."
)


def _text(estimate: Estimate) -> str:
  known = not math.isnan(estimate.low)
  return report.signed(estimate.value) + (f" [{report.interval(estimate)}]" if known else "")
