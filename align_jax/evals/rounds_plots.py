"""The drift of iterated preference collection in one picture: small plots over the rounds."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from align_jax.evals import plots
from align_jax.evals.rounds import Report
from align_jax.evals.statistics import Estimate

WIDTH, HEIGHT = 10.6, 8.2  # inches
CAPTION = (
  "Everything by policy: 0 is the start, r the policy that round r trained. Scores, KL and diversity are "
  "those of its answers to the same held-out prompts; the pairs and labels at r are those that it was "
  "asked for by round r + 1. Bars are 95 % intervals."
)
_BLUE, _RED, _GREEN, _PURPLE, _BROWN = "#0067a5", "#c14e00", "#00795a", "#8e3a80", "#8c5a2b"
_DASHED = (0, (4, 3))
_FAMILY_COLOURS = (
  "#0067a5", "#c14e00", "#00795a", "#8e3a80", "#8c5a2b", "#7a6a00", "#2f4b9b", "#b02a4c", "#1f7a8c",
  "#68727b", "#56731a", "#5b4fa8",
)  # fmt: skip
Points = Sequence[Estimate | float | None]


@plots.styled
def drift(found: Report) -> Figure:
  """Nine small plots: what the policy gained, how far it moved, and what became of its pairs."""
  figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
  axes = figure.subplots(3, 3)
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.07)
  draws = (
    _score, _win_rate, _kl, _lengths, _diversity, _agreement, _old_pairs, _dropped, _families,
  )  # fmt: skip
  for place, draw in zip(axes.flat, draws):
    draw(place, found)
    place.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    place.set_xlim(-0.35, found.rounds + 0.35)
  for place in axes[-1]:
    place.set_xlabel("policy after round")
  return figure


def _line(
  axes, rounds: Sequence[int], values: Points, colour: str, marker: str, label="", style="-"
):
  """A line through what is known, with intervals where there are some."""
  known = [(r, v) for r, v in zip(rounds, values) if v is not None and _value(v) == _value(v)]
  if not known:
    return
  estimates = [_as_estimate(v) for _, v in known]
  axes.errorbar(
    [r for r, _ in known],
    [e.value for e in estimates],
    yerr=plots.interval_bars(estimates),
    color=colour,
    ecolor=(colour, 0.45),
    marker=marker,
    markersize=5,
    linewidth=1.5,
    elinewidth=1.2,
    capsize=2.5,
    linestyle=style,
    label=label or None,
    zorder=3,
  )


def _value(value: Estimate | float) -> float:
  return value.value if isinstance(value, Estimate) else value


def _as_estimate(value: Estimate | float) -> Estimate:
  return value if isinstance(value, Estimate) else Estimate(value, 0.0, math.nan, math.nan, 1)


def _legend(axes, place: str = "best") -> None:
  axes.legend(fontsize=7.5, handlelength=1.7, borderaxespad=0.2, labelspacing=0.3, loc=place)


def _shares(axes) -> None:
  axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _level(axes, value: float, label: str = "") -> None:
  axes.axhline(
    value, color=plots.MUTED, linewidth=1, linestyle=_DASHED, label=label or None, zorder=1
  )


def _policies(found: Report) -> list[int]:
  return [p.round for p in found.policies]


def _sampled(found: Report) -> list[int]:
  """The policies that said the pairs of every round."""
  return [c.round - 1 for c in found.collections]


def _score(axes, found: Report) -> None:
  scores = [p.evaluation.score for p in found.policies]
  _level(axes, scores[0].value, "start")
  scorer = found.policies[0].evaluation.scorer
  name = "Gold score" if scorer == "gold" else "Reward model’s score"
  _line(axes, _policies(found), scores, _BLUE, "o")
  axes.set_title(f"{name}, held out")
  axes.set_ylabel("mean a response")


def _win_rate(axes, found: Report) -> None:
  _level(axes, 0.5, "tie")
  _line(axes, _policies(found), [p.evaluation.win_rate.rate for p in found.policies], _BLUE, "o")
  axes.set_title("Win rate against the start")
  _shares(axes)


def _kl(axes, found: Report) -> None:
  rounds = _policies(found)
  _line(axes, rounds, [p.evaluation.kl for p in found.policies], _BLUE, "o", "to the start, k1")
  _line(
    axes, rounds, [p.evaluation.kl_k3 for p in found.policies], _BLUE, "o", "to the start, k3", ":"
  )
  _line(axes, rounds, [p.kl_previous for p in found.policies], _RED, "^", "to the previous, k1")
  axes.set_title("KL of whole responses")
  axes.set_ylabel("nats a response")
  _legend(axes)


def _lengths(axes, found: Report) -> None:
  lengths = [p.evaluation.length for p in found.policies]
  _line(axes, _policies(found), lengths, _BLUE, "o", "answers, held-out")
  rounds = _sampled(found)
  _line(
    axes, rounds, [c.chosen_length for c in found.collections], _GREEN, "s", "its pairs: chosen"
  )
  _line(
    axes,
    rounds,
    [c.rejected_length for c in found.collections],
    _RED,
    "^",
    "its pairs: rejected",
    "--",
  )
  axes.set_title("Length")
  axes.set_ylabel("tokens")
  _legend(axes)


def _diversity(axes, found: Report) -> None:
  rounds = _policies(found)
  _line(axes, rounds, [p.evaluation.finished for p in found.policies], _GREEN, "s", "ended by EOS")
  _line(
    axes, rounds, [p.distinct_responses for p in found.policies], _BLUE, "o", "distinct responses"
  )
  _line(
    axes, rounds, [p.distinct_bigrams for p in found.policies], _PURPLE, "D", "distinct bigrams"
  )
  axes.set_ylim(0, 1.05)
  axes.set_title("Ending and diversity")
  _shares(axes)
  _legend(axes)


def _agreement(axes, found: Report) -> None:
  rounds = _sampled(found)
  gold = [c.agreement for c in found.collections]
  _line(axes, rounds, gold, plots.MUTED, "", "gold judge", _DASHED)
  for name, colour, marker in (("first", _RED, "^"), ("newest", _GREEN, "s")):
    models = [c.reward_models.get(name) for c in found.collections]
    accuracy = [model and model.accuracy for model in models]
    _line(axes, rounds, accuracy, colour, marker, f"{name} reward model")
  _level(axes, 0.5)
  axes.margins(y=0.2)  # for the legend
  axes.set_title("Agreement with its fresh labels")
  _shares(axes)
  if axes.get_legend_handles_labels()[1]:
    _legend(axes)


def _old_pairs(axes, found: Report) -> None:
  if not found.collections:
    return
  known = [found.policies[1].pairs_before, *(p.pairs.get("1") for p in found.policies[1:])]
  rounds = _policies(found)
  _line(axes, rounds, [p and p.chosen for p in known], _GREEN, "s", "chosen")
  _line(axes, rounds, [p and p.rejected for p in known], _RED, "^", "rejected", "--")
  axes.set_title("Log-prob of round 1’s pairs")
  axes.set_ylabel("nats a response")
  _legend(axes)


def _dropped(axes, found: Report) -> None:
  rounds = _sampled(found)
  looks = {"identical": (_BLUE, "o"), "cut": (_BROWN, "h"), "tied": (_PURPLE, "D")}
  for why, (colour, marker) in looks.items():
    shares = [c.dropped[why] for c in found.collections]
    if why == "identical" or any(share.value for share in shares):
      _line(axes, rounds, shares, colour, marker, f"prompts: {why}")
  ties = [c.gold_ties for c in found.collections]
  _line(axes, rounds, ties, plots.MUTED, "", "pairs: a gold tie", _DASHED)
  axes.set_ylim(bottom=0)
  axes.set_title("Nothing to choose between")
  _shares(axes)
  if axes.get_legend_handles_labels()[1]:
    _legend(axes, "upper left")


def _families(axes, found: Report) -> None:
  names = sorted({name for c in found.collections for name in c.families})
  if len(names) < 2:
    return _sampled_scores(axes, found)
  rounds, below = _sampled(found), [0.0] * len(found.collections)
  for place, name in enumerate(names):
    shares = [c.families.get(name, 0.0) for c in found.collections]
    colour = _FAMILY_COLOURS[place % len(_FAMILY_COLOURS)]
    axes.bar(rounds, shares, bottom=below, width=0.62, color=(colour, 0.6), label=name, zorder=2)
    below = [a + b for a, b in zip(below, shares)]
  axes.set_title("Families among its pairs")
  axes.set_ylim(0, 1)
  axes.grid(visible=False)
  _shares(axes)
  if len(names) <= len(_FAMILY_COLOURS):
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
      handles[::-1], labels[::-1], fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5),
      handlelength=0.9, labelspacing=0.25,
    )  # fmt: skip


def _sampled_scores(axes, found: Report) -> None:
  """In the place of families where there are none: what judges say of all that was sampled."""
  rounds = _sampled(found)
  for name, colour, marker in (("first", _RED, "^"), ("newest", _GREEN, "s")):
    means = [c.reward_scores.get(name) for c in found.collections]
    _line(axes, rounds, means, colour, marker, f"{name} reward model")
  _line(axes, rounds, [c.gold for c in found.collections], plots.MUTED, "", "gold judge", _DASHED)
  axes.set_title("Scores of its samples")
  if axes.get_legend_handles_labels()[1]:
    _legend(axes)
