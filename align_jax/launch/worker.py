"""Runs one command on one host of a slice: `python -m align_jax.launch.worker --slice=0 -- COMMAND`.

Every line is marked with slice and host, so that whoever started all of them can tell them apart; the
last says the status.  A job that an earlier connection left behind is asked to save and stop first.
Standard library only: it must start before anything else can.
"""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

STATUS = "exit status "
_PATIENCE = 180.0  # seconds that a job of before gets to save


def host_number(hostname: str) -> int:
  """Machines of a slice are called ...-w-0, ...-w-1 and so on; any other machine is alone."""
  found = re.search(r"-w-(\d+)(?:\.|$)", hostname)
  return int(found[1]) if found else 0


def run(command: list[str], mark: str, state: pathlib.Path, emit=print) -> int:
  """The status of `command`, whose lines are emitted marked; a signal n gives 128 + n."""
  end_previous(state / "job.pid")
  environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
  environment["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  try:
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      env=environment,
      start_new_session=True,  # a signal to the connection is passed on once, not received twice
    )
  except OSError as error:
    emit(f"{mark}{error}")
    return 127
  me = f"{process.pid} {_started(process.pid)}"
  (state / "job.pid").write_text(me)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: _ask_to_stop(process.pid))
  signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost connection is no reason to stop
  with (state / "job.log").open("ab") as log:
    for line in process.stdout:
      log.write(line)
      log.flush()
      emit = _said(emit, mark + line.decode(errors="replace").rstrip("\r\n"))
  status = process.wait()
  if (state / "job.pid").read_text() == me:  # and not already that of a job after this one
    (state / "job.pid").unlink()
  return status if status >= 0 else 128 - status


def fetch(local: str, bucket: str, emit, call=subprocess.run) -> None:
  """The workdir as a run before left it in the bucket; the first run finds nothing there."""
  pathlib.Path(local).mkdir(parents=True, exist_ok=True)
  found = call(_sync(bucket, local), capture_output=True, text=True)
  if found.returncode:
    emit(f"nothing taken over from {bucket}: {found.stderr.strip().splitlines()[-1:]}")


@contextlib.contextmanager
def mirrored(local: str, bucket: str, emit, *, seconds: float = 60, call=subprocess.run):
  """Keeps the bucket's copy of the workdir new while the job runs, and once more when it has ended."""
  over = threading.Event()

  def copy():
    done = call(_sync(local, bucket), capture_output=True, text=True)
    if done.returncode:
      emit(f"the workdir could not be copied to {bucket}: {done.stderr.strip()[-300:]}")

  def again():
    while not over.wait(seconds):
      copy()

  thread = threading.Thread(target=again, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    copy()


def _sync(source: str, destination: str) -> list[str]:
  """Checkpoints are left out: they are written into the bucket as they are made."""
  return [
    "gcloud",
    "storage",
    "rsync",
    "--recursive",
    "--exclude=^checkpoints/.*",
    source,
    destination,
  ]


def _said(emit, line: str):
  """Emits the line; once nobody listens the job goes on in silence, with its log on the host."""
  try:
    emit(line)
  except BrokenPipeError:
    sys.stdout = open(os.devnull, "w")
    return lambda _: None
  return emit


def end_previous(file: pathlib.Path, patience: float = _PATIENCE) -> None:
  """Ends the job that the file names, if it still runs: it saves on SIGTERM."""
  try:
    pid, started = file.read_text().split(" ", 1)
  except (OSError, ValueError):
    return
  pid, deadline = int(pid), time.monotonic() + patience
  if started != _started(pid):  # another process has that number by now
    return
  _ask_to_stop(pid)
  while started == _started(pid):
    if time.monotonic() > deadline:
      os.killpg(pid, signal.SIGKILL)
      return
    time.sleep(0.2)


def _ask_to_stop(pid: int) -> None:
  with contextlib.suppress(OSError):
    os.killpg(pid, signal.SIGTERM)


def _started(pid: int) -> str:
  """When a process began, in the kernel's ticks; nothing if it has ended."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] == "Z" else fields[19]


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="align_jax.launch.worker")
  parser.add_argument("--slice", type=int, required=True)
  parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
  parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path("launch"))
  parser.add_argument("--mirror", nargs=2, metavar=("FOLDER", "BUCKET"))
  parser.add_argument("command", nargs=argparse.REMAINDER)
  options = parser.parse_args(argv)
  os.environ.update(pair.split("=", 1) for pair in options.env)
  options.state.mkdir(parents=True, exist_ok=True)
  command = options.command[1:] if options.command[:1] == ["--"] else options.command
  mark = f"[{options.slice}/{host_number(socket.gethostname())}] "

  def emit(line):
    print(line, flush=True)

  first = options.slice == 0 and host_number(socket.gethostname()) == 0

  def noted(line):
    _said(emit, mark + line)

  if options.mirror:
    end_previous(options.state / "job.pid")
    fetch(*options.mirror, noted)
  keeping = (
    mirrored(*options.mirror, noted) if options.mirror and first else contextlib.nullcontext()
  )
  with keeping:
    status = run(command, mark, options.state, emit)
  _said(emit, f"{mark}{STATUS}{status}")
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
