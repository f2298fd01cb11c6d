"""How long a command takes from its start to its first training step, compiling or not."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from align_jax.errors import InputError

_POLL = 0.02  # seconds


@dataclasses.dataclass(frozen=True)
class FirstStepSection:
  """`python -m MODULE ARGUMENTS --workdir=...`, a command that writes metrics.jsonl."""

  module: str  # "": nothing is measured
  arguments: tuple[str, ...] = ()
  warm_repeats: int = 3  # starts with the programs of the first
  timeout_s: float = 300.0

  def __post_init__(self):
    if self.warm_repeats < 1 or self.timeout_s <= 0:
      raise InputError("first_step: warm_repeats and timeout_s must be positive")


def measure(section: FirstStepSection) -> dict[str, Any]:
  """Seconds to the first line of training metrics: with an empty compilation cache, then with it filled.

  The line of a step is written when the next one is under way. RuntimeError where the command ends or
  `timeout_s` passes before there is one.
  """
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    seconds = [_start(section, root, number) for number in range(1 + section.warm_repeats)]
  command = " ".join(["python -m", section.module, *section.arguments])
  return {"command": command, "cold_s": seconds[0], "warm_s": seconds[1:]}


def sentence(found: dict[str, Any]) -> str:
  warm = sorted(found["warm_s"])
  return (
    f"{found['command']}: first step after {found['cold_s']:.1f} s cold and "
    f"{warm[len(warm) // 2]:.1f} s [{warm[0]:.1f}, {warm[-1]:.1f}] warm"
  )


def _start(section: FirstStepSection, root: pathlib.Path, number: int) -> float:
  place = root / f"run{number}"
  command = [sys.executable, "-m", section.module, *section.arguments, f"--workdir={place}"]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
  with (root / "log").open("w+") as log:
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
      while not _begun(place / "metrics.jsonl"):
        if child.poll() is not None or time.perf_counter() - start > section.timeout_s:
          log.seek(0)
          raise RuntimeError(f"{' '.join(command)} made no step:\n{log.read()[-2000:]}")
        time.sleep(_POLL)
      return time.perf_counter() - start
    finally:
      child.kill()
      child.wait()


def _begun(file: pathlib.Path) -> bool:
  """Whether a whole line of training metrics is there; those of an evaluation come before it."""
  if not file.exists():
    return False
  *lines, _ = file.read_text().split("\n")
  return any("loss" in json.loads(line) for line in lines)
