"""The dashboard of an online run, or of several side by side: dashboard.png and dashboard.html.

It is made from metrics.jsonl, rollouts.jsonl and stopped.json of a work directory, at any time.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from align_jax.errors import InputError
from align_jax.evals import dashboard_plots, plots, report, results
from align_jax.training import workdir

ROLLOUTS = "rollouts.jsonl"
_RESPONSES = 6  # early and late ones, on the page of one run
_SHARE = 0.02  # of a run's time that its own dashboard may take
_FIRST_S = 15.0  # of a run before its first drawing: a short run has one, at its end

# metric -> (head of the column, unit), with the mean of the first and of the last tenth of the steps
_COLUMNS = {
  "score": ("Score", "reward"),
  "kl/ref": ("KL", "nats a response"),
  "kl/ref_k3": ("KL, k3", "nats a response"),
  "entropy": ("Entropy", "nats a token"),
  "response_length": ("Length", "tokens"),
  "eos_rate": ("EOS rate", "share"),
  "distinct/responses": ("Distinct", "share of responses"),
  "value/explained_variance": ("Explained", "share of variance"),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run has left in its folder so far."""

  metrics: Mapping[str, plots.Series]
  responses: tuple[Mapping[str, Any], ...]  # the lines of rollouts.jsonl
  stop: tuple[int, str] | None  # (step, reason)
  finished: bool
  planned: int | None  # steps, by its config

  @property
  def steps(self) -> int:
    """Steps whose metrics are known."""
    return max((int(s.steps[-1]) + 1 for s in self.metrics.values()), default=0)

  @property
  def state(self) -> str:
    """Where it stands, in words."""
    of = f" of {self.planned}" if self.planned else ""
    if self.stop:
      return f"stopped after {self.steps}{of} steps: {self.stop[1]}"
    word = "finished" if self.finished else "running or interrupted"
    return f"{word}, {self.steps}{of} steps"


def read_run(folder: pathlib.Path) -> Run:
  """Reads a work directory; InputError if it has no metrics.jsonl, or a file is not what it should be."""
  if not (folder / "metrics.jsonl").is_file():
    raise InputError(f"{folder} has no metrics.jsonl: there is nothing to show")
  has_config, has_rollouts = (folder / "config.json").is_file(), (folder / ROLLOUTS).is_file()
  config = results.read_json(folder / "config.json") if has_config else {}
  return Run(
    metrics=report.read_metrics(folder / "metrics.jsonl"),
    responses=tuple(x for _, x in results.read_lines(folder / ROLLOUTS)) if has_rollouts else (),
    stop=workdir.read_stop(folder),
    finished=workdir.is_finished(folder),
    planned=config.get("loop", {}).get("steps"),
  )


def write(
  folders: Sequence[str | pathlib.Path], output: str | pathlib.Path | None = None
) -> pathlib.Path:
  """Writes dashboard.png and dashboard.html, which needs no other file, and returns its path.

  Args:
    folders: work directories; several are drawn over each other.
    output: where to; None: into the only folder.

  Raises:
    InputError: for a folder without metrics, one given twice, or several without `output`.
  """
  paths = [pathlib.Path(folder) for folder in folders]
  if not paths or (output is None and len(paths) > 1):
    raise InputError(
      "a dashboard needs a work directory, and an output folder if there are several"
    )
  runs = {name: read_run(path) for name, path in _names(paths).items()}
  target = paths[0] if output is None else pathlib.Path(output)
  target.mkdir(parents=True, exist_ok=True)
  picture = draw(runs)
  if picture is not None:
    part = target / "dashboard.png.part"
    part.write_bytes(picture.png)
    part.replace(target / "dashboard.png")
  page = target / "dashboard.html"
  results.write_text(page, render(runs, picture))
  return page


def draw(runs: Mapping[str, Run]) -> report.Picture | None:
  """The grid of all instruments; None before the first step."""
  title = ""  # the legend names several runs
  if len(runs) == 1:
    title = " ".join(f"{name}: {run.state}" for name, run in runs.items())
  figure = dashboard_plots.grid(
    {name: run.metrics for name, run in runs.items()},
    stops={name: run.stop for name, run in runs.items() if run.stop},
    title=title,
  )
  if figure is None:
    return None
  alt = "Training curves. " + ". ".join(f"{name}: {run.state}" for name, run in runs.items())
  return report.Picture("dashboard", plots.to_png(figure), alt, round(108 * figure.get_figwidth()))


def render(runs: Mapping[str, Run], picture: report.Picture | None) -> str:
  """The page. Every text from outside is escaped by the template."""
  columns = [m for m in _COLUMNS if any(m in run.metrics for run in runs.values())]
  tints = dashboard_plots.colours({name: run.metrics for name, run in runs.items()})
  only = next(iter(runs.values())) if len(runs) == 1 else None
  return report.page(
    "dashboard.html",
    title=" · ".join(runs),
    runs=runs,
    colours=tints,
    heads=[_COLUMNS[m] for m in columns],
    rows={name: [ends(run.metrics.get(m)) for m in columns] for name, run in runs.items()},
    sampling={name: sampling_share(run.metrics) for name, run in runs.items()},
    pictures={"dashboard": picture} if picture else {},
    pairs=early_and_late(only.responses) if only else [],
  )


def ends(series: plots.Series | None) -> tuple[float, float] | None:
  """Means over the first and the last tenth of the steps (one at least), NaNs left out."""
  if series is None:
    return None
  size = max(1, len(series.values) // 10)
  return tuple(_mean(part) for part in (series.values[:size], series.values[-size:]))


def _mean(values: np.ndarray) -> float:
  known = values[np.isfinite(values)]
  return float(known.mean()) if len(known) else math.nan


def sampling_share(metrics: Mapping[str, plots.Series]) -> float:
  """The share of all seconds that went into sampling; NaN if the time was not split."""
  spent = dashboard_plots.time_shares(metrics)
  total = sum(spent.values())
  return spent.get("time/sample", 0.0) / total if total else math.nan


def early_and_late(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Responses of the first and of the last logged step side by side, chosen by place alone.

  A prompt that was answered at several steps is shown with its first and its last answer; such pairs
  come first, and the rest is filled up with the first rows of the two steps.
  """
  if not lines or lines[0]["step"] == lines[-1]["step"]:
    return [{"early": line, "late": None, "same": False} for line in lines[:_RESPONSES]]
  answers: dict[str, list[Mapping[str, Any]]] = {}
  for line in lines:
    answers.setdefault(repr(line["prompt"]), []).append(line)
  pairs = [
    {"early": found[0], "late": found[-1], "same": True}
    for found in answers.values()
    if found[0]["step"] < found[-1]["step"]
  ][:_RESPONSES]
  shown = [id(line) for pair in pairs for line in (pair["early"], pair["late"])]
  first, last = (
    [x for x in lines if x["step"] == lines[end]["step"] and id(x) not in shown] for end in (0, -1)
  )
  others = [{"early": a, "late": b, "same": False} for a, b in zip(first, last)]
  return pairs + others[: _RESPONSES - len(pairs)]


def _names(paths: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
  """The shortest ends of the paths that tell them apart."""
  full = [path.resolve() for path in paths]
  if len(set(full)) < len(full):
    raise InputError("a work directory is given twice")
  depth = 1
  while len({path.parts[-depth:] for path in full}) < len(full):
    depth += 1
  return {"/".join(a.parts[-depth:]): b for a, b in zip(full, paths)}


class Live:
  """Keeps the dashboard of a run that is going on fresh: `with Live(folder) as live:` around it.

  Calling it draws again, unless that would take more than 2 % of the time, and first after a quarter of
  a minute; it is drawn once more when the block ends, also by an error, but not when the process was
  asked to stop. A drawing that fails is said and costs nothing else.
  """

  def __init__(self, folder: str | pathlib.Path):
    self._folder, self._due = pathlib.Path(folder), time.monotonic() + _FIRST_S

  def __call__(self):
    if time.monotonic() >= self._due:
      self._draw()

  def _draw(self):
    if jax.process_index() != 0:
      return
    begin = time.monotonic()
    try:
      write([self._folder])
    except Exception as error:  # a picture must not end a run
      print(f"== the dashboard was not drawn: {error}", flush=True)
    end = time.monotonic()
    self._due = end + (end - begin) / _SHARE

  def __enter__(self) -> "Live":
    return self

  def __exit__(self, kind, error, trace):
    stopped = kind is not None and issubclass(kind, (SystemExit, KeyboardInterrupt))
    if not stopped and (self._folder / "metrics.jsonl").exists():
      self._draw()
