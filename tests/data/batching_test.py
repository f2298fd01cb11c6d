"""A host's part of a batch; what batches hold is in pipeline_test."""

import numpy as np
import pytest

from align_jax.data.batching import Batching
from align_jax.errors import InputError


def test_the_rows_of_all_hosts_are_the_batch_filled_up():
  rows = np.arange(10).reshape(5, 2)
  parts = [Batching(6, shard_index=i, shard_count=3).local(rows, -1) for i in range(3)]
  assert [part.shape for part in parts] == [(2, 2)] * 3
  together = np.concatenate(parts)
  assert sorted(map(tuple, together)) == sorted([*map(tuple, rows), (-1, -1)])


@pytest.mark.parametrize(
  "options",
  [
    {"batch_size": 0},
    {"batch_size": 4, "shard_count": 3},
    {"batch_size": 4, "shard_index": -1},
    {"batch_size": 4, "pad_last": True},
    {"batch_size": 4, "epochs": 0},
    {"batch_size": 4, "seed": -1},
  ],
)
def test_impossible_batchings_are_refused(options):
  with pytest.raises(InputError):
    Batching(**options)
