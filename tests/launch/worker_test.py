"""The host's side, with real processes: marked lines, the status, jobs that a connection left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from align_jax.launch import worker

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAVES = """
import pathlib, signal, sys, time
def save(*_):
  print("saved"); sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").write_text("")
while True: time.sleep(0.05)
"""


def start(folder, code, *options):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    [sys.executable, "-m", "align_jax.launch.worker", "--slice=1", *options, "--", "python", "-c", code],
    cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def until_ready(folder):
  for _ in range(1200):
    if (folder / "ready").exists():
      (folder / "ready").unlink()
      return
    time.sleep(0.05)
  raise AssertionError("the job did not start")


@pytest.mark.parametrize(
  "code, lines, status",
  [
    ("print('a'); print('b')", ["a", "b"], 0),
    ("import sys; print('bad', file=sys.stderr); sys.exit(2)", ["bad"], 2),
    ("import os; os.kill(os.getpid(), 9)", [], 137),
    ("import os; print(os.environ['X'])", ["y=z"], 0),
    ("import sys; sys.stdout.buffer.write(b'\\xff\\n')", ["\ufffd"], 0),
  ],
)
def test_lines_are_marked_and_the_last_says_the_status(tmp_path, code, lines, status):
  process = start(tmp_path, code, "--env=X=y=z")
  out, _ = process.communicate(timeout=60)
  assert out.splitlines() == [f"[1/0] {line}" for line in [*lines, f"exit status {status}"]]
  assert process.returncode == status
  assert not (tmp_path / "launch" / "job.pid").exists()


def test_a_program_that_is_not_there_is_status_127(tmp_path):
  heard = []
  assert worker.run(["no-such-program"], "", tmp_path, heard.append) == 127
  assert "no-such-program" in heard[0]


def test_sigterm_is_passed_on_and_the_saved_job_says_resume_me(tmp_path):
  process = start(tmp_path, SAVES)
  until_ready(tmp_path)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and out.splitlines() == ["[1/0] saved", "[1/0] exit status 75"]


def test_a_job_left_behind_saves_before_the_next_begins(tmp_path):
  """Nobody listens to the first any more: it goes on all the same, until the second asks it to stop."""
  first = start(tmp_path, SAVES)
  until_ready(tmp_path)
  first.stdout.close()
  second = start(tmp_path, "print('next')")
  out, _ = second.communicate(timeout=60)
  assert second.returncode == 0 and out.splitlines()[0] == "[1/0] next"
  assert first.wait(timeout=60) == 75
  assert (tmp_path / "launch" / "job.log").read_text().splitlines() == ["saved", "next"]


def test_a_stale_number_of_a_process_harms_nobody(tmp_path):
  bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
  try:
    (tmp_path / "job.pid").write_text(f"{bystander.pid} 123")
    worker.end_previous(tmp_path / "job.pid")
    assert bystander.poll() is None
  finally:
    bystander.kill()


def test_a_job_that_will_not_stop_is_killed(tmp_path):
  deaf = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); time.sleep(60)"
  )
  process = start(tmp_path, deaf)
  until_ready(tmp_path)
  worker.end_previous(tmp_path / "launch" / "job.pid", patience=0.5)
  out, _ = process.communicate(timeout=60)
  assert out.splitlines() == ["[1/0] exit status 137"]


@pytest.mark.parametrize(
  "name, number", [("t1v-n-0a1b-w-13", 13), ("t1v-n-0a1b-w-0.us-east5-a.c.p.internal", 0), ("laptop", 0)]
)  # fmt: skip
def test_hosts_are_numbered_by_their_names(name, number):
  assert worker.host_number(name) == number


def test_the_workdir_is_taken_over_and_kept_in_the_bucket(tmp_path):
  """Fetched before the job, copied while it runs and after it; without the checkpoints."""
  calls, said = [], []

  def call(words, **_):
    calls.append(words)
    return subprocess.CompletedProcess(words, len(calls) == 2, "", "no bucket")

  local = str(tmp_path / "work")
  worker.fetch(local, "gs://b/x", said.append, call)
  assert pathlib.Path(local).is_dir() and calls[0][-2:] == ["gs://b/x", local] and not said
  with worker.mirrored(local, "gs://b/x", said.append, seconds=0.01, call=call):
    while len(calls) < 4:
      time.sleep(0.01)
  assert all(c[-2:] == [local, "gs://b/x"] and "--exclude=^checkpoints/.*" in c for c in calls[1:])
  assert said == ["the workdir could not be copied to gs://b/x: no bucket"]
