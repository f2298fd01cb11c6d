"""Logistic regression: the maximum of its likelihood, honest errors, and sentences where there is none."""

import numpy as np
import pytest
from scipy import optimize

from align_jax.evals import logistic


def draw(n, weights, seed, clusters=None):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, len(weights)))
  if clusters is not None:
    x = x[clusters]
  p = 1 / (1 + np.exp(-x @ weights))
  return x, (rng.random(len(x)) < p).astype(float)


def test_the_maximum_is_that_of_a_general_optimiser():
  x, y = draw(300, np.array([1.0, -0.5, 0.2]), 0)

  def loss(w):
    z = x @ w
    return np.sum(np.logaddexp(0, z) - y * z) + 0.7 / 2 * w @ w

  expected = optimize.minimize(loss, np.zeros(3), tol=1e-12).x
  np.testing.assert_allclose(logistic.fit(x, y, l2=0.7).coefficients, expected, atol=1e-5)


def test_intervals_hold_the_truth_as_often_as_they_say():
  weights = np.array([0.8, -0.4])
  inside = []
  for seed in range(300):
    found = logistic.fit(*draw(250, weights, seed))
    inside += [not found.estimate(i).excludes(w) for i, w in enumerate(weights)]
  assert 0.925 < np.mean(inside) < 0.98


def test_repeated_rows_need_clusters():
  """Every row four times says no more than once; without clusters the error is half as large."""
  x, y = draw(400, np.array([0.8]), 1)
  once = logistic.fit(x, y).estimate(0).stderr
  rows = np.repeat(np.arange(400), 4)
  clustered = logistic.fit(x[rows], y[rows], clusters=rows).estimate(0).stderr
  alone = logistic.fit(x[rows], y[rows]).estimate(0).stderr
  assert clustered == pytest.approx(once, rel=0.1)
  assert alone == pytest.approx(once / 2, rel=0.1)


def test_soft_labels_that_fit_exactly_have_no_error():
  x, _ = draw(200, np.array([0.5, 1.5]), 2)
  found = logistic.fit(x, 1 / (1 + np.exp(-x @ [0.5, 1.5])))
  np.testing.assert_allclose(found.coefficients, [0.5, 1.5], atol=1e-8)
  assert found.estimate(0).stderr < 1e-6


@pytest.mark.parametrize(
  "x, y, words",
  [
    (np.array([[1.0], [2.0], [-1.0]]), np.array([1.0, 1.0, 0.0]), "separated"),
    (np.ones((4, 2)), np.array([1.0, 0.0, 1.0, 0.0]), "depend on each other"),
    (np.ones((4, 1)), np.array([1.0, 2.0, 0.0, 0.0]), "within"),
    (np.ones((4, 1)), np.array([1.0]), r"\[n, k\]"),
  ],
)
def test_what_has_no_maximum_is_said(x, y, words):
  with pytest.raises(ValueError, match=words):
    logistic.fit(x, y)


def test_separated_classes_with_a_prior_are_uncertain():
  """The sandwich alone would call the coefficient certain: its residuals are all but 0."""
  x = np.concatenate([np.ones(60), -np.ones(60)])[:, None]
  found = logistic.fit(x, (x[:, 0] > 0).astype(float), l2=0.01).estimate(0)
  assert found.value > 4 and found.stderr > 2
