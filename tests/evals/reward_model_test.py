"""The evaluation of reward models, on pairs whose numbers can be counted by hand or by integral."""

import math

import jax
import numpy as np
import pytest

from align_jax import models, sampling
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
  """Scores of sampled rows: one at a time by hand, in batches, and with more padding."""
  model, params = tiny_model
  head = models.init_scalar_head(jax.random.key(1), 32)
  rng = np.random.default_rng(0)
  prompts, responses = np.array([3, 2, 5, 1, 2]), np.array([3, 6, 1, 4, 2])
  tokens = rng.integers(1, 64, (5, 9)).astype(np.int32)
  by_hand = []
  for row, end in zip(tokens, prompts + responses):
    hidden = model.apply({"params": params}, row[None, :end], method="hidden")
    by_hand.append(models.scalar_head(head, hidden)[0, -1])

  def scores(width, batch_size):
    places = np.arange(width)
    mask = (places >= prompts[:, None]) & (places < (prompts + responses)[:, None])
    wide = np.pad(tokens, ((0, 0), (0, width - 9)), constant_values=7)
    samples = sampling.Samples(wide, prompts, mask, np.zeros(wide.shape), np.ones(5, bool))
    return reward_model.response_rewards(
      model, {"params": params}, head, samples, batch_size=batch_size
    )

  np.testing.assert_allclose(scores(9, 2), by_hand, atol=1e-5)
  np.testing.assert_allclose(scores(14, 8), by_hand, atol=1e-5)
