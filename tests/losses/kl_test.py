"""Tests of the KL estimators and the controller."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax.losses import kl

KINDS = ("k1", "k2", "k3")


def test_formulas():
  logprobs, ref = np.array([[-1.0, -2.0]]), np.array([[-1.5, -0.5]])
  difference = logprobs - ref
  expected = {
    "k1": difference,
    "k2": difference**2 / 2,
    "k3": np.exp(-difference) - 1 + difference,
  }
  for kind in KINDS:
    np.testing.assert_allclose(kl.kl_estimate(logprobs, ref, kind=kind), expected[kind], rtol=1e-6)
    np.testing.assert_array_equal(kl.kl_estimate(ref, ref, kind=kind), 0.0)


def test_k3_is_never_negative_and_k1_may_be():
  logprobs = np.random.default_rng(0).normal(size=(4, 50))
  ref = np.random.default_rng(1).normal(size=(4, 50))
  assert np.all(kl.kl_estimate(logprobs, ref, kind="k3") >= 0)
  assert np.any(kl.kl_estimate(logprobs, ref, kind="k1") < 0)


@pytest.fixture(scope="module")
def distributions():
  rng = np.random.default_rng(0)
  return rng.normal(size=(1, 5)).astype(np.float32), rng.normal(size=(1, 5)).astype(np.float32)


def _expectation(kind, logits, ref_logits):
  # The exact mean of an estimator: every token, weighted with its probability.
  logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
  return jnp.sum(jnp.exp(logp) * kl.kl_estimate(logp, logq, kind=kind))


def test_k1_and_k3_are_unbiased_and_k2_is_not(distributions):
  exact = kl.exact_kl(*distributions)[0]
  for kind in ("k1", "k3"):
    np.testing.assert_allclose(_expectation(kind, *distributions), exact, rtol=1e-5)
  assert abs(_expectation("k2", *distributions) - exact) > 0.01


def test_which_estimator_has_which_gradient(distributions):
  logits, ref = distributions
  probabilities = jax.nn.softmax(logits)

  def sampled_gradient(kind):
    # Tokens are drawn, so their probabilities are constants to the differentiation.
    def loss(x):
      estimate = kl.kl_estimate(jax.nn.log_softmax(x), jax.nn.log_softmax(ref), kind=kind)
      return jnp.sum(probabilities * estimate)

    return jax.grad(loss)(logits)

  reverse = jax.grad(lambda x: kl.exact_kl(x, ref)[0])(logits)
  forward = jax.grad(lambda x: kl.exact_kl(ref, x)[0])(logits)
  np.testing.assert_allclose(sampled_gradient("k1"), 0.0, atol=1e-6)
  np.testing.assert_allclose(sampled_gradient("k2"), reverse, atol=1e-6)
  np.testing.assert_allclose(sampled_gradient("k3"), forward, atol=1e-6)


def test_exact_kl(distributions):
  logits, ref = (np.asarray(x, np.float64) for x in distributions)
  p, q = np.exp(logits) / np.exp(logits).sum(), np.exp(ref) / np.exp(ref).sum()
  np.testing.assert_allclose(kl.exact_kl(*distributions), [np.sum(p * np.log(p / q))], rtol=1e-5)
  np.testing.assert_allclose(kl.exact_kl(logits, logits), 0.0, atol=1e-7)
  jax.test_util.check_grads(kl.exact_kl, distributions, 1, ["rev"], rtol=2e-2, eps=1e-2)


def test_exact_kl_with_a_forbidden_token():
  logits, ref = jnp.array([[0.0, -jnp.inf, 0.0]]), jnp.zeros((1, 3))
  np.testing.assert_allclose(kl.exact_kl(logits, ref), [np.log(3 / 2)], rtol=1e-6)
  assert np.all(np.isfinite(jax.grad(lambda x: kl.exact_kl(x, ref)[0])(logits)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_are_finite(sign):
  big, zero = jnp.full((1, 2), sign * 1e4), jnp.zeros((1, 2))
  for kind in KINDS:

    def total(x, kind=kind):
      return kl.kl_estimate(x, zero, kind=kind).sum()

    value, gradient = jax.value_and_grad(total)(big)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
  assert np.all(np.isfinite(kl.exact_kl(jnp.array([[1e4, -1e4]]), zero)))


def test_check_grads_and_jit():
  logprobs = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
  for kind in KINDS:

    def estimate(x, kind=kind):
      return kl.kl_estimate(x, logprobs * 0.5, kind=kind)

    jax.test_util.check_grads(estimate, (logprobs,), 1, ["rev"], rtol=2e-2, eps=1e-2)
    np.testing.assert_allclose(jax.jit(estimate)(logprobs), estimate(logprobs), rtol=1e-6)


def _adapt(coefficient, divergence):
  return kl.adaptive_kl_coef(coefficient, divergence, target=6.0, horizon=10_000, batch_size=64)


def test_controller_follows_ziegler():
  # By hand: an error of 6.6/6 - 1 = 0.1 over 64 of 10,000 episodes.
  np.testing.assert_allclose(_adapt(0.2, 6.6), 0.2 * (1 + 0.1 * 64 / 10_000), rtol=1e-6)
  np.testing.assert_allclose(_adapt(0.2, 6.0), 0.2, rtol=1e-6)
  np.testing.assert_allclose(_adapt(0.2, 1e4), 0.2 * (1 + 0.2 * 64 / 10_000), rtol=1e-6)
  np.testing.assert_allclose(_adapt(0.2, -1e4), 0.2 * (1 - 0.2 * 64 / 10_000), rtol=1e-6)
  np.testing.assert_allclose(jax.jit(_adapt)(0.2, 6.6), _adapt(0.2, 6.6), rtol=1e-6)


def test_wrong_arguments_are_refused():
  x = np.zeros((2, 3))
  with pytest.raises(ValueError, match="k1, k2, k3"):
    kl.kl_estimate(x, x, kind="k4")
  with pytest.raises(ValueError, match="rank 2"):
    kl.kl_estimate(x[0], x[0], kind="k1")
  with pytest.raises(ValueError, match="one shape"):
    kl.exact_kl(x, x[:, :2])
  with pytest.raises(ValueError, match="target must be positive"):
    kl.adaptive_kl_coef(0.1, 1.0, target=0.0, horizon=10, batch_size=1)
