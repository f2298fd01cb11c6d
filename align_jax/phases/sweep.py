"""A sweep: one start, many runs from it, each evaluated, and one table of them all."""

import functools
import json
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import tqdm

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import results, sweep_page
from align_jax.evals import sweep as table_lib
from align_jax.phases import evaluate, online, pipeline, preference, reward, sft, workers
from align_jax.phases.sweep_plan import Run, SweepConfig, plan, shared_settings
from align_jax.training import workdir

_TRAIN = {
  sft.SftConfig: sft.run,
  reward.RewardConfig: reward.run,
  preference.PreferenceConfig: preference.run,
  online.OnlineConfig: online.run,
}


def run(
  settings: dict[str, Any],
  path: str,
  start_worker: Callable[[int, int], Any],
  *,
  job_index: int = 0,
  job_count: int = 1,
) -> table_lib.Table:
  """Runs what is not done yet of this job's share, and writes the table of all that is finished.

  Job i of n, which share the workdir, takes the runs i, i + n, i + 2n...; every job writes the table
  when it ends, so the last one's is complete.  `start_worker(index, count)` readies a process and
  returns its devices.
  """
  if not 0 <= job_index < job_count:
    raise InputError(f"job_index must lie within [0, job_count), not {job_index} of {job_count}")
  config = config_lib.build(SweepConfig, pipeline.resolve(settings, str(pathlib.Path(path))))
  root = pathlib.Path(path)
  runs = plan(config, root)
  workdir.open_workdir(root, "sweep", shared_settings(config))
  mine = share(runs, job_index, job_count)
  waiting = [r for r in mine if not r.is_done]
  if waiting:
    _train_start(config, root, start_worker)
    _execute(config, mine, waiting, start_worker)
  return report(config, root, runs)


def share(runs: list[Run], job_index: int, job_count: int) -> list[Run]:
  """The runs of one job: every `job_count`-th, so that all jobs get of every variant."""
  return runs[job_index::job_count]


def report(config: SweepConfig, root: pathlib.Path, runs: list[Run]) -> table_lib.Table:
  """Writes sweep.json, .csv, .md, .html and the figures from the runs that are finished."""
  found = [table_lib.read_run(r.folder, r.variant, r.seed, samples=True) for r in runs]
  table = table_lib.build_table(found, metric=config.metric, baseline=config.baseline)
  page = sweep_page.write(root, table)
  print(f"== {table.summary}: {page}", flush=True)
  return table


def _train_start(config: SweepConfig, root: pathlib.Path, start_worker: Callable):
  """Trains what all runs share: the model they start from, with all cores of this machine, and then
  the reward models, side by side."""
  start = [] if config.sft is None else [("sft", config.sft)]
  for stage in (start, list(config.reward_models.items())):
    tasks = [(str(root / name), c) for name, c in stage if not workdir.is_finished(root / name)]
    if not tasks:
      continue
    count = min(config.processes, len(tasks))
    for outcome in workers.run(tasks, _train_shared, count=count, start=start_worker):
      name = pathlib.Path(outcome.task[0]).name
      if outcome.death:
        raise RuntimeError(f"{name}: {outcome.death}")
      if outcome.value:
        raise InputError(f"{name}: {outcome.value}")


def _train_shared(task: tuple[str, Any], devices, stopping) -> str | None:
  """In a worker: trains (folder, config) unless another job does; returns what was wrong with its
  input."""
  folder, config = task
  if stopping():
    raise SystemExit(workers.RESUME_STATUS)
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  with workers.lock(pathlib.Path(folder) / "lock"):
    print(f"== {pathlib.Path(folder).name}: training", flush=True)
    try:
      _TRAIN[type(config)](config, folder, devices)
    except InputError as error:
      return str(error)
  return None


def _execute(config: SweepConfig, mine: list[Run], waiting: list[Run], start_worker: Callable):
  """Trains and evaluates in worker processes, with one bar over all runs of this job."""
  work = functools.partial(_train_and_evaluate, evaluation(config), config.metric)
  interval = 0.5 if sys.stderr.isatty() else 10.0
  bar = tqdm.tqdm(
    desc="runs", total=len(mine), initial=len(mine) - len(waiting), mininterval=interval
  )
  with bar:
    for outcome in workers.run(waiting, work, count=config.processes, start=start_worker):
      last = outcome.value
      if outcome.death:
        last = outcome.death
        _record_failure(outcome.task, "crashed", outcome.death)
      bar.set_postfix_str(f"{outcome.task.title}: {last}", refresh=False)
      bar.update()


def evaluation(config: SweepConfig) -> evaluate.EvaluateConfig:
  """How every run is evaluated: against the model that all of them started from."""
  return config_lib.build(
    evaluate.EvaluateConfig, config_lib.to_dict(config.evaluation) | {"reference": config.start}
  )


def _train_and_evaluate(settings, metric: str, task: Run, devices, stopping) -> str:
  """In a worker: one run from wherever it stands; returns what the bar shows of it.

  All that is printed goes to the run's log.txt.  A failure is recorded, and the sweep goes on.
  """
  task.folder.mkdir(parents=True, exist_ok=True)
  with workers.lock(task.folder / "lock"), workers.output_to(task.folder / "log.txt"):
    if not task.is_done:
      try:
        _advance(settings, task, devices, stopping)
      except Exception as error:
        traceback.print_exc()
        state = "diverged" if isinstance(error, FloatingPointError) else "crashed"
        _record_failure(task, state, f"{error}" or type(error).__name__)
  found = table_lib.read_run(task.folder, task.variant, task.seed)
  stopped = ", stopped early" if found.stopped else ""
  return found.reason if found.failed else f"{metric} {found.value(metric):.4g}{stopped}"


def _advance(settings: evaluate.EvaluateConfig, task: Run, devices, stopping):
  (task.folder / table_lib.FAILURE).unlink(missing_ok=True)
  if not workdir.is_finished(task.folder):
    print(f"== {task.title}: training", flush=True)
    _TRAIN[type(task.config)](task.config, str(task.folder), devices)
  if stopping():
    raise SystemExit(workers.RESUME_STATUS)
  print(f"== {task.title}: evaluating", flush=True)
  reference = _reference(settings, tuple(devices))
  evaluate.run(settings, str(task.folder), devices, reference=reference)


_KEPT: list[Any] = []  # of this worker: (settings, devices) and the reference made for them


def _reference(settings: evaluate.EvaluateConfig, devices) -> evaluate.Reference:
  """The start and its answers, once a worker: they are the same for all runs."""
  if not _KEPT or _KEPT[0] != (settings, devices):
    _KEPT[:] = (settings, devices), evaluate.sample_reference(settings, devices)
  return _KEPT[1]


def _record_failure(task: Run, state: str, reason: str):
  sentence = " ".join(reason.split())[:500]
  results.write_text(
    task.folder / table_lib.FAILURE, json.dumps({"state": state, "reason": sentence}) + "\n"
  )
