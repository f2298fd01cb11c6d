"""Tests of what several labellers' votes become."""

import dataclasses

import numpy as np
import pytest

from align_jax import data
from align_jax.data import votes
from align_jax.errors import InputError

USER = ({"role": "user", "content": "?"},)


def _pair(**labels):
  share = sum(labels.values()) / len(labels) if labels else 1.0
  return data.Preference(USER, "a", "b", label_prob=share, labels=labels, source="f.jsonl:3")


PAIRS = [
  _pair(x=1, y=1, z=1),  # unanimous
  _pair(x=1, y=1, z=0),
  _pair(x=0, y=0, z=0.5),
  _pair(x=1, y=0),  # even
  _pair(x=0.5, y=0.5),  # a tie, twice
]
SHARES = [1, 2 / 3, 1 / 6, 1 / 2, 1 / 2]


def _settled(how):
  return [(pair.label_prob, pair.weight) for pair in votes.settle(PAIRS, how)]


def test_every_way_to_settle_against_counting():
  np.testing.assert_allclose(_settled("soft"), [(share, 1.0) for share in SHARES])
  assert _settled("majority") == [(1, 1), (1, 1), (0, 1), (0.5, 1), (0.5, 1)]
  assert _settled("unanimous") == [(1, 1)]
  weighed = [(1.0, 1.0), (1.0, 1 / 3), (0.0, 2 / 3)]  # an even split weighs nothing and is left out
  np.testing.assert_allclose(_settled("agreement"), weighed)
  assert all(not pair.labels for pair in votes.settle(PAIRS, "soft"))


def test_a_pair_judged_once_is_its_own_only_vote_and_weights_stay():
  alone = dataclasses.replace(_pair(), label_prob=0.8, weight=2.0)
  (soft,) = votes.settle([alone], "soft")
  assert (soft.label_prob, soft.weight) == (0.8, 2.0)
  (agreed,) = votes.settle([alone], "agreement")
  assert (agreed.label_prob, agreed.weight) == pytest.approx((1.0, 2.0 * 0.6))


def test_the_table_of_votes():
  names = votes.labellers_of(PAIRS)
  assert names == ("x", "y", "z")
  expected = [[1, 1, 1], [1, 1, 0], [0, 0, 0.5], [1, 0, -1], [0.5, 0.5, -1]]
  np.testing.assert_array_equal(votes.vote_table(PAIRS, names), np.float32(expected))


def test_what_cannot_be_counted_is_refused():
  with pytest.raises(InputError, match="soft, majority, unanimous, agreement, not 'mean'"):
    votes.settle(PAIRS, "mean")
  with pytest.raises(InputError, match="leaves none of 1"):
    votes.settle(PAIRS[1:2], "unanimous")
  with pytest.raises(InputError, match="f.jsonl:3: field 'labels' is missing"):
    votes.labellers_of([_pair()])
  with pytest.raises(InputError, match="'z' is no labeller"):
    votes.vote_table(PAIRS, ("x", "y"))
