"""The one training loop: data, step, the previous step's metrics, evaluation, checkpoints."""

import contextlib
import dataclasses
import math
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from align_jax.errors import InputError
from align_jax.training import metrics as metrics_lib
from align_jax.training.checkpoints import Checkpoints

RESUME_STATUS = 75  # EX_TEMPFAIL: the run was asked to stop, saved its state, and can be resumed


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long, and how often to look and to save."""

  steps: int
  eval_every: int = 0  # steps; 0 means at the first and the last step only
  checkpoint_every: int = 0  # steps; 0 means at the end only
  keep: int = 2  # newest checkpoints preserved

  def __post_init__(self):
    if self.steps < 1 or self.keep < 1 or min(self.eval_every, self.checkpoint_every) < 0:
      raise InputError("loop.steps and loop.keep must be positive, the intervals not negative")


@dataclasses.dataclass
class Hooks:
  """What a phase adds to the loop; every hook may be absent."""

  evaluate: Callable[[Any], dict[str, float]] | None = None  # state -> {name: value}
  check_first: Callable[[dict[str, float]], None] | None = (
    None  # raises unless step 0 is as it must be
  )


def fit(
  state,
  *,
  name: str,
  step: Callable,
  batches,
  put: Callable,
  config: LoopConfig,
  workdir: pathlib.Path,
  metadata: dict,
  hooks: Hooks,
):
  """Runs `state, metrics = step(state, batch)` up to `config.steps`, resuming from the newest checkpoint.

  A line of metrics with `step: t` is measured on the parameters after t updates.  SIGTERM or Ctrl-C
  saves, and exits with status 75, "resume me".
  """
  checkpoints = Checkpoints(workdir, keep=config.keep)
  if checkpoints.latest_step is not None:
    state = checkpoints.restore(state, batches)
  start = int(state.step)
  log = _Log(name, workdir, config.steps, start, hooks.check_first)
  with contextlib.closing(checkpoints), contextlib.closing(log), _stop_requests() as stop:
    for t in range(start, config.steps):
      if hooks.evaluate and (t == 0 or (config.eval_every and t % config.eval_every == 0)):
        log.evaluation(t, hooks.evaluate(state))
      state, metrics = step(state, put(next(batches)))
      log.after_dispatch(t, metrics)
      due = config.checkpoint_every and (t + 1) % config.checkpoint_every == 0
      stopping = _any_host(stop.requested)
      if due or stopping:
        log.flush()
        checkpoints.save(t + 1, state, batches, metadata=metadata)
      if stopping:
        checkpoints.close()
        raise SystemExit(RESUME_STATUS)
    log.flush()
    if hooks.evaluate and start < config.steps:
      log.evaluation(config.steps, hooks.evaluate(state))
    checkpoints.save(config.steps, state, batches, metadata=metadata)
  return state


def _any_host(flag: bool) -> bool:
  """Whether any host was asked to stop: all of them must save the same step."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


class _Log:
  """Holds one step's metrics on the device until the next step has been dispatched."""

  def __init__(self, name, workdir, steps, start, check_first):
    self._writer = metrics_lib.MetricsWriter(workdir, start)
    self._progress = metrics_lib.Progress(name, steps, start)
    self._watch = metrics_lib.Stopwatch()
    self._pending, self._evaluation = None, {}
    self._check_first = check_first

  def after_dispatch(self, step: int, metrics):
    self.flush()
    self._pending = (step, metrics)

  def evaluation(self, step: int, values: dict[str, float]):
    self.flush()
    self._writer.write(step, {f"eval/{k}": v for k, v in values.items()})
    self._watch.lap()  # the next rate is that of training alone

  def flush(self):
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = metrics_lib.to_floats(metrics)
    values["tokens_per_s"] = values.pop("tokens") / self._watch.lap()
    self._writer.write(step, values)
    if not math.isfinite(values["loss"]):
      raise FloatingPointError(f"the loss is {values['loss']} at step {step}")
    if step == 0 and self._check_first:
      self._check_first(values)
    self._progress.advance({"loss": values["loss"], "tokens/s": values["tokens_per_s"]})

  def close(self):
    self._progress.close()
    self._writer.close()


class _Stop:
  requested = False


@contextlib.contextmanager
def _stop_requests():
  """Turns SIGTERM and the first Ctrl-C into a flag that the loop reads between steps."""
  stop = _Stop()

  def request(signum, frame):
    stop.requested = True
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

  try:
    previous = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not the main thread (a notebook's, say): nobody sends signals here
    yield stop
    return
  try:
    yield stop
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)


def evaluate_batches(eval_step: Callable, params, batches, put: Callable) -> dict[str, float]:
  """Metrics over a finite stream, weighted as one big batch."""
  totals = None
  for batch in batches:
    totals = metrics_lib.add(totals, eval_step(params, put(batch)))
  values = metrics_lib.to_floats(totals)
  values.pop("tokens")
  return values
