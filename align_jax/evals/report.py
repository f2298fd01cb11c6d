"""One page from the work directory of a pipeline: what was trained, and what it bought."""

import base64
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from align_jax.errors import InputError
from align_jax.evals import lineage, plots, results
from align_jax.evals.results import PolicyEvaluation, RewardEvaluation, Sample
from align_jax.evals.statistics import Estimate

_ORDER = ("start", "sft", "reward", "dpo", "ipo", "kto", "ppo")
_FILES = ("config.json", "metrics.jsonl", "evaluation.json", "lineage.json")
_PROMPTS = 12  # shown with all answers, spread evenly over the families
_PAIRWISE = ("dpo", "ipo", "kto", "reward")  # their accuracy has one half as chance


@dataclasses.dataclass(frozen=True)
class Run:
  """What one phase left in its folder; a part that it has not written yet is empty or None."""

  name: str
  config: Mapping[str, Any]
  metrics: Mapping[str, plots.Series]
  evaluation: PolicyEvaluation | RewardEvaluation | None
  samples: tuple[Sample, ...]
  lineage: lineage.Lineage | None

  @property
  def title(self) -> str:
    return plots.title_of(self.name)


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure of the page: its PNG, and the words for those who cannot see it."""

  name: str
  png: bytes
  alt: str
  width: int  # CSS pixels, so that the letters of all figures have one size

  @property
  def uri(self) -> str:
    return "data:image/png;base64," + base64.b64encode(self.png).decode()


def build_report(workdir: str | pathlib.Path) -> pathlib.Path:
  """Writes report.html, which needs no other file, and its figures as report_<name>.png beside it.

  report_overview.png is not on the page: it is the run in one picture, for a README or a slide.

  workdir: a folder of phase folders (sft, reward, dpo, ..., or dpo-beta0.05 and the like), each
  with any of config.json, metrics.jsonl, evaluation.json, samples.jsonl, lineage.json. Returns the
  page's path. InputError for a folder without phases, or a file that is not what it should be.
  """
  workdir = pathlib.Path(workdir)
  runs = read_runs(workdir)
  pictures = draw(runs)
  for picture in pictures.values():
    (workdir / f"report_{picture.name}.png").write_bytes(picture.png)
  file = workdir / "report.html"
  file.write_text(render(workdir.resolve().name, runs, pictures), encoding="utf-8")
  return file


def read_runs(workdir: pathlib.Path) -> dict[str, Run]:
  """The phases of a work directory by name, in the order of the pipeline."""
  if not workdir.is_dir():
    raise InputError(f"{workdir} is not a folder, so there is nothing to report")
  folders = [f for f in workdir.iterdir() if any((f / name).is_file() for name in _FILES)]
  if not folders:
    raise InputError(f"{workdir} holds no phase: no folder in it has one of {', '.join(_FILES)}")
  return {folder.name: read_run(folder) for folder in sorted(folders, key=_place)}


def read_run(folder: pathlib.Path) -> Run:
  """One phase's folder; only the files that are there are read."""

  def has(name: str) -> bool:
    return (folder / name).is_file()

  return Run(
    name=folder.name,
    config=results.read_json(folder / "config.json") if has("config.json") else {},
    metrics=read_metrics(folder / "metrics.jsonl") if has("metrics.jsonl") else {},
    evaluation=results.load(folder) if has("evaluation.json") else None,
    samples=results.load_samples(folder) if has("samples.jsonl") else (),
    lineage=lineage.load(folder) if has("lineage.json") else None,
  )


def read_metrics(file: pathlib.Path) -> dict[str, plots.Series]:
  """metrics.jsonl by metric; a metric keeps the steps at which it was logged."""
  columns: dict[str, list[tuple[float, float]]] = {}  # name -> (step, value)
  for line, row in results.read_lines(file):
    if not _is_number(row.get("step")):
      raise InputError(f"{file}:{line}: field 'step' must be a number")
    for name, value in row.items():
      if name != "step" and _is_number(value):
        known = value if math.isfinite(value) else math.nan
        columns.setdefault(name, []).append((row["step"], known))
  return {name: plots.Series(*np.array(pairs, np.float64).T) for name, pairs in columns.items()}


def draw(runs: Mapping[str, Run]) -> dict[str, Picture]:
  """The figures that these runs have the numbers for, by name."""
  policies, reward = policy_evaluations(runs), reward_evaluation(runs)
  figures = []
  if any(not e.is_reference for e in policies.values()):
    figures.append(("frontier", plots.frontier(policies), _frontier_alt(policies)))
  rates = [
    r for r in results.RATES if any(r in e.families.get("all", {}) for e in policies.values())
  ]
  if policies:
    figures.append(("lengths", plots.lengths(policies), "Mean response length of every policy"))
    if len(next(iter(policies.values())).families) > 2:
      figures.append(("families", plots.families(policies), "Mean score in every prompt family"))
    if rates:
      alt = f"Shares of responses judged {', '.join(rates)}, by policy"
      figures.append(("behaviour", plots.behaviour(policies, rates), alt))
  if figures and figures[0][0] == "frontier" and rates and reward is not None:
    picture = plots.overview(policies, reward, rates)
    figures.append(("overview", picture, _frontier_alt(policies)))
  if reward is not None:
    figures.append(("reward_model", plots.reward_model(reward), _reward_alt(reward)))
  for name, run in runs.items():
    figure = plots.curves(name, run.metrics, levels=_levels(name, reward))
    figures.append((f"curves_{name}", figure, f"Training curves of {run.title}"))
  return {
    name: Picture(name, plots.to_png(figure), alt, round(108 * figure.get_figwidth()))
    for name, figure, alt in figures
    if figure is not None
  }


def render(title: str, runs: Mapping[str, Run], pictures: Mapping[str, Picture]) -> str:
  """The page. Every text from outside is escaped by the template."""
  policies = policy_evaluations(runs)
  lineages = {name: run.lineage for name, run in runs.items() if run.lineage}
  graph = lineage.graph(lineages)
  return page(
    "report.html",
    title=title,
    runs=runs,
    pictures=pictures,
    policies=policies,
    reward=reward_evaluation(runs),
    findings=findings(runs),
    comparisons=side_by_side(runs),
    lineages=lineages,
    diagram=lineage.to_svg(graph, lineages),
    parents={name: _parents(name, graph, lineages) for name in lineages},
    commands=_commands(lineages),
    families=by_family(policies),
    settings={name: _flat(run.config) for name, run in runs.items()},
  )


def page(template: str, **values: Any) -> str:
  """A template of this folder with its values; texts are escaped, numbers have filters."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "number": number,
    "signed": signed,
    "percent": percent,
    "interval": interval,
    "interval_percent": interval_percent,
    "title_of": plots.title_of,
    "colour": lambda name: plots.look_of(name)[0],
  }
  return environment.get_template(template).render(**values)


def policy_evaluations(runs: Mapping[str, Run]) -> dict[str, PolicyEvaluation]:
  """The policies that were evaluated, by run name."""
  return {n: r.evaluation for n, r in runs.items() if isinstance(r.evaluation, PolicyEvaluation)}


def reward_evaluation(runs: Mapping[str, Run]) -> RewardEvaluation | None:
  """The evaluation of the reward model, if there is one."""
  found = [r.evaluation for r in runs.values() if isinstance(r.evaluation, RewardEvaluation)]
  return found[0] if found else None


def findings(runs: Mapping[str, Run]) -> list[str]:
  """What a reader should take away, said only as far as the intervals allow."""
  policies = policy_evaluations(runs)
  aligned = {n: e for n, e in policies.items() if not e.is_reference}
  told = []
  if aligned:
    told += _gains(aligned)
  reward = reward_evaluation(runs)
  if reward is not None:
    text = f"The reward model agrees with {percent(reward.accuracy.value)} of held-out labels"
    if reward.ceiling is not None:
      text += f"; the gold judge itself agrees with {percent(reward.ceiling.value)} of them"
    told.append(text + ".")
  return told


def side_by_side(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
  """The first prompts of every family that all policies answered, with the answers of each.

  The choice is by place in the file, never by how an answer looks.
  """
  sampled = {name: run for name, run in runs.items() if run.samples}
  if not sampled:
    return []
  answers = {name: {_key(s): s for s in run.samples} for name, run in sampled.items()}
  first = next(iter(sampled.values())).samples
  per_family = max(1, _PROMPTS // len({sample.family for sample in first}))
  taken: dict[str, int] = {}
  rows = []
  for sample in first:
    key = _key(sample)
    if taken.get(sample.family, 0) >= per_family:
      continue
    if all(key in known for known in answers.values()):
      taken[sample.family] = taken.get(sample.family, 0) + 1
      replies = {name: known[key] for name, known in answers.items()}
      rows.append({"prompt": sample.prompt, "family": sample.family, "replies": replies})
  return sorted(rows, key=lambda row: row["family"])


def by_family(policies: Mapping[str, PolicyEvaluation]) -> list[dict[str, Any]]:
  """The judge's rates a family: n, and for every policy its correct rate and what else occurred."""
  rows = []
  for family in dict.fromkeys(f for e in policies.values() for f in e.families):
    cells = {n: e.families.get(family, {}) for n, e in policies.items()}
    if any("correct" in cell for cell in cells.values()):
      rows.append(
        {
          "family": "all prompts" if family == "all" else family,
          "n": next(cell["correct"].n for cell in cells.values() if "correct" in cell),
          "cells": {name: _cell(cell) for name, cell in cells.items()},
        }
      )
  return rows


def _cell(rates: Mapping[str, Estimate]) -> dict[str, Any]:
  others = [
    f"{100 * rates[name].value:.0f} % {name}"
    for name in results.RATES[1:]
    if name in rates and rates[name].value > 0
  ]
  correct = rates["correct"].value if "correct" in rates else math.nan
  return {"correct": correct, "others": others}


def _parents(
  name: str, graph: lineage.Graph, lineages: Mapping[str, lineage.Lineage]
) -> list[dict[str, str]]:
  """What a checkpoint was made from, one entry a parent, with all the roles that it had."""
  return [
    {"name": plots.title_of(parent) if parent in lineages else parent, "roles": ", ".join(roles)}
    for (parent, child), roles in graph.roles.items()
    if child == name
  ]


def _commands(lineages: Mapping[str, lineage.Lineage]) -> dict[str, str]:
  """Every command once, with the phases that it made."""
  made: dict[str, list[str]] = {}
  for name, entry in lineages.items():
    made.setdefault(entry.command, []).append(name)
  return {command: _names(names) for command, names in made.items()}


def _gains(aligned: Mapping[str, PolicyEvaluation]) -> list[str]:
  reference = plots.title_of(next(iter(aligned.values())).reference)
  better = [n for n, e in aligned.items() if e.score_gain.low > 0]
  worse = [n for n, e in aligned.items() if e.score_gain.high < 0]
  told = [
    f"{len(better)} of {len(aligned)} aligned policies score above {reference} by more than "
    "their 95 % interval" + (f"; below it: {_names(worse)}" if worse else "") + "."
  ]
  best = max(aligned, key=lambda n: aligned[n].score.value)
  found = aligned[best]
  told.append(
    f"The highest mean score is {plots.title_of(best)}’s: {number(found.score.value)}, "
    f"{signed(found.score_gain.value)} over {reference}, at a KL of {number(found.kl.value)} "
    "nats a response."
  )
  moved = max(aligned, key=lambda n: abs(aligned[n].length.value - found.reference_length.value))
  told.append(
    f"Length changed most in {plots.title_of(moved)}: from "
    f"{number(aligned[moved].reference_length.value)} to "
    f"{number(aligned[moved].length.value)} tokens a response."
  )
  return told


def _levels(name: str, reward: RewardEvaluation | None) -> dict[str, tuple[float, str]]:
  levels = {}
  objective = plots.objective_of(name)
  if objective in _PAIRWISE:
    levels["rewards/accuracy"] = (0.5, "chance")
  if objective == "reward" and reward is not None and reward.ceiling is not None:
    levels["rewards/accuracy"] = (reward.ceiling.value, "ceiling")
  if objective in ("dpo", "reward"):
    levels["loss"] = (math.log(2), "ln 2")
  return levels


def _frontier_alt(policies: Mapping[str, PolicyEvaluation]) -> str:
  points = (
    f"{plots.title_of(n)}: {number(e.score.value)} at {number(e.sqrt_kl[0])}"
    for n, e in policies.items()
  )
  return "Mean score against the root of the KL to the reference. " + "; ".join(points)


def _reward_alt(reward: RewardEvaluation) -> str:
  return (
    f"Held-out accuracy {percent(reward.accuracy.value)} beside its ceiling and the baseline "
    f"that prefers the longer response ({percent(reward.longer_wins.value)}), and a reliability "
    "diagram"
  )


def _place(folder: pathlib.Path) -> tuple[int, str]:
  head = plots.objective_of(folder.name)
  return (_ORDER.index(head) if head in _ORDER else len(_ORDER), folder.name)


def _key(sample: Sample) -> str:
  return json.dumps(sample.prompt, sort_keys=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
  flat: dict[str, str] = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.dumps(value, ensure_ascii=False)
  return flat


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(names: list[str]) -> str:
  return ", ".join(map(plots.title_of, names))


def number(value: float | None) -> str:
  """Three significant digits at most, two decimals at least below 100, and a true minus sign."""
  if value is None or math.isnan(value):
    return "–"
  if value == 0:
    return "0"
  digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
  return f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
  return ("+" if value > 0 else "") + number(value)


def percent(value: float) -> str:
  return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def interval(estimate: Estimate) -> str:
  if math.isnan(estimate.low):
    return "n too small"
  return f"{number(estimate.low)} to {number(estimate.high)}"


def interval_percent(estimate: Estimate) -> str:
  if math.isnan(estimate.low):
    return "n too small"
  return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f} %"
