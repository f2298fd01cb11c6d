"""The figures of a sweep: the frontier of score against √KL, and the leaderboard of any metric.

Large marks are means over seeds with their 95 % intervals, small ones the seeds themselves.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from align_jax.evals import plots
from align_jax.evals.statistics import Estimate
from align_jax.evals.sweep import METRICS, Row, Run, Table, metric_title

# After the colours of the pipeline's own objectives; told apart by their markers too.
_LOOKS = (
  ("#7a6a00", "v"),
  ("#b02a4c", "X"),
  ("#2f4b9b", "p"),
  ("#1f7a8c", ">"),
  ("#8c5a2b", "h"),
  ("#8e3a80", "P"),
  ("#56731a", "<"),
  ("#5b4fa8", "*"),
  ("#a3471d", "d"),
  ("#3c444b", "o"),
)
_KNOWN = ("dpo", "ipo", "kto")
_DIRECTIONS = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 16, endpoint=False)]
_DISTANCES = (10, 16, 24, 36, 52, 72)  # points


def looks(variants: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Colour and marker of every variant; those of one objective (`dpo-beta=0.1`...) share theirs."""
  heads = dict.fromkeys(map(head_of, variants))
  spare = [head for head in heads if head not in _KNOWN]
  found = {head: _LOOKS[place % len(_LOOKS)] for place, head in enumerate(spare)}
  return {
    v: plots.look_of(head_of(v)) if head_of(v) in _KNOWN else found[head_of(v)] for v in variants
  }


def head_of(variant: str) -> str:
  """What stands before the grid's settings: "dpo" of "dpo-learning_rate=0.0001"."""
  return variant.partition("-")[0]


@plots.styled
def frontier(table: Table) -> Figure:
  """Score against √KL for every variant: what it bought with its distance from the reference."""
  rows = [row for row in table.rows if row.finished]
  figure = Figure(figsize=(9.2, 5.6), layout="constrained")
  axes = figure.add_subplot()
  plots.reference_band(axes, table.evaluation)
  styles = looks(sorted(row.variant for row in table.rows))
  for row in rows:
    _frontier_row(axes, row, *styles[row.variant])
  axes.set_ylabel(f"{metric_title('score', table.evaluation)} (mean a response)")
  _frame(axes, rows, table.evaluation.reference_score.value)
  plots.root_kl_axis(axes)
  _label(figure, axes, rows, {name: colour for name, (colour, _) in styles.items()})
  return figure


@plots.styled
def leaderboard(table: Table, metric: str) -> Figure:
  """Every variant's mean of a metric, in the order of the table, with its interval and its seeds."""
  figure = Figure(figsize=(8.6, 0.31 * len(table.rows) + 1.1), layout="constrained")
  axes = figure.add_subplot()
  styles = looks(sorted(row.variant for row in table.rows))
  for place, row in enumerate(table.rows):
    _leaderboard_row(axes, place, row, metric, styles[row.variant][0])
  level = _reference_level(table, metric)
  if level is not None:
    axes.axvline(level, color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
  axes.set_yticks(range(len(table.rows)), [row.variant for row in table.rows])
  axes.set_ylim(len(table.rows) - 0.4, -0.6)
  axes.grid(axis="y", visible=False)
  axes.tick_params(axis="y", length=0)
  unit = "" if METRICS[metric].is_share else f"{METRICS[metric].unit}, "
  title = metric_title(metric, table.evaluation)
  axes.set_xlabel(f"{title} ({unit}95 % interval over seeds)")
  return figure


def _frontier_row(axes, row: Row, colour: str, marker: str) -> None:
  across, up = row.metrics["sqrt_kl"], row.metrics["score"]
  axes.scatter(
    [run.value("sqrt_kl") for run in row.finished],
    [run.value("score") for run in row.finished],
    s=13,
    color=colour,
    marker=marker,
    alpha=0.45,
    linewidths=0,
    zorder=3,
  )
  axes.errorbar(
    [across.value],
    [up.value],
    xerr=plots.interval_bars([across]),
    yerr=plots.interval_bars([up]),
    marker=marker,
    color=colour,
    ecolor=(colour, 0.4),
    markersize=8,
    markeredgecolor="white",
    markeredgewidth=0.6,
    elinewidth=1.1,
    linestyle="none",
    zorder=4,
  )


def _frame(axes, rows: Sequence[Row], level: float) -> None:
  """Limits that hold every seed, mean and the reference; a very long interval may leave the frame."""
  across = [run.value("sqrt_kl") for row in rows for run in row.finished]
  up = [run.value("score") for row in rows for run in row.finished] + [level]
  wide, tall = max(across) or 1.0, (max(up) - min(up)) or 1.0
  axes.set_xlim(0, 1.12 * wide)
  axes.set_ylim(min(up) - 0.12 * tall, max(up) + 0.12 * tall)


def _leaderboard_row(axes, place: int, row: Row, metric: str, colour: str) -> None:
  if row.failed:
    text = f"{len(row.failed)} of {len(row.runs)} failed: {row.failed[0].state}"
  else:
    text = "" if row.finished else "not run yet"
  estimate = row.metrics[metric]
  if not estimate.n:
    axes.annotate(
      text, (0, place), (6, 0), textcoords="offset points", va="center", color=plots.MUTED,
      fontsize=8.5, xycoords=axes.get_yaxis_transform(),
    )  # fmt: skip
    return
  axes.barh([place], [estimate.value], height=0.62, color=colour, alpha=0.28, linewidth=0, zorder=2)
  seeds = [run.value(metric) for run in row.finished]
  axes.scatter(seeds, [place] * len(seeds), s=14, color=colour, alpha=0.6, linewidths=0, zorder=3)
  axes.errorbar(
    [estimate.value], [place], xerr=plots.interval_bars([estimate]), fmt="|", color=colour, markersize=13,
    markeredgewidth=2, elinewidth=1.4, capsize=3, zorder=4,
  )  # fmt: skip
  if text:
    _beside(axes, place, estimate, seeds, text)


def _beside(axes, place: int, estimate: Estimate, seeds: Sequence[float], text: str) -> None:
  right = np.nanmax([*seeds, estimate.value, estimate.high])
  axes.annotate(
    text, (max(right, 0), place), (7, 0), textcoords="offset points", va="center",
    color=plots.MUTED, fontsize=8.5,
  )  # fmt: skip


def _reference_level(table: Table, metric: str) -> float | None:
  """Where the reference itself stands, for the metrics that are known of it."""
  if table.evaluation is None:
    return None
  known: Mapping[str, float] = {
    "score": table.evaluation.reference_score.value,
    "length": table.evaluation.reference_length.value,
    "win_rate": 0.5,
  }
  return known.get(metric)


def _label(figure: Figure, axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
  """Writes every variant's name beside its mean, where it covers no mark and no other name.

  Names are placed one after the other, each at the free place nearest to its mark, with a thin line
  where that is not beside it.
  """
  FigureCanvasAgg(figure).draw()  # so that the axes have their final size
  marks = axes.transData.transform([_mean_of(row) for row in rows])
  seeds = axes.transData.transform([_point_of(run) for row in rows for run in row.finished])
  scale, size = figure.dpi / 72, 8.5 if len(rows) <= 16 else 7
  frame, taken = axes.get_window_extent(), []
  for row, mark in sorted(zip(rows, marks), key=lambda pair: -pair[1][1]):
    half = _half_size(figure, axes, row.variant, size)
    distance, centre = min(
      _places(mark, half, scale),
      key=lambda place: place[0] + _cost(place[1], half, marks, seeds, taken, frame),
    )
    colour = colours[row.variant]
    line = {"arrowstyle": "-", "color": (colour, 0.5), "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    text = axes.annotate(
      row.variant, _mean_of(row), (centre - mark) / scale, textcoords="offset points",
      fontsize=size, color=colour, ha="center", va="center", zorder=6,
      arrowprops=line if distance > _DISTANCES[1] else None,
    )  # fmt: skip
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
    taken.append((centre - half, centre + half))


def _half_size(figure: Figure, axes, text: str, size: float) -> np.ndarray:
  """Half the width and height of a text in pixels."""
  probe = axes.text(0, 0, text, fontsize=size)
  extent = probe.get_window_extent(figure.canvas.get_renderer())
  probe.remove()
  return np.array([extent.width, extent.height]) / 2


def _mean_of(row: Row) -> tuple[float, float]:
  return row.metrics["sqrt_kl"].value, row.metrics["score"].value


def _point_of(run: Run) -> tuple[float, float]:
  return run.value("sqrt_kl"), run.value("score")


def _places(mark: np.ndarray, half: np.ndarray, scale: float):
  """(distance in points, centre in pixels) of the places that a name may take."""
  for distance in _DISTANCES:
    for direction in _DIRECTIONS:
      reach = half * direction  # the nearest side of the box, not its centre, is at this distance
      yield distance, mark + reach + distance * scale * np.array(direction)


def _cost(centre: np.ndarray, half: np.ndarray, marks, seeds, taken, frame) -> float:
  """0 for a free place, else the points of distance one would rather go to find a better one."""
  low, high = centre - half - 2, centre + half + 2
  covered = ((marks > low - 7) & (marks < high + 7)).all(axis=1).sum()
  dotted = ((seeds > low) & (seeds < high)).all(axis=1).sum()
  hidden = sum(bool(((top > low) & (bottom < high)).all()) for bottom, top in taken)
  outside = bool((low < frame.min).any() or (high > frame.max).any())
  return 60.0 * covered + 8.0 * dotted + 100.0 * hidden + 200.0 * outside
