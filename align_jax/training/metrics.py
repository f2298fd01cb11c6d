"""Metrics leave the device one step late, into metrics.jsonl, TensorBoard events and a progress bar."""

import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import tensorboardX
import tqdm

from align_jax.errors import InputError
from align_jax.losses.masked import Mean
from align_jax.training import workdir as workdir_lib


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
  Only the first process writes.  InputError where the disk does not take a line.
  """

  def __init__(self, workdir: pathlib.Path, start_step: int):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._path = workdir / "metrics.jsonl"
    self._steps = _trim(self._path, start_step)
    with workdir_lib.writing(self._path):
      self._file = self._path.open("a")
    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start_step or None)

  def write(self, step: int, values: dict[str, float]):
    if not self._active:
      return
    with workdir_lib.writing(self._path):
      self._file.write(json.dumps({"step": step} | values) + "\n")
      self._file.flush()
    self._steps.append(step)
    for name, value in values.items():
      if math.isfinite(value):
        self._events.add_scalar(name, value, step)

  def lines_before(self, step: int) -> int:
    """How many lines of earlier steps there are, all of them on the disk itself: 0 on other hosts."""
    if not self._active:
      return 0
    with workdir_lib.writing(self._path):
      os.fsync(self._file.fileno())
    return sum(s < step for s in self._steps)

  def close(self):
    if self._active:
      with workdir_lib.writing(self._path):
        self._file.close()
      self._events.close()


def _trim(path: pathlib.Path, start_step: int) -> list[int]:
  """Drops the lines from `start_step` on in one move; returns the steps of those that stay."""
  kept = [(line, row["step"]) for line, row in _rows(path) if row["step"] < start_step]
  text = "".join(line + "\n" for line, _ in kept)
  if path.exists() and path.read_text() != text:
    workdir_lib.write_text(path, text)
  return [step for _, step in kept]


def training_lines(workdir: pathlib.Path) -> list[tuple[int, dict[str, float]]]:
  """(step, metrics) of every training step in metrics.jsonl, without the lines of evaluations."""
  rows = [row for _, row in _rows(workdir / "metrics.jsonl")]
  return [(row.pop("step"), row) for row in rows if "loss" in row]


def _rows(path: pathlib.Path) -> list[tuple[str, dict[str, float]]]:
  """(line, what it says) of the complete lines; a killed run may have left a torn last one."""
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
    try:
      rows.append((line, json.loads(line)))
    except ValueError as error:
      raise InputError(f"{path}:{number}: invalid JSON: {error}") from error
  return rows


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

  def say(self, text: str):
    """A line on stderr that does not tear the bar."""
    self._bar.write(text, file=sys.stderr)

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
