"""The grid of an online run's instruments: small plots that share their steps, of one run or of several.

One run: a colour a metric. Several: a colour a run, and a line style a metric. Raw values are faint, their
running mean is bold; a dashed red line is the step whose metrics stopped the run.
"""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from align_jax.evals import plots
from align_jax.evals.plots import INK, MUTED, Series

Metrics = Mapping[str, Series]

COLOURS = (
  "#0067a5", "#c14e00", "#00795a", "#8e3a80", "#7a6a00", "#b02a4c", "#4a5560", "#1f7a8c",
)  # fmt: skip
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_STOP = "#c1121f"
_COLUMNS, _LEGEND_COLUMNS = 3, 4
# Inches: of a plot, between plots and around them, with room for what is written there.
_WIDTH, _HEIGHT, _BESIDE, _BELOW = 2.17, 1.4, 0.78, 0.62
_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 0.74, 0.14, 0.32, 0.42, 0.17
TIMES = ("time/sample", "time/score", "time/train")


@dataclasses.dataclass(frozen=True)
class Panel:
  """Metrics in one small plot."""

  title: str
  unit: str
  lines: Mapping[str, str]  # metric -> what the legend calls it
  scale: str = "linear"  # "share": 0 to 1; "log"; "explained": 1 at most, cut below -1
  level: float | None = None  # where a dotted line shows what is neutral


_REWARD = (
  Panel("Score", "reward a response", {"score": "score"}),
  Panel("Spread of the score", "standard deviation", {"score/std": "score"}),
)
_FIXED = (
  Panel("KL to the reference", "nats a response", {"kl/ref": "k1", "kl/ref_k3": "k3"}, level=0.0),
  Panel("KL coefficient", "reward a nat", {"kl_coef": "coefficient"}),
  Panel("Entropy", "nats a token", {"entropy": "entropy"}),
  Panel("Response length", "tokens", {"response_length": "length"}),
  Panel("EOS rate", "share of responses", {"eos_rate": "EOS rate"}, "share"),
  Panel(
    "Variety of responses",
    "share",
    {
      "distinct/responses": "distinct responses",
      "distinct/bigrams": "distinct bigrams",
      "repetition/4grams": "repeated 4-grams",
    },
    "share",
  ),
  Panel("Clipped ratios", "share of tokens", {"ppo/clip_fraction": "clipped"}),
  Panel("Largest ratio", "π / π_old of a token", {"ppo/ratio_max": "ratio"}, "log", 1.0),
  Panel(
    "Sampler − trainer gap",
    "nats a token",
    {"ppo/sampler_mismatch": "mean", "ppo/sampler_mismatch_max": "largest"},
    "log",
  ),
  Panel("Importance weight", "mean of a token", {"ppo/importance_mean": "weight"}, level=1.0),
  Panel(
    "Value: explained variance",
    "share of variance",
    {"value/explained_variance": "explained"},
    "explained",
    0.0,
  ),
  Panel("Value: loss", "reward²", {"value/loss": "loss"}),
  Panel("Loss", "objective", {"loss": "loss"}),
  Panel("Gradient norm", "L2 norm", {"grad_norm": "norm"}),
)
_SPEED = Panel(
  "Speed",
  "tokens a second",
  {"sampling/tokens_per_s": "sampling", "tokens_per_s": "whole step"},
)


def panels(metrics: Sequence[Metrics]) -> list[Panel]:
  """The plots that at least one of these runs has numbers for, a plot for every reward by name."""
  known = dict.fromkeys(name for run in metrics for name in run)
  rewards = [n for n in known if n.startswith("score/") and n != "score/std"]
  named = [Panel(f"Reward: {n[6:]}", "reward a response", {n: n[6:]}) for n in rewards]
  wanted = [*_REWARD[:1], *named, *_REWARD[1:], *_FIXED, _SPEED]
  return [p for p in wanted if any(name in known for name in p.lines)]


def has_times(metrics: Sequence[Metrics]) -> bool:
  """Whether a run says what its iterations spent their time on."""
  return any(name in run for run in metrics for name in TIMES)


@plots.styled
def grid(
  runs: Mapping[str, Metrics], *, stops: Mapping[str, tuple[int, str]], title: str
) -> Figure | None:
  """All instruments of the runs.

  Args:
    runs: by the name that the legend shows, the run's metrics.
    stops: run -> (step, reason), of those that were stopped.
    title: of the whole figure; may be empty.

  Returns:
    None if no known metric was logged.
  """
  wanted = panels(list(runs.values()))
  timed = has_times(list(runs.values()))
  if not wanted and not timed:
    return None
  several = len(runs) > 1
  figure, cells = _cells(len(wanted) + timed, title, runs if several else {}, stops)
  for cell, panel in zip(cells, wanted):
    _draw(figure.add_subplot(cell), panel, runs, stops)
  if timed:
    axes = figure.add_subplot(cells[-1])
    _time_bars(axes, runs) if several else _time_shares(axes, *runs.values(), stops)
  return figure


def _cells(count: int, title: str, named: Mapping[str, Metrics], stops):
  """A figure with its title and a legend of the named runs, and places for `count` plots, by rows.

  All sizes are fixed: to find them from the texts takes longer than to draw the figure.
  """
  columns = min(_COLUMNS, count)
  rows = math.ceil(count / columns)
  lines = textwrap.fill(title, 38 * columns)
  handles = [
    Line2D([], [], color=colour, linewidth=2.2, label=name + _stopped_at(stops.get(name)))
    for name, colour in colours(named).items()
  ]
  top = _TOP + _LINE * (lines.count("\n") + 1) * bool(lines)
  bottom = _BOTTOM + 0.24 * math.ceil(len(handles) / _LEGEND_COLUMNS) + 0.24 * bool(handles)
  width = _LEFT + _WIDTH * columns + _BESIDE * (columns - 1) + _RIGHT
  height = top + _HEIGHT * rows + _BELOW * (rows - 1) + bottom
  figure = Figure(figsize=(width, height))
  figure.suptitle(lines, x=0.01, y=1 - 0.08 / height, ha="left", va="top", fontsize=10.5, color=INK)
  if handles:
    figure.legend(handles=handles, loc="lower center", ncols=min(_LEGEND_COLUMNS, len(handles)))
  places = figure.add_gridspec(
    rows,
    columns,
    left=_LEFT / width,
    right=1 - _RIGHT / width,
    top=1 - top / height,
    bottom=bottom / height,
    wspace=_BESIDE / _WIDTH,
    hspace=_BELOW / _HEIGHT,
  )
  return figure, list(places)[:count]


def _stopped_at(stop: tuple[int, str] | None) -> str:
  return f" (stopped by step {stop[0]})" if stop else ""


def colours(runs: Mapping[str, Metrics]) -> dict[str, str]:
  """The colour of every run in a comparison."""
  return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}


def _draw(axes: Axes, panel: Panel, runs: Mapping[str, Metrics], stops) -> None:
  several, tints = len(runs) > 1, colours(runs)
  drawn = [m for m in panel.lines if any(m in metrics for metrics in runs.values())]
  for name, metrics in runs.items():
    for place, metric in enumerate(panel.lines):
      if metric not in metrics:
        continue
      colour = tints[name] if several else COLOURS[place]
      _line(axes, metrics[metric], colour, _DASHES[place] if several else "-", faint=not several)
    if name in stops:
      _mark_stop(axes, stops[name][0], tints[name] if several else _STOP)
  if len(drawn) > 1:
    _legend(axes, panel, drawn, several)
  _scale(axes, panel, [metrics[m] for metrics in runs.values() for m in drawn if m in metrics])
  stopped = any(reason.startswith(m + " ") for _, reason in stops.values() for m in drawn)
  _title(axes, panel.title, _STOP if stopped else INK)
  axes.set_ylabel(panel.unit, fontsize=8.5)
  _step_axis(axes)


def _title(axes: Axes, text: str, colour: str = INK) -> None:
  """At a fixed height: nothing stands above the axes, and to look for it takes a third of a drawing."""
  axes.set_title(text, y=1.0, color=colour)


def _line(axes: Axes, series: Series, colour: str, dashes, *, faint: bool) -> None:
  lonely = "o" if len(series.steps) == 1 else None
  axes.plot(series.steps, series.values, color=colour, alpha=0.28 if faint else 0.14, linewidth=0.8)
  axes.plot(
    series.steps,
    plots.smooth(series.values),
    color=colour,
    linestyle=dashes,
    linewidth=1.6,
    marker=lonely,
    markersize=4,
  )


def _legend(axes: Axes, panel: Panel, drawn: Sequence[str], several: bool) -> None:
  """What the lines of one plot are; with several runs by their style, in grey."""
  places = {metric: place for place, metric in enumerate(panel.lines)}
  handles = [
    Line2D(
      [],
      [],
      color=MUTED if several else COLOURS[places[metric]],
      linestyle=_DASHES[places[metric]] if several else "-",
      linewidth=1.6,
      label=panel.lines[metric],
    )
    for metric in drawn
  ]
  axes.legend(handles=handles, fontsize=7.5, handlelength=2.0, borderaxespad=0.2, labelspacing=0.25)


def _scale(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
  values = np.concatenate([s.values for s in series])
  known = values[np.isfinite(values)]
  if panel.level is not None and panel.scale != "log":
    axes.axhline(panel.level, color=MUTED, linewidth=0.9, linestyle=":", zorder=0)
  if panel.scale == "share":
    axes.set_ylim(-0.03, 1.03 if axes.get_legend() is None else 1.5)  # room for the legend
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
  elif panel.scale == "explained" and len(known):
    axes.set_ylim(min(max(known.min() - 0.05, -1.0), -0.05), 1.03)
  elif panel.scale == "log" and len(known) and known.min() > 0 and known.max() > 10 * known.min():
    axes.set_yscale("log")
    if known.max() < 1000 * known.min():
      axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
      axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_stop(axes: Axes, step: int, colour: str) -> None:
  axes.axvline(step, color=colour, linewidth=1.1, linestyle=(0, (3, 2)), zorder=1)


def _step_axis(axes: Axes) -> None:
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
  axes.set_xlabel("step", fontsize=8, color=MUTED, labelpad=1)
  axes.tick_params(labelsize=8)


def time_shares(metrics: Metrics) -> dict[str, float]:
  """Mean seconds of an iteration by what they went into; the first, which compiles, is left out."""
  split = {n: metrics[n].values for n in TIMES if n in metrics}
  return {n: float(np.nanmean(x[1:] if len(x) > 1 else x)) for n, x in split.items()}


def _time_shares(axes: Axes, metrics: Metrics, stops) -> None:
  """Stacked shares of one run's iterations."""
  names = [n for n in TIMES if n in metrics]
  steps = metrics[names[0]].steps
  seconds = np.stack([np.nan_to_num(plots.smooth(metrics[n].values)) for n in names])
  total = np.maximum(seconds.sum(axis=0), 1e-12)
  labels = [n.split("/")[1] for n in names]
  tints = [COLOURS[TIMES.index(n)] for n in names]
  if len(steps) == 1:
    steps, seconds, total = np.array([0, 1]), np.repeat(seconds, 2, axis=1), np.repeat(total, 2)
  axes.stackplot(steps, seconds / total, colors=tints, labels=labels, alpha=0.75, linewidth=0)
  for step, _ in stops.values():
    _mark_stop(axes, step, _STOP)
  axes.set_ylim(0, 1)
  axes.set_xlim(steps[0], steps[-1])
  mean = sum(time_shares(metrics).values())
  _title(axes, f"Time ({mean:.3g} s a step)")
  axes.set_ylabel("share of a step", fontsize=8.5)
  legend = axes.legend(fontsize=7.5, ncols=3, loc="lower center", handlelength=1.0)
  legend.set_frame_on(True)
  legend.get_frame().set(facecolor="white", alpha=0.85, linewidth=0)
  _step_axis(axes)


def _time_bars(axes: Axes, runs: Mapping[str, Metrics]) -> None:
  """The mean shares of several runs, one bar each."""
  tints = colours(runs)
  for row, (name, metrics) in enumerate(runs.items()):
    spent = time_shares(metrics)
    total, left = sum(spent.values()), 0.0
    for metric, seconds in spent.items():
      share = seconds / total if total else 0.0
      place = TIMES.index(metric)
      axes.barh(row, share, left=left, color=COLOURS[place], alpha=0.75, height=0.62)
      left += share
    if spent:
      axes.text(1.02, row, f"{total:.3g} s", va="center", fontsize=7.5, color=tints[name])
  handles = [
    Line2D([], [], color=COLOURS[i], linewidth=5, alpha=0.75, label=n.split("/")[1])
    for i, n in enumerate(TIMES)
  ]
  axes.legend(
    handles=handles, fontsize=7.5, ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.42),
    handlelength=1.0, columnspacing=1.0,
  )  # fmt: skip
  axes.set_yticks(range(len(runs)), [""] * len(runs))
  for row, colour in enumerate(tints.values()):
    axes.plot([-0.04], [row], "s", color=colour, markersize=5, clip_on=False)
  axes.set_ylim(len(runs) - 0.5, -0.5)
  axes.set_xlim(0, 1)
  axes.tick_params(labelsize=8, axis="x")
  axes.tick_params(length=0, axis="y")
  axes.grid(axis="y", visible=False)
  _title(axes, "Time")
  axes.set_xlabel("share of a step, and its seconds", fontsize=8, color=MUTED, labelpad=1)
