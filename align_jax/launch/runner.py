"""Runs a command of this machine and listens to it."""

import dataclasses
import subprocess
from collections.abc import Callable, Sequence

from align_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Result:
  status: int
  output: str  # both streams


Runner = Callable[[Sequence[str], Callable[[str], None] | None], Result]


def run(words: Sequence[str], on_line: Callable[[str], None] | None = None) -> Result:
  """Runs to the end; `on_line` hears every line as it comes.  InputError if there is no such program."""
  try:
    process = subprocess.Popen(
      list(words),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
    )
  except FileNotFoundError as error:
    what = (
      "install the Google Cloud CLI and run `gcloud auth login`" if words[0] == "gcloud" else ""
    )
    raise InputError(f"{words[0]} is not on this machine{'; ' if what else ''}{what}") from error
  lines = []
  with process:
    for line in process.stdout:
      lines.append(line)
      if on_line:
        on_line(line.rstrip("\r\n"))
  return Result(process.returncode, "".join(lines))
