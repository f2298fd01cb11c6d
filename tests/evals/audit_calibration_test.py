"""Calibration: golden values, laws that hold for any forecaster, and what must not be fooled."""

import math

import numpy as np
import pytest

from align_jax.evals import audit_calibration as lib
from align_jax.evals import statistics

CONFIDENCE = np.array([0.97, 0.91, 0.86, 0.83, 0.74, 0.66, 0.61, 0.55, 0.32, 0.24])
CORRECT = np.array([1, 1, 0, 1, 1, 0, 1, 0, 0, 1.0])


def calibrated(n, seed, low=0.5):
  rng = np.random.default_rng(seed)
  c = rng.uniform(low, 1, n)
  return c, (rng.random(n) < c).astype(float)


def test_golden_values():
  found = lib.calibration(CONFIDENCE, CORRECT)
  assert found.ece.value == pytest.approx(0.297, abs=1e-12)
  assert found.max_error == pytest.approx(0.76, abs=1e-12)
  assert found.brier.value == pytest.approx(0.24153, abs=1e-12)
  five = lib.calibration(CONFIDENCE, CORRECT, bins=5)
  assert five.ece.value == pytest.approx(0.157, abs=1e-12)
  assert five.ece_equal_mass.value == pytest.approx(0.181, abs=1e-12)


def test_nll_and_auroc_are_those_of_two_loops():
  expected = -np.mean([math.log(c) if y else math.log(1 - c) for c, y in zip(CONFIDENCE, CORRECT)])
  assert lib.nll(CONFIDENCE, CORRECT) == pytest.approx(expected, abs=1e-12)
  c, y = np.round(calibrated(200, 0)[0], 1), calibrated(200, 0)[1]  # ties
  pairs = [(a > b) + (a == b) / 2 for a in c[y == 1] for b in c[y == 0]]
  assert lib.auroc(c, y) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_brier_splits_into_parts_that_the_formulas_give():
  c, y = calibrated(500, 1, low=0.0)
  found = lib.brier(c, y)
  place = np.ceil(c * 10).astype(int)
  base = y.mean()
  rel = res = var = cov = 0.0
  for b in np.unique(place):
    cs, ys = c[place == b], y[place == b]
    rel += len(cs) * (cs.mean() - ys.mean()) ** 2
    res += len(cs) * (ys.mean() - base) ** 2
    var += ((cs - cs.mean()) ** 2).sum()
    cov += 2 * ((cs - cs.mean()) * (ys - ys.mean())).sum()
  parts = (rel / 500, res / 500, base * (1 - base), (var - cov) / 500)
  np.testing.assert_allclose(
    (found.reliability, found.resolution, found.uncertainty, found.within), parts, atol=1e-12
  )
  total = found.reliability - found.resolution + found.uncertainty + found.within
  assert total == pytest.approx(np.mean((c - y) ** 2), abs=1e-12)


def test_debiased_errors_of_a_calibrated_forecaster_are_zero_and_the_plain_one_is_not():
  draws = [calibrated(400, seed) for seed in range(400)]
  plain = np.array([statistics.expected_calibration_error(c, y) for c, y in draws])
  expected = np.array([lib.expected_ece(c, y) for c, y in draws])
  squared = np.array([lib.squared_error(c, y) for c, y in draws])
  assert plain.mean() > 0.03  # O(sqrt(bins / n))
  for debiased in (plain - expected, squared):
    assert abs(debiased.mean()) < 3 * debiased.std() / 20
  assert 0.3 < np.mean(plain > expected) < 0.7


def test_the_debiased_squared_error_of_a_wrong_forecaster_is_its_own():
  """Says 0.9 and is right 0.6 of the time: 0.09, on 60 items as on 6,000."""
  for n in (60, 6000):
    draws = [
      lib.squared_error(np.full(n, 0.9), np.random.default_rng(s).random(n) < 0.6, bins=2)
      for s in range(300)
    ]
    assert np.mean(draws) == pytest.approx(0.09, abs=3 * np.std(draws) / 300**0.5)


def test_bins_of_two_items_are_debiased_too():
  """A coin called at one half: the plain square is 1/8 in every bin of two, all of it bias."""
  draws = [
    lib.squared_error(np.full(40, 0.5), np.random.default_rng(s).random(40) < 0.5, bins=20)
    for s in range(400)
  ]
  assert abs(np.mean(draws)) < 3 * np.std(draws) / 20 < 0.02


def test_a_monotone_map_raises_ece_and_leaves_auroc():
  c, y = calibrated(4000, 2)
  before, after = lib.calibration(c, y), lib.calibration(c**2, y)
  assert after.ece.low > before.ece.high and after.ece_debiased > 0.1
  assert abs(before.ece_debiased) < 0.01
  assert after.auroc == before.auroc


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.5])
def test_a_planted_temperature_is_recovered(planted):
  rng = np.random.default_rng(3)
  z = rng.normal(0, 2, 60_000)
  y = rng.random(60_000) < 1 / (1 + np.exp(-z))
  found = lib.temperature(planted * z, y)
  assert found.value == pytest.approx(planted, rel=0.02)
  assert found.low < planted < found.high
  assert found.nll_scaled <= found.nll
  assert found.ece_scaled < 0.01


def test_the_interval_of_a_temperature_holds_it_as_often_as_it_says():
  inside = []
  for seed in range(200):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, 400)
    found = lib.temperature(2 * z, rng.random(400) < 1 / (1 + np.exp(-z)))
    inside.append(found.low < 2 < found.high)
  assert 0.9 < np.mean(inside) < 0.99


def test_margins_of_pairs_are_logits_whose_outcome_is_one():
  """Turning pairs around, with their outcome, changes nothing."""
  rng = np.random.default_rng(4)
  z = rng.normal(0, 2, 500)
  first = rng.random(500) < 1 / (1 + np.exp(-z))
  margins = np.where(first, z, -z)
  turned = lib.temperature(margins, np.ones(500))
  assert turned.value == pytest.approx(lib.temperature(z, first).value, rel=1e-9)


def test_no_temperature_is_found_where_there_is_none():
  rng = np.random.default_rng(5)
  z = rng.normal(size=200)
  assert lib.temperature(z, rng.random(200) < 1 / (1 + np.exp(3 * z))) is None  # worse than chance
  assert lib.temperature(z, z > 0) is None  # never wrong
  assert lib.temperature(np.zeros(50), np.ones(50)) is None


def test_soft_outcomes_add_no_noise():
  c = calibrated(100, 6)[0]
  assert lib.expected_ece(c, c) == 0
  assert lib.calibration(c, c).ece.value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("c, y", [([], []), ([0.5], [2.0]), ([1.5], [1.0]), ([0.5, 0.5], [1.0])])
def test_bad_confidences_are_refused(c, y):
  with pytest.raises(ValueError, match="confidences and outcomes"):
    lib.calibration(c, y)
