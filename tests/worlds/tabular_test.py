"""The tabular world: its policy, its labels, its optima, and what a trajectory reports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.worlds import tabular

DIVERGENCES = (("reverse_kl", None), ("forward_kl", None), ("js", None), ("alpha", 0.5))


@pytest.fixture(scope="module")
def world():
  return tabular.random_world(0)


def normalised(scores):
  scores = np.asarray(scores, np.float64)
  return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_the_start_is_the_reference_with_and_without_features(world):
  featured = tabular.similar_answers()
  for w in (world, featured):
    np.testing.assert_allclose(tabular.log_policy(w, tabular.start(w)), w.ref_logps, atol=1e-6)
  moved = tabular.log_policy(featured, jnp.array([0.5, -2.0]))
  scores = featured.ref_logps + featured.features @ np.array([0.5, -2.0])
  np.testing.assert_allclose(moved, normalised(scores), atol=1e-6)


def test_preferences_are_bradley_terry_with_their_limits(world):
  soft = tabular.preference_probabilities(world, temperature=0.5)
  r = world.rewards
  better = np.exp(r[:, :, None] / 0.5)
  np.testing.assert_allclose(soft, better / (better + np.exp(r[:, None, :] / 0.5)), atol=1e-12)
  hard = tabular.preference_probabilities(world, temperature=0)
  assert set(np.unique(hard)) == {0.0, 0.5, 1.0}
  np.testing.assert_allclose(np.diagonal(hard, axis1=1, axis2=2), 0.5)
  cold = tabular.preference_probabilities(world, temperature=1e-4)
  np.testing.assert_allclose(cold, hard, atol=1e-9)
  flipped = tabular.preference_probabilities(world, temperature=0, flip=0.2)
  np.testing.assert_allclose(flipped[hard == 1.0], 0.8)


def test_pairs_are_all_ordered_pairs_weighted_by_their_labels(world):
  soft, hard = tabular.pairs(world), tabular.pairs(world, temperature=0)
  assert len(soft.weight) == 3 * 4 * 3 and len(hard.weight) == 3 * 6
  for batch in (soft, hard):
    np.testing.assert_allclose(batch.weight.sum(), 1.0)
    assert np.all(batch.chosen != batch.rejected)
  assert np.all(world.rewards[hard.prompt, hard.chosen] > world.rewards[hard.prompt, hard.rejected])


def test_thumbs_carry_their_probabilities(world):
  up = tabular.thumb_probabilities(world)
  batch = tabular.thumbs(up)
  for x, y in np.ndindex(up.shape):
    here = (batch.prompt == x) & (batch.answer == y)
    np.testing.assert_allclose(
      12 * np.sum(batch.weight * here * batch.is_desirable), up[x, y], atol=1e-7
    )
    np.testing.assert_allclose(12 * np.sum(batch.weight * here), 1.0)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"rewards": np.zeros(4)}, "rewards"),
    ({"ref_logps": np.zeros((3, 4))}, "distributions"),
    ({"features": np.zeros((3, 5, 2))}, "features"),
    ({"lengths": np.ones(4)}, "lengths"),
  ],
)
def test_a_malformed_world_is_refused(world, change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(world, **change)


def test_a_loss_that_sorts_needs_pairs_of_equal_weight(world):
  with pytest.raises(ValueError, match="equal weight"):
    loss = functools.partial(losses.aot_loss, beta=1.0)
    tabular.pair_objective(world, tabular.pairs(world), loss)


@pytest.mark.parametrize("divergence, alpha", DIVERGENCES)
def test_no_policy_beats_the_optimum(world, divergence, alpha):
  """E_π[r] − β·Σ π_ref f(π/π_ref), written out, is lower at ten thousand other policies."""
  generator = {
    "reverse_kl": lambda u: u * np.log(u),
    "forward_kl": lambda u: -np.log(u),
    "js": lambda u: u * np.log(u) - (1 + u) * np.log((1 + u) / 2),
    "alpha": lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
  }[divergence]

  def value(logps):
    ratio = np.exp(logps - world.ref_logps)
    return np.sum(np.exp(logps) * world.rewards - 0.7 * np.exp(world.ref_logps) * generator(ratio))

  best = tabular.optimum(world, beta=0.7, divergence=divergence, alpha=alpha)
  np.testing.assert_allclose(np.exp(best).sum(1), 1.0, atol=1e-9)
  rng = np.random.default_rng(0)
  for size in (1e-3, 0.1, 2.0):
    others = normalised(best + size * rng.normal(size=(3000, *best.shape)))
    assert max(map(value, others)) < value(best)


def test_a_trajectory_reports_exact_kl_and_reward(world):
  loss = functools.partial(losses.dpo_loss, beta=0.5)
  objective = tabular.pair_objective(world, tabular.pairs(world), loss)
  reached = tabular.fit(world, objective, steps=5, learning_rate=1.0)
  assert reached.logps.shape == (6, 3, 4)
  p = np.exp(reached.logps.astype(np.float64))
  np.testing.assert_allclose(reached.reward, (p * world.rewards).sum(-1).mean(-1), atol=1e-5)
  kl = (p * (np.log(p) - world.ref_logps)).sum(-1).mean(-1)
  np.testing.assert_allclose(reached.kl, kl, atol=1e-5)
  np.testing.assert_allclose(
    jax.nn.log_softmax(world.ref_logps + reached.params), reached.logps[-1], atol=1e-5
  )
