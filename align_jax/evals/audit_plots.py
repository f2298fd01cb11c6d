"""The pictures of an audit: accuracy by group, calibration, spread, length, features, drift."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from align_jax.evals import plots
from align_jax.evals.audit import Audit, Group
from align_jax.evals.features import Regression
from align_jax.evals.statistics import Estimate

_MODEL, _MARK = plots.look_of("reward")
_LABELS, _GOLD = "#0067a5", "#00795a"
_DASHED = (0, (4, 3))
_MOST = 24  # groups drawn of one kind, the largest


@plots.styled
def accuracy(found: Audit) -> Figure:
  """Accuracy of every group, beside "longer wins" and the ceiling where it is known."""
  rows: list[Group | str] = []
  for kind, groups in found.groups.items():
    kept = largest(groups)
    rows += ([] if kind == "all" else [title_of(kind)]) + list(kept)
  figure = Figure(figsize=(8.6, 0.245 * len(rows) + 1.3), layout="constrained")
  axes = figure.add_subplot()
  for place, row in enumerate(rows):
    if not isinstance(row, str):
      _group(axes, place, row, first=place == 0)
  axes.axvline(0.5, color=plots.MUTED, linewidth=1, linestyle=":")
  names = [row if isinstance(row, str) else f"{row.name} (n = {row.n})" for row in rows]
  axes.set_yticks(range(len(rows)), names)
  for label, row in zip(axes.get_yticklabels(), rows):
    label.set_fontweight("bold" if isinstance(row, str) else "normal")
  axes.set_ylim(len(rows) - 0.4, -0.7)
  axes.set_xlim(-0.02, 1.02)
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axes.set_xlabel("agreement with the labels (95 % interval)")
  axes.grid(axis="y", visible=False)
  figure.legend(loc="outside upper center", ncols=4, fontsize=8.5)
  return figure


def largest(groups: Sequence[Group]) -> list[Group]:
  """The `_MOST` largest groups, in the order that they had."""
  kept = sorted(groups, key=lambda g: -g.n)[:_MOST]
  return [g for g in groups if g in kept]


def title_of(kind: str) -> str:
  """The heading of a kind of groups."""
  return {
    "length": "by tokens, chosen − rejected",
    "agreement": "by agreement of labellers",
  }.get(kind, f"by {kind}")


def _group(axes, place: int, row: Group, *, first: bool) -> None:
  def label(text: str) -> str | None:
    return text if first else None

  if row.ceiling is not None:
    axes.plot(
      [row.ceiling], [place], "|", color=plots.INK, markersize=12, markeredgewidth=1.6,
      label=label("ceiling"),
    )  # fmt: skip
  if not row.accuracy.n:
    return
  axes.plot([row.longer.value], [place], "x", color=plots.MUTED, label=label("“longer wins”"))
  _bar(axes, row.accuracy, place, _MODEL, _MARK, label("scorer"))
  if row.gold is not None:
    axes.plot([row.gold.value], [place], "D", color=_GOLD, markersize=4,
              markerfacecolor="none", label=label("scorer on gold"))  # fmt: skip


def _bar(axes, found: Estimate, place: float, colour: str, marker: str, label=None, size=6):
  axes.errorbar(
    [found.value], [place], xerr=plots.interval_bars([found]), fmt=marker, color=colour,
    ecolor=(colour, 0.5), markersize=size, elinewidth=1.6, label=label,
  )  # fmt: skip


@plots.styled
def calibration(found: Audit) -> Figure:
  """The reliability diagram with bins of equal mass, and how many confidences there are of each."""
  figure = Figure(figsize=(8.6, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1, 1))
  bins = found.calibration.bins_equal_mass
  confidence, share = [b.confidence for b in bins], [b.accuracy for b in bins]
  errors = [np.sqrt(a * (1 - a) / b.n) * 1.96 for a, b in zip(share, bins)]
  left.plot([0.5, 1], [0.5, 1], color=plots.MUTED, linewidth=1, linestyle=_DASHED)
  left.errorbar(
    confidence, share, yerr=errors, fmt=_MARK + "-", color=_MODEL, ecolor=(_MODEL, 0.5),
    markersize=6, linewidth=1, elinewidth=1.4,
  )  # fmt: skip
  left.set_xlabel("confidence σ(|r⁺ − r⁻|), bins of equal mass")
  left.set_ylabel("agreement with the labels")
  left.set_title(f"Reliability: ECE {found.calibration.ece_equal_mass.value:.3f}")
  wide = found.calibration.bins
  right.bar(
    [b.confidence for b in wide], [b.n / found.n for b in wide], width=0.06, color=(_MODEL, 0.6)
  )
  right.set_xlim(0.47, 1.03)
  right.set_xlabel("confidence")
  right.set_ylabel("share of pairs")
  text = "none" if found.temperature is None else f"{found.temperature.value:.2f}"
  right.set_title(f"Confidences; best temperature {text}")
  right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  return figure


@plots.styled
def spread(found: Audit) -> Figure | None:
  """Mean score and deviation of every category; None with fewer than two."""
  if found.spread is None or len(found.spread.categories) < 2:
    return None
  kinds = sorted(found.spread.categories, key=lambda c: c.score.value)[-2 * _MOST :]
  figure = Figure(figsize=(8.6, 0.25 * len(kinds) + 1.0), layout="constrained")
  axes = figure.add_subplot()
  for place, kind in enumerate(kinds):
    mean = kind.score.value
    axes.plot(
      [mean - kind.deviation, mean + kind.deviation], [place, place], color=(_MODEL, 0.18),
      linewidth=7, solid_capstyle="butt",
    )  # fmt: skip
    _bar(axes, kind.score, place, _MODEL, _MARK)
  axes.set_yticks(range(len(kinds)), [f"{k.name} (n = {k.score.n})" for k in kinds])
  axes.set_ylim(-0.7, len(kinds) - 0.3)
  axes.set_xlabel("score: mean with its 95 % interval; the band is ± one deviation")
  axes.grid(axis="y", visible=False)
  return figure


@plots.styled
def length(found: Audit) -> Figure:
  """How often the longer response is preferred, by how much longer; and accuracy by length."""
  figure = Figure(figsize=(8.6, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
  bins = found.length.bins
  places = range(len(bins))
  sides = [("labels", [b.labels for b in bins], _LABELS, "s", "-")]
  sides += [("scorer", [b.model for b in bins], _MODEL, _MARK, "-")]
  if bins and bins[0].gold is not None:
    sides.append(("gold judge", [b.gold for b in bins], _GOLD, "D", "-"))
  for shift, (name, values, colour, marker, style) in zip((-0.08, 0.08, 0.0), sides):
    left.errorbar(
      [p + shift for p in places], [v.value for v in values], yerr=plots.interval_bars(values),
      color=colour, ecolor=(colour, 0.5), marker=marker, markersize=5, linewidth=1.3,
      linestyle=style, label=name,
    )  # fmt: skip
  if bins and bins[0].planted is not None:
    planted = [b.planted for b in bins]
    left.plot(places, planted, color=plots.INK, linestyle=_DASHED, label="labels, in closed form")
  left.axhline(0.5, color=plots.MUTED, linewidth=1, linestyle=":")
  spans = [f"{b.low:.0f}" if b.low == b.high else f"{b.low:.0f}–{b.high:.0f}" for b in bins]
  left.set_xticks(list(places), spans)
  left.set_xlabel("tokens by which one response is longer")
  left.set_ylabel("share that prefer the longer")
  left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  left.set_title("Preference for the longer response")
  left.legend(fontsize=8)
  _splits(right, found)
  return figure


def _splits(axes, found: Audit) -> None:
  rows = [(found.length.split, "scorer", _MODEL, _MARK)]
  if found.length.gold_split is not None:
    rows.append((found.length.gold_split, "gold judge", _GOLD, "D"))
  names = ("chosen longer", "chosen shorter", "equal length")
  for shift, (split, name, colour, marker) in zip((-0.1, 0.1), rows):
    for place, part in enumerate((split.longer, split.shorter, split.matched)):
      if part.n:
        _bar(axes, part, place + shift, colour, marker, name if place == 0 else None)
  axes.axvline(0.5, color=plots.MUTED, linewidth=1, linestyle=":")
  axes.set_yticks(range(3), names)
  axes.set_ylim(2.5, -0.5)
  axes.set_xlabel("agreement with the labels")
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  gap = found.length.split.gap
  axes.set_title(f"Accuracy by length: gap {gap.value:+.2f}".replace("-", "−"))
  axes.grid(axis="y", visible=False)
  axes.legend(fontsize=8)


@plots.styled
def features(sides: dict[str, Regression], planted: dict[str, float], title: str) -> Figure:
  """Coefficients a standard deviation, labels and scorer side by side, the planted ones as bars."""
  labels = {f.name: f for f in sides["labels"].features}
  model = {f.name: f for f in sides["model"].features}
  names = sorted(labels, key=lambda n: abs(labels[n].standardised.value))
  figure = Figure(figsize=(8.6, 0.27 * len(names) + 1.2), layout="constrained")
  axes = figure.add_subplot()
  values = [f.standardised.value for side in (labels, model) for f in side.values()]
  for place, name in enumerate(names):
    first = place == 0
    _bar(axes, labels[name].standardised, place + 0.14, _LABELS, "s",
         "labels" if first else None, 5)  # fmt: skip
    _bar(axes, model[name].standardised, place - 0.14, _MODEL, _MARK, "scorer" if first else None)
    if name in planted:
      value = planted[name] * labels[name].deviation
      values.append(value)
      axes.plot([value], [place], "|", color=plots.INK, markersize=14, markeredgewidth=1.6,
                label="planted" if first else None)  # fmt: skip
  reach = 1.25 * max(0.1, *map(abs, values))
  axes.set_xlim(-reach, reach)  # an interval of a coefficient that is not identified has no end
  axes.axvline(0.0, color=plots.MUTED, linewidth=1, linestyle=":")
  axes.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
  axes.set_ylim(-0.6, len(names) - 0.4)
  axes.set_xlabel(
    "log-odds of being preferred, for one deviation of the difference (95 % interval)"
  )
  axes.set_title(title)
  axes.grid(axis="y", visible=False)
  axes.legend(fontsize=8, loc="lower right")
  return figure


@plots.styled
def drift(found: Audit) -> Figure | None:
  """Score, gold, length, accuracy and out-of-range share by policy; None without any."""
  if not found.drift:
    return None
  panels = [
    ("Score", [d.score for d in found.drift], None),
    ("Gold reward", [d.gold for d in found.drift], None),
    ("Accuracy on its samples, gold", [d.accuracy for d in found.drift], 0.5),
    ("Share out of the start’s range", [d.out_of_range for d in found.drift], 0.01),
    ("Tokens", [d.tokens for d in found.drift], None),
  ]
  panels = [panel for panel in panels if panel[1][0] is not None]
  rows = len(found.drift)
  figure = Figure(figsize=(2.3 * len(panels) + 0.6, 0.3 * rows + 1.1), layout="constrained")
  for index, (title, values, level) in enumerate(panels):
    axes = figure.add_subplot(1, len(panels), index + 1)
    for place, (value, policy) in enumerate(zip(values, found.drift)):
      _bar(axes, value, place, *plots.look_of(policy.name.split("/")[-1]))
    if level is not None:
      axes.axvline(level, color=plots.MUTED, linewidth=1, linestyle=_DASHED)
    axes.set_yticks(range(rows), [d.name for d in found.drift] if index == 0 else [])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
  return figure
