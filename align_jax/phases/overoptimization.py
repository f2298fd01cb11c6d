"""The over-optimisation laboratory: gold judge, proxies of it, and what optimising them does to gold."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import tqdm

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import overoptimization_page
from align_jax.evals.overoptimization_report import Report
from align_jax.phases import overoptimization_collect, workers, workspace
from align_jax.phases import overoptimization_steps as steps
from align_jax.phases.overoptimization_config import OveroptimizationConfig


def run(settings: dict[str, Any], path: str, start_worker: Callable[[int, int], Any]) -> Report:
  """Does what is not done yet under `path`, and writes the report from all of it.

  `start_worker(index, count)` readies a process and returns its devices.
  """
  workspace.single_process("the over-optimisation laboratory")
  root = pathlib.Path(path)
  config = config_lib.build(OveroptimizationConfig, settings)
  root.mkdir(parents=True, exist_ok=True)
  steps.check_folders(config, root)
  with workers.lock(root / "lock"):
    for tasks in steps.plan(config, root):
      _execute(config, tasks, start_worker)
    collector = overoptimization_collect.Collector(config, root)
    collector.choose()
    found = collector.report()
    print(f"== report: {overoptimization_page.write(root, found)}", flush=True)
  return found


def _execute(config: OveroptimizationConfig, tasks: list[steps.Task], start_worker: Callable):
  """One stage in worker processes, with one bar; raises at its end what went wrong in it."""
  waiting = [task for task in tasks if not steps.is_done(task)]
  if not waiting:
    return
  interval = 0.5 if sys.stderr.isatty() else 10.0
  done, failed = len(tasks) - len(waiting), []
  count = min(config.processes, len(waiting))
  with tqdm.tqdm(desc=waiting[0].kind, total=len(tasks), initial=done, mininterval=interval) as bar:
    for outcome in workers.run(waiting, steps.work, count=count, start=start_worker):
      wrong = outcome.death or outcome.value
      failed += [f"{outcome.task.title}: {wrong}"] if wrong else []
      bar.set_postfix_str(outcome.task.title, refresh=False)
      bar.update()
  if failed:
    raise InputError("; ".join(failed))
