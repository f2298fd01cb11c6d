"""The bar chart of a benchmark: speed and memory of every variant, relative to the first."""

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib import ticker
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
def peer_figure(sets: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Speed and peak memory of every side, {set: what was measured of it}; relative to the first side."""
  drawn = Figure(figsize=(10.8, 3.8), layout="constrained")
  panels = (("speedup", "examples per second (×)"), ("memory_ratio", "peak memory (×)"))
  for axes, (field, label) in zip(drawn.subplots(1, 2), panels):
    _bars(axes, sets, field)
    axes.set_ylabel(label)
    axes.axhline(1.0, color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.1)
  handles, names = axes.get_legend_handles_labels()
  drawn.legend(handles, names, loc="outside upper center", ncols=len(names))
  return drawn


def peer_png(sets: Mapping[str, Mapping[str, Any]]) -> bytes:
  return plots.to_png(peer_figure(sets))


def save(results: Mapping[str, Any], file: pathlib.Path) -> None:
  file.write_bytes(plots.to_png(figure(results)))


def _bars(axes, sets: Mapping[str, Mapping[str, Any]], field: str) -> None:
  """A colour for every variant that any set has, in the order in which they are met."""
  names = list(dict.fromkeys(name for found in sets.values() for name in found["variants"]))
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    having = [
      (at, f["variants"][name]) for at, f in enumerate(sets.values()) if name in f["variants"]
    ]
    rows = [row for _, row in having]
    heights = [row[field] for row in rows]
    places = [at + (i - (len(names) - 1) / 2) * width for at, _ in having]
    axes.bar(places, heights, width * 0.9, color=_COLOURS[i % len(_COLOURS)], label=name)
    tops = heights
    if field == "speedup":
      low = [row[field] - row["speedup_range"][0] for row in rows]
      high = [row["speedup_range"][1] - row[field] for row in rows]
      axes.errorbar(places, heights, yerr=[low, high], fmt="none", ecolor=plots.INK, capsize=2)
      tops = [row["speedup_range"][1] for row in rows]
    for place, height, top in zip(places, heights, tops):  # clear of the range's cap
      where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 8}
      axes.annotate(f"{height:.2f}", (place, top), **where)
  axes.set_xticks(range(len(sets)), list(sets))


@plots.styled
def scaling_figure(axes: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Seconds a step against each size, {axis: {step: rows and fit}}, on logarithmic scales."""
  drawn = Figure(figsize=(3.2 * len(axes), 3.4), layout="constrained")
  for panel, (axis, steps) in zip(drawn.subplots(1, len(axes), squeeze=False)[0], axes.items()):
    for (name, found), colour in zip(steps.items(), _COLOURS):
      sizes, seconds = ([row[k] for row in found["rows"]] for k in ("size", "s"))
      low = [row["s"] - row["range"][0] for row in found["rows"]]
      high = [row["range"][1] - row["s"] for row in found["rows"]]
      fit = found["fit"]
      label = f"{name}: {fit['exponent']:.2f} ± {fit['standard_error']:.2f}"
      panel.errorbar(sizes, seconds, yerr=[low, high], marker="o", color=colour, label=label)
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds a step")
    panel.set_xticks(sizes, [str(size) for size in sizes], minor=False, fontsize=8)
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.yaxis.set_minor_formatter(ticker.LogFormatterSciNotation(minor_thresholds=(1.5, 0.5)))
    panel.legend(title="exponent", fontsize=8, title_fontsize=8)
  return drawn


def scaling_png(axes: Mapping[str, Mapping[str, Any]]) -> bytes:
  return plots.to_png(scaling_figure(axes))
