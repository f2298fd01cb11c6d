"""Golden values of the field's conventions, and laws that the intervals must obey."""

import math

import numpy as np
import pytest

from align_jax.evals import statistics

# Confidences and outcomes whose calibration numbers are known to three places.
CONFIDENCES = (0.97, 0.91, 0.86, 0.83, 0.74, 0.66, 0.61, 0.55, 0.32, 0.24)
CORRECT = (1, 1, 0, 1, 1, 0, 1, 0, 0, 1)


def test_mean_is_the_textbook_one():
  estimate = statistics.mean([2.0, 4.0, 9.0])
  # s² = (9 + 1 + 16) / 2 = 13; t(0.975, 2 degrees) = 4.302653
  assert estimate.value == 5.0
  assert estimate.stderr == pytest.approx(math.sqrt(13 / 3))
  assert estimate.half_width == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)
  assert (estimate.low + estimate.high) / 2 == pytest.approx(5.0)
  assert estimate.n == 3 and estimate.unscored == 0


@pytest.mark.parametrize("values", [[], [3.0], [3.0, math.nan]])
def test_below_two_items_the_error_is_zero_and_the_interval_unknown(values):
  estimate = statistics.mean(values)
  assert estimate.stderr == 0.0
  assert math.isnan(estimate.low) and math.isnan(estimate.high)
  assert not estimate.excludes(-1e9)


def test_unscored_items_are_counted_and_never_zeros():
  estimate = statistics.mean([1.0, math.nan, 1.0, 1.0])
  assert (estimate.value, estimate.n, estimate.unscored) == (1.0, 3, 1)
  win = statistics.win_rate([1.0, math.nan, 0.0], [0.0, 0.0, math.nan])
  assert (win.wins, win.ties, win.losses) == (1, 0, 0)
  assert (win.rate.n, win.rate.unscored) == (1, 2)


def test_clustered_stderr_meets_the_golden_value():
  clusters = [[1, 1, 1], [0, 0], [1, 0, 1], [0]]
  values = [float(value) for cluster in clusters for value in cluster]
  labels = [c for c, cluster in enumerate(clusters) for _ in cluster]
  assert statistics.mean(values).value == pytest.approx(0.555556, abs=1e-6)
  assert statistics.mean(values).stderr == pytest.approx(0.175682, abs=1e-6)
  assert statistics.clustered_mean(values, labels).stderr == pytest.approx(0.237688, abs=1e-6)


def test_clusters_of_one_are_no_clusters():
  values = np.random.default_rng(0).normal(size=20)
  plain, clustered = statistics.mean(values), statistics.clustered_mean(values, range(20))
  assert clustered.stderr == pytest.approx(plain.stderr)
  assert clustered.low == pytest.approx(plain.low)


def test_duplicated_items_do_not_shrink_a_clustered_error():
  values = np.random.default_rng(1).normal(size=12)
  once = statistics.mean(values)
  thrice = statistics.clustered_mean(np.repeat(values, 3), np.repeat(np.arange(12), 3))
  assert thrice.stderr == pytest.approx(once.stderr)
  assert statistics.mean(np.repeat(values, 3)).stderr < 0.6 * once.stderr


def test_clustered_mean_drops_the_label_of_an_unscored_item_with_it():
  estimate = statistics.clustered_mean([1.0, math.nan, 0.0], ["a", "b", "a"])
  assert (estimate.n, estimate.unscored, estimate.stderr) == (2, 1, 0.0)  # one cluster is left
  with pytest.raises(ValueError, match="2 labels for 3 values"):
    statistics.clustered_mean([1.0, 2.0, 3.0], ["a", "b"])


def test_paired_difference_sees_what_separate_intervals_hide():
  rng = np.random.default_rng(2)
  difficulty = rng.normal(scale=10, size=50)
  baseline = difficulty + rng.normal(scale=0.1, size=50)
  better = difficulty + 0.5 + rng.normal(scale=0.1, size=50)
  difference = statistics.paired_difference(better, baseline)
  assert difference.value == pytest.approx(better.mean() - baseline.mean())
  assert difference.low > 0.4 and difference.high < 0.6
  assert statistics.mean(better).low < statistics.mean(baseline).high


def test_wilson_is_the_inversion_of_the_score_test():
  # The bounds are the p with |p̂ - p| = z · sqrt(p (1 - p) / n).
  z = 1.959963984540054
  for successes, n in ((3, 10), (50, 80), (1, 400)):
    for bound in statistics.wilson_interval(successes, n):
      assert abs(successes / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n))


def test_wilson_at_the_edges():
  z2 = 1.959963984540054**2
  low, high = statistics.wilson_interval(0, 10)
  assert low == 0.0 and high == pytest.approx(z2 / (10 + z2))
  low, high = statistics.wilson_interval(10, 10)
  assert low == pytest.approx(10 / (10 + z2)) and high == 1.0
  assert statistics.wilson_interval(0, 0) == (0.0, 1.0)
  with pytest.raises(ValueError, match="not a proportion"):
    statistics.wilson_interval(11, 10)


@pytest.mark.parametrize("estimator", [statistics.mean, statistics.proportion])
def test_intervals_cover_as_often_as_they_say(estimator):
  rng = np.random.default_rng(3)
  covered = 0
  for _ in range(2000):
    estimate = estimator((rng.random(40) < 0.3).astype(float))
    covered += estimate.low <= 0.3 <= estimate.high
  assert 0.92 < covered / 2000 < 0.975


def test_few_seeds_are_covered_too():
  # With the normal quantile, three seeds would be covered only about 81 % of the time.
  draws = np.random.default_rng(4).normal(size=(2000, 3))
  estimates = [statistics.mean(row) for row in draws]
  assert np.mean([e.low <= 0 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.02)


def test_win_rate_counts_ties_half():
  win = statistics.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 3.0, 5.0])
  assert (win.wins, win.ties, win.losses) == (1, 2, 1)
  assert win.rate.value == 0.5
  assert statistics.win_rate([1.0, 2.0], [1.05, 1.0], tolerance=0.1).ties == 1


def test_win_rates_of_two_sides_add_to_one():
  rng = np.random.default_rng(5)
  ours, theirs = rng.integers(4, size=(2, 60)).astype(float)
  one, other = statistics.win_rate(ours, theirs).rate, statistics.win_rate(theirs, ours).rate
  assert one.value + other.value == pytest.approx(1.0)
  assert one.low + other.high == pytest.approx(1.0)


def test_ties_vary_less_and_narrow_the_interval_as_much():
  # 60 % ties, the rest won with probability 0.6: the rate is 0.54, the variance 0.2484 - 0.15.
  rng = np.random.default_rng(8)
  widths, covered = [], 0
  for _ in range(2000):
    outcome = rng.choice([1.0, 0.0, -1.0], p=[0.24, 0.6, 0.16], size=80)
    rate = statistics.win_rate(outcome, np.zeros(80)).rate
    widths.append(rate.half_width)
    covered += rate.low <= 0.54 <= rate.high
  assert 0.94 < covered / 2000 < 0.98
  assert np.mean(widths) == pytest.approx(1.96 * math.sqrt(0.0984 / 80), rel=0.1)


def test_ties_alone_are_no_proof_of_one_half():
  rate = statistics.win_rate(np.zeros(50), np.zeros(50)).rate
  assert rate.value == 0.5 and 0.02 < rate.half_width < 0.05


def test_a_clean_sweep_still_has_a_width():
  win = statistics.win_rate(np.ones(20), np.zeros(20)).rate
  assert win.value == win.high == 1.0
  assert win.low < 0.85


def test_bootstrap_agrees_with_the_formula_and_repeats():
  values = np.random.default_rng(6).normal(size=200)
  exact = statistics.mean(values)
  drawn = statistics.bootstrap(values, np.mean, seed=0)
  assert drawn.value == exact.value
  assert drawn.stderr == pytest.approx(exact.stderr, rel=0.06)
  assert drawn.low == pytest.approx(exact.low, abs=0.2 * exact.stderr)
  assert statistics.bootstrap(values, np.mean, seed=0) == drawn
  assert statistics.bootstrap(values, np.mean, seed=1) != drawn


def test_bootstrap_resamples_rows_together():
  rows = np.stack([np.arange(1.0, 51.0), 2 * np.arange(1.0, 51.0)], axis=1)
  ratio = statistics.bootstrap(rows, lambda r: r[:, 1].sum() / r[:, 0].sum(), seed=0, resamples=100)
  assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_calibration_meets_the_golden_values():
  ece = statistics.expected_calibration_error
  assert ece(CONFIDENCES, CORRECT, bins=10) == pytest.approx(0.297, abs=1e-9)
  assert ece(CONFIDENCES, CORRECT, bins=5) == pytest.approx(0.157, abs=1e-9)
  assert ece(CONFIDENCES, CORRECT, bins=5, equal_mass=True) == pytest.approx(0.181, abs=1e-9)
  assert statistics.brier_score(CONFIDENCES, CORRECT) == pytest.approx(0.24153, abs=1e-9)
  gaps = [abs(b.accuracy - b.confidence) for b in statistics.calibration_bins(CONFIDENCES, CORRECT)]
  assert max(gaps) == pytest.approx(0.76, abs=1e-9)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
  for confidence in np.arange(1, 10) / 10:
    bins = statistics.calibration_bins([confidence, confidence - 0.05], [1, 0])
    assert [b.n for b in bins] == [2], confidence
  assert statistics.calibration_bins([0.0, 0.1], [0, 1])[0].n == 2


def test_calibrated_predictions_have_little_error_and_squared_ones_more():
  rng = np.random.default_rng(7)
  p = rng.random(20_000)
  y = rng.random(20_000) < p
  assert statistics.expected_calibration_error(p, y) < 0.02
  # |E[y | p²] - p²| = p - p², whose mean over [0, 1] is 1/6.
  assert statistics.expected_calibration_error(p**2, y) == pytest.approx(1 / 6, abs=0.02)


def test_pass_at_k():
  assert statistics.pass_at_k(10, 2, 3) == pytest.approx(0.533333, abs=1e-6)
  assert statistics.pass_at_k(10, 2, 1) == pytest.approx(0.2)
  assert statistics.pass_hat_k(10, 5, 2) == pytest.approx(5 * 4 / (10 * 9))
  assert statistics.pass_at_k(5, 5, 3) == 1.0 and statistics.pass_hat_k(5, 2, 3) == 0.0
  assert math.isnan(statistics.pass_at_k(2, 1, 3)) and math.isnan(statistics.pass_hat_k(2, 1, 3))
  with pytest.raises(ValueError, match="correct=4, n=3"):
    statistics.pass_at_k(3, 4, 1)


def test_what_has_no_mean_is_refused():
  with pytest.raises(ValueError, match="infinite"):
    statistics.mean([1.0, math.inf])
  with pytest.raises(ValueError, match="shape"):
    statistics.mean([[1.0], [2.0]])
  with pytest.raises(ValueError, match="differ in number: 2 and 3"):
    statistics.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
  with pytest.raises(ValueError, match=r"within \[0, 1\]"):
    statistics.proportion([0.5, 1.5])
