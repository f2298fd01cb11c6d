"""The evaluation of reward models, on pairs whose numbers can be counted by hand or by integral."""

import functools
import math

import jax
import numpy as np
import pytest

from align_jax import data, models
from align_jax.evals import reward_model


def evaluate(margins, extra_length=None, gold=None):
  margins = np.asarray(margins, float)
  extra = np.zeros_like(margins) if extra_length is None else np.asarray(extra_length)
  return reward_model.evaluate_pairs(
    margins,
    np.zeros_like(margins),
    chosen_lengths=10 + extra,
    rejected_lengths=np.full_like(margins, 10),
    gold_margins=gold,
  )


def test_counts_by_hand():
  found = evaluate([2.0, 1.0, -1.0, 0.0], [5, -5, 5, 0], gold=[1.0, -1.0, -1.0, 0.0])
  assert found.n == 4
  assert found.accuracy.value == (1 + 1 + 0 + 0.5) / 4
  assert found.ceiling.value == (1 + 0 + 0 + 0.5) / 4  # the gold judge against the labels
  assert found.gold_accuracy.value == (1 + 0 + 1) / 3 and found.gold_accuracy.n == 3
  assert found.accuracy_chosen_longer.value == 0.5 and found.accuracy_chosen_longer.n == 2
  assert found.accuracy_chosen_shorter.value == 1.0 and found.accuracy_chosen_shorter.n == 1
  assert found.longer_wins.value == (1 + 0 + 1 + 0.5) / 4
  assert found.margin.value == 0.5


def test_a_perfect_model_of_noisy_labels_sits_at_the_ceiling_and_is_calibrated():
  rng = np.random.default_rng(0)
  size = 20_000
  truth = rng.normal(scale=1.5, size=size)  # r(first) - r(second)
  first_wins = rng.random(size) < 1 / (1 + np.exp(-truth))
  margins = np.where(first_wins, truth, -truth)  # chosen minus rejected
  found = evaluate(margins, gold=margins)
  expected = np.mean(1 / (1 + np.exp(-np.abs(truth))))  # E max(p, 1 - p)
  assert found.accuracy == found.ceiling
  assert found.accuracy.value == pytest.approx(expected, abs=0.01)
  assert found.gold_accuracy.value == 1.0
  assert found.calibration_error < 0.015
  # Three times too sure: same accuracy, worse calibration.
  overconfident = evaluate(3 * margins, gold=margins)
  assert overconfident.accuracy == found.accuracy
  assert overconfident.calibration_error > 0.1 and overconfident.brier > found.brier


def test_a_model_of_length_is_unmasked():
  rng = np.random.default_rng(1)
  extra = rng.choice([-4, -2, 2, 4], size=400)
  found = evaluate(extra.astype(float), extra)
  assert found.accuracy.value == found.longer_wins.value
  assert found.accuracy_chosen_longer.value == 1.0
  assert found.accuracy_chosen_shorter.value == 0.0
  assert found.length_correlation == pytest.approx(1.0)


def test_a_constant_model_is_at_chance():
  found = evaluate(np.zeros(10), np.arange(10))
  assert found.accuracy.value == 0.5 and found.length_correlation is None
  assert found.calibration_error == 0.0  # it says one half, and is right
  assert found.ceiling is None and found.gold_accuracy is None


def test_extreme_rewards_stay_finite():
  found = evaluate([1e4, -1e4])
  assert math.isfinite(found.calibration_error) and found.brier == 0.5


@pytest.mark.parametrize("margins", [[], [math.nan, 1.0]])
def test_nothing_to_evaluate_is_refused(margins):
  with pytest.raises(ValueError, match="at least one pair of finite rewards"):
    evaluate(margins)


def test_responses_score_alike_in_any_batch_and_padding(tiny_model):
  """Scores of single responses: one row at a time by hand, in batches, and with more padding."""
  model, params = tiny_model
  head = models.init_scalar_head(jax.random.key(1), 32)
  rng = np.random.default_rng(0)
  rows = []
  for size in (3, 9, 6, 7, 5):
    mask = np.arange(size) >= 2
    rows.append(data.Encoded(rng.integers(1, 64, size).astype(np.int32), mask))
  score = functools.partial(reward_model.response_rewards, model, {"params": params}, head, rows)
  by_hand = [
    models.scalar_head(head, model.apply({"params": params}, r.tokens[None], method="hidden"))[
      0, -1
    ]
    for r in rows
  ]
  np.testing.assert_allclose(score(length=9, batch_size=2), by_hand, atol=1e-5)
  np.testing.assert_allclose(score(length=14, batch_size=8), by_hand, atol=1e-5)
