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
from align_jax.training import workdir as workdir_lib
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
  # (step, its metrics) -> why the run must end, or None.  It may remember what it saw: it sees every
  # step once and in order, a resumed run's earlier ones read back from metrics.jsonl.
  stop: Callable[[int, dict[str, float]], str | None] | None = None
  report: Callable[[], None] | None = None  # after a checkpoint was due, one process only


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

  A reason that `hooks.stop` gives for step t ends the run after t + 2 updates, as the metrics of a step
  are read when the next one is under way; a resumed run ends at the same update.  The state is saved,
  stopped.json says {"step": t, "reason"}, and the state is returned: the run is finished.
  """
  checkpoints = Checkpoints(workdir, keep=config.keep)
  if (found := checkpoints.restore(state, batches)) is not None:
    state, _ = found
  t = start = int(state.step)
  log = _Log(name, workdir, config.steps, start, hooks)
  with contextlib.closing(checkpoints), contextlib.closing(log), _stop_requests() as stop:
    _, ended = _any_host(False, log.ends_at(start))
    while t < config.steps and not ended:
      if hooks.evaluate and (t == 0 or (config.eval_every and t % config.eval_every == 0)):
        log.evaluation(t, hooks.evaluate(state))
      state, metrics = step(state, put(next(batches)))
      log.after_dispatch(t, metrics)
      t += 1
      due = config.checkpoint_every and t % config.checkpoint_every == 0
      stopping, ended = _any_host(stop.requested, log.ends_at(t))
      if due or (stopping and not ended):
        log.flush()
        checkpoints.save(t, state, batches, metadata=metadata)
      if stopping and not ended:
        checkpoints.close()
        raise SystemExit(RESUME_STATUS)
      if due:
        log.report()
    log.flush()
    if hooks.evaluate and start < t:
      log.evaluation(t, hooks.evaluate(state))
    checkpoints.save(t, state, batches, metadata=metadata)
    log.end(t)
  return state


def _any_host(*flags: bool) -> tuple[bool, ...]:
  """Each flag, true if any host raised it: all hosts must save, and end at, the same step."""
  if jax.process_count() == 1:
    return flags
  return tuple(map(bool, multihost_utils.process_allgather(np.array(flags)).any(axis=0)))


class _Log:
  """Holds one step's metrics on the device until the next step has been dispatched."""

  def __init__(self, name, workdir, steps, start, hooks):
    self._writer = metrics_lib.MetricsWriter(workdir, start)
    self._progress = metrics_lib.Progress(name, steps, start)
    self._watch = metrics_lib.Stopwatch()
    self._pending, self._hooks = None, hooks
    self._name, self._workdir, self._steps = name, workdir, steps
    self._first = (
      jax.process_index() == 0
    )  # the only one that writes, and asks for a reason to stop
    self._stop = None  # (step, reason)
    if self._first:
      workdir_lib.write_stop(workdir, None)
      for step, values in metrics_lib.training_lines(workdir):
        self._ask(step, values)

  def after_dispatch(self, step: int, metrics):
    known_at = metrics_lib.known_at(metrics)  # a step that waits for its own end is timed to here
    self.flush()
    self._pending = (step, metrics, known_at)

  def evaluation(self, step: int, values: dict[str, float]):
    self.flush()
    self._writer.write(step, {f"eval/{k}": v for k, v in values.items()})
    self._watch.lap()  # the next rate is that of training alone

  def flush(self):
    if self._pending is None:
      return
    step, metrics, known_at = self._pending
    self._pending = None
    values = metrics_lib.to_floats(metrics)
    values["tokens_per_s"] = values.pop("tokens") / self._watch.lap(known_at)
    self._writer.write(step, values)
    if not math.isfinite(values["loss"]):
      reason = f"the loss is {values['loss']} at step {step}"
      workdir_lib.write_stop(self._workdir, (step, reason))
      raise FloatingPointError(reason)
    if step == 0 and self._hooks.check_first:
      self._hooks.check_first(values)
    if self._first:
      self._ask(step, values)
    self._progress.advance({"loss": values["loss"], "tokens/s": values["tokens_per_s"]})

  def _ask(self, step: int, values: dict[str, float]):
    if self._hooks.stop and self._stop is None and (reason := self._hooks.stop(step, values)):
      self._stop = (step, reason)

  def ends_at(self, updates: int) -> bool:
    """Whether the reason to stop, if there is one, was known when this many updates were made."""
    return self._stop is not None and updates >= self._stop[0] + 2

  def report(self):
    if self._first and self._hooks.report:
      self._hooks.report()
      self._watch.lap()

  def end(self, updates: int):
    """Says why the run ended before its last step, if it did."""
    if updates < self._steps and self._first:
      workdir_lib.write_stop(self._workdir, self._stop)
      self._progress.close()
      print(f"== {self._name}: stopped after {updates} steps: {self._stop[1]}", flush=True)

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
