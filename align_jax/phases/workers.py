"""Long-lived worker processes for tasks that do not need each other, and locks between jobs."""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from align_jax.errors import InputError
from align_jax.training.loop import RESUME_STATUS

_PATIENCE = 120.0  # seconds a worker has to save its state before it is killed


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a task: its value, or how its worker died."""

  task: Any
  value: Any = None
  death: str | None = None


class _Worker:
  """A process that takes one task after the other from its pipe."""

  def __init__(self, index: int, count: int, start: Callable, work: Callable):
    context = multiprocessing.get_context("spawn")
    self.index, self.task = index, None
    self.stop = context.Event()
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(
      target=_serve, args=(theirs, self.stop, index, count, start, work), daemon=True
    )
    # Until it has handlers of its own, a worker must not answer the terminal's Ctrl-C by a traceback.
    with _handlers({signal.SIGINT: signal.SIG_IGN}):
      self.process.start()
    theirs.close()

  def give(self, task: Any):
    self.task = task
    with contextlib.suppress(OSError):  # it died idle: `receive` will say so
      self.pipe.send(task)

  def receive(self) -> Outcome | None:
    """The outcome of the task it was given; None if it saved its state and stopped."""
    task, self.task = self.task, None
    try:
      return Outcome(task, self.pipe.recv())
    except (EOFError, OSError):
      self.process.join(_PATIENCE)
    status = self.process.exitcode
    if status == RESUME_STATUS:
      return None
    return Outcome(task, death=f"its process died with status {status}")

  def end(self):
    """Asks it to save and stop; kills it if it does not."""
    self.stop.set()
    if self.process.is_alive():
      self.process.terminate()


def run(tasks: Sequence[Any], work: Callable, *, count: int, start: Callable) -> Iterator[Outcome]:
  """Yields the outcome of every task, in the order in which they end.

  In each of `count` processes `resource = start(index, count)` is called once, and then
  `work(task, resource, stopping)` for one task after the other; both must be importable by name.
  A worker that dies costs its task only.  SIGTERM or Ctrl-C is passed on: the workers save what they
  are at, and this process exits with status 75.
  """
  waiting, workers = list(tasks), {}
  stop = _Stop()
  with _handlers({s: stop for s in (signal.SIGTERM, signal.SIGINT)}):
    try:
      for index in range(min(count, len(waiting))):
        workers[index] = _Worker(index, count, start, work)
        workers[index].give(waiting.pop(0))
      while busy := {w.pipe: w for w in workers.values() if w.task is not None}:
        ready = connection.wait(list(busy), timeout=0.2)
        if stop.requested:
          raise SystemExit(RESUME_STATUS)
        for worker in (busy[pipe] for pipe in ready):
          outcome = worker.receive()
          if outcome is None:
            raise SystemExit(RESUME_STATUS)
          if waiting:
            if outcome.death:
              workers[worker.index] = _Worker(worker.index, count, start, work)
            workers[worker.index].give(waiting.pop(0))
          yield outcome
    finally:
      _end(list(workers.values()))


def _end(workers: Sequence[_Worker]):
  for worker in workers:
    worker.end()
  limit = time.monotonic() + _PATIENCE
  for worker in workers:
    worker.process.join(max(0.0, limit - time.monotonic()))
    if worker.process.is_alive():
      worker.process.kill()
      worker.process.join()


def _serve(pipe, stop, index: int, count: int, start: Callable, work: Callable):
  """A worker's life.  It ends with its parent, whose end of the pipe is then closed."""
  for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: sys.exit(RESUME_STATUS))
  resource = start(index, count)
  with contextlib.suppress(EOFError, OSError):
    while True:
      pipe.send(work(pipe.recv(), resource, stop.is_set))


class _Stop:
  """A signal handler that takes note; a second Ctrl-C stops at once."""

  requested = False

  def __call__(self, signum, frame):
    self.requested = True
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _handlers(handlers: dict[int, Any]):
  """Signal handlers for a while; none outside the main thread, where nobody sends signals."""
  try:
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
  except ValueError:
    previous = {}
  try:
    yield
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)


@contextlib.contextmanager
def output_to(file: pathlib.Path):
  """Appends everything this process prints to a file: several bars on one terminal are unreadable."""
  sys.stdout.flush(), sys.stderr.flush()
  kept = [os.dup(fd) for fd in (1, 2)]
  with file.open("a") as log:
    for fd in (1, 2):
      os.dup2(log.fileno(), fd)
    try:
      yield
    finally:
      sys.stdout.flush(), sys.stderr.flush()
      for fd, saved in zip((1, 2), kept):
        os.dup2(saved, fd)
        os.close(saved)


@contextlib.contextmanager
def lock(file: pathlib.Path):
  """Waits until no other process, on this host or another, holds the lock; a dead one holds none."""
  with file.open("w") as handle:
    told = False
    while True:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if not told:
          print(f"== waiting for the process that holds {file}", flush=True)
        told = True
        time.sleep(0.5)
      except OSError as error:
        raise InputError(f"{file} cannot be locked: {error.strerror}") from error
    yield
