"""An audit as files: audit.json, audit.html, which needs no other file, and its pictures beside it."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

from align_jax.evals import audit_plots, plots, report, results
from align_jax.evals.audit import Audit, Drift, Group
from align_jax.evals.features import Regression
from align_jax.evals.report import Picture
from align_jax.evals.statistics import Estimate

Cell = tuple[str, str]  # a value and, in small, its interval


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page; the first cell of a row is its head, `picture` names a picture, if any."""

  title: str
  caption: str
  picture: str = ""
  columns: tuple[str, ...] = ()
  rows: Sequence[Sequence[Cell]] = ()


def write(folder: pathlib.Path, found: Audit) -> pathlib.Path:
  """Writes all files into `folder` and returns the page's path."""
  text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
  results.write_text(folder / "audit.json", text + "\n")
  pictures = draw(found)
  return write_page(
    folder / "audit.html",
    heading="Audit of a reward model",
    title=found.scorer,
    lead=f"{found.n} pairs of {found.data}.",
    sentences=sentences(found),
    sections=sections(found),
    pictures=pictures,
  )


def write_page(
  page: pathlib.Path,
  *,
  heading: str,
  title: str,
  lead: str,
  sentences: Sequence[str],
  sections: Sequence[Section],
  pictures: dict[str, Picture],
) -> pathlib.Path:
  """Writes the page, and every picture as <page>_<name>.png beside it; returns its path."""
  for picture in pictures.values():
    (page.parent / f"{page.stem}_{picture.name}.png").write_bytes(picture.png)
  html = report.page(
    "audit.html", heading=heading, title=title, lead=lead, sentences=sentences, sections=sections,
    pictures=pictures,
  )  # fmt: skip
  results.write_text(page, html)
  return page


def draw(found: Audit) -> dict[str, Picture]:
  """The pictures that there are numbers for, by name."""
  figures = {
    "accuracy": (audit_plots.accuracy(found), "Agreement with the labels by group"),
    "calibration": (audit_plots.calibration(found), "Reliability diagram"),
    "spread": (audit_plots.spread(found), "Scores by category"),
    "length": (audit_plots.length(found), "Preference for the longer response, and accuracy"),
    "drift": (audit_plots.drift(found), "Scores of the samples of later policies"),
  }
  for name, sides in found.features.items():
    planted = found.planted if name == "judge" else {}
    figure = audit_plots.features(sides, planted, feature_title(name))
    figures[f"features_{name}"] = (figure, f"Coefficients of {name} features")
  return {
    name: picture(name, figure, alt)
    for name, (figure, alt) in figures.items()
    if figure is not None
  }


def picture(name: str, figure, alt: str) -> Picture:
  return Picture(name, plots.to_png(figure), alt, round(108 * figure.get_figwidth()))


def feature_title(name: str) -> str:
  return {"text": "Features of the text", "judge": "What the judge found"}[name]


def sentences(found: Audit) -> list[str]:
  """What a reader should take away, said only as far as the intervals allow."""
  whole = found.groups["all"][0]
  told = [_accuracy_sentence(whole)]
  if whole.gold is not None:
    told.append(
      f"It goes the gold way on {_percent_of(whole.gold)} of the pairs with a gold preference."
    )
  told.append(_length_sentence(found))
  told.append(_calibration_sentence(found))
  told += [_feature_sentence(name, sides) for name, sides in found.features.items()]
  told += _drift_sentences(found.drift)
  if found.truncated:
    told.append(f"{report.percent(found.truncated)} of the responses were cut to fit a row.")
  return told


def _percent_of(found: Estimate) -> str:
  return f"{report.percent(found.value)} ({report.interval_percent(found)})"


def _accuracy_sentence(whole: Group) -> str:
  apart = whole.accuracy.low > whole.longer.value
  text = (
    f"It agrees with {_percent_of(whole.accuracy)} of the labels; “the longer wins” agrees with "
    f"{report.percent(whole.longer.value)}" + ("" if apart else ", which it does not clearly beat")
  )
  if whole.ceiling is not None:
    what = "no model can agree with more than" if whole.votes is None else "with votes the most is"
    text += f"; {what} {report.percent(whole.ceiling)} on such labels"
  if whole.votes is not None:
    text += f", and it agrees with {report.percent(whole.votes.value)} of the votes"
  return text + "."


def _length_sentence(found: Audit) -> str:
  part, gap = found.length, found.length.split.gap
  bias = (
    "no gap that its interval tells from 0"
    if math.isnan(gap.low) or not gap.excludes(0.0)
    else f"a gap of {report.signed(100 * gap.value)} points ({_points(gap)})"
  )
  text = (
    f"Within prompts its scores correlate with length by {report.number(part.correlation.pearson.value)} "
    f"({report.interval(part.correlation.pearson)}); accuracy where the chosen response is the longer and "
    f"where it is the shorter has {bias}"
  )
  if part.gold_split is not None:
    text += f", the gold judge’s own being {report.signed(100 * part.gold_split.gap.value)}"
  return text + (
    f". Online learning takes the slope off with a second reward of kind “length” and weight "
    f"{report.number(-part.residual.slope)}."
  )


def _points(gap: Estimate) -> str:
  return f"{report.number(100 * gap.low)} to {report.number(100 * gap.high)}"


def _calibration_sentence(found: Audit) -> str:
  c, t = found.calibration, found.temperature
  text = (
    f"Its ECE is {report.number(c.ece.value)}, where a calibrated model would show "
    f"{report.number(c.ece_expected)} on so many pairs"
  )
  if t is None:
    return text + "; no temperature makes its confidences fit."
  bounds = f"{report.number(t.low)} to " + ("∞" if _unknown(t.high) else report.number(t.high))
  return text + f"; the temperature that fits best is {report.number(t.value)} ({bounds})."


def _unknown(value: float | None) -> bool:
  return value is None or math.isnan(value)


def _feature_sentence(name: str, sides: dict[str, Regression]) -> str:
  labels, model = ({f.name: f.standardised for f in sides[s].features} for s in ("labels", "model"))
  apart = [n for n in labels if labels[n].low > model[n].high or labels[n].high < model[n].low]
  strongest = max(model, key=lambda n: abs(model[n].value)).replace("_", " ")
  text = f"Among {name} features its scores are moved most by {strongest}"
  if apart:
    text += "; it weighs otherwise than the labels, beyond both intervals: " + ", ".join(
      n.replace("_", " ") for n in apart
    )
  return text + "."


def _drift_sentences(drift: Sequence[Drift]) -> list[str]:
  if len(drift) < 2:
    return []
  most = max(drift[1:], key=lambda d: d.out_of_range.value)
  told = [
    f"Of the samples of {most.name}, {_percent_of(most.out_of_range)} score outside the middle 99 % of "
    f"{drift[0].name}’s."
  ]
  if drift[0].accuracy is not None:
    worst = min(drift[1:], key=lambda d: d.accuracy.value)
    told.append(
      f"Between two samples of one policy it goes the gold way on {_percent_of(drift[0].accuracy)} for "
      f"{drift[0].name}, and least often for {worst.name}: {_percent_of(worst.accuracy)}."
    )
  return told


def sections(found: Audit) -> list[Section]:
  """The page's parts, each only where there is something to show."""
  parts = [_accuracy(found), _calibration(found), _spread(found), *_length(found)]
  parts += [_features(name, sides, found.planted) for name, sides in found.features.items()]
  return [part for part in [*parts, _drift(found)] if part is not None]


def _accuracy(found: Audit) -> Section:
  whole = found.groups["all"][0]
  columns = ["pairs", "n", "agrees with labels", "“longer wins”"]
  caption = (
    "The share of labels that the scorer’s margin goes along with, a level margin counting half."
  )
  if whole.ceiling is not None:
    columns.append("ceiling")
    caption += " The ceiling is the most that any model can agree with such labels, in closed form."
  if whole.votes is not None:
    columns.append("agrees with votes")
    caption += (
      " Votes are those of labellers drawn at random, so the ceiling is theirs; a pair whose votes"
    )
    caption += " are level has no label."
  if whole.gold is not None:
    columns += ["gold judge on labels", "on gold"]
    caption += " The last columns are the gold judge’s expected agreement with the labels, and the"
    caption += " scorer’s agreement with the gold judge."
  rows = []
  for kind, groups in found.groups.items():
    if kind != "all":
      rows.append([(audit_plots.title_of(kind), "")] + [("", "")] * (len(columns) - 1))
    rows += [_group(g, whole) for g in groups]
  return Section("Where it is right", caption, "accuracy", tuple(columns), rows)


def _group(g: Group, whole: Group) -> list[Cell]:
  row = [(g.name, ""), (str(g.n), ""), share(g.accuracy), share(g.longer)]
  if whole.ceiling is not None:
    row.append((_maybe_percent(g.ceiling), ""))
  if whole.votes is not None:
    row.append(share(g.votes))
  if whole.gold is not None:
    row += [(_maybe_percent(g.gold_judge), ""), share(g.gold)]
  return row


def _calibration(found: Audit) -> Section:
  c, t = found.calibration, found.temperature
  rows = [
    [("ECE, bins of equal width", ""), number(c.ece)],
    [("ECE, bins of equal mass", ""), number(c.ece_equal_mass)],
    [("ECE of a calibrated model on so many pairs", ""), (report.number(c.ece_expected), "")],
    [("ECE without that", ""), (report.number(c.ece_debiased), "")],
    [("squared error, unbiased", ""), (report.number(c.squared_error_debiased), "")],
    [("largest error of a bin", ""), (report.number(c.max_error), "")],
    [("Brier score", ""), (report.number(c.brier.value), "")],
    [("= reliability", ""), (report.number(c.brier.reliability), "")],
    [("− resolution", ""), (report.number(c.brier.resolution), "")],
    [("+ uncertainty", ""), (report.number(c.brier.uncertainty), "")],
    [("+ within bins", ""), (report.number(c.brier.within), "")],
    [("NLL, nats", ""), (report.number(c.nll), "")],
    [("AUROC of confidence", ""), number(c.auroc)],
  ]
  if t is not None:
    bounds = f"{report.number(t.low)} to " + ("∞" if _unknown(t.high) else report.number(t.high))
    rows += [
      [("temperature T*", ""), (report.number(t.value), bounds)],
      [("NLL at T*", ""), (report.number(t.nll_scaled), "")],
      [("ECE at T*", ""), (report.number(t.ece_scaled), "")],
    ]
  return Section(
    "Calibration",
    "Whether σ(|r⁺ − r⁻|) is how often the preferred response is the one that labellers prefer. ECE is "
    "above 0 for any model on few pairs; intervals are bootstraps over pairs, and do not know it.",
    "calibration",
    ("", "value"),
    rows,
  )


def _spread(found: Audit) -> Section | None:
  s = found.spread
  if s is None:
    return None
  return Section(
    "What the scores are spread over",
    f"The variance of the scores is {report.number(s.variance)}: {report.percent(s.between_categories)} of "
    f"it lies between categories, {report.percent(s.between_prompts)} between prompts of one category, and "
    f"{report.percent(s.within_prompts)} within prompts. Only the last part was ever trained: a policy "
    "that is paid by the others is paid for what it was asked.",
    "spread",
    ("category", "responses", "mean score", "deviation", "tokens"),
    [
      [(c.name, ""), (str(c.score.n), ""), number(c.score), (report.number(c.deviation), ""),
       (report.number(c.tokens), "")]
      for c in s.categories
    ] if len(s.categories) > 1 else (),
  )  # fmt: skip


def _length(found: Audit) -> list[Section]:
  part, whole = found.length, found.groups["all"][0]
  rows = [
    [("Pearson’s correlation within prompts", ""), number(part.correlation.pearson), ("1", "")],
    [("Spearman’s", ""), number(part.correlation.spearman), ("1", "")],
    [("accuracy, chosen longer", ""), share(part.split.longer), ("100 %", "")],
    [("accuracy, chosen shorter", ""), share(part.split.shorter), ("0 %", "")],
    [("gap", ""), number(part.split.gap, signed=True), ("+1", "")],
    [("accuracy at equal length (± 10 %)", ""), share(part.split.matched), ("–", "")],
  ]
  if part.model_gap is not None:
    rows += [
      [("goes the gold way more often if gold is longer by", ""),
       number(part.model_gap, signed=True), ("+1", "")],
      [("so do labels", ""), number(part.labels_gap, signed=True), ("", "")],
      [("and in closed form", ""), (_maybe(part.labels_gap_planted), ""), ("", "")],
    ]  # fmt: skip
  parts = [
    Section(
      "Length",
      "What the scores have to do with the number of tokens, beside what they would have if the longer "
      "response always won.",
      "length",
      ("", "scorer", "“longer wins”"),
      rows,
    )
  ]
  rows = [
    [("correlation within prompts", ""), (report.number(part.residual.correlation), ""),
     (_maybe(part.residual_correlation), "")],
    [("accuracy on labels", ""), share(whole.accuracy), share(part.residual_accuracy)],
    [("accuracy at equal length", ""), share(part.split.matched), share(part.residual_matched)],
  ]  # fmt: skip
  if part.residual_gold is not None:
    rows.append([("accuracy on gold", ""), share(whole.gold), share(part.residual_gold)])
  parts.append(
    Section(
      "Length taken off",
      f"r − λ (tokens − {report.number(part.residual.mean_tokens)}) with λ = "
      f"{part.residual.slope:.5g}, the slope within prompts; for the right column each half of the "
      "prompts has the λ of the other half. For online learning: config.rewards.length = {kind: length, "
      f"weight: {-part.residual.slope:.5g}}} beside the model’s weight of 1.",
      "",
      ("", "as it is", "without length"),
      rows,
    )
  )
  return parts


def _features(name: str, sides: dict[str, Regression], planted: dict[str, float]) -> Section:
  labels, model = sides["labels"], sides["model"]
  planted = planted if name == "judge" else {}
  columns = ["feature", "pairs that differ", "labels", *(["planted"] if planted else []), "scorer"]
  rows = []
  by_name = {f.name: f for f in model.features}
  for f in sorted(labels.features, key=lambda f: -abs(f.standardised.value)):
    row = [
      (f.name.replace("_", " "), ""),
      (report.percent(f.differs), ""),
      number(f.coefficient, signed=True),
    ]
    if planted:
      row.append((_maybe(planted.get(f.name)), ""))
    rows.append([*row, number(by_name[f.name].coefficient, signed=True)])
  left = "; ".join(f"{n.replace('_', ' ')} {why}" for n, why in labels.left_out.items())
  caption = (
    "Logistic regressions of which side is preferred on differences of features: by the labels, and by "
    "the scorer’s own probabilities. Coefficients are log-odds a unit (in the picture a deviation). On "
    f"pairs left out they predict {report.percent(labels.held_out.value)} of the labels’ and "
    f"{report.percent(model.held_out.value)} of the scorer’s preferences (the longer side: "
    f"{report.percent(labels.longer.value)} and {report.percent(model.longer.value)}); with labels "
    f"shuffled {report.percent(labels.shuffled.value)}, and then {labels.shuffled_found} of "
    f"{len(labels.features)} intervals leave 0 out."
  )
  if left:
    caption += f" Left out: {left}."
  return Section(
    f"What it rewards: {feature_title(name).lower()}",
    caption,
    f"features_{name}",
    tuple(columns),
    rows,
  )


def _drift(found: Audit) -> Section | None:
  if not found.drift:
    return None
  gold = found.drift[0].gold is not None
  columns = [
    "policy", "score", "shift", "out of range", "distance", "tokens", "correlation with tokens",
    "gain at equal length", "share due to length", "win rate", "at equal length",
  ]  # fmt: skip
  columns += ["gold", "gold win rate", "accuracy on gold", "“longer wins”"] if gold else []
  return Section(
    "Later policies",
    "Samples of every policy on the same prompts, each compared with the first. Shift in deviations of "
    "its scores; out of range: outside the middle 99 % of its scores; distance: Kolmogorov–Smirnov. The "
    "gain at equal length is Singhal’s, the win rate at equal length AlpacaEval’s."
    + (" Accuracy is that between two samples of the policy." if gold else ""),
    "drift",
    tuple(columns),
    [_drift_row(d, first=i == 0) for i, d in enumerate(found.drift)],
  )


def _drift_row(d: Drift, *, first: bool) -> list[Cell]:
  pearson = d.correlation and d.correlation.pearson
  row = [(d.name, ""), number(d.score), (report.number(d.shift), ""), share(d.out_of_range)]
  row += [(report.number(d.distance), ""), number(d.tokens), number(pearson)]
  if first:
    row += [("", "")] * 4
  else:
    known = d.gain.gain.excludes(0.0)  # a share of nothing is no share
    row += [number(d.gain.non_length, signed=True), share(d.gain.explained) if known else ("–", "")]
    row += [share(d.win_rate.raw), share(d.win_rate.controlled)]
  if d.gold is not None:
    row += [number(d.gold), ("", "") if first else share(d.gold_win_rate)]
    row += [share(d.accuracy), share(d.longer)]
  return row


def number(found: Estimate | None, *, signed: bool = False) -> Cell:
  """A value and its interval as they stand in a table."""
  if found is None or not found.n or math.isnan(found.value):
    return "–", ""
  text = report.signed(found.value) if signed else report.number(found.value)
  return text, "" if math.isnan(found.low) else report.interval(found)


def share(found: Estimate | None) -> Cell:
  """The same of a share, in per cent."""
  if found is None or not found.n or math.isnan(found.value):
    return "–", ""
  return report.percent(found.value), "" if math.isnan(found.low) else report.interval_percent(
    found
  )


def _maybe(value: float | None) -> str:
  return report.number(value)


def _maybe_percent(value: float | None) -> str:
  return "–" if value is None else report.percent(value)
