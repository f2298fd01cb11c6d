"""The drift report as files: rounds.json, rounds.md, rounds.html and its picture."""

import dataclasses
import json
import pathlib

from align_jax.evals import plots, report, results, rounds_plots
from align_jax.evals.report import Picture
from align_jax.evals.rounds import DROPS, Collection, PairLogprobs, PolicyDrift, Report
from align_jax.evals.statistics import Estimate

Cell = tuple[str, str]  # a value and, in small, its interval


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the report; the first cell of a row is its head."""

  title: str
  caption: str
  columns: tuple[str, ...]
  rows: list[list[Cell]]


def write(folder: pathlib.Path, found: Report) -> pathlib.Path:
  """Writes all files into `folder` and returns the page's path."""
  png = plots.to_png(rounds_plots.drift(found))
  (folder / "rounds.png").write_bytes(png)
  picture = Picture("drift", png, summary(found), round(108 * rounds_plots.WIDTH))
  text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
  results.write_text(folder / "rounds.json", text + "\n")
  results.write_text(folder / "rounds.md", as_markdown(found))
  page = folder / "rounds.html"
  title = folder.resolve().name
  html = report.page(
    "rounds.html",
    title=title,
    sentences=sentences(found),
    tables=tables(found),
    pictures={"drift": picture},
    caption=rounds_plots.CAPTION,
  )
  results.write_text(page, html)
  return page


def as_markdown(found: Report) -> str:
  lines = ["# Preference collection in rounds", "", " ".join(sentences(found)), ""]
  lines += [f"![{summary(found)}](rounds.png)", "", rounds_plots.CAPTION, ""]
  for table in tables(found):
    lines += [f"## {table.title}", "", table.caption, ""]
    lines += [
      "| " + " | ".join(table.columns) + " |",
      "| --- |" + " ---: |" * (len(table.columns) - 1),
    ]
    for row in table.rows:
      cells = (value + (f" [{small}]" if small else "") for value, small in row)
      lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
  return "\n".join(lines)


def tables(found: Report) -> list[Table]:
  """Policies, collections, old pairs and families, each only where there is something to show."""
  shown = [_policies(found)]
  if found.collections:
    shown += [_collections(found), _reward_models(found), _old_pairs(found), _families(found)]
  return [table for table in shown if table is not None and len(table.columns) > 1]


def summary(found: Report) -> str:
  """The picture in one sentence."""
  last = found.policies[-1]
  return (
    f"Drift over {len(found.collections)} of {found.rounds} rounds: score "
    f"{report.number(found.policies[0].evaluation.score.value)} to "
    f"{report.number(last.evaluation.score.value)}, KL to the start "
    f"{report.number(last.evaluation.kl.value)} nats"
  )


def sentences(found: Report) -> list[str]:
  """What happened, in words that the intervals support."""
  if not found.collections:
    return ["No round is finished; this is the start."]
  last, evaluation = found.policies[-1], found.policies[-1].evaluation
  told = [
    f"After {last.round} of {found.rounds} rounds the score is {report.number(evaluation.score.value)}, "
    f"{report.signed(evaluation.score_gain.value)} over the start (95 % interval "
    f"{report.interval(evaluation.score_gain)}, paired over {evaluation.n} held-out prompts), at a KL of "
    f"{report.number(evaluation.kl.value)} nats a response to the start and "
    f"{report.number(last.kl_previous.value)} to the policy before it."
  ]
  first, newest = found.collections[0], found.collections[-1]
  if first is not newest and "first" in first.reward_models and "first" in newest.reward_models:
    told.append(_shift(first, newest))
  lost = sum(1 - c.pairs / c.prompts for c in (newest,))
  told.append(f"In the last round {report.percent(lost)} of the prompts gave no pair.")
  return told


def _shift(first: Collection, last: Collection) -> str:
  before, after = (c.reward_models["first"].accuracy for c in (first, last))
  apart = after.high < before.low or after.low > before.high
  text = (
    f"The first reward model agrees with {report.percent(after.value)} of the last round’s labels, "
    f"after {report.percent(before.value)} in round 1"
    + ("" if apart else " (their intervals overlap)")
  )
  if last.agreement is not None:
    text += (
      f"; the gold judge itself agrees with {report.percent(last.agreement.value)}, after "
      f"{report.percent(first.agreement.value)}"
    )
  return text + "."


def _policies(found: Report) -> Table:
  scorer = found.policies[0].evaluation.scorer
  score = "gold score" if scorer == "gold" else "score"
  columns = (
    "policy after round", score, "gain over start", "win rate", "KL to start (k1)", "k3",
    "KL to previous (k1)", "k3", "length", "ended", "distinct responses", "distinct bigrams",
  )  # fmt: skip
  return Table(
    "Policies",
    "Every policy answers the same held-out prompts with the same random numbers. KL in nats a "
    "response; in brackets 95 % intervals over prompts.",
    columns,
    [_policy_row(p) for p in found.policies],
  )


def _policy_row(p: PolicyDrift) -> list[Cell]:
  e = p.evaluation
  return [
    ("start" if p.round == 0 else str(p.round), ""),
    _number(e.score),
    _number(e.score_gain, signed=True),
    _share(e.win_rate.rate),
    _number(e.kl),
    _number(e.kl_k3),
    _number(p.kl_previous),
    _number(p.kl_previous_k3),
    _number(e.length),
    _share(e.finished),
    (_percent(p.distinct_responses), ""),
    (_percent(p.distinct_bigrams), ""),
  ]


def _collections(found: Report) -> Table:
  gold = found.collections[0].agreement is not None
  columns = ["round", "pairs", *(f"dropped: {why}" for why in DROPS), "distinct samples"]
  columns += ["length chosen", "length rejected", "chosen longer"]
  if gold:
    columns += ["gold of samples", "labels as gold", "gold ties", "gold gap"]
  rows = []
  for c in found.collections:
    row = [(str(c.round), ""), (f"{c.pairs} of {c.prompts}", "")]
    row += [_share(c.dropped[why]) for why in DROPS]
    row += [_share(c.distinct), _number(c.chosen_length), _number(c.rejected_length)]
    row += [_share(c.chosen_longer)]
    if gold:
      row += [_number(c.gold), _share(c.agreement), _share(c.gold_ties), _number(c.gold_gap)]
    rows.append(row)
  return Table(
    "Pairs",
    "Round r samples the policy of round r − 1 on prompts that no earlier round used. “Labels as gold” "
    "counts a pair between which the gold judge sees no difference one half."
    if gold
    else "Round r samples the policy of round r − 1 on prompts that no earlier round used.",
    tuple(columns),
    rows,
  )


def _reward_models(found: Report) -> Table | None:
  names = list(found.collections[-1].reward_models)
  if not names:
    return None
  gold = found.collections[0].agreement is not None
  heads = ["labels", *(["gold preference"] if gold else []), "mean reward"]
  rows = []
  for c in found.collections:
    row = [(str(c.round), "")]
    for name in names:
      evaluation = c.reward_models.get(name)
      row.append(_share(evaluation and evaluation.accuracy))
      if gold:
        row.append(_share(evaluation and evaluation.gold_accuracy))
      row.append(_number(c.reward_scores.get(name)))
    if gold:
      row.append(_share(c.agreement))
    rows.append(row)
  columns = ["round", *(f"{name}: {head}" for name in names for head in heads)]
  return Table(
    "Reward models on fresh pairs",
    "Accuracy on pairs that were collected after the model was trained. The first one never changes; "
    "the newest, if there is one, has seen all earlier rounds."
    + (" The last column is what the gold judge itself reaches on these labels." if gold else ""),
    tuple(columns + (["gold judge: labels"] if gold else [])),
    rows,
  )


def _old_pairs(found: Report) -> Table:
  numbers = [c.round for c in found.collections]
  rows = []
  for p in found.policies:
    cells = [("start" if p.round == 0 else str(p.round), "")]
    for r in numbers:
      cells.append(_sides(logprobs_of(found, p.round, r)))
    rows.append(cells)
  return Table(
    "Old pairs under new policies",
    "Mean log-prob, in nats a response, of the chosen and the rejected side of every round’s pairs; in "
    "brackets how far the chosen side is ahead.",
    ("policy after round", *(f"pairs of round {r}" for r in numbers)),
    rows,
  )


def logprobs_of(found: Report, policy: int, pairs: int) -> PairLogprobs | None:
  """Pairs of round `pairs` under policy `policy`: known from the policy that said them on."""
  if policy == pairs - 1:
    return found.policies[pairs].pairs_before
  return found.policies[policy].pairs.get(str(pairs))


def _families(found: Report) -> Table | None:
  names = sorted({name for c in found.collections for name in c.families})
  if len(names) < 2:
    return None
  return Table(
    "Families of prompts among the pairs",
    "Share of the round’s pairs: a family whose answers are all alike gives no pairs any more.",
    ("round", *names),
    [
      [(str(c.round), ""), *((_percent(c.families.get(name, 0.0)), "") for name in names)]
      for c in found.collections
    ],
  )


def _number(estimate: Estimate | None, *, signed: bool = False) -> Cell:
  if estimate is None or not estimate.n:
    return "–", ""
  write = report.signed if signed else report.number
  return write(estimate.value), "" if estimate.low != estimate.low else report.interval(estimate)


def _share(estimate: Estimate | None) -> Cell:
  if estimate is None or not estimate.n:
    return "–", ""
  return report.percent(estimate.value), report.interval_percent(estimate)


def _percent(value: float | None) -> str:
  return "–" if value is None else report.percent(value)


def _sides(found: PairLogprobs | None) -> Cell:
  if found is None or not found.chosen.n:
    return "–", ""
  sides = f"{report.number(found.chosen.value)} / {report.number(found.rejected.value)}"
  return sides, report.signed(found.margin.value)
