"""A sweep's table as files: sweep.json, sweep.csv, sweep.md, sweep.html and the figures beside them."""

import csv
import io
import json
import math
import pathlib
from typing import Any

from align_jax.evals import plots, report, results, sweep_curve_plots, sweep_curves, sweep_plots
from align_jax.evals.report import Picture
from align_jax.evals.statistics import Estimate
from align_jax.evals.sweep import METRICS, Row, Run, Table, metric_title

_BOUNDS = ("mean", "low", "high")


def write(folder: pathlib.Path, table: Table) -> pathlib.Path:
  """Writes all files into `folder` and returns the page's path."""
  pictures = draw(table)
  for picture in pictures.values():
    (folder / f"sweep_{picture.name}.png").write_bytes(picture.png)
  text = json.dumps(results.to_json(as_json(table)), indent=2, allow_nan=False)
  results.write_text(folder / "sweep.json", text + "\n")
  results.write_text(folder / "sweep.csv", as_csv(table))
  results.write_text(folder / "sweep.md", as_markdown(table, pictures))
  page = folder / "sweep.html"
  results.write_text(page, as_html(folder.resolve().name, table, pictures))
  return page


def draw(table: Table) -> dict[str, Picture]:
  """The figures by name; none while no run has finished."""
  if not table.finished:
    return {}
  title = metric_title(table.metric, table.evaluation)
  means = ", ".join(
    f"{row.variant} {report.number(row.metrics[table.metric].value)}" for row in table.rows
  )
  figures = [
    ("frontier", sweep_plots.frontier(table), "Mean score against the root of the KL, by variant"),
    ("leaderboard", sweep_plots.leaderboard(table, table.metric), f"Mean {title}: {means}"),
  ]
  if table.curves:
    scores = sweep_curve_plots.scores_over_kl(table.curves)
    figures.append(("scores", scores, "Every score against the root of the KL while training"))
  return {
    name: Picture(name, plots.to_png(figure), alt, round(108 * figure.get_figwidth()))
    for name, figure, alt in figures
  }


def as_json(table: Table) -> dict[str, Any]:
  """Everything in the table, and every run's own numbers."""
  return {
    "metric": table.metric,
    "baseline": table.baseline,
    "confidence": 0.95,
    "variants": [
      {
        "variant": row.variant,
        "seeds": [run.seed for run in row.finished],
        "failed": [run.seed for run in row.failed],
        "metrics": {m: row.metrics[m] for m in table.metrics},
        "differences": {m: row.differences[m] for m in table.metrics if m in row.differences},
        "prompt_difference": row.prompt_difference,
      }
      for row in table.rows
    ],
    "over_optimisation": {
      variant: {fall.judge: fall for name, fall in falls(table) if name == variant}
      for variant in table.curves
    },
    "runs": [_run_json(run, table.metrics) for row in table.rows for run in row.runs],
  }


def falls(table: Table) -> list[tuple[str, sweep_curves.Fall]]:
  """(variant, fall) of every judge that the runs of a variant only watched; in the table's order."""
  return [
    (variant, fall)
    for variant, runs in table.curves.items()
    for fall in sweep_curves.over_optimisation(runs)
  ]


def _run_json(run: Run, metrics: tuple[str, ...]) -> dict[str, Any]:
  values = {"variant": run.variant, "seed": run.seed, "state": run.state, "reason": run.reason}
  return values | {"metrics": {m: run.value(m) for m in metrics} if run.evaluation else None}


def as_csv(table: Table) -> str:
  """One line a variant; a mean with its bounds in three columns, unknown ones empty."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  names = [*table.metrics, "score_difference", "score_difference_over_prompts"]
  bounds = [f"{name}_{bound}" for name in names for bound in _BOUNDS]
  writer.writerow(["variant", "finished", "failed", "runs", *bounds])
  for row in table.rows:
    estimates = [row.metrics[m] for m in table.metrics]
    estimates += [row.differences.get("score"), row.prompt_difference]
    counts = [len(row.finished), len(row.failed), len(row.runs)]
    writer.writerow([row.variant, *counts, *(x for e in estimates for x in _three(e))])
  return buffer.getvalue()


def _three(estimate: Estimate | None) -> list[Any]:
  if estimate is None:
    return ["", "", ""]
  values = (estimate.value, estimate.low, estimate.high)
  return ["" if math.isnan(value) else value for value in values]


def as_markdown(table: Table, pictures: dict[str, Picture]) -> str:
  """The table and the figures, for a README or a pull request."""
  heads = columns(table)
  lines = [f"# Sweep: {table.summary}", "", caption(table), ""]
  lines += ["| variant | seeds | " + " | ".join(heads) + " |"]
  lines += ["| --- | ---: |" + " ---: |" * len(heads)]
  for row in table.rows:
    cells = " | ".join(
      value + (f" [{small}]" if small else "") for value, small in cells_of(table, row)
    )
    lines.append(f"| {row.variant} | {seeds_of(row)} | {cells} |")
  rows = [sweep_curves.as_row(variant, fall) for variant, fall in falls(table)]
  if rows:
    lines += ["", sweep_curves.CAPTION, "", "| " + " | ".join(sweep_curves.HEADS) + " |"]
    lines += ["|" + " --- |" * len(sweep_curves.HEADS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
  for picture in pictures.values():
    lines += ["", f"![{picture.alt}](sweep_{picture.name}.png)"]
  if table.stopped:
    lines += ["", "Runs that a limit ended early:", ""]
    lines += [f"- {r.variant} seed {r.seed}: {r.reason}" for r in table.stopped]
  if table.failed:
    lines += ["", "Failed runs:", ""]
    lines += [f"- {r.variant} seed {r.seed} {r.state}: {r.reason}" for r in table.failed]
  return "\n".join(lines) + "\n"


def caption(table: Table) -> str:
  """What the numbers are, in sentences."""
  found = table.evaluation
  text = f"Sorted by {metric_title(table.metric, found)}. "
  if found is not None:
    text += (
      f"Every run answers the same {found.n} held-out prompts; the reference {found.reference} scores "
      f"{report.number(found.reference_score.value)}. "
    )
  text += (
    "Means over seeds; in brackets the 95 % Student interval over seeds, which needs two. "
    "A failed seed is left out of the means and counted."
    + (" One that its limits stopped early counts as it then was." if table.stopped else "")
  )
  if table.baseline is not None:
    text += (
      f" Δ is the score minus that of {table.baseline}, paired: over seeds (seed by seed, what another "
      "training seed would give on these prompts), and over prompts (seed and prompt by prompt, what "
      "other prompts would give for these policies)."
    )
  return text


def columns(table: Table) -> list[str]:
  """The heads of the table after variant and seeds."""
  first, *others = _ordered(table)
  deltas = [] if table.baseline is None else ["Δ over seeds", "Δ over prompts"]
  return [
    metric_title(first, table.evaluation),
    *deltas,
    *(metric_title(m, table.evaluation) for m in others),
  ]


def cells_of(table: Table, row: Row) -> list[tuple[str, str]]:
  """(mean, interval) of every column, as text."""
  first, *others = _ordered(table)
  deltas = [row.differences.get("score"), row.prompt_difference] if table.baseline else []
  return [
    _cell(row.metrics[first], first),
    *(("–", "") if d is None else (report.signed(d.value), _between(d)) for d in deltas),
    *(_cell(row.metrics[m], m) for m in others),
  ]


def seeds_of(row: Row) -> str:
  """ "3", or "2 of 3" with what became of the others, and how many ended early."""
  stopped = f", {len(row.stopped)} stopped early" if row.stopped else ""
  if len(row.finished) == len(row.runs):
    return f"{len(row.runs)}{stopped}"
  failed = f", {len(row.failed)} failed" if row.failed else ""
  return f"{len(row.finished)} of {len(row.runs)}{stopped}{failed}"


def as_html(title: str, table: Table, pictures: dict[str, Picture]) -> str:
  """One page that needs no other file; its columns sort by a click."""
  styles = sweep_plots.looks(sorted(row.variant for row in table.rows))
  rows = [
    {
      "variant": row.variant,
      "colour": styles[row.variant][0],
      "seeds": seeds_of(row),
      "cells": [
        {"text": text, "interval": small, "value": "" if math.isnan(value) else value}
        for (text, small), value in zip(cells_of(table, row), _values(table, row))
      ],
    }
    for row in table.rows
  ]
  return report.page(
    "sweep.html",
    title=title,
    summary=table.summary,
    caption=caption(table),
    columns=columns(table),
    rows=rows,
    pictures=pictures,
    failed=table.failed,
    stopped=table.stopped,
    fall_caption=sweep_curves.CAPTION,
    fall_heads=sweep_curves.HEADS,
    falls=[sweep_curves.as_row(variant, fall) for variant, fall in falls(table)],
  )


def _values(table: Table, row: Row) -> list[float]:
  first, *others = _ordered(table)
  deltas = [row.differences.get("score"), row.prompt_difference] if table.baseline else []
  estimates = [row.metrics[first], *deltas, *(row.metrics[m] for m in others)]
  return [math.nan if e is None else e.value for e in estimates]


def _ordered(table: Table) -> list[str]:
  """The score first, as its differences stand beside it."""
  return ["score", *(m for m in table.metrics if m != "score")]


def _cell(estimate: Estimate, metric: str) -> tuple[str, str]:
  if not estimate.n:
    return "–", ""
  if not METRICS[metric].is_share:
    return report.number(estimate.value), _between(estimate)
  between = "" if math.isnan(estimate.low) else report.interval_percent(estimate)
  return report.percent(estimate.value), between


def _between(estimate: Estimate) -> str:
  return "" if math.isnan(estimate.low) else report.interval(estimate)
