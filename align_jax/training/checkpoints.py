"""Orbax checkpoints of a phase: its state, its data iterator, and what the next phase loads.

Beside the arrays of a step lies its record: the place in the data, what the run was made from, and a
checksum of every array, by which a damaged checkpoint is found out.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from align_jax import hosts
from align_jax.errors import InputError
from align_jax.training import integrity
from align_jax.training.integrity import Damaged
from align_jax.training.state import abstract_state
from align_jax.training.workdir import read_json

_RECORD = "record"  # an item of JSON values, which the first host writes for all
_STEPS = ocp.path.step.standard_name_format()


class Checkpoints:
  """The numbered checkpoints `<workdir>/checkpoints/<step>` with items `state` and `record`.

  Saving is asynchronous and atomic; the newest `keep` are preserved, and every step that `keep_every`
  divides.  A write that fails leaves the checkpoints before it: InputError names the last one.
  """

  def __init__(
    self, workdir: str | pathlib.Path, *, keep: int, keep_every: int = 0, root: str = ""
  ):
    self._folder, self._saved = _folder(workdir, root), None
    self._open, self._keep, self._keep_every = None, keep, keep_every

  def restore(self, state, data) -> tuple[Any, Mapping[str, Any]] | None:
    """(state, record) of the newest checkpoint that is whole; None if there is no checkpoint.

    The state is placed like the one given, and `data`, a grain iterator, is moved to its place.  A
    damaged checkpoint is named on stderr and set aside as `<step>.damaged`.  InputError if all are.
    """
    found, damaged = _newest_whole(self._folder, state)
    if found is None and damaged:
      reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
      raise InputError(
        f"no checkpoint in {self._folder} can be trusted ({reasons}): put back a copy of one, or use "
        "another workdir"
      )
    for step, reason in damaged.items():
      _set_aside(self._folder, step, reason, found[0])
    if damaged:
      hosts.wait("damaged checkpoints are set aside")
    if found is None:
      return None
    self._saved, state, record = found
    data.set_state(record["data"])
    return state, record

  def save(self, step: int, state, data, *, metadata: Mapping[str, Any]):
    """Starts writing; a step that is there already is left alone."""
    if step == self._saved:
      return
    record = {"data": data.get_state(), "checksums": integrity.checksums(state), **metadata}
    items = {"state": state, _RECORD: integrity.seal(record)}
    self._guarded(lambda: self._writer().save_checkpointables_async(step, items, force=True))
    self._saved = step

  def check(self):
    """Raises InputError if the last write has failed; does not wait for one that goes on."""
    if self._open is not None and not self._open.is_saving_in_progress():
      self._guarded(self._open.wait)

  def last_good(self) -> str:
    """A phrase that names the newest checkpoint, once its writing has come to an end."""
    if self._open is not None:
      with contextlib.suppress(Exception):
        self._open.wait()
    steps = _steps(self._folder)
    if not steps:
      return "there is no checkpoint yet"
    return f"the last good checkpoint is {self._folder / str(steps[-1])}"

  def close(self):
    """Waits for the last write."""
    if self._open is not None:
      self._guarded(self._open.close)

  def _writer(self) -> ocp.training.Checkpointer:
    if self._open is None:
      policies = ocp.training.preservation_policies
      kept = [policies.LatestN(self._keep)]
      if self._keep_every:
        kept.append(policies.EveryNSteps(self._keep_every))
      self._open = ocp.training.Checkpointer(
        self._folder,
        context=_context(),
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
      )
    return self._open

  def _guarded(self, write):
    """Runs a part of a write; what goes wrong in it, now or since the last call, is InputError."""
    try:
      return write()
    except Exception as error:
      reason = _reason(error)
      raise InputError(
        f"a checkpoint could not be written ({reason}); {self.last_good()}"
      ) from error


def _folder(workdir: str | pathlib.Path, root: str = "") -> epath.Path:
  """Where the checkpoints of a run are: `<workdir>/checkpoints`, or the like under its loop.checkpoints.

  There the whole path of the workdir follows, so that the runs of a sweep do not meet.  Orbax writes to
  absolute paths only; a bucket's path is one already.
  """
  folder = pathlib.Path(os.path.abspath(workdir))
  config = folder / "config.json"
  if not root and config.exists():
    root = (read_json(config).get("loop") or {}).get("checkpoints") or ""
  if not root:
    return epath.Path(folder) / "checkpoints"
  root = root if "://" in root else os.path.abspath(root)
  return epath.Path(root) / folder.relative_to(folder.anchor) / "checkpoints"


def _context() -> ocp.Context:
  """By itself Orbax would take a record for a tree of arrays."""
  context = ocp.Context()
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name=_RECORD)
  context.checkpointables.registry = registry
  return context


def _steps(folder: epath.Path) -> list[int]:
  """Of all checkpoints whose writing has come to its end, in order."""
  return sorted(found.step for found in _STEPS.find_all(folder)) if folder.exists() else []


def _newest_whole(folder: epath.Path, state):
  """((step, state, record) or None, {step: why it is damaged} of those that were tried before)."""
  damaged = {}
  for step in reversed(_steps(folder)):
    loaded, reason = None, ""
    try:
      loaded = _read(folder / str(step), state)
    except Exception as error:  # whatever a library says of files that are not what it wrote
      reason = _reason(error)
    (somewhere,) = hosts.any_of(loaded is None)
    if not somewhere:
      return (step, *loaded), damaged
    damaged[step] = reason or "another host could not read it"
  return None, damaged


def _read(folder: epath.Path, state):
  """(state, record) of one checkpoint; raises Damaged where the numbers are not those saved."""
  record = _read_record(folder)
  loaded = ocp.load(folder, abstract_state(state), checkpointable_name="state")
  integrity.check(loaded, record["checksums"])
  return loaded, record


def _read_record(folder: epath.Path) -> dict[str, Any]:
  if not (folder / _RECORD).exists():
    raise Damaged(f"it has no {_RECORD}; an older align_jax wrote none")
  try:
    text = (folder / _RECORD / "data.json").read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise Damaged(f"its {_RECORD} is not readable") from error
  return integrity.unseal(text)


def _set_aside(folder: epath.Path, step: int, reason: str, good: int):
  """Renames a damaged checkpoint, so that nobody takes it for a good one, and says so."""
  if jax.process_index() != 0:
    return
  names = [f"{step}.damaged", *(f"{step}.damaged-{i}" for i in range(2, 1000))]
  target = next(folder / name for name in names if not (folder / name).exists())
  print(
    f"== {folder / str(step)} is damaged ({reason}): set aside as {target.name}, going on from {good}",
    file=sys.stderr,
    flush=True,
  )
  (folder / str(step)).rename(target)


def _reason(error: BaseException) -> str:
  """An exception in one line."""
  text = " ".join(str(error).split())
  return f"{text[:300]}..." if len(text) > 300 else text or type(error).__name__


def latest_step(workdir: str | pathlib.Path) -> int:
  """The newest complete checkpoint of a phase; raises InputError when there is none."""
  folder = _folder(workdir)
  steps = _steps(folder)
  if not steps:
    raise InputError(f"{workdir} holds no checkpoint (looked for {folder}/<step>)")
  return steps[-1]


def load_params(workdir: str | pathlib.Path, abstract_params, *, step: int | None = None):
  """Only the parameters of a phase's checkpoint, straight onto the shardings of `abstract_params`.

  InputError where they are those of another model, or not the numbers that were saved.
  """
  step = latest_step(workdir) if step is None else step
  folder = _folder(workdir) / str(step)
  context = ocp.Context()
  context.pytree.loading.partial_load = True  # the optimizer's moments stay on disk
  try:
    record = _read_record(folder)
    with context:
      state = ocp.load(folder, {"params": abstract_params}, checkpointable_name="state")
    integrity.check(state, record["checksums"])
  except Damaged as error:
    raise InputError(f"{folder} is damaged: {error}") from error
  except (ValueError, KeyError) as error:
    reason = str(error).splitlines()[0]
    raise InputError(f"{folder} does not hold the parameters of this model: {reason}") from error
  return state["params"]
