"""Orbax checkpoints of a phase: its state, its data iterator, and what the next phase loads."""

import os
import pathlib

from etils import epath
from orbax.checkpoint import v1 as ocp

from align_jax.errors import InputError
from align_jax.training.position import Position
from align_jax.training.state import abstract_state


class Checkpoints:
  """The numbered checkpoints `<workdir>/checkpoints/<step>` with items `state` and `data`.

  Saving is asynchronous and atomic; the newest `keep` are preserved.  `data` is a grain iterator,
  whose position is saved and restored in place.
  """

  def __init__(self, workdir: str | pathlib.Path, *, keep: int):
    self._checkpointer = ocp.training.Checkpointer(
      _folder(workdir),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  @property
  def latest_step(self) -> int | None:
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, step: int, state, data, *, metadata: dict):
    """Starts writing; a step that is there already is left alone."""
    if step == self.latest_step:
      return
    items = {"state": state, "data": Position(data)}
    self._checkpointer.save_checkpointables_async(step, items, custom_metadata=metadata, force=True)

  def restore(self, state, data):
    """The newest state, placed like the one given, with `data` moved to its position."""
    items = {"state": abstract_state(state), "data": Position(data)}
    return self._checkpointer.load_checkpointables(None, items)["state"]

  def close(self):
    """Waits for the last write."""
    self._checkpointer.close()


def _folder(workdir: str | pathlib.Path) -> epath.Path:
  """Orbax writes to absolute paths only; a bucket's path is one already."""
  absolute = workdir if "://" in str(workdir) else os.path.abspath(workdir)
  return epath.Path(absolute) / "checkpoints"


def latest_step(workdir: str | pathlib.Path) -> int:
  """The newest complete checkpoint of a phase; raises InputError when there is none."""
  folder = _folder(workdir)
  steps = []
  if folder.exists():
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
  if not steps:
    raise InputError(f"{workdir} holds no checkpoint (looked for {folder}/<step>)")
  return max(steps)


def load_params(workdir: str | pathlib.Path, abstract_params, *, step: int | None = None):
  """Only the parameters of a phase's checkpoint, straight onto the shardings of `abstract_params`."""
  step = latest_step(workdir) if step is None else step
  folder = _folder(workdir) / str(step)
  context = ocp.Context()
  context.pytree.loading.partial_load = True  # the optimizer's moments stay on disk
  with context:
    try:
      state = ocp.load(folder, {"params": abstract_params}, checkpointable_name="state")
    except (ValueError, KeyError) as error:
      reason = str(error).splitlines()[0]
      raise InputError(f"{folder} does not hold the parameters of this model: {reason}") from error
  return state["params"]
