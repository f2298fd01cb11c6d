"""The bar chart of a benchmark: speed and memory of every variant, relative to the first."""

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from align_jax.evals import plots

_COLOURS = ("#0067a5", "#c14e00", "#00795a", "#8e3a80")


@plots.styled
def figure(results: Mapping[str, Any]) -> Figure:
  """Two panels, one group of bars a data set; results: what benchmark.json holds."""
  drawn = Figure(figsize=(9.6, 3.6), layout="constrained")
  panels = (("speedup", "speed-up of a step (×)"), ("memory_ratio", "temporary memory (×)"))
  for axes, (field, label) in zip(drawn.subplots(1, 2), panels):
    _bars(axes, results["sets"], field)
    axes.set_ylabel(label)
    axes.axhline(1.0, color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.1)
  names = next(iter(results["sets"].values()))["variants"]
  drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
  return drawn


@plots.styled
def sampling_figure(comparisons: Mapping[str, Mapping[str, Any]]) -> Figure:
  """One panel a comparison, {title: {set: what was measured of it}}; tokens/s relative to the first."""
  drawn = Figure(figsize=(4.8 * len(comparisons), 3.6), layout="constrained")
  for axes, (title, sets) in zip(
    drawn.subplots(1, len(comparisons), squeeze=False)[0], comparisons.items()
  ):
    _bars(axes, sets, "speedup")
    axes.set(title=title, ylabel="tokens per second (×)")
    axes.axhline(1.0, color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.25)
    axes.legend(loc="upper left", ncols=2)
  return drawn


def sampling_png(comparisons: Mapping[str, Mapping[str, Any]]) -> bytes:
  return plots.to_png(sampling_figure(comparisons))


def save(results: Mapping[str, Any], file: pathlib.Path) -> None:
  file.write_bytes(plots.to_png(figure(results)))


def _bars(axes, sets: Mapping[str, Any], field: str) -> None:
  names = list(next(iter(sets.values()))["variants"])
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    rows = [found["variants"][name] for found in sets.values()]
    heights = [row[field] for row in rows]
    places = [at + (i - (len(names) - 1) / 2) * width for at in range(len(rows))]
    bars = axes.bar(places, heights, width * 0.9, color=_COLOURS[i % len(_COLOURS)], label=name)
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=7)  # clear of the range's cap
    if field == "speedup":
      low = [row[field] - row["speedup_range"][0] for row in rows]
      high = [row["speedup_range"][1] - row[field] for row in rows]
      axes.errorbar(places, heights, yerr=[low, high], fmt="none", ecolor=plots.INK, capsize=2)
  axes.set_xticks(range(len(sets)), list(sets))
