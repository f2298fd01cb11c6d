"""Over-optimisation: golden peaks, planted laws found again, and the law itself in a small world."""

import math

import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax.evals import best_of_n, overoptimization, results
from align_jax.evals.overoptimization import extrapolate, fit, fit_prompts, peak, predict, tied_kl

SIZES = (1, 4, 16, 64, 256, 1024, 4096)


def independent(form, alpha, beta, d):
  return d * (alpha - beta * (d if form == "bon" else np.log(d)))


def test_golden_peaks():
  assert peak("bon", 1, 0.25) == pytest.approx((2.0, 1.0), abs=1e-12)
  assert peak("rl", 1, 0.25) == pytest.approx((20.0855, 5.0214), abs=1e-4)


@pytest.mark.parametrize("form, alpha, beta", [("bon", 0.7, 0.12), ("rl", 1.0, 0.3)])
def test_a_peak_is_the_highest_point_of_its_curve(form, alpha, beta):
  d = np.linspace(0.01, 40, 400_001)
  curve = independent(form, alpha, beta, d)
  np.testing.assert_allclose(predict(form, alpha, beta, d), curve, atol=1e-12)
  assert predict(form, alpha, beta, 0.0) == 0
  place, height = peak(form, alpha, beta)
  assert place == pytest.approx(d[curve.argmax()], abs=2e-4)
  assert height == pytest.approx(curve.max(), rel=1e-8)


@pytest.mark.parametrize(
  "form, alpha, beta", [("bon", 1, -0.1), ("bon", -1, 0.1), ("rl", 1, 0), ("rl", 1000, 1)]
)
def test_a_curve_that_does_not_turn_has_no_peak(form, alpha, beta):
  assert all(map(math.isnan, peak(form, alpha, beta)))


def planted(form, rng, error=0.02):
  """(distances, gains, stderrs) with an error of their own on every point."""
  alpha, beta = (1.0, 0.25) if form == "bon" else (1.0, 0.3)
  d = np.linspace(1.0, 3.2 if form == "bon" else 12.0, 24)
  se = error * rng.uniform(0.5, 2.0, d.shape)
  return alpha, beta, d, independent(form, alpha, beta, d) + se * rng.normal(size=d.shape), se


@pytest.mark.parametrize("form", overoptimization.FORMS)
def test_a_planted_law_is_found_within_its_errors(form):
  """Within 2 SE in about 95 % of 300 worlds, and the interval of the peak covers it as often."""
  rng = np.random.default_rng(0)
  near, covered = [], []
  for _ in range(300):
    alpha, beta, *points = planted(form, rng)
    found = fit(form, *points)
    near += [abs(e.value - t) < 2 * e.stderr for e, t in ((found.alpha, alpha), (found.beta, beta))]
    for e, true in zip((found.peak_distance, found.peak_gain), peak(form, alpha, beta)):
      covered.append(e.low < true < e.high)
  assert 0.92 < np.mean(near) < 0.99
  assert 0.92 < np.mean(covered) < 0.99
  assert found.r_squared > 0.9 and found.points == 24


@pytest.mark.parametrize("form", overoptimization.FORMS)
def test_the_right_form_wins_on_held_out_distances(form):
  rng = np.random.default_rng(1)
  wins, in_sample = [], []
  for _ in range(100):
    alpha, beta, d, gains, se = planted(form, rng)
    found = extrapolate(form, d, gains, se, limit=float(d[11]))
    wins.append(found.prefers_its_form)
    assert (found.form, found.fitted, found.held_out) == (form, 12, 12)
    other = "rl" if form == "bon" else "bon"
    in_sample.append(fit(form, d, gains, se).aic < fit(other, d, gains, se).aic)
  assert np.mean(wins) > 0.95 and np.mean(in_sample) > 0.95
  exact = extrapolate(form, d, independent(form, alpha, beta, d), se, limit=float(d[11]))
  assert exact.rmse < 1e-12 and exact.aic == pytest.approx(4) and exact.other_rmse > 0.05


def test_the_wrong_form_does_not_win_its_own_test():
  """The control: asked for the rl law of a best-of-n curve, the test says no."""
  rng = np.random.default_rng(2)
  _, _, d, gains, se = planted("bon", rng)
  assert not extrapolate("rl", d, gains, se, limit=float(d[11])).prefers_its_form


def test_weighted_least_squares_by_hand():
  """Against numpy.linalg.lstsq on rows divided by their errors."""
  rng = np.random.default_rng(3)
  _, _, d, gains, se = planted("bon", rng)
  found = fit("bon", d, gains, se)
  rows = np.stack([d, -(d**2)], axis=1) / se[:, None]
  solution, rss, *_ = np.linalg.lstsq(rows, gains / se, rcond=None)
  covariance = np.linalg.inv(rows.T @ rows) * max(1, rss[0] / 22)
  np.testing.assert_allclose([found.alpha.value, found.beta.value], solution, rtol=1e-9)
  np.testing.assert_allclose(
    [found.alpha.stderr, found.beta.stderr], np.sqrt(np.diag(covariance)), rtol=1e-9
  )
  assert found.chi_squared == pytest.approx(rss[0]) and found.aic == pytest.approx(rss[0] + 4)
  wild = fit("bon", d, gains + rng.normal(size=d.shape), se)  # scatter far beyond the stated errors
  assert wild.alpha.stderr > 10 * found.alpha.stderr


@pytest.mark.parametrize("form", overoptimization.FORMS)
def test_the_errors_of_a_peak_are_those_of_its_gradient(form):
  """The delta method against the spread of peaks over ten thousand draws of (α, β)."""
  rng = np.random.default_rng(4)
  alpha, beta, d, gains, se = planted(form, rng, error=0.002)
  found = fit(form, d, gains, se)
  rows = np.array([[x, -(x**2 if form == "bon" else x * math.log(x))] for x in d]) / se[:, None]
  covariance = np.linalg.inv(rows.T @ rows) * max(1, found.chi_squared / 22)
  draws = rng.multivariate_normal([found.alpha.value, found.beta.value], covariance, 10_000)
  spread = np.std([peak(form, *draw) for draw in draws], axis=0)
  np.testing.assert_allclose(
    [found.peak_distance.stderr, found.peak_gain.stderr], spread, rtol=0.05
  )


def test_prompts_are_resampled_whole():
  """Of prompts that differ by a factor the errors of all points move together: α/β hardly varies."""
  rng = np.random.default_rng(5)
  d = np.linspace(0.5, 3, 12)
  factors = rng.normal(1.0, 0.5, size=(200, 1))
  gains = factors * independent("bon", 1.0, 0.25, d) + 1e-3 * rng.normal(size=(200, 12))
  found = fit_prompts("bon", d, gains, seed=0)
  error = 0.5 / math.sqrt(200)
  assert found.alpha.stderr == pytest.approx(error, rel=0.15)
  assert found.beta.stderr == pytest.approx(0.25 * error, rel=0.15)
  assert found.alpha.low < 1.0 < found.alpha.high
  assert found.peak_distance.stderr < 0.01 and found.peak_distance.value == pytest.approx(
    2, abs=0.01
  )
  assert found == fit_prompts("bon", d, gains, seed=0)
  means, errors = gains.mean(axis=0), gains.std(axis=0, ddof=1) / math.sqrt(200)
  plain = fit("bon", d, means, errors)
  assert (found.alpha.value, found.chi_squared) == (plain.alpha.value, plain.chi_squared)


def test_a_peak_that_many_resamples_lack_has_no_upper_bound():
  rng = np.random.default_rng(6)
  d = np.linspace(0.5, 3, 12)
  found = fit_prompts("bon", d, 0.5 * d + rng.normal(size=(20, 12)), seed=0)
  assert math.isnan(found.peak_distance.high)
  assert math.isfinite(found.alpha.high)


def test_a_fit_goes_to_disk_and_back():
  d = np.linspace(1, 3, 9)
  found = fit("bon", d, independent("bon", 1, 0.2, d), np.full(9, 0.1))
  assert config_lib.build(overoptimization.Fit, results.to_json(found)) == found


D = np.linspace(1, 3, 8)
BAD = [
  ("ppo", D, D, D, {}, "form must be one of bon, rl"),
  ("bon", D[:2], D[:2], D[:2], {}, "3 points or more"),
  ("bon", D, D[:3], D, {}, "3 points or more"),
  ("bon", D, D, 0 * D, {}, "must be positive"),
  ("bon", D - 1, D, D, {}, "must be positive"),
  ("bon", D, D * np.nan, D, {}, "finite"),
  ("rl", D - 0.5, D, D, {}, "not fitted below d = 1 .there are 2"),
  ("rl", D, D, D, {"first_distance": 2.5}, "not fitted below d = 2.5"),
]


@pytest.mark.parametrize("form, d, r, se, options, message", BAD, ids=range(len(BAD)))
def test_points_that_cannot_be_fitted_are_refused(form, d, r, se, options, message):
  with pytest.raises(ValueError, match=message):
    fit(form, d, r, se, **options)


def test_near_points_are_fitted_only_when_asked_for():
  fit("rl", D - 0.5, D, D, first_distance=0.5)
  with pytest.raises(ValueError, match="nothing to extrapolate"):
    extrapolate("bon", D, D, D, limit=3.0)
  with pytest.raises(ValueError, match="two prompts or more"):
    fit_prompts("bon", D, D[None], seed=0)


@pytest.mark.parametrize("n", (1, 2, 8, 64))
def test_the_kl_of_tied_responses_is_exact(n):
  """Six responses of known shares, by the sum over them; without ties the closed form."""
  shares = np.array([0.30, 0.25, 0.2, 0.15, 0.07, 0.03])
  above = np.cumsum(shares)
  weights = above**n - (above - shares) ** n
  exact = float(np.sum(weights * np.log(weights / shares)))
  row = np.repeat(np.arange(6.0), (shares * 20_000).round().astype(int))
  rng = np.random.default_rng(n)
  assert tied_kl(rng.permutation(row)[None], n)[0] == pytest.approx(exact, abs=2e-3)
  loose = rng.normal(size=(2, 300))
  np.testing.assert_allclose(tied_kl(loose, n), best_of_n.best_of_n_kl(n), atol=1e-9)
  np.testing.assert_allclose(tied_kl(np.zeros((1, 300)), n), 0, atol=1e-12)  # no choice
  if n > 1:
    assert exact < best_of_n.best_of_n_kl(n)


def test_a_kl_of_bad_scores_is_refused():
  for proxy, n in ((np.zeros(3), 1), (np.zeros((1, 3)), 4), (np.full((1, 3), np.nan), 1)):
    with pytest.raises(ValueError, match="proxy must be finite"):
      tied_kl(proxy, n)


# The small-scale law: x ~ N(0, I₃₂), gold u − q(u² − 1) with u = x₁, and a proxy that is linear in x.

FEATURES, PROMPTS, SAMPLES = 32, 40, 8192


def logistic_regression(x, y, ridge=1.0, steps=12):
  """Weights [F] of P(y) = σ(y · w·x), labels ±1, penalty ridge/2 |w|²; Newton's method."""
  w = np.zeros(x.shape[1])
  for _ in range(steps):
    p = 1 / (1 + np.exp(-y * (x @ w)))
    gradient = ridge * w - x.T @ (y * (1 - p))
    hessian = ridge * np.eye(len(w)) + (x * (p * (1 - p))[:, None]).T @ x
    w -= np.linalg.solve(hessian, gradient)
  return w


def gold_of(u, q):
  return u - q * (u**2 - 1)


def small_world(q, pairs, seeds=2):
  """Mean gold of the best of n by a proxy learned from so many comparisons, for every n of SIZES."""
  curves = []
  for seed in range(seeds):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, pairs, FEATURES))
    labels = np.sign(gold_of(a[:, 0], q) - gold_of(b[:, 0], q))
    w = logistic_regression(a - b, labels)
    # Of a linear proxy only u and the part of the score beside it matter: two numbers a sample.
    u, rest = rng.normal(size=(2, PROMPTS, SAMPLES))
    proxy = w[0] * u + np.linalg.norm(w[1:]) * rest
    gold = gold_of(u, q)
    curves.append([best_of_n.best_of_n_scores(proxy, gold, n).mean() for n in SIZES])
  return np.mean(curves, axis=0)


def test_a_misspecified_proxy_is_over_optimised_and_more_data_lifts_the_peak():
  peaks = []
  for pairs in (30, 100, 1000, 10_000):
    curve = small_world(0.2, pairs)
    peaks.append(curve.max())
    if pairs >= 100:
      assert 0 < curve.argmax() < len(SIZES) - 1, (pairs, curve)
      assert curve[-1] < curve.max() - 0.1
  assert (np.diff(peaks) > -0.005).all() and peaks[2] > peaks[0] + 0.05
  assert peaks[2] == pytest.approx(1.40, abs=0.03)


def test_regressional_error_alone_is_never_over_optimised():
  """The control: with q = 0 the proxy errs, at any amount of data, and gold still rises to the end."""
  last = []
  for pairs in (30, 1000):
    curve = small_world(0.0, pairs)
    assert (np.diff(curve) > 0).all(), (pairs, curve)
    last.append(curve[-1])
  assert last[0] < last[1] - 0.5 and last[1] == pytest.approx(3.63, abs=0.1)


def test_drawing_best_of_n_agrees_with_the_estimator_under_heavy_tails():
  """Gold plus Cauchy errors, ten thousand draws of every n: within 3 standard errors of the estimate."""
  rng = np.random.default_rng(7)
  gold = rng.normal(size=400)
  proxy = gold + rng.standard_cauchy(size=400)
  for n in (2, 8, 32, 128):
    drawn = np.array([rng.choice(400, n, replace=False) for _ in range(10_000)])
    chosen = gold[drawn[np.arange(10_000), proxy[drawn].argmax(axis=1)]]
    estimate = best_of_n.best_of_n_scores(proxy[None], gold[None], n)[0]
    assert abs(estimate - chosen.mean()) < 3 * chosen.std() / 100


def test_the_laws_of_a_measured_curve():
  """From scores to law: the misspecified world's curve is a best-of-n curve, and extrapolates as one."""
  rng = np.random.default_rng(8)
  u, rest = rng.normal(size=(2, 200, 4096))
  proxy, gold = u + 0.3 * rest, gold_of(u, 0.2)
  sizes = [2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024]
  first = best_of_n.best_of_n_scores(proxy, gold, 1)
  gains = np.stack([best_of_n.best_of_n_scores(proxy, gold, n) - first for n in sizes], axis=1)
  d = np.sqrt([tied_kl(proxy, n).mean() for n in sizes])
  found = fit_prompts("bon", d, gains, seed=0)
  assert found.r_squared > 0.98
  top = d[gains.mean(axis=0).argmax()]
  assert abs(found.peak_distance.value - top) < 0.3
