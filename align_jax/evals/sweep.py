"""From the evaluations of a sweep to one table: means over seeds, paired differences, a leaderboard.

Two kinds of uncertainty, never mixed. Over seeds: what another training seed would give on these
prompts (Student's t, n - 1 degrees). Over prompts: what other prompts would give for these trained
policies (differences paired by seed and prompt, the seeds of a prompt moving together).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from align_jax.errors import InputError
from align_jax.evals import results, statistics, sweep_curves
from align_jax.evals.results import PolicyEvaluation, Sample
from align_jax.evals.statistics import Estimate
from align_jax.evals.sweep_curves import Curves
from align_jax.training import workdir

FAILURE = (
  "failure.json"  # {"state": "diverged" or "crashed", "reason"} in the folder of a failed run
)


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number of an evaluation, and how a leaderboard reads it."""

  title: str
  unit: str
  read: Callable[[PolicyEvaluation], float]
  lower_first: bool = False

  @property
  def is_share(self) -> bool:
    return self.unit == "share"


def _rate(name: str) -> Callable[[PolicyEvaluation], float]:
  def read(evaluation: PolicyEvaluation) -> float:
    found = evaluation.families.get("all", {}).get(name)
    return math.nan if found is None else found.value

  return read


METRICS = {
  "score": Metric("score", "mean a response", lambda e: e.score.value),
  "kl": Metric("KL", "nats a response", lambda e: e.kl.value, lower_first=True),
  "sqrt_kl": Metric("√KL", "√nats a response", lambda e: e.sqrt_kl[0], lower_first=True),
  "gain": Metric("gain", "over the reference", lambda e: e.score_gain.value),
  "win_rate": Metric("win rate", "share", lambda e: e.win_rate.rate.value),
  "length": Metric("length", "tokens a response", lambda e: e.length.value, lower_first=True),
  "finished": Metric("finished", "share", lambda e: e.finished.value),
  "correct": Metric("correct", "share", _rate("correct")),
  "harmful": Metric("harmful", "share", _rate("harmful"), lower_first=True),
  "refused": Metric("refused", "share", _rate("refused"), lower_first=True),
  "sycophantic": Metric("sycophantic", "share", _rate("sycophantic"), lower_first=True),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of one variant: where it stands, and what its evaluation found."""

  variant: str
  seed: int
  state: str  # finished, diverged, crashed or pending
  reason: str | None = (
    None  # why it failed; of a finished run, why it was stopped before its last step
  )
  evaluation: PolicyEvaluation | None = None
  samples: tuple[Sample, ...] = ()
  curves: Curves | None = None  # of an online run

  def value(self, metric: str) -> float:
    """A metric of METRICS; NaN while the run has none."""
    return math.nan if self.evaluation is None else METRICS[metric].read(self.evaluation)

  @property
  def failed(self) -> bool:
    return self.state in ("diverged", "crashed")

  @property
  def stopped(self) -> bool:
    """Whether one of its `stops` ended it. It is a result all the same, and counts as one: limits are
    settings of its variant, and the policy it had then is evaluated."""
    return self.state == "finished" and self.reason is not None


@dataclasses.dataclass(frozen=True)
class Row:
  """One variant over its seeds."""

  variant: str
  runs: tuple[Run, ...]
  metrics: dict[str, Estimate]  # mean and interval over seeds
  differences: dict[str, Estimate]  # to the baseline, paired by seed; interval over seeds
  prompt_difference: Estimate | None  # of the score, paired by seed and prompt; over prompts

  @property
  def finished(self) -> tuple[Run, ...]:
    return tuple(r for r in self.runs if r.state == "finished")

  @property
  def failed(self) -> tuple[Run, ...]:
    return tuple(r for r in self.runs if r.failed)

  @property
  def stopped(self) -> tuple[Run, ...]:
    return tuple(r for r in self.runs if r.stopped)


@dataclasses.dataclass(frozen=True)
class Table:
  """A sweep's result; the rows are in the order of the leaderboard."""

  metric: str  # that they are sorted by
  baseline: str | None
  rows: tuple[Row, ...]

  @property
  def failed(self) -> tuple[Run, ...]:
    return tuple(run for row in self.rows for run in row.failed)

  @property
  def finished(self) -> tuple[Run, ...]:
    return tuple(run for row in self.rows for run in row.finished)

  @property
  def stopped(self) -> tuple[Run, ...]:
    return tuple(run for row in self.rows for run in row.stopped)

  @property
  def curves(self) -> dict[str, list[Curves]]:
    """What the finished runs of every variant logged, of those whose runs all have logged scores."""
    return {
      row.variant: [run.curves for run in row.finished]
      for row in self.rows
      if row.finished and all(run.curves is not None for run in row.finished)
    }

  @property
  def evaluation(self) -> PolicyEvaluation | None:
    """Any run's evaluation: the reference, the prompts and the scorer are the same in all."""
    return self.finished[0].evaluation if self.finished else None

  @property
  def metrics(self) -> tuple[str, ...]:
    """The metrics that some run has."""
    return tuple(m for m in METRICS if any(row.metrics[m].n for row in self.rows))

  @property
  def summary(self) -> str:
    total = sum(len(row.runs) for row in self.rows)
    left = total - len(self.finished) - len(self.failed)
    text = f"{len(self.finished)} of {total} runs finished"
    text += f" ({len(self.stopped)} stopped early)" if self.stopped else ""
    text += f", {len(self.failed)} failed" if self.failed else ""
    return text + (f", {left} still to run" if left else "")


def read_run(folder: pathlib.Path, variant: str, seed: int, *, samples: bool = False) -> Run:
  """Where the run in `folder` stands, with its evaluation and, if asked, its samples and curves."""
  if workdir.is_finished(folder) and (folder / "evaluation.json").exists():
    evaluation = results.load(folder)
    if not isinstance(evaluation, PolicyEvaluation):
      raise InputError(f"{folder} evaluates a reward model; a sweep compares policies")
    stop = workdir.read_stop(folder)
    return Run(
      variant,
      seed,
      "finished",
      stop[1] if stop else None,
      evaluation,
      samples=results.load_samples(folder) if samples else (),
      curves=sweep_curves.read(folder) if samples else None,
    )
  if (folder / FAILURE).exists():
    return Run(variant, seed, **results.read_json(folder / FAILURE))
  return Run(variant, seed, "pending")


def build_table(runs: Sequence[Run], *, metric: str, baseline: str | None = None) -> Table:
  """One row a variant, sorted by `metric`; differences are to the variant called `baseline`."""
  variants: dict[str, list[Run]] = {}
  for run in runs:
    variants.setdefault(run.variant, []).append(run)
  others = variants.get(baseline, []) if baseline is not None else []
  rows = [_row(name, own, others if name != baseline else []) for name, own in variants.items()]
  return Table(metric, baseline, leaderboard(rows, metric))


def leaderboard(rows: Sequence[Row], metric: str) -> tuple[Row, ...]:
  """The rows by the mean of a metric, best first; those without one last, in their old order."""
  if metric not in METRICS:
    raise InputError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
  sign = 1.0 if METRICS[metric].lower_first else -1.0

  def place(row: Row) -> float:
    value = row.metrics[metric].value
    return math.inf if math.isnan(value) else sign * value

  return tuple(sorted(rows, key=place))


def _row(variant: str, runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
  by_seed = {r.seed: r for r in baseline if r.state == "finished"}
  pairs = [(r, by_seed[r.seed]) for r in runs if r.state == "finished" and r.seed in by_seed]
  return Row(
    variant,
    tuple(runs),
    {m: _over_seeds([r.value(m) for r in runs]) for m in METRICS},
    {m: _difference(pairs, m) for m in METRICS} if pairs else {},
    prompt_difference(pairs) if pairs else None,
  )


def prompt_difference(pairs: Sequence[tuple[Run, Run]]) -> Estimate | None:
  """Mean score difference of runs to their baselines, paired prompt by prompt, over prompts.

  Σ over seeds and prompts of (ours - theirs) / (seeds · prompts); the error is that of the prompts, a
  prompt's seeds being one cluster. None where the samples are missing or answer other prompts.
  """
  prompts = [tuple(sample.prompt for sample in run.samples) for pair in pairs for run in pair]
  if not prompts[0] or any(p != prompts[0] for p in prompts):
    return None
  ours, theirs = (
    np.array([[sample.score for sample in pair[side].samples] for pair in pairs]) for side in (0, 1)
  )
  clusters = list(range(ours.shape[1])) * len(pairs)
  return statistics.paired_difference(ours.ravel(), theirs.ravel(), clusters=clusters)


def _over_seeds(values: Sequence[float]) -> Estimate:
  """A failed seed is left out: it has no policy, and the table says that it failed."""
  return dataclasses.replace(statistics.mean(values), unscored=0)


def _difference(pairs: Sequence[tuple[Run, Run]], metric: str) -> Estimate:
  ours, theirs = ([pair[side].value(metric) for pair in pairs] for side in (0, 1))
  return statistics.paired_difference(ours, theirs)


def metric_title(metric: str, evaluation: PolicyEvaluation | None) -> str:
  """How a metric is called over a column: the score by whose it is."""
  if metric != "score" or evaluation is None:
    return METRICS[metric].title
  return "gold reward" if evaluation.scorer == "gold" else "reward-model score"
