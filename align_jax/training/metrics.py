"""Metrics leave the device one step late, into metrics.jsonl, TensorBoard events and a progress bar."""

import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import tensorboardX
import tqdm

from align_jax.losses.masked import Mean


def to_floats(metrics: dict[str, Any]) -> dict[str, float]:
  """Waits for the device; every `Mean` becomes its quotient (0 for an empty one), the rest floats."""
  return {k: _to_float(v) for k, v in jax.device_get(metrics).items()}


def _to_float(value) -> float:
  if isinstance(value, Mean):
    return float(value.total) / float(value.weight) if value.weight else 0.0
  return float(value)


def add(totals: dict[str, Any] | None, metrics: dict[str, Any]) -> dict[str, Any]:
  """Sums totals and weights of two metric dictionaries."""
  if totals is None:
    return metrics
  return {k: totals[k] + v for k, v in metrics.items()}


class MetricsWriter:
  """Writes one JSON object a step, first key `step`, and the same to TensorBoard.

  A writer opened at `start_step` drops the lines of later steps, which a resumed run makes again.
  Only the first process writes.
  """

  def __init__(self, workdir: pathlib.Path, start_step: int):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    path = workdir / "metrics.jsonl"
    kept = [line for line in _lines(path) if json.loads(line)["step"] < start_step]
    path.write_text("".join(line + "\n" for line in kept))
    self._file = path.open("a")
    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start_step or None)

  def write(self, step: int, values: dict[str, float]):
    if not self._active:
      return
    self._file.write(json.dumps({"step": step} | values) + "\n")
    self._file.flush()
    for name, value in values.items():
      if math.isfinite(value):
        self._events.add_scalar(name, value, step)

  def close(self):
    if self._active:
      self._file.close()
      self._events.close()


def training_lines(workdir: pathlib.Path) -> list[tuple[int, dict[str, float]]]:
  """(step, metrics) of every training step in metrics.jsonl, without the lines of evaluations."""
  rows = [json.loads(line) for line in _lines(workdir / "metrics.jsonl")]
  return [(row.pop("step"), row) for row in rows if "loss" in row]


def _lines(path: pathlib.Path) -> list[str]:
  """The complete lines of a file that a killed run may have left with a torn last one."""
  if not path.exists():
    return []
  return [line for line in path.read_text().split("\n")[:-1] if line]


class Progress:
  """A bar with rate and time left, on a terminal or in a log file."""

  def __init__(self, name: str, steps: int, start: int):
    interval = 0.5 if sys.stderr.isatty() else 10.0
    self._bar = tqdm.tqdm(
      desc=name, total=steps, initial=start, mininterval=interval, disable=jax.process_index() != 0
    )

  def advance(self, shown: dict[str, float]):
    self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
    self._bar.update()

  def close(self):
    self._bar.close()


def known_at(metrics: dict[str, Any]) -> float | None:
  """The time, if the device is done with these metrics already; else None."""
  arrays = [x for x in jax.tree.leaves(metrics) if isinstance(x, jax.Array)]
  return time.perf_counter() if all(x.is_ready() for x in arrays) else None


class Stopwatch:
  """Seconds between successive calls."""

  def __init__(self):
    self._last = time.perf_counter()

  def lap(self, at: float | None = None) -> float:
    """Seconds since the last call, up to now or to a time `at` that has passed."""
    now = time.perf_counter() if at is None else at
    seconds, self._last = now - self._last, now
    return seconds
