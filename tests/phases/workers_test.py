"""Worker processes: every task once, a death costs its task only, a stop is passed on."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from align_jax.phases import workers

HELPERS = """
import os, sys, time

def start(index, count):
  return index, os.getpid()

def work(task, resource, stopping):
  if task == "die":
    os._exit(9)
  if task == "stop":
    sys.exit(75)
  if task == "sleep":
    time.sleep(60)
  return (task, *resource)
"""


@pytest.fixture(scope="module")
def helpers(tmp_path_factory):
  """A module that a spawned process can import."""
  folder = tmp_path_factory.mktemp("helpers")
  (folder / "sweep_helpers.py").write_text(HELPERS)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(folder))
    yield importlib.import_module("sweep_helpers")


def run(helpers, tasks, count):
  return list(workers.run(tasks, helpers.work, count=count, start=helpers.start))


def test_every_task_is_done_once_by_processes_that_live_on(helpers):
  outcomes = run(helpers, list(range(8)), 2)
  assert sorted(o.value[0] for o in outcomes) == list(range(8))
  assert all(o.task == o.value[0] and o.death is None for o in outcomes)
  pids = {(index, pid) for _, index, pid in (o.value for o in outcomes)}
  assert len(pids) <= 2 and os.getpid() not in {pid for _, pid in pids}


def test_a_worker_that_dies_costs_its_task_only(helpers):
  outcomes = run(helpers, ["a", "die", "b", "c"], 1)
  assert [o.task for o in outcomes] == ["a", "die", "b", "c"]
  assert outcomes[1].death == "its process died with status 9"
  assert outcomes[1].value is None
  first, last = outcomes[0].value[2], outcomes[3].value[2]
  assert first != last  # another process took its place


def test_a_worker_that_was_told_to_stop_stops_them_all(helpers):
  with pytest.raises(SystemExit) as stop:
    run(helpers, ["stop", "a", "b"], 1)
  assert stop.value.code == 75


def test_a_signal_ends_the_workers_and_the_status_says_resume(helpers):
  before = time.monotonic()
  outcomes = workers.run(["a", "sleep", "b"], helpers.work, count=1, start=helpers.start)
  worker = next(outcomes).value[2]
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(SystemExit) as stop:
    next(outcomes)
  assert stop.value.code == 75
  assert time.monotonic() - before < 50
  with pytest.raises(ProcessLookupError):
    os.kill(worker, 0)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


HOLD = """
import fcntl, pathlib, sys, time
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(1.0)
pathlib.Path(sys.argv[1] + ".ended").touch()
"""


def test_a_lock_is_held_by_one_and_freed_by_its_end(tmp_path):
  """The other process never frees it itself: the system does when it ends."""
  file = tmp_path / "lock"
  with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b"held\n"
    with workers.lock(file):
      assert (tmp_path / "lock.ended").exists()


def test_output_goes_to_the_file_and_comes_back(tmp_path, capfd):
  with workers.output_to(tmp_path / "log.txt"):
    os.system("echo inside; echo error >&2")
  os.system("echo outside")
  assert (tmp_path / "log.txt").read_text() == "inside\nerror\n"
  assert capfd.readouterr().out == "outside\n"
