"""What the hosts of one run must agree on: they make the same decisions from the same numbers."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def fetch(tree):
  """Arrays as NumPy, whole on every host, whatever devices hold which part of them.

  All hosts must call this at the same place; on one host it is `jax.device_get`.
  """

  def whole(x):
    scattered = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return multihost_utils.process_allgather(x, tiled=True) if scattered else jax.device_get(x)

  return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(whole, tree)


def agreed(tree):
  """NumPy values as the first host has them: of what a host has computed by itself."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)


def any_of(*flags: bool) -> tuple[bool, ...]:
  """Each flag, true if any host raised it: all hosts must save, and end at, the same step."""
  if jax.process_count() == 1:
    return flags
  return tuple(map(bool, multihost_utils.process_allgather(np.array(flags)).any(axis=0)))


def wait(what: str) -> None:
  """Returns once all hosts are here: the files that the first one has written can be read."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
