"""The figure of a sweep's online runs: every score over √KL while they trained."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from align_jax.evals import plots, sweep_curves, sweep_plots
from align_jax.evals.sweep_curves import Curves


@plots.styled
def scores_over_kl(variants: Mapping[str, Sequence[Curves]]) -> Figure:
  """One panel a reward, against √KL, with one line a variant from its first steps to its last.

  Strong lines are means over seeds of the bins of `sweep_curves.binned`, faint ones the seeds, the dot
  is the end, and the ring the best bin of a judge that nobody learns from. What is learned from comes
  first.

  Args:
    variants: the runs of each, by name; runs of a variant log the same rewards.
  """
  learned = [n for runs in variants.values() for run in runs for n in run.learned]
  names = dict.fromkeys(learned) | dict.fromkeys(
    n for runs in variants.values() for run in runs for n in run.scores
  )
  figure = Figure(figsize=(5.2 * len(names), 4.9), layout="constrained")
  panels = figure.subplots(1, len(names), squeeze=False)[0]
  looks = sweep_plots.looks(sorted(variants))
  for axes, name in zip(panels, names):
    for variant, runs in variants.items():
      if all(name in run.scores for run in runs):
        _line(axes, name, runs, looks[variant][0], _dashes(variant, variants), variant)
    axes.set_title(f"{name}, learned from" if name in learned else f"{name}, only watched", pad=26)
    axes.set_ylabel("mean a response")
    axes.set_xlim(left=0)
    plots.root_kl_axis(axes)
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False
  )
  return figure


def _line(axes, name: str, runs: Sequence[Curves], colour: str, dashes, label: str) -> None:
  root_kl, scores = sweep_curves.binned(runs)
  mean = scores[name].mean(axis=0)
  for run in runs if len(runs) > 1 else ():
    own, values = sweep_curves.binned([run])
    axes.plot(own, values[name][0], color=colour, linestyle=dashes, linewidth=0.7, alpha=0.3)
  axes.plot(root_kl, mean, color=colour, linestyle=dashes, linewidth=1.6, label=label)
  axes.plot(root_kl[-1], mean[-1], "o", color=colour, markersize=5)
  if name not in runs[0].learned:
    best = int(np.argmax(mean))
    axes.plot(root_kl[best], mean[best], "o", markersize=9, markerfacecolor="none", color=colour)


def _dashes(variant: str, variants: Mapping[str, Sequence[Curves]]):
  """Variants of one head share its colour: the second, third... of them are dashed."""
  head = sweep_plots.head_of(variant)
  place = [v for v in variants if sweep_plots.head_of(v) == head].index(variant)
  return ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))[place % 4]
