"""Gold and proxy against √KL, after Gao et al. 2022: one panel for each thing that was varied."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from align_jax.evals import overoptimization, plots
from align_jax.evals.overoptimization_report import Curve, Report, RlCurve

WIDTH = 10.6  # inches
CAPTION = (
  "Best of n. Points: the gold reward of what the proxy chose, over that of one sample; bars are 95 % "
  "intervals over prompts. Lines: R = d (α − β d), fitted to all n, dashed beyond the n of the fit that "
  "is extrapolated. The mark on a line is its peak."
)
RL_CAPTION = (
  "Online learning. Points: windows of iterations; lines: R = d (α − β log d), fitted to the windows with "
  "d ≥ 1. Below, the proxy’s score in its deviations under the initial policy."
)
ACCURACY_CAPTION = (
  "Agreement with the labels of held-out pairs, the mean over seeds with its 95 % interval over pairs. "
  "Dashed: the ceiling, mean max(p, 1 − p), that the labeller’s noise and gold ties imply."
)
_RAMP = ("#c98a2b", "#7fa650", "#2a9d8f", "#2a6f9d", "#1b2f5c")
_COLOURS = ("#0067a5", "#c14e00", "#00795a", "#8e3a80", "#7a6a00", "#b02a4c")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@plots.styled
def bon(found: Report) -> Figure:
  """Amounts of data for every arm, sizes at an amount they share, ensembles, and proxies' own scores."""
  arms = list(dict.fromkeys(curve.arm for curve in found.curves))
  combined = list(dict.fromkeys(e.arm for e in found.ensembles))
  panels = [(_amounts, arm) for arm in arms] + [(_sizes, "")]
  panels += [(_ensembles, arm) for arm in combined]
  panels += [(_own, arm) for arm in combined or arms[:1]]
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(WIDTH, 2.9 * rows + 0.2), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
  for place, axes in enumerate(grid):
    if place >= len(panels):
      axes.set_visible(False)
      continue
    draw, arm = panels[place]
    draw(axes, found, arm)
    axes.set_xlabel("√KL of best-of-n  (√nats)" if place >= len(panels) - columns else "")
    axes.set_ylabel("proxy, its deviations" if draw is _own else "gold over the start")
  gold = [axes for axes, (draw, _) in zip(grid, panels) if draw is not _own]
  low, high = min(a.get_ylim()[0] for a in gold), max(a.get_ylim()[1] for a in gold)
  reach = max(p.distance for c in (*found.curves, *found.ensembles) for p in c.points)
  for axes in grid[: len(panels)]:
    axes.set_xlim(0, 1.04 * reach)
  for axes in gold:
    axes.set_ylim(low, high)
  return figure


def _amounts(axes, found: Report, arm: str) -> None:
  curves = [c for c in found.curves if c.arm == arm]
  for i, curve in enumerate(curves):
    _curve(axes, curve, _shade(i, len(curves)), _MARKERS[i % 6], f"{curve.comparisons:,}")
  labels = f"labels at T = {curves[0].temperature:g}" if curves[0].temperature else "gold labels"
  axes.set_title(f"{arm} ({_count(curves[0].parameters)}), {labels}")
  _legend(axes, "comparisons")


def _own(axes, found: Report, arm: str) -> None:
  """What the proxies of an arm say of their own choices."""
  curves = [c for c in found.curves if c.arm == arm]
  for i, curve in enumerate(curves):
    axes.plot(
      [p.distance for p in curve.points],
      [p.proxy.value for p in curve.points],
      color=_shade(i, len(curves)),
      marker=_MARKERS[i % 6],
      markersize=3.6,
      linewidth=1.2,
      label=f"{curve.comparisons:,}",
    )
  axes.set_title(f"{arm}: the proxy’s own score")
  _legend(axes, "comparisons")


def _shade(place: int, count: int) -> str:
  """From light to dark with the amount of data."""
  return _RAMP[round(place * (len(_RAMP) - 1) / max(1, count - 1))]


def _sizes(axes, found: Report, arm: str) -> None:
  """At the largest amount that all arms with gold labels have; `arm` is not asked for."""
  del arm
  gold = [c for c in found.curves if not c.temperature]
  arms = list(dict.fromkeys(c.arm for c in gold))
  shared = [
    n for n in {c.comparisons for c in gold} if sum(c.comparisons == n for c in gold) == len(arms)
  ]
  amount = max(shared, default=None)
  curves = [c for c in gold if c.comparisons == amount]
  for i, curve in enumerate(sorted(curves, key=lambda c: c.parameters)):
    _curve(axes, curve, _COLOURS[i % 6], _MARKERS[i % 6], _count(curve.parameters))
  axes.set_title(f"Sizes, {amount:,} comparisons" if amount else "Sizes")
  _legend(axes, "parameters")


def _ensembles(axes, found: Report, arm: str) -> None:
  ensembles = [e for e in found.ensembles if e.arm == arm]
  single = [c for c in found.curves if c.arm == arm and c.comparisons == ensembles[0].comparisons]
  for i, curve in enumerate([*single, *ensembles]):
    _curve(axes, curve, _COLOURS[i % 6], _MARKERS[i % 6], curve.combine or "one member")
  axes.set_title(f"Ensembles of {ensembles[0].seeds} {arm}, {ensembles[0].comparisons:,}")
  _legend(axes, "combined by")


def _curve(axes, curve: Curve, colour: str, marker: str, label: str) -> None:
  gains = [p.gold for p in curve.points]
  axes.errorbar(
    [p.distance for p in curve.points],
    [g.value for g in gains],
    yerr=plots.interval_bars(gains),
    fmt=marker,
    color=colour,
    ecolor=(colour, 0.3),
    markersize=3.6,
    elinewidth=1.0,
    label=label,
    zorder=3,
  )
  reach = max(p.distance for p in curve.points)
  _law(axes, curve.law, np.linspace(0, reach, 200), colour, curve.extrapolation)


def _law(axes, law, at: np.ndarray, colour: str, extrapolation) -> None:
  if law is None:
    return
  values = overoptimization.predict(law.form, law.alpha.value, law.beta.value, at)
  split = extrapolation.fitted_to if extrapolation else math.inf
  near = at <= split
  axes.plot(at[near], values[near], color=colour, linewidth=1.3, alpha=0.85)
  axes.plot(
    at[~near], values[~near], color=colour, linewidth=1.3, alpha=0.85, linestyle=(0, (4, 2))
  )
  place, height = law.peak_distance.value, law.peak_gain.value
  if at[0] < place <= at[-1]:
    axes.plot([place], [height], marker="|", markersize=11, color=colour, zorder=4)


@plots.styled
def rl(found: Report) -> Figure:
  """KL coefficients, amounts of comparisons, and ensembles of online learning: gold, and the proxy."""
  groups = rl_groups(found.rl)
  figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
  grid = figure.subplots(2, len(groups), sharey="row", sharex=True, squeeze=False)
  for column, (title, runs) in enumerate(groups.items()):
    for i, run in enumerate(runs):
      _rl_curve(grid[:, column], run, _COLOURS[i % 6], _MARKERS[i % 6], rl_label(title, run))
    grid[0, column].set_title(title)
    grid[1, column].set_xlabel("√KL of the policy  (√nats)")
    grid[1, column].set_xlim(left=0)
    _legend(grid[0, column], "")
  grid[0, 0].set_ylabel("gold over the start")
  grid[1, 0].set_ylabel("proxy, its deviations")
  return figure


def rl_groups(runs: Sequence[RlCurve]) -> dict[str, list[RlCurve]]:
  """The runs by what they vary from the one that most of the others differ from in one thing."""
  if not runs:
    return {}
  fields = ("arm", "comparisons", "kl_coef", "combine")

  def differences(a: RlCurve, b: RlCurve) -> list[str]:
    return [name for name in fields if getattr(a, name) != getattr(b, name)]

  single = [run for run in runs if run.combine is None] or list(runs)
  base = max(single, key=lambda run: sum(len(differences(run, other)) == 1 for other in runs))

  def varied(name: str) -> list[RlCurve]:
    return [run for run in runs if run is base or differences(base, run) == [name]]

  groups = {
    "KL coefficients": sorted(varied("kl_coef"), key=lambda run: run.kl_coef),
    "Comparisons of the proxy": sorted(varied("comparisons"), key=lambda run: run.comparisons),
    "Ensembles": [base, *(run for run in varied("combine") if run is not base)],
  }
  return {title: found for title, found in groups.items() if len(found) > 1}


def rl_label(title: str, run: RlCurve) -> str:
  if title.startswith("KL"):
    return f"KL × {run.kl_coef:g}"
  if title.startswith("Comparisons"):
    return f"{run.comparisons:,}"
  return run.combine or "one member"


def _rl_curve(pair, run: RlCurve, colour: str, marker: str, label: str) -> None:
  d = np.array([p.distance for p in run.points])
  for axes, name in zip(pair, ("gold", "proxy")):
    gains = [getattr(p, name) for p in run.points]
    axes.errorbar(
      d,
      [g.value for g in gains],
      yerr=plots.interval_bars(gains),
      fmt=marker,
      color=colour,
      ecolor=(colour, 0.25),
      markersize=3.2,
      elinewidth=0.9,
      label=label,
      zorder=3,
    )
  if run.law is not None and d.max() > overoptimization.RL_FIRST_DISTANCE:
    at = np.linspace(overoptimization.RL_FIRST_DISTANCE, d.max(), 200)
    _law(pair[0], run.law, at, colour, run.extrapolation)


@plots.styled
def accuracy(found: Report) -> Figure:
  """Agreement with labels as data grows, beside the ceiling that the planted noise implies."""
  figure = Figure(figsize=(7.4, 3.4), layout="constrained")
  axes = figure.add_subplot()
  handles = []
  for i, arm in enumerate(dict.fromkeys(c.arm for c in found.curves)):
    curves = sorted((c for c in found.curves if c.arm == arm), key=lambda c: c.comparisons)
    colour, marker = _COLOURS[i % 6], _MARKERS[i % 6]
    estimates = [c.accuracy.labels for c in curves]
    axes.errorbar(
      [c.comparisons for c in curves],
      [e.value for e in estimates],
      yerr=plots.interval_bars(estimates),
      marker=marker,
      color=colour,
      ecolor=(colour, 0.5),
      markersize=5,
      linewidth=1.3,
      capsize=2.5,
    )
    ceiling = curves[0].accuracy.ceiling.value
    axes.axhline(ceiling, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    labels = f"{arm}, T = {curves[0].temperature:g}" if curves[0].temperature else f"{arm}, gold"
    handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=labels))
  axes.set_xscale("log", base=2)
  amounts = sorted({c.comparisons for c in found.curves})
  axes.set_xticks(amounts, [f"{n:,}" for n in amounts])
  axes.minorticks_off()
  axes.axhline(0.5, color=plots.MUTED, linewidth=1, linestyle=":")
  axes.set_xlabel("comparisons")
  axes.set_ylabel("agreement with held-out labels")
  figure.legend(handles=handles, loc="outside right upper", fontsize=8)
  return figure


def _count(parameters: int) -> str:
  return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{round(parameters / 1e3)} k"


def _legend(axes, title: str) -> None:
  axes.legend(
    fontsize=7.5, title=title or None, title_fontsize=7.5, handlelength=1.2, labelspacing=0.25,
    borderaxespad=0.2,
  )  # fmt: skip
