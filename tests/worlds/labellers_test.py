"""Noise that can be dialled, biases that are what was planted."""

import dataclasses

import numpy as np
import pytest

from align_jax import worlds
from align_jax.errors import InputError


@pytest.fixture(scope="module")
def pairs():
  world = worlds.Microworld()
  return world.judge_pairs(world.pairs(5000, seed=1))


def labels(labeller, pairs, seed):
  return np.random.default_rng(seed).random(len(pairs)) < labeller.probabilities(pairs)


@pytest.mark.parametrize("biases", [{}, {"length_bias": 0.1, "agreement_bias": 1.0}])
@pytest.mark.parametrize("target", [0.60, 0.65, 0.70, 0.75])
def test_agreement_can_be_dialled(pairs, target, biases):
  labeller = worlds.Labeller(**biases).calibrated(pairs, target)
  p = labeller.probabilities(pairs)
  assert worlds.agreement_rate(p, p) == pytest.approx(target, abs=1e-6)
  measured = [
    np.mean(labels(labeller, pairs, s) == labels(labeller, pairs, s + 100)) for s in (0, 1)
  ]
  assert np.mean(measured) == pytest.approx(target, abs=0.01)


def test_default_labellers_agree_on_seventy_percent(pairs):
  p = worlds.Labeller().probabilities(pairs)
  assert worlds.agreement_rate(p, p) == pytest.approx(0.70, abs=0.01)


def test_ceiling_and_gold_agreement_are_what_is_measured(pairs):
  labeller = worlds.Labeller(length_bias=0.1)
  p = labeller.probabilities(pairs)
  chosen = np.stack([labels(labeller, pairs, seed) for seed in range(20)])
  assert np.mean(chosen == (p > 0.5)) == pytest.approx(worlds.label_ceiling(p), abs=0.005)
  gap = np.array([a.reward - b.reward for a, b in pairs])
  won = np.where(gap == 0, 0.5, chosen == (gap > 0))
  assert np.mean(won) == pytest.approx(worlds.gold_agreement(p, pairs), abs=0.005)
  assert worlds.gold_agreement(p, pairs) < worlds.label_ceiling(p)


def test_without_bias_gold_reaches_the_ceiling(pairs):
  p = worlds.Labeller().probabilities(pairs)
  assert worlds.gold_agreement(p, pairs) == pytest.approx(worlds.label_ceiling(p), abs=1e-12)


def fit_logistic(x, y, steps=50):
  """Newton's method; returns coefficients and their standard errors."""
  w = np.zeros(x.shape[1])
  for _ in range(steps):
    p = 1 / (1 + np.exp(-x @ w))
    information = x.T @ (x * (p * (1 - p))[:, None])
    w = w + np.linalg.solve(information, x.T @ (y - p))
  return w, np.sqrt(np.diag(np.linalg.inv(information)))


def test_biases_are_as_planted(pairs):
  labeller = worlds.Labeller(temperature=0.8, length_bias=0.12, agreement_bias=1.5)
  columns = [(a.reward - b.reward, a.length - b.length, a.agrees - b.agrees) for a, b in pairs]
  x, planted = np.array(columns, float), np.array([1, 0.12, 1.5]) / 0.8
  z = []
  for seed in range(8):
    w, error = fit_logistic(x, labels(labeller, pairs, seed))
    z.append((w - planted) / error)
  assert np.all(np.abs(z) < 4)
  assert np.all(np.abs(np.mean(z, 0)) < 3 / np.sqrt(8))


def test_an_unbiased_labeller_shows_no_bias(pairs):
  columns = [(a.reward - b.reward, a.length - b.length, a.agrees - b.agrees) for a, b in pairs]
  w, error = fit_logistic(np.array(columns, float), labels(worlds.Labeller(), pairs, 0))
  assert np.all(np.abs(w[1:] / error[1:]) < 3)


def test_flips_bound_the_agreement(pairs):
  sure = worlds.Labeller(temperature=1e-3, flip=0.1)
  apart = [pair for pair in pairs if pair[0].reward != pair[1].reward]
  p = sure.probabilities(apart)
  assert worlds.agreement_rate(p, p) == pytest.approx(0.1**2 + 0.9**2)
  with pytest.raises(InputError, match="agreement must be in"):
    sure.calibrated(apart, 0.9)


def test_order_does_not_matter(pairs):
  labeller = worlds.Labeller(length_bias=0.3, agreement_bias=-1, flip=0.05)
  swapped = [pair[::-1] for pair in pairs]
  np.testing.assert_allclose(
    labeller.probabilities(pairs) + labeller.probabilities(swapped), 1, atol=1e-12
  )


@pytest.mark.parametrize("field, value", [("temperature", 0.0), ("flip", 0.6), ("flip", -0.1)])
def test_impossible_labellers_are_refused(field, value):
  with pytest.raises(InputError, match=field):
    dataclasses.replace(worlds.Labeller(), **{field: value})
