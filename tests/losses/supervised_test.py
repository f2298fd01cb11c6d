"""Tests of the supervised losses."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax.losses import supervised


@pytest.fixture(scope="module")
def example():
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, 4, 7)).astype(np.float32), rng.integers(0, 7, (2, 4))


def test_token_logprobs_scores_the_token_at_t_by_the_logits_before_it(example):
  logits, tokens = example
  expected = np.zeros((2, 3))
  for b in range(2):
    for t in range(1, 4):
      probabilities = np.exp(logits[b, t - 1]) / np.exp(logits[b, t - 1]).sum()
      expected[b, t - 1] = np.log(probabilities[tokens[b, t]])
  np.testing.assert_allclose(supervised.token_logprobs(logits, tokens), expected, rtol=1e-5)
  np.testing.assert_allclose(
    jax.jit(supervised.token_logprobs)(logits, tokens), expected, rtol=1e-5
  )


def test_uniform_logits_cost_log_of_the_vocabulary():
  loss = supervised.cross_entropy_loss(jnp.full((3, 11), 5.0), jnp.arange(3))
  np.testing.assert_allclose(loss, np.log(11.0), rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot(example):
  logits, tokens = example
  gradient = jax.grad(lambda x: supervised.cross_entropy_loss(x, tokens).sum())(logits)
  expected = np.asarray(jax.nn.softmax(logits)) - np.eye(7)[tokens]
  np.testing.assert_allclose(gradient, expected, atol=1e-6)
  jax.test_util.check_grads(
    lambda x: supervised.cross_entropy_loss(x, tokens), (logits,), 1, ["rev"], rtol=2e-2, eps=1e-2
  )


def test_extreme_and_forbidden_logits():
  logits = jnp.array([[1e4, -1e4, 0.0], [0.0, -jnp.inf, 0.0]])
  loss = supervised.cross_entropy_loss(logits, jnp.array([1, 0]))
  np.testing.assert_allclose(loss, [2e4, np.log(2.0)], rtol=1e-6)
  gradient = jax.grad(lambda x: supervised.cross_entropy_loss(x, jnp.array([1, 0])).sum())(logits)
  assert np.all(np.isfinite(gradient))


def test_half_precision_logits_are_computed_in_float32(example):
  logits, tokens = example
  halves = jnp.asarray(logits, jnp.bfloat16)
  loss = supervised.cross_entropy_loss(halves, tokens)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(
    loss, supervised.cross_entropy_loss(halves.astype(jnp.float32), tokens), rtol=1e-6
  )


def test_wrong_shapes_are_refused(example):
  logits, tokens = example
  with pytest.raises(ValueError, match="token_logprobs"):
    supervised.token_logprobs(logits, tokens[:, 1:])
  with pytest.raises(ValueError, match="token_logprobs"):
    supervised.token_logprobs(logits[0], tokens[0])
  with pytest.raises(ValueError, match="cross_entropy_loss"):
    supervised.cross_entropy_loss(logits, tokens[:, :2])
