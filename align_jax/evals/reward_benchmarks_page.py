"""A scorer's benchmarks as files: reward_benchmarks.json, .html and .png; and as a printed table."""

import json
import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from align_jax.evals import plots, report, results
from align_jax.evals.report import Picture
from align_jax.evals.reward_benchmarks import RULES, BenchmarkResult, RewardBenchmarks, Share
from align_jax.evals.rounds_page import Cell, Table
from align_jax.evals.statistics import Estimate

NAME = "reward_benchmarks"
WIDTH = 8.8  # inches
CAPTION = (
  "Accuracy by each benchmark’s own rules, overall and by section; bars are 95 % intervals. Beside every "
  "one is the baseline that prefers the longer answer; the dotted line is what two answers by chance give."
)


def write(folder: pathlib.Path, found: RewardBenchmarks) -> pathlib.Path:
  """Writes all files into `folder` and returns the page's path."""
  folder.mkdir(parents=True, exist_ok=True)
  png = plots.to_png(bars(found))
  (folder / f"{NAME}.png").write_bytes(png)
  text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
  results.write_text(folder / f"{NAME}.json", text + "\n")
  picture = Picture(NAME, png, " ".join(sentences(found)), round(108 * WIDTH))
  html = report.page(
    f"{NAME}.html",
    title=found.scorer,
    sentences=sentences(found),
    tables=tables(found),
    pictures={NAME: picture},
    caption=CAPTION,
  )
  page = folder / f"{NAME}.html"
  results.write_text(page, html)
  return page


@plots.styled
def bars(found: RewardBenchmarks) -> Figure:
  """One panel a benchmark: the scorer's accuracy beside that of the longer answer, row by row."""
  shown = {name: _headlines(result) for name, result in found.benchmarks.items()}
  counts = [len(rows) + 1.2 for rows in shown.values()]
  figure = Figure(figsize=(WIDTH, 0.32 * sum(counts) + 0.9), layout="constrained")
  panels = figure.subplots(len(shown), 1, height_ratios=counts, squeeze=False, sharex=True)[:, 0]
  looks = (("accuracy", plots.look_of("reward")[0], found.scorer),
           ("longer", "#b9c0c6", "the longer answer"))  # fmt: skip
  looks = looks[1:] if found.scorer == "longer" else looks
  height = 0.76 / len(looks)
  for axes, (name, rows) in zip(panels, shown.items()):
    for place, (field, colour, label) in enumerate(looks):
      estimates = [getattr(row, field) for row in rows]
      axes.barh(
        [i + (place - (len(looks) - 1) / 2) * height for i in range(len(rows))],
        [e.value for e in estimates],
        height,
        xerr=plots.interval_bars(estimates),
        color=colour,
        error_kw={"ecolor": plots.INK, "elinewidth": 1, "capsize": 2},
        label=label,
      )
    axes.set_yticks(range(len(rows)), [f"{row.name} (n = {row.n:,})" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.02)
    axes.axvline(0.5, color=plots.MUTED, linewidth=1, linestyle=":")
    axes.set_title(RULES[name].title)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  panels[-1].set_xlabel("accuracy")
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8.5)
  return figure


def sentences(found: RewardBenchmarks) -> list[str]:
  """What was found, said only as far as the intervals allow."""
  told = [f"Scored by {found.source}."]
  for name, result in found.benchmarks.items():
    row = result.overall
    if row is None:
      continue
    told.append(f"{RULES[name].title}: {_with_interval(row.accuracy)}{_against(found, row)}.")
  return told


def notes(name: str, result: BenchmarkResult, found: RewardBenchmarks) -> str:
  """What a reader of a table has to know about its numbers."""
  told = [f"{RULES[name].title} ({RULES[name].url}): {RULES[name].how}."]
  used = f"{result.used:,} of {result.items:,} items"
  if result.used < result.items:
    used += f", drawn by the hash of their prompt (limit {found.limit})"
  told.append(f"{used}; {result.duplicates} of them repeat another one.")
  if result.truncated:
    told.append(
      f"{result.truncated:,} of {result.texts:,} texts were cut to {found.length:,} tokens."
    )
  if result.missing:
    told.append(f"No item of {', '.join(result.missing)}: the overall score is without them.")
  files = (f"{file} {digest or '(of a hub)'}" for file, digest in result.files.items())
  told.append(f"SHA-256: {'; '.join(files)}; chat template: {found.chat_template or 'none'}.")
  return " ".join(told)


def tables(found: RewardBenchmarks) -> list[Table]:
  """One table a benchmark, and RM-Bench's matrices of styles."""
  columns = (
    "", "n", found.scorer, "longer", "difference", "right is longer", "right is shorter",
    f"{found.unit}, right", "wrong",
  )  # fmt: skip
  made = []
  for name, result in found.benchmarks.items():
    rows = [_row(row) for row in result.rows]
    made.append(Table(RULES[name].title, notes(name, result, found), columns, rows))
    for title, values in ((found.scorer, result.matrix), ("longer", result.longer_matrix)):
      if values is not None:
        made.append(_matrix(title, values))
  return made


def as_text(found: RewardBenchmarks) -> str:
  """The table of all benchmarks as it is printed: overall and sections."""
  lines = [
    f"{'benchmark':16} {'part':28} {'n':>6} {found.scorer[:22]:>22} {'longer':>22} {'difference':>24}"
  ]
  for name, result in found.benchmarks.items():
    for row in _headlines(result):
      lines.append(
        f"{RULES[name].title:16} {row.name:28} {row.n:6} {_with_interval(row.accuracy):>22} "
        f"{_with_interval(row.longer):>22} {_with_interval(row.over_longer, sign=True):>24}"
      )
  return "\n".join(lines)


def _headlines(result: BenchmarkResult) -> list[Share]:
  return [row for row in result.rows if row.level != "subset"]


def _row(row: Share) -> list[Cell]:
  rates = (row.accuracy, row.longer, row.over_longer, row.right_longer, row.right_shorter)
  indent = {"overall": "", "section": "", "subset": "– "}[row.level]
  return [
    (indent + row.name, ""),
    (f"{row.n:,}", ""),
    *((report.percent(e.value), report.interval_percent(e)) if e.n else ("–", "") for e in rates),
    (report.number(row.right_length), ""),
    (report.number(row.wrong_length), ""),
  ]


def _matrix(title: str, values: tuple[tuple[float, ...], ...]) -> Table:
  styles = ("concise", "detailed", "markdown")
  return Table(
    f"RM-Bench by style: {title}",
    "Rows: the style of the right answer; columns: that of the wrong one.",
    ("", *styles),
    [
      [(style, ""), *((report.percent(value), "") for value in row)]
      for style, row in zip(styles, values)
    ],
  )


def _against(found: RewardBenchmarks, row: Share) -> str:
  if found.scorer == "longer":
    return ""
  told = f", where the longer answer gives {report.percent(row.longer.value)}"
  if not row.over_longer.excludes(0.0):
    return told + " (the two cannot be told apart)"
  return told


def _with_interval(estimate: Estimate, *, sign: bool = False) -> str:
  write = f"{100 * estimate.value:+.1f}" if sign else f"{100 * estimate.value:.1f}"
  return f"{write} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
