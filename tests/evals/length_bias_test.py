"""Length bias: what is planted is measured, what is taken off is gone, and nothing else with it."""

import numpy as np
import pytest
from scipy import stats

from align_jax.evals import audit, length_bias, logistic

SHARE = 0.3


def planted(n=40_000, seed=0, share=SHARE, noise=0.8):
  """(gold, tokens, P(first chosen), first chosen) [n, 2] and [n]: gold has nothing to do with length."""
  rng = np.random.default_rng(seed)
  gold, tokens = rng.normal(size=(n, 2)), rng.integers(5, 60, (n, 2)).astype(float)
  fair = logistic.sigmoid((gold[:, 0] - gold[:, 1]) / noise)
  p = length_bias.flip_toward_longer(fair, *tokens.T, share=share)
  return gold, tokens, p, rng.random(n) < p


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7])
def test_the_gap_of_labels_is_the_planted_share(share):
  gold, tokens, p, first = planted(share=share)
  margin, extra = gold[:, 0] - gold[:, 1], tokens[:, 0] - tokens[:, 1]
  right = (first == (margin > 0)).astype(float)
  found = length_bias.gold_gap(right, margin, extra)
  assert found.low <= share <= found.high
  assert found.half_width < 0.015
  exact = length_bias.gold_gap(np.where(margin > 0, p, 1 - p), margin, extra)
  assert exact.value == pytest.approx(
    share, abs=0.006
  )  # what is left is the draw of gold and tokens


def test_the_gold_judge_is_worse_where_the_chosen_is_longer_by_the_analytic_amount():
  """a = 1 without noise: (e + (1 - e) a) / (1 + e) - a = -e / (1 + e)."""
  gold, tokens, _, _ = planted()
  fair = (gold[:, 0] > gold[:, 1]).astype(float)
  p = length_bias.flip_toward_longer(fair, *tokens.T, share=SHARE)
  first = np.random.default_rng(1).random(len(p)) < p
  sign = np.where(first, 1.0, -1.0)
  chosen, rejected = (np.where(first, tokens[:, i], tokens[:, 1 - i]) for i in (0, 1))
  split = length_bias.length_split(sign * (gold[:, 0] - gold[:, 1]), chosen, rejected)
  assert split.gap.low <= -SHARE / (1 + SHARE) <= split.gap.high
  longer = length_bias.length_split(chosen - rejected, chosen, rejected)
  assert (longer.longer.value, longer.shorter.value, longer.gap.value) == (1.0, 0.0, 1.0)


def biased_scores(seed=0, slope=0.03):
  """Scores of a model that has learned gold, and the length that the labels like."""
  gold, tokens, p, first = planted(6000, seed)
  noise = np.random.default_rng(seed + 100).normal(0, 0.3, gold.shape)
  return gold, tokens, p, first, gold + slope * tokens + noise


def test_residualising_takes_the_correlation_and_keeps_the_accuracy_at_equal_length():
  gold, tokens, _, first, scores = biased_scores()
  prompts = np.repeat(np.arange(len(gold)), 2)
  half = np.arange(len(gold)) < 3000
  fitted = audit.fit_on(scores, tokens, prompts.reshape(-1, 2), half)
  assert fitted.slope == pytest.approx(0.03, abs=0.002)
  rest = ~half
  left = fitted.apply(scores, tokens)

  def correlation(x):
    return length_bias.correlation(x[rest].ravel(), tokens[rest].ravel(), prompts[:6000]).pearson

  assert correlation(scores).low > 0.3
  assert abs(correlation(left).value) < 0.05
  sign = np.where(first, 1.0, -1.0)[rest]
  close = length_bias.matched(*tokens[rest].T)

  def accuracy(x):
    return length_bias.ahead((x[rest, 0] - x[rest, 1]) * sign)

  assert accuracy(left)[close].mean() >= accuracy(scores)[close].mean() - 0.02
  # Among gold preferences it is better everywhere: the bias was in the way.
  truth = np.sign(gold[rest, 0] - gold[rest, 1])
  before, after = (
    length_bias.ahead((x[rest, 0] - x[rest, 1]) * truth).mean() for x in (scores, left)
  )
  assert after > before + 0.02


def test_a_slope_between_prompts_is_no_bias():
  """Prompts that call for long answers and are liked: every response of a prompt is alike."""
  rng = np.random.default_rng(0)
  liked = np.repeat(rng.normal(size=500), 4)
  tokens = 30 + 10 * liked + rng.normal(size=2000)
  rewards, prompts = liked + 0.1 * rng.normal(size=2000), np.repeat(np.arange(500), 4)
  assert np.corrcoef(rewards, tokens)[0, 1] > 0.9  # what one would see without prompts
  found = length_bias.correlation(rewards, tokens, prompts)
  assert found.pearson.low < 0 < found.pearson.high
  assert abs(length_bias.fit_residual(rewards, tokens, prompts).slope) < 0.01


def test_correlations_are_those_of_deviations():
  rng = np.random.default_rng(1)
  prompts = rng.integers(0, 40, 300)
  rewards, tokens = rng.normal(size=300), rng.integers(1, 50, 300).astype(float)
  rewards += 0.03 * tokens
  found = length_bias.correlation(rewards, tokens, prompts)
  groups = [np.flatnonzero(prompts == p) for p in range(40)]
  r, t = (
    np.concatenate([x[g] - x[g].mean() for g in groups if len(g) > 1]) for x in (rewards, tokens)
  )
  assert found.pearson.value == pytest.approx(stats.pearsonr(r, t)[0], abs=1e-12)
  assert found.spearman.value == pytest.approx(stats.spearmanr(r, t)[0], abs=1e-12)
  assert found.slope.value == pytest.approx(np.polyfit(t, r, 1)[0], abs=1e-12)
  assert found.pearson.low < found.pearson.value < found.pearson.high


def test_turning_pairs_around_changes_no_correlation():
  rng = np.random.default_rng(2)
  r, t = rng.normal(size=(50, 2)), rng.integers(1, 30, (50, 2))
  prompts = np.repeat(np.arange(50), 2)
  there = length_bias.correlation(r.ravel(), t.ravel(), prompts).pearson.value
  back = length_bias.correlation(r[:, ::-1].ravel(), t[:, ::-1].ravel(), prompts).pearson.value
  d, e = r[:, 0] - r[:, 1], t[:, 0] - t[:, 1]
  assert there == pytest.approx(back, abs=1e-12)
  assert there == pytest.approx((d @ e) / np.sqrt((d @ d) * (e @ e)), abs=1e-12)


def test_a_gain_that_is_all_length_has_no_non_length_part():
  rng = np.random.default_rng(3)
  before, after = rng.integers(20, 100, (400, 2)), rng.integers(60, 140, (400, 2))
  found = length_bias.non_length_gain(0.1 * (before // 20), before, 0.1 * (after // 20), after)
  assert found.gain.value == pytest.approx(0.2, abs=0.01)
  assert found.non_length.value == pytest.approx(0.0, abs=1e-12)
  assert found.explained.value == pytest.approx(1.0, abs=1e-9)
  assert found.shared == pytest.approx(0.5, abs=0.05)


def test_a_gain_that_has_nothing_to_do_with_length_is_all_non_length():
  rng = np.random.default_rng(4)
  before, after = rng.integers(20, 100, 800), rng.integers(60, 140, 800)
  found = length_bias.non_length_gain(np.zeros(800), before, np.ones(800), after)
  assert found.non_length.value == found.gain.value == 1.0
  assert found.explained.value == 0.0


def test_the_weights_of_bins_are_the_share_of_both_sets():
  """Bin 0: 3 before and 1 after, +1; bin 1: 1 and 3, +5. (4 · 1 + 4 · 5) / 8 = 3."""
  r, t = np.array([0, 0, 0, 10.0]), np.array([1, 2, 3, 25])
  r2, t2 = np.array([1.0, 15, 15, 15]), np.array([5, 30, 31, 39])
  found = length_bias.non_length_gain(r, t, r2, t2)
  assert found.non_length.value == pytest.approx(3.0)
  assert found.gain.value == pytest.approx(9.0)
  assert found.explained.value == pytest.approx(1 - 3 / 9)


def test_a_win_rate_bought_by_length_falls_to_one_half_at_equal_length():
  rng = np.random.default_rng(5)
  lengths, base = rng.normal(70, 20, 6000), rng.normal(50, 20, 6000)
  extra = lengths - base
  p = 1 / (1 + np.exp(-1.5 * np.tanh(extra / extra.std())))
  wins = (rng.random(6000) < p).astype(float)
  found = length_bias.controlled_win_rate(wins, lengths, base)
  assert found.raw.low > 0.6
  assert found.controlled.low < 0.5 < found.controlled.high
  assert found.length_coefficient.low < 1.5 < found.length_coefficient.high
  fair = length_bias.controlled_win_rate((rng.random(6000) < 0.7).astype(float), lengths, base)
  assert fair.controlled.low < 0.7 < fair.controlled.high  # a real advantage stays


def test_difficulty_is_averaged_over_and_a_clean_sweep_is_finite():
  rng = np.random.default_rng(6)
  hard, lengths = rng.normal(size=5000), rng.normal(50, 10, 5000)
  wins = (rng.random(5000) < 1 / (1 + np.exp(-1 - 2 * hard))).astype(float)
  found = length_bias.controlled_win_rate(wins, lengths, 50 + 0 * lengths, difficulty=hard)
  assert found.controlled.value == pytest.approx(np.mean(1 / (1 + np.exp(-1 - 2 * hard))), abs=0.02)
  swept = length_bias.controlled_win_rate(np.ones(50), lengths[:50], lengths[50:100])
  assert 0.9 < swept.controlled.value <= 1.0 and np.isfinite(swept.controlled.low)


@pytest.mark.parametrize(
  "call",
  [
    lambda: length_bias.correlation([1.0, 2.0], [1, 2], [0, 1]),
    lambda: length_bias.correlation([1.0, 2.0], [1, 2, 3], [0, 0]),
    lambda: length_bias.non_length_gain([1.0], [1], [1.0, 2.0], [1, 2]),
    lambda: length_bias.flip_toward_longer([0.5], [1], [2], share=1.5),
  ],
)
def test_bad_arguments_are_refused(call):
  with pytest.raises(ValueError):
    call()
