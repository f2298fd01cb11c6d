"""Which rows of a batch a host holds, on meshes over hosts that are only imagined."""

import types

import jax
import numpy as np
import pytest

from align_jax import sharding
from align_jax.data.batching import Batching
from align_jax.errors import InputError
from align_jax.sharding import MESH_AXES


def imagined(hosts, **sizes):
  """A mesh with a device of host hosts[i] in place i, axes in the order of MESH_AXES."""
  shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  devices = [types.SimpleNamespace(process_index=host) for host in hosts]
  grid = np.array(devices, object).reshape(tuple(shape.values()))
  return types.SimpleNamespace(devices=grid, shape=shape)


def shares(monkeypatch, mesh, hosts):
  found = []
  for host in range(hosts):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    found.append(sharding.host_share(mesh))
  return found


PAIRS = [0, 0, 1, 1, 2, 2, 3, 3]  # four hosts of two devices


@pytest.mark.parametrize(
  "sizes, expected",
  [
    ({"fsdp": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ({"data": 4, "fsdp": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ({"fsdp": 4, "tensor": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ({"fsdp": 2, "tensor": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ({"data": 2, "context": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ({"fsdp": 2, "context": 2, "tensor": 2}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ({"tensor": 8}, [(0, 1)] * 4),
  ],
)
def test_hosts_that_part_along_other_axes_hold_the_same_rows(monkeypatch, sizes, expected):
  assert shares(monkeypatch, imagined(PAIRS, **sizes), 4) == expected


def test_a_host_may_hold_rows_that_lie_apart(monkeypatch):
  """As on a torus, whose devices are not in the order of the hosts."""
  assert shares(monkeypatch, imagined([0, 1, 0, 1], fsdp=4), 2) == [(0, 2), (1, 2)]


def test_rows_that_overlap_in_part_are_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  with pytest.raises(InputError, match="overlap only in part"):
    sharding.host_share(imagined([0, 0, 0, 1, 1, 1], fsdp=3, tensor=2))


def test_the_shares_in_order_are_the_batch():
  """So one host and many have the same global arrays, not only the same sets of rows."""
  rows = np.arange(10).reshape(5, 2)
  parts = [Batching(6, shard_index=i, shard_count=3).local(rows, -1) for i in range(3)]
  np.testing.assert_array_equal(np.concatenate(parts), np.concatenate([rows, [[-1, -1]]]))
