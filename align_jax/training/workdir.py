"""The folder of one run: its settings, its parents, and whether it is finished."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import uuid
from typing import Any

import jax

from align_jax import config as config_lib
from align_jax.errors import InputError, one_line


def open_workdir(path: str | pathlib.Path, phase: str, settings: dict[str, Any]) -> pathlib.Path:
  """Makes the folder and writes config.json; refuses the folder of a run with other settings.

  Only the mesh may be another: a run goes on on whatever devices there are.
  """
  if "://" in str(path):
    raise InputError(
      f"the workdir {path} must be a folder of the file system; its checkpoints may lie in a bucket: "
      "set config.loop.checkpoints"
    )
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot create the workdir {folder}: {error.strerror}") from error
  if not os.access(folder, os.W_OK):
    raise InputError(f"the workdir {folder} is not writable")
  new = json.loads(json.dumps({"phase": phase} | settings))
  file = folder / "config.json"
  if file.exists():
    old = read_json(file)
    if not isinstance(old, dict):
      raise InputError(f"{file} must hold an object, not {type(old).__name__}")
    changes = config_lib.difference(_anywhere(old), _anywhere(new))
    if changes:
      raise InputError(
        f"{folder} belongs to a run with other settings ({'; '.join(changes)}); use another workdir"
      )
  write_json(file, new)
  return folder


def _anywhere(settings: dict[str, Any]) -> dict[str, Any]:
  """The settings without every section `mesh`."""
  kept = {name: value for name, value in settings.items() if name != "mesh"}
  return {n: _anywhere(value) if isinstance(value, dict) else value for n, value in kept.items()}


def write_json(file: pathlib.Path, value):
  """Replaces the file in one move.  Only the first process writes, of each run that shares the file."""
  if jax.process_index() == 0:
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: pathlib.Path, text: str):
  """A killed run, a full disk or a power cut leaves the old file or the new one, never a part."""
  part = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.part")
  with writing(file):
    try:
      with part.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
      part.replace(file)
    except OSError:
      part.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def writing(file: pathlib.Path):
  """A disk that is full or not writable is a sentence, not a traceback."""
  try:
    yield
  except OSError as error:
    raise InputError(f"{file} cannot be written: {error.strerror or error}") from error


def read_json(file: pathlib.Path):
  """The content of a JSON file written by a phase; InputError if it is not there, or not JSON."""
  if not file.exists():
    raise InputError(f"{file} is missing: {file.parent} is not the workdir of a finished phase")
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{file} is not valid JSON: {one_line(error)}") from error


def write_stop(folder: pathlib.Path, stop: tuple[int, str] | None):
  """Writes stopped.json, (step, reason) of a run that ended early; None takes an old one away."""
  if stop is not None:
    write_json(folder / "stopped.json", {"step": stop[0], "reason": stop[1]})
  elif jax.process_index() == 0:
    (folder / "stopped.json").unlink(missing_ok=True)


def read_stop(folder: pathlib.Path) -> tuple[int, str] | None:
  """(step, reason) if the run ended before its last step, because of what its metrics were there."""
  if not (folder / "stopped.json").exists():
    return None
  values = read_json(folder / "stopped.json")
  return values["step"], values["reason"]


def write_lineage(folder: pathlib.Path, *, phase: str, step: int, parents, data_fingerprint: str):
  """Names what a checkpoint was made from; its presence marks the phase as finished.

  A run that was stopped before its last step also has "stopped", the reason.
  """
  stop = read_stop(folder)
  write_json(
    folder / "lineage.json",
    {
      "phase": phase,
      "workdir": str(folder),
      "step": step,
      "parents": [dict(p) for p in parents],
      "git_revision": git_revision(),
      "data_fingerprint": data_fingerprint,
      "command": " ".join(["python -m", *_command()]),
    }
    | ({"stopped": stop[1]} if stop else {}),
  )


def is_finished(folder: str | pathlib.Path) -> bool:
  return (pathlib.Path(folder) / "lineage.json").exists()


def _command() -> list[str]:
  main = sys.modules["__main__"]
  spec = getattr(main, "__spec__", None)
  return [spec.name if spec else pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]


def git_revision() -> str:
  """The commit of this source tree, with `+changes` when it is not clean; `unknown` outside git."""
  root = pathlib.Path(__file__).resolve().parents[2]

  def git(*args: str) -> str:
    return subprocess.run(
      ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
