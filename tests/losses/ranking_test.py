"""Tests of the losses on ranked lists."""

import itertools

import jax
import numpy as np
import pytest

from align_jax.losses import ranking, reward

CHOSEN = np.array([1.0, -0.5, 3.0], np.float32)
REJECTED = np.array([0.2, 0.5, -1.0], np.float32)


def _pairs_by_hand(rewards, ranks, smoothing):
  """A loop over the pairs of one list."""
  total, count = 0.0, 0
  for i, j in itertools.permutations(range(len(rewards)), 2):
    if 0 < ranks[i] < ranks[j]:
      p = 1.0 / (1.0 + np.exp(rewards[j] - rewards[i]))
      total -= (1 - smoothing) * np.log(p) + smoothing * np.log(1 - p)
      count += 1
  return total / max(count, 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_all_pairs_against_a_loop_over_pairs(smoothing):
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(40, 5)).astype(np.float32)
  ranks = rng.integers(0, 4, (40, 5))
  ranks[0], ranks[1] = [2, 2, 0, 2, 0], [0, 0, 3, 0, 0]
  expected = [_pairs_by_hand(*row, smoothing) for row in zip(rewards, ranks)]
  found = ranking.all_pairs_loss(rewards, ranks, label_smoothing=smoothing)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert min(expected) == 0.0  # a list without a pair is among them


def test_all_pairs_of_two_is_bradley_terry_and_level_rewards_cost_ln_2():
  pairs = np.stack([REJECTED, CHOSEN], axis=1)
  found = ranking.all_pairs_loss(pairs, np.tile([2, 1], (3, 1)))
  np.testing.assert_allclose(found, reward.bradley_terry_loss(CHOSEN, REJECTED), rtol=1e-6)
  level = ranking.all_pairs_loss(np.zeros((1, 4)), np.array([[1, 3, 2, 2]]))
  np.testing.assert_allclose(level, np.log(2.0), rtol=1e-6)


def test_an_empty_slot_or_a_tie_has_no_gradient():
  ranks = np.array([[1, 0, 2]])
  gradient = jax.grad(lambda r: ranking.all_pairs_loss(r, ranks).sum())
  np.testing.assert_array_equal(gradient(np.array([[0.3, np.nan, 1.0]], np.float32))[0, 1], 0.0)
  assert np.isfinite(gradient(np.array([[0.3, np.nan, 1.0]], np.float32))).all()
  tied = jax.grad(lambda r: ranking.all_pairs_loss(r, np.array([[2, 2]])).sum())
  np.testing.assert_array_equal(tied(np.array([[0.3, 1.0]], np.float32)), 0.0)


def _ranking_loss(rewards):
  """-log of the probability of drawing the rewards in their order, one by one."""
  probabilities = [np.exp(rewards[k]) / np.exp(rewards[k:]).sum() for k in range(len(rewards))]
  return -np.log(np.prod(probabilities))


def test_plackett_luce_against_numpy():
  rewards = np.random.default_rng(0).normal(0.0, 2.0, (6, 5)).astype(np.float32)
  expected = [_ranking_loss(row.astype(np.float64)) for row in rewards]
  np.testing.assert_allclose(ranking.plackett_luce_loss(rewards), expected, rtol=1e-5)
  np.testing.assert_allclose(ranking.plackett_luce_loss(np.ones((2, 5))), np.log(120.0), rtol=1e-6)


def test_plackett_luce_of_two_is_bradley_terry():
  pairs = np.stack([CHOSEN, REJECTED], axis=1)
  np.testing.assert_allclose(
    ranking.plackett_luce_loss(pairs), reward.bradley_terry_loss(CHOSEN, REJECTED), rtol=1e-5
  )


@pytest.mark.parametrize("k", [2, 3, 4])
def test_plackett_luce_is_a_distribution_over_rankings(k):
  rewards = np.random.default_rng(k).normal(0.0, 2.0, k)
  rankings = np.array([rewards[list(order)] for order in itertools.permutations(range(k))])
  losses = ranking.plackett_luce_loss(rankings)
  np.testing.assert_allclose(np.exp(-losses).sum(), 1.0, rtol=1e-5)
  # The likeliest ranking is the sorted one.
  np.testing.assert_array_equal(rankings[np.argmin(losses)], np.sort(rewards)[::-1])


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0] * 4])
def test_plackett_luce_without_the_empty_slots(mask):
  on = np.array(mask) > 0
  rewards = np.where(on, np.random.default_rng(1).normal(0.0, 2.0, (3, 4)), np.nan)
  loss = ranking.plackett_luce_loss(rewards, np.tile(mask, (3, 1)))
  gradient = jax.grad(lambda r: ranking.plackett_luce_loss(r, np.tile(on, (3, 1))).sum())(rewards)
  np.testing.assert_array_equal(gradient[:, ~on], 0.0)
  if on.sum() < 2:
    np.testing.assert_array_equal(loss, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)
  else:
    np.testing.assert_allclose(loss, ranking.plackett_luce_loss(rewards[:, on]), rtol=1e-6)
    assert np.all(gradient[:, on] != 0.0)
    np.testing.assert_allclose(gradient.sum(axis=1), 0.0, atol=1e-6)  # no offset is preferred
