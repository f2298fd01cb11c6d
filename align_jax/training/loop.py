"""The one training loop: data, step, the previous step's metrics, evaluation, checkpoints."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax

from align_jax import hosts
from align_jax.data import streams
from align_jax.errors import InputError
from align_jax.training import guards
from align_jax.training import metrics as metrics_lib
from align_jax.training import workdir as workdir_lib
from align_jax.training.checkpoints import Checkpoints

RESUME_STATUS = 75  # EX_TEMPFAIL: the run was asked to stop, saved its state, and can be resumed


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long, how often to look and to save, and what to do where the loss looks wrong."""

  steps: int
  eval_every: int = 0  # steps; 0 means at the first and the last step only
  checkpoint_every: int = 0  # steps; 0 means at the end only
  keep: int = 2  # newest checkpoints preserved
  keep_every: int = 0  # and those of every so many steps; 0: no others
  checkpoints: str = ""  # where they go, a folder or a bucket (gs://...); "": into the workdir
  spike: str = "warn"  # of the loss, see `guards`: warn, stop or off
  stuck: str = "warn"  # a loss that stays what it was before anything was learned

  def __post_init__(self):
    intervals = self.eval_every, self.checkpoint_every, self.keep_every
    if self.steps < 1 or self.keep < 1 or min(intervals) < 0:
      raise InputError("loop.steps and loop.keep must be positive, the intervals not negative")
    if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
      raise InputError("loop.keep_every must be a multiple of loop.checkpoint_every")
    guards.check_action("loop.spike", self.spike)
    guards.check_action("loop.stuck", self.stuck)


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
  start_loss: float | None = None  # of a model that has learned nothing, where it is known


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
  identity: dict[str, str] | None = None,
):
  """Runs `state, metrics = step(state, batch)` up to `config.steps`, resuming from the newest checkpoint.

  A line of metrics with `step: t` is measured on the parameters after t updates.  SIGTERM or Ctrl-C
  saves, and exits with status 75, "resume me".  `identity` names, by a hash, what must not change
  while the run lasts (its reference): InputError where a run is resumed with another.

  A reason that `hooks.stop` gives for step t ends the run after t + 2 updates, as the metrics of a step
  are read when the next one is under way; a resumed run ends at the same update.  The state is saved,
  stopped.json says {"step": t, "reason"}, and the state is returned: the run is finished.
  """
  saver = _Saver(workdir, config, metadata | {"identity": identity or {}})
  state = saver.resume(state, batches)
  t = start = int(state.step)
  log = _Log(name, workdir, config, start, hooks, lambda place: saver.blame(batches, place))
  saver.follow(log, start)
  with contextlib.closing(saver), contextlib.closing(log), _stop_requests() as stop:
    _, ended = hosts.any_of(False, log.ends_at(start))
    while t < config.steps and not ended:
      if hooks.evaluate and (t == 0 or (config.eval_every and t % config.eval_every == 0)):
        log.evaluation(t, hooks.evaluate(state))
      place = batches.get_state()
      state, metrics = step(state, put(next(batches)))
      log.after_dispatch(t, metrics, place)
      t += 1
      due = config.checkpoint_every and t % config.checkpoint_every == 0
      stopping, ended = hosts.any_of(stop.requested, log.ends_at(t))
      if due or (stopping and not ended):
        saver.save(t, state, batches)
      if stopping and not ended:
        saver.close()
        raise SystemExit(RESUME_STATUS)
      if due:
        log.report()
      saver.check()
    log.flush()
    if hooks.evaluate:  # also if the run was killed when only this line was missing
      log.evaluation(t, hooks.evaluate(state))
    saver.save(t, state, batches)
    log.end(t)
  return state


def no_transfers(step: Callable) -> Callable:
  """The step, which may not move arrays between host and devices unasked: each time costs a wait."""

  def guarded(*args):
    with jax.transfer_guard("disallow"):
      return step(*args)

  return guarded


class _Saver:
  """The checkpoints of one run, and what they say of it."""

  def __init__(self, workdir, config: LoopConfig, metadata: dict):
    self._checkpoints = Checkpoints(
      workdir, keep=config.keep, keep_every=config.keep_every, root=config.checkpoints
    )
    self._workdir, self._metadata = workdir, metadata
    self._lines = 0  # of metrics.jsonl, by the checkpoint that the run goes on from
    self.log = None
    self.check, self.close = self._checkpoints.check, self._checkpoints.close

  def resume(self, state, batches):
    """The state of the newest checkpoint, or the one given; InputError if the run is another."""
    found = self._checkpoints.restore(state, batches)
    if found is None:
      return state
    state, record = found
    there, here = record["identity"], self._metadata["identity"]
    changed = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if changed:
      raise InputError(
        f"{self._workdir} cannot go on: {', '.join(changed)} is not what it was when the run was "
        "begun (its weights have changed): put it back, or use another workdir"
      )
    self._lines = record["metrics_lines"]
    return state

  def follow(self, log: "_Log", step: int):
    """Says so where metrics.jsonl has lost lines of earlier steps, which nobody makes again."""
    self.log, found = log, log.lines_before(step)
    if found < self._lines and jax.process_index() == 0:
      print(
        f"== {self._workdir / 'metrics.jsonl'} holds {found} of the {self._lines} lines before step {step}",
        file=sys.stderr,
      )

  def save(self, step: int, state, batches):
    self.log.flush()
    lines = self.log.lines_before(step)
    self._checkpoints.save(step, state, batches, metadata=self._metadata | {"metrics_lines": lines})

  def blame(self, batches, place) -> str:
    """What a person wants to know of a step that went wrong: its records, and where to go back to."""
    return f"on {streams.describe(batches, place)}; {self._checkpoints.last_good()}"


class _Log:
  """Holds one step's metrics on the device until the next step has been dispatched."""

  def __init__(self, name, workdir, config: LoopConfig, start, hooks, blame):
    self._writer = metrics_lib.MetricsWriter(workdir, start)
    self._progress = metrics_lib.Progress(name, config.steps, start)
    self._watch = metrics_lib.Stopwatch()
    self._pending, self._hooks, self._blame = None, hooks, blame
    self._name, self._workdir, self._steps = name, workdir, config.steps
    self._guards = _guards(config, hooks)
    self._first = (
      jax.process_index() == 0
    )  # the only one that writes, and asks for a reason to stop
    self._stop = None  # (step, reason)
    if self._first:
      workdir_lib.write_stop(workdir, None)
      for step, values in metrics_lib.training_lines(workdir):
        self._ask(step, values, again=True)

  def after_dispatch(self, step: int, metrics, place):
    known_at = metrics_lib.known_at(metrics)  # a step that waits for its own end is timed to here
    self.flush()
    self._pending = (step, metrics, place, known_at)

  def evaluation(self, step: int, values: dict[str, float]):
    self.flush()
    self._writer.write(step, {f"eval/{k}": v for k, v in values.items()})
    self._watch.lap()  # the next rate is that of training alone

  def flush(self):
    if self._pending is None:
      return
    step, metrics, place, known_at = self._pending
    self._pending = None
    values = metrics_lib.to_floats(metrics)
    values["tokens_per_s"] = values.pop("tokens") / self._watch.lap(known_at)
    self._writer.write(step, values)
    self._check_finite(step, values, place)
    if step == 0 and self._hooks.check_first:
      self._hooks.check_first(values)
    if self._first:
      self._ask(step, values)
    self._progress.advance({"loss": values["loss"], "tokens/s": values["tokens_per_s"]})

  def _check_finite(self, step: int, values: dict[str, float], place):
    """A gradient that is not finite spoils the parameters behind it, before any loss shows it."""
    for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
      if not math.isfinite(values.get(name, 0.0)):
        reason = f"{what} is {values[name]} at step {step}, {self._blame(place)}"
        workdir_lib.write_stop(self._workdir, (step, reason))
        raise FloatingPointError(reason)

  def _ask(self, step: int, values: dict[str, float], again: bool = False):
    if self._hooks.stop and self._stop is None and (reason := self._hooks.stop(step, values)):
      self._stop = (step, reason)
    for action, watch in self._guards:
      reason = watch(step, values)
      if reason and action == "stop":
        self._stop = self._stop or (step, reason)
      elif reason and not again:
        self._progress.say(f"== {self._name}: at step {step} {reason}")

  def lines_before(self, step: int) -> int:
    return self._writer.lines_before(step)

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


def _guards(config: LoopConfig, hooks: Hooks) -> list[tuple[str, guards.Watch]]:
  """(what to do, what to look for)."""
  found = [(config.spike, guards.spikes())]
  if hooks.start_loss is not None:
    found.append((config.stuck, guards.stuck(hooks.start_loss, config.steps)))
  return [(action, watch) for action, watch in found if action != "off"]


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
