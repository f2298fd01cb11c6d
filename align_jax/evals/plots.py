"""The figures of the report and of the notebooks: one look, one colour and marker per objective.

Every function returns a `matplotlib.figure.Figure` of its own; pyplot and its global state are not
touched. Intervals are 95 %.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from align_jax.evals.results import PolicyEvaluation, RewardEvaluation
from align_jax.evals.statistics import Estimate

# Told apart in print, in greyscale (by marker) and with any colour vision (after Okabe and Ito).
_REFERENCE = ("#4a5560", "o")
_LOOKS = {
  "start": _REFERENCE,
  "sft": _REFERENCE,
  "reward": ("#8c5a2b", "h"),
  "dpo": ("#0067a5", "s"),
  "ipo": ("#c14e00", "^"),
  "kto": ("#00795a", "D"),
  "ppo": ("#8e3a80", "P"),
}
_SPARE = (("#7a6a00", "v"), ("#2f4b9b", "X"), ("#b02a4c", "<"), ("#1f7a8c", ">"))
_TITLES = {
  "start": "Start",
  "sft": "SFT",
  "reward": "Reward model",
  "dpo": "DPO",
  "ipo": "IPO",
  "kto": "KTO",
  "ppo": "PPO",
}
_STYLE = {
  "font.family": "DejaVu Sans",
  "font.size": 9.5,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.labelcolor": "#1c2126",
  "axes.edgecolor": "#7d868f",
  "axes.linewidth": 0.8,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#e6e9ec",
  "grid.linewidth": 0.8,
  "xtick.color": "#3c444b",
  "ytick.color": "#3c444b",
  "legend.frameon": False,
  "figure.facecolor": "white",
}
INK, MUTED = "#1c2126", "#68727b"


@dataclasses.dataclass(frozen=True)
class Series:
  """One metric of a run: its steps and values, both [n]."""

  steps: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
  """Metrics drawn in one small plot, with the unit of its vertical axis."""

  title: str
  unit: str
  names: tuple[str, ...]


PANELS = (
  Panel("Reward-model score", "reward", ("score",)),
  Panel("Loss", "objective", ("loss",)),
  Panel("Preference accuracy", "share of pairs", ("rewards/accuracy",)),
  Panel("KL to the reference", "nats a response", ("kl/ref",)),
  Panel("Reward", "reward", ("rewards/chosen", "rewards/rejected")),
  Panel("Response length", "tokens", ("response_length",)),
  Panel("Log-probability", "nats a response", ("logps/chosen", "logps/rejected")),
  Panel("Explained variance", "share of returns’ variance", ("value/explained_variance",)),
  Panel("Clipped ratios", "share of tokens", ("ppo/clip_fraction",)),
  Panel("Sampler − trainer gap", "nats a token", ("ppo/sampler_mismatch",)),
  Panel("Entropy", "nats a token", ("entropy",)),
  Panel("Gradient norm", "L2 norm", ("grad_norm",)),
)
_LOSS_UNITS = {"sft": "nats a token", "reward": "nats a pair", "dpo": "nats a pair"}


def objective_of(name: str) -> str:
  """The objective of a run: "dpo" for "dpo", "dpo-beta0.05" and "dpo_seed1"."""
  return name.replace("_", "-").split("-")[0].lower()


def title_of(name: str) -> str:
  """How a run is called in text: "DPO" for "dpo", "DPO beta0.05" for "dpo-beta0.05"."""
  head = objective_of(name)
  return (_TITLES.get(head, name[: len(head)]) + name[len(head) :].replace("-", " ")).strip()


def look_of(name: str) -> tuple[str, str]:
  """Colour and marker of a run's objective; an unknown one always gets the same spare look."""
  head = objective_of(name)
  return _LOOKS.get(head, _SPARE[sum(head.encode()) % len(_SPARE)])


def to_png(figure: Figure, *, dpi: int = 160) -> bytes:
  """The figure as a PNG file."""
  FigureCanvasAgg(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
  return buffer.getvalue()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
  """`draw` with the look that all figures share."""

  def wrapper(*args, **settings) -> Figure:
    with matplotlib.rc_context(_STYLE):
      return draw(*args, **settings)

  wrapper.__name__, wrapper.__doc__ = draw.__name__, draw.__doc__
  return wrapper


@styled
def frontier(evaluations: Mapping[str, PolicyEvaluation]) -> Figure:
  """Score against √KL: what each objective bought with its distance from the reference.

  evaluations: by run name. Runs of one objective (a sweep) are joined in the order of their KL. The
  band is the reference policy. √KL because reward grows about linearly in it (Gao et al. 2023).
  """
  figure = Figure(figsize=(8.6, 4.4), layout="constrained")
  looks = _draw_frontier(figure.add_subplot(), evaluations)
  _legend(figure, looks, "outside right upper", 1)
  return figure


@styled
def overview(
  evaluations: Mapping[str, PolicyEvaluation], reward: RewardEvaluation, rates: Sequence[str]
) -> Figure:
  """A whole pipeline in one picture: the frontier, what the judge found, and the reward model."""
  figure = Figure(figsize=(10.6, 4.3), layout="constrained")
  grid = figure.add_gridspec(2, 2, width_ratios=(1.45, 1), height_ratios=(1.7, 1))
  frontier_axes = figure.add_subplot(grid[:, 0])
  looks = _draw_frontier(frontier_axes, evaluations)
  behaviour_axes = figure.add_subplot(grid[0, 1])
  found = [(rate, {n: _all(e).get(rate) for n, e in evaluations.items()}) for rate in rates]
  _grouped_rows(behaviour_axes, found)
  behaviour_axes.set_xlabel("share of responses")
  behaviour_axes.set_xlim(-0.02, 1.02)
  bars = [
    ("reward model", reward.accuracy, True),
    ("“longer wins”", reward.longer_wins, False),
    ("gold judge", reward.ceiling, False),
  ]
  reward_axes = figure.add_subplot(grid[1, 1])
  _accuracy_rows(reward_axes, [bar for bar in bars if bar[1] is not None], counts=False)
  reward_axes.set_title("")
  reward_axes.set_xlabel("agreement with held-out noisy labels")
  _legend(figure, looks, "outside upper center", len(looks))
  return figure


def _draw_frontier(axes, evaluations: Mapping[str, PolicyEvaluation]) -> dict[str, tuple[str, str]]:
  """Draws the frontier and returns the looks that its legend explains."""
  aligned = {n: e for n, e in evaluations.items() if not e.is_reference}
  reference_band(axes, next(iter(evaluations.values())))
  for head in dict.fromkeys(map(objective_of, aligned)):
    runs = sorted(
      (e for n, e in aligned.items() if objective_of(n) == head), key=lambda e: e.kl.value
    )
    _frontier_runs(axes, head, runs)
  axes.set_ylabel(f"{_scorer_name(evaluations)} (mean a response)")
  axes.set_xlim(left=0)
  root_kl_axis(axes)
  reference = title_of(next(iter(evaluations.values())).reference)
  return {f"{reference} (reference)": _REFERENCE} | {
    title_of(head): look_of(head) for head in dict.fromkeys(map(objective_of, aligned))
  }


def root_kl_axis(axes) -> None:
  """Labels the horizontal axis as √KL, and the top with the KL itself; limits are set before."""
  axes.set_xlabel("√KL(policy ‖ reference)  (√nats a response)")
  top = axes.secondary_xaxis("top", functions=(np.square, _root))
  top.set_xlabel("KL (nats a response)", color=MUTED)
  top.tick_params(colors=MUTED, length=3)
  ticks = _square_ticks(axes.get_xlim()[1])
  top.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


@styled
def behaviour(evaluations: Mapping[str, PolicyEvaluation], rates: Sequence[str]) -> Figure:
  """The judge's rates over all prompts (correct, harmful, refused...), one panel a rate."""
  figure = Figure(
    figsize=(2.1 * len(rates) + 0.6, 0.32 * len(evaluations) + 1.0), layout="constrained"
  )
  for place, rate in enumerate(rates):
    axes = figure.add_subplot(1, len(rates), place + 1)
    found = {n: e.families["all"][rate] for n, e in evaluations.items() if rate in _all(e)}
    _rows(axes, {n: found.get(n) for n in evaluations}, names=place == 0)
    axes.set_title(rate.capitalize())
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of responses")
  return figure


@styled
def families(evaluations: Mapping[str, PolicyEvaluation]) -> Figure:
  """Mean score in every family of prompts, one marker a policy."""
  names = [f for f in next(iter(evaluations.values())).families if f != "all"]
  figure = Figure(figsize=(8.6, 0.4 * len(names) + 1.2), layout="constrained")
  axes = figure.add_subplot()
  _grouped_rows(
    axes,
    [
      (family, {n: e.families.get(family, {}).get("score") for n, e in evaluations.items()})
      for family in names
    ],
  )
  axes.set_xlabel(f"{_scorer_name(evaluations)} (mean, 95 % interval)")
  _legend(figure, {title_of(n): look_of(n) for n in evaluations}, "outside upper center", 6)
  return figure


@styled
def lengths(evaluations: Mapping[str, PolicyEvaluation]) -> Figure:
  """Mean response length of every policy; the band is the reference."""
  figure = Figure(figsize=(8.6, 0.32 * len(evaluations) + 0.8), layout="constrained")
  axes = figure.add_subplot()
  reference = next(iter(evaluations.values())).reference_length
  axes.axvline(reference.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
  _rows(axes, {n: e.length for n, e in evaluations.items()}, names=True)
  axes.set_xlabel("tokens a response (mean, 95 % interval)")
  axes.set_xlim(left=0)
  return figure


@styled
def reward_model(evaluation: RewardEvaluation) -> Figure:
  """Held-out accuracy beside its ceiling and the length baseline, and the reliability diagram."""
  figure = Figure(figsize=(8.8, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
  bars = [
    ("labels", evaluation.accuracy, True),
    ("gold preference", evaluation.gold_accuracy, True),
    ("labels, chosen longer", evaluation.accuracy_chosen_longer, True),
    ("labels, chosen shorter", evaluation.accuracy_chosen_shorter, True),
    ("“longer wins” on labels", evaluation.longer_wins, False),
    ("gold judge on labels", evaluation.ceiling, False),
  ]
  _accuracy_rows(left, [bar for bar in bars if bar[1] is not None and bar[1].n])
  if evaluation.ceiling is not None:
    left.axvline(evaluation.ceiling.value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
  _reliability(right, evaluation)
  return figure


@styled
def curves(
  name: str,
  metrics: Mapping[str, Series],
  *,
  levels: Mapping[str, tuple[float, str]],
  limit: int = 9,
) -> Figure | None:
  """Small multiples of a run's metrics: raw values faint, their running mean bold, held-out dotted.

  metrics: by name, held-out ones as "eval/<name>". levels: metric name -> (value, label) of a
  horizontal line. None if no known metric was logged.
  """
  panels = [p for p in PANELS if any(n in metrics or f"eval/{n}" in metrics for n in p.names)]
  panels = panels[:limit]
  if not panels:
    return None
  columns = 2 if len(panels) == 4 else min(3, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(2.9 * columns, 2.05 * rows + 0.15), layout="constrained")
  for place, panel in enumerate(panels):
    axes = figure.add_subplot(rows, columns, place + 1)
    _curve_panel(axes, name, panel, metrics, levels)
  figure.supxlabel("step", fontsize=10, color=INK)
  figure.get_layout_engine().set(w_pad=0.07, h_pad=0.05)
  return figure


def _curve_panel(axes, run: str, panel: Panel, metrics, levels) -> None:
  colour, _ = look_of(run)
  shades = (colour, MUTED)
  several = len(panel.names) > 1
  for metric, shade in zip(panel.names, shades):
    label = metric.split("/")[-1] if several else "training"
    if metric in metrics:
      series = metrics[metric]
      axes.plot(series.steps, series.values, color=shade, alpha=0.25, linewidth=0.8)
      axes.plot(series.steps, smooth(series.values), color=shade, linewidth=1.6, label=label)
    if f"eval/{metric}" in metrics and not several:
      series = metrics[f"eval/{metric}"]
      axes.plot(
        series.steps,
        series.values,
        color=INK,
        marker="o",
        markersize=3.5,
        linestyle=":",
        linewidth=1.2,
        label="held out",
      )
    if metric in levels:
      value, text = levels[metric]
      axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=text)
  axes.set_title(panel.title)
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  unit = _LOSS_UNITS.get(objective_of(run)) if panel.names == ("loss",) else None
  axes.set_ylabel(unit or panel.unit)
  if len(axes.get_legend_handles_labels()[1]) > 1:
    axes.legend(fontsize=7.5, handlelength=1.6, borderaxespad=0.2)


def _frontier_runs(axes, head: str, runs: Sequence[PolicyEvaluation]) -> None:
  colour, marker = look_of(head)
  roots = np.array([run.sqrt_kl for run in runs])
  scores = [run.score for run in runs]
  across = np.abs(roots[:, 1:] - roots[:, :1]).T
  axes.errorbar(
    roots[:, 0],
    [s.value for s in scores],
    xerr=np.nan_to_num(across),
    yerr=interval_bars(scores),
    marker=marker,
    color=colour,
    markersize=8,
    elinewidth=1.4,
    capsize=3,
    linestyle="-" if len(runs) > 1 else "none",
    linewidth=1,
    zorder=3,
  )


def reference_band(axes, evaluation: PolicyEvaluation) -> None:
  """The reference's score: a dashed line within its interval, and its point at a KL of 0."""
  score, (colour, marker) = evaluation.reference_score, _REFERENCE
  if not math.isnan(score.low):
    axes.axhspan(score.low, score.high, color=colour, alpha=0.1, linewidth=0)
  axes.axhline(score.value, color=colour, linewidth=1, linestyle=(0, (4, 3)))
  axes.plot(
    [0],
    [score.value],
    marker,
    color=colour,
    markersize=8,
    clip_on=False,
    zorder=4,
  )


def _legend(figure: Figure, looks: Mapping[str, tuple[str, str]], place: str, columns: int) -> None:
  handles = [
    Line2D([], [], color=colour, marker=marker, markersize=7, linestyle="none", label=label)
    for label, (colour, marker) in looks.items()
  ]
  figure.legend(handles=handles, loc=place, ncols=columns, handletextpad=0.4)


def _rows(axes, estimates: Mapping[str, Estimate | None], *, names: bool) -> None:
  """One estimate a row, with its interval, in the look of its run."""
  for row, (name, estimate) in enumerate(estimates.items()):
    if estimate is None:
      continue
    colour, marker = look_of(name)
    axes.errorbar(
      [estimate.value],
      [row],
      xerr=interval_bars([estimate]),
      fmt=marker,
      color=colour,
      markersize=7,
      elinewidth=1.6,
      capsize=3,
    )
  axes.set_yticks(range(len(estimates)), map(title_of, estimates) if names else [])
  axes.set_ylim(len(estimates) - 0.5, -0.5)
  axes.grid(axis="y", visible=False)


def _grouped_rows(axes, rows: Sequence[tuple[str, Mapping[str, Estimate | None]]]) -> None:
  """Several estimates a row, one a run, spread so that their intervals do not hide each other."""
  for row, (_, estimates) in enumerate(rows):
    spread = np.linspace(-0.28, 0.28, len(estimates)) if len(estimates) > 1 else [0.0]
    for shift, (name, estimate) in zip(spread, estimates.items()):
      if estimate is None:
        continue
      colour, marker = look_of(name)
      axes.errorbar(
        [estimate.value],
        [row + shift],
        xerr=interval_bars([estimate]),
        fmt=marker,
        color=colour,
        ecolor=(colour, 0.45),
        markersize=4.5,
        elinewidth=1.2,
      )
  axes.set_yticks(range(len(rows)), [label for label, _ in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.grid(axis="y", visible=False)


def _accuracy_rows(
  axes, bars: Sequence[tuple[str, Estimate, bool]], *, counts: bool = True
) -> None:
  colour, marker = look_of("reward")
  for row, (_, estimate, ours) in enumerate(bars):
    axes.errorbar(
      [estimate.value],
      [row],
      xerr=interval_bars([estimate]),
      fmt=marker if ours else "|",
      color=colour if ours else INK,
      markersize=7 if ours else 12,
      elinewidth=1.6,
      capsize=3,
    )
  axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
  axes.set_yticks(range(len(bars)), [f"{n} (n = {e.n})" if counts else n for n, e, _ in bars])
  axes.set_ylim(len(bars) - 0.5, -0.5)
  axes.set_xlim(min(0.4, *(e.low - 0.02 for _, e, _ in bars)), 1.02)
  axes.set_xlabel("accuracy (95 % interval)")
  axes.set_title("Held-out pairs")
  axes.grid(axis="y", visible=False)


def _reliability(axes, evaluation: RewardEvaluation) -> None:
  colour, marker = look_of("reward")
  axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
  bins = evaluation.calibration
  sizes = [12 + 130 * b.n / evaluation.n for b in bins]
  confidence, accuracy = [b.confidence for b in bins], [b.accuracy for b in bins]
  axes.plot(confidence, accuracy, color=colour, linewidth=1)
  axes.scatter(confidence, accuracy, s=sizes, color=colour, marker=marker, zorder=3)
  axes.set_xlim(0.48, 1.02)
  axes.set_ylim(min(0.48, min(accuracy) - 0.04), 1.02)
  axes.set_xlabel("confidence σ(|r⁺ − r⁻|)")
  axes.set_ylabel("accuracy on labels")
  axes.set_title(f"Calibration (ECE {evaluation.calibration_error:.3f})")


def interval_bars(estimates: Sequence[Estimate]) -> np.ndarray:
  """[2, n] distances to the bounds; 0 where a bound is unknown."""
  pairs = [(e.value - e.low, e.high - e.value) for e in estimates]
  return np.maximum(np.nan_to_num(np.array(pairs).reshape(-1, 2).T), 0)


def smooth(values: np.ndarray) -> np.ndarray:
  """Running mean over the last n/20 values, NaNs left out."""
  width = max(1, len(values) // 20)
  known = np.isfinite(values)
  sums = np.convolve(np.where(known, values, 0.0), np.ones(width))[: len(values)]
  counts = np.convolve(known.astype(float), np.ones(width))[: len(values)]
  return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _scorer_name(evaluations: Mapping[str, PolicyEvaluation]) -> str:
  scorer = next(iter(evaluations.values())).scorer
  return "gold reward" if scorer == "gold" else "reward-model score"


def _all(evaluation: PolicyEvaluation) -> Mapping[str, Estimate]:
  return evaluation.families.get("all", {})


def _root(x: np.ndarray) -> np.ndarray:
  return np.sqrt(np.maximum(x, 0))


def _square_ticks(limit: float) -> list[float]:
  """Round KL values whose roots are spread over the axis."""
  round_numbers = (0.1, 0.25, 0.5, 1, 2, 4, 6, 9, 12, 16, 25, 36, 49, 64, 100, 150, 200, 300)
  ticks, last = [0.0], 0.0
  for value in round_numbers:
    if math.sqrt(value) <= limit and math.sqrt(value) - last >= limit / 7:
      ticks.append(value)
      last = math.sqrt(value)
  return ticks
