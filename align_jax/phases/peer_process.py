"""Processes that are measured: started, asked in lines of JSON, and told to stop.

A process says once that it is ready, with what it found; then it answers every "pass" with what that
took, until "stop". Its standard output is the channel, so whatever else it prints goes to its log.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

_TAIL = 2000  # characters of its log that an error shows


class Process:
  """One side of a benchmark in a process of its own, seen from the parent."""

  def __init__(self, role: str, task: str, folder: pathlib.Path, environment: dict[str, str]):
    """Starts `python -m align_jax.peer_worker ROLE TASK FOLDER`."""
    self._log = folder / "logs" / f"{task}.{role}.log".replace(", ", ".").replace(" ", "_")
    self._log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "align_jax.peer_worker", role, task, str(folder)]
    with self._log.open("a") as log:
      self._child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | environment,
      )

  def ready(self) -> dict[str, Any]:
    """Waits for what the process says first; RuntimeError with the end of its log if it fails."""
    return self._answer()

  def ask(self) -> dict[str, Any]:
    """One pass, and what it took; RuntimeError as in `ready`."""
    self._say("pass")
    return self._answer()

  def stop(self) -> None:
    """Ends the process, and waits until its memory is free."""
    if self._child.poll() is None:
      self._say("stop")
    self._child.communicate()

  def kill(self) -> None:
    """Ends it at once, whatever it is doing."""
    self._child.kill()
    self._child.communicate()

  def _say(self, word: str) -> None:
    try:
      self._child.stdin.write(word + "\n")
      self._child.stdin.flush()
    except BrokenPipeError:
      pass  # what was wrong is in its log, which `_answer` shows

  def _answer(self) -> dict[str, Any]:
    line = self._child.stdout.readline()
    if not line:
      self._child.communicate()
      tail = self._log.read_text(errors="replace")[-_TAIL:]
      raise RuntimeError(
        f"a process of the benchmark ended with status {self._child.returncode}; {self._log} ends:\n"
        f"{tail}"
      )
    return json.loads(line)


class Channel:
  """The same pipe, seen from the child; made before anything is printed."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    self._in = os.fdopen(os.dup(0), "r")

  def send(self, answer: dict[str, Any]) -> None:
    self._out.write(json.dumps(answer) + "\n")
    self._out.flush()

  def goes_on(self) -> bool:
    """Waits for the next word: whether it asks for a pass. A parent that is gone asks for none."""
    return self._in.readline().strip() == "pass"


def peak_bytes() -> int:
  """The most memory this process has had resident: VmHWM of Linux, or what getrusage says."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    for line in status.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def memory(devices) -> dict[str, int | None]:
  """Peaks of this process so far: resident on the host, and on the device where it counts them."""
  found = devices[0].memory_stats() or {}
  return {"peak_bytes": peak_bytes(), "peak_device_bytes": found.get("peak_bytes_in_use")}


def cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
