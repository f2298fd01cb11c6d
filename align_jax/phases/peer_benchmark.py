"""Training next to TRL's and Tunix's, sampling next to transformers': a process each, the same weights.

Before any timing all sides make two updates on the same examples, or sample greedily to the same prompts,
and what they find must agree. Then their passes over the same records alternate, A B A B, so that a noisy
machine is noisy for all alike. A peer runs in its own loop, with the settings that are its defaults; ours
as the product runs: full rows, shared prompts, batches of its own grouping. This process knows neither
torch nor a device.
"""

import contextlib
import importlib.util
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import benchmark_plots
from align_jax.phases import peer_summary
from align_jax.phases.peer_config import PEERS, PREPARE, PeerBenchmarkConfig
from align_jax.phases.peer_process import Process, cores
from align_jax.training import workdir

_PACKAGES = {
  "trl": ("torch", "transformers", "trl"),
  "tunix": ("tunix",),
  "transformers": ("torch", "transformers"),
}
# Relative, between both sides' losses and log-probs or rewards, by the type of computation.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}


def run(config: PeerBenchmarkConfig, path: str) -> dict[str, Any]:
  """Measures, prints tables, and writes benchmark.json and benchmark.png into an empty `path`.

  Where a peer is not installed, that is said and the others are measured. FloatingPointError where two
  sides do not compute the same.
  """
  folder = pathlib.Path(path).absolute()
  if (folder / "benchmark.json").exists():
    raise InputError(f"{path} holds a benchmark already: choose another workdir")
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("model", "records", "reference", "compiled"):  # of a run that was interrupted
    shutil.rmtree(folder / name, ignore_errors=True)
  workdir.write_json(folder / "config.json", config_lib.to_dict(config))
  missing = {peer: missing_packages(peer) for peer in config.peers}
  for peer, packages in missing.items():
    if packages:
      print(f"not compared with {peer}: {', '.join(packages)} is not installed", flush=True)
  prepared: dict[str, list] = {"starts": []}
  with _Runs(config, folder, "all").started(PREPARE, prepared):
    pass
  results = prepared["starts"][0] | {
    "cores": cores(),
    "dtype": config.model.dtype,
    "missing": missing,
  }
  results |= {
    "definitions": peer_summary.DEFINITIONS,
    "config": config_lib.to_dict(config),
    "sets": {},
  }
  for name, task in config.tasks.items():
    sides = task.sides([peer for peer in config.peers if not missing[peer]])
    results["sets"][name] = _measure(_Runs(config, folder, name), sides)
    print(peer_summary.table(name, results["sets"][name]), flush=True)
    workdir.write_json(folder / "benchmark.json", results)
    (folder / "benchmark.png").write_bytes(benchmark_plots.peer_png(results["sets"]))
  shutil.rmtree(folder / "model")
  return results


def missing_packages(peer: str) -> list[str]:
  """What a peer's side needs and this installation lacks."""
  return [name for name in _PACKAGES[peer] if importlib.util.find_spec(name) is None]


class _Runs:
  """Starts the processes of one task, which share a folder and a compilation cache in it."""

  def __init__(self, config: PeerBenchmarkConfig, folder: pathlib.Path, task: str):
    self.config, self.folder, self.task = config, folder, task
    self._environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    self._environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

  @contextlib.contextmanager
  def started(self, role: str, found: dict[str, list]) -> Iterator[Process]:
    """The process when it is ready, and what it said then in found["starts"]."""
    process = Process(role, self.task, self.folder, self._environment)
    try:
      found["starts"].append(process.ready())
      yield process
      process.stop()
    finally:
      process.kill()


def _measure(runs: _Runs, sides: Sequence[str]) -> dict[str, Any]:
  """First every side compiles for the first time, so that a mismatch ends the run early."""
  found = {side: {"starts": [], "passes": []} for side in sides}
  with contextlib.ExitStack() as stack:
    kept: dict[str, Process] = {}
    for side in tqdm.tqdm(sides, f"{runs.task}: first start", unit=" sides"):
      if runs.config.interleave and side in PEERS:  # starts once: how it compiles is not reported
        kept[side] = stack.enter_context(runs.started(side, found[side]))
      else:
        _turn(runs, side, found[side], passes=0)
    checks = {side: found[side]["starts"][0]["check"] for side in sides}
    agreement = compare(runs.task, checks, TOLERANCES[runs.config.model.dtype])
    if runs.config.interleave:
      for side in [side for side in sides if side not in kept]:
        kept[side] = stack.enter_context(runs.started(side, found[side]))
    turns = [side for _ in range(runs.config.repeats) for side in sides]
    for side in tqdm.tqdm(turns, runs.task, unit=" passes"):
      if kept:
        found[side]["passes"].append(kept[side].ask())
      else:
        _turn(runs, side, found[side], passes=1)
  task = runs.config.tasks[runs.task]
  examples = runs.config.batches * task.data.batch_size
  records = workdir.read_json(runs.folder / "records" / f"{runs.task}.json")
  return peer_summary.summary(task, examples, records["useful_tokens"], agreement, found)


def _turn(runs: _Runs, side: str, found: dict[str, list], passes: int) -> None:
  """The side alone in memory, from its start to its end."""
  with runs.started(side, found) as process:
    found["passes"] += [process.ask() for _ in range(passes)]


def compare(
  task: str, checks: dict[str, list[dict[str, float]]], tolerance: float
) -> dict[str, Any]:
  """Relative differences from the first side of what each found before updates 1 and 2, or in samples.

    |ours - theirs| / max(|ours|, |theirs|, 0.1)

  FloatingPointError where one is above `tolerance`, or where an update did not move the loss by more
  than both sides differ, as then their second values prove nothing.
  """
  (first, theirs), *others = checks.items()
  worst = {}
  for side, ours in others:
    apart = [
      {name: _apart(mine[name], other[name]) for name in other} for mine, other in zip(ours, theirs)
    ]
    worst[side] = max(x for found in apart for x in found.values())
    for at, found in enumerate(apart):
      for name, value in found.items():
        if not value <= tolerance:
          raise FloatingPointError(
            f"{task}: {name} at step {at} is {ours[at][name]:.6g} by {side} and {theirs[at][name]:.6g} by "
            f"{first}: they differ by {value:.1e}, and at most {tolerance} is allowed"
          )
    if len(theirs) < 2:  # nothing was updated
      continue
    moved = _apart(theirs[1]["loss"], theirs[0]["loss"])
    if moved <= apart[1]["loss"]:
      raise FloatingPointError(
        f"{task}: the update moved the loss by {moved:.1e} only, less than both sides differ: raise "
        "config.optimizer.learning_rate"
      )
  return {"values": checks, "largest_difference": worst, "tolerance": tolerance}


def _apart(one: float, other: float) -> float:
  return abs(one - other) / max(abs(one), abs(other), 0.1)
