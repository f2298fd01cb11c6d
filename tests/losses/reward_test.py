"""Tests of the reward-model loss."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax.losses import reward

CHOSEN = np.array([1.0, -0.5, 3.0], np.float32)
REJECTED = np.array([0.2, 0.5, -1.0], np.float32)


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def test_formula():
  np.testing.assert_allclose(
    reward.bradley_terry_loss(CHOSEN, REJECTED), -np.log(_sigmoid(CHOSEN - REJECTED)), rtol=1e-5
  )
  np.testing.assert_allclose(reward.bradley_terry_loss(CHOSEN, CHOSEN), np.log(2.0), rtol=1e-6)


def test_margin():
  margin = np.array([0.0, 1.0, 2.0], np.float32)
  np.testing.assert_allclose(
    reward.bradley_terry_loss(CHOSEN, REJECTED, margin=margin),
    -np.log(_sigmoid(CHOSEN - REJECTED - margin)),
    rtol=1e-5,
  )


def test_label_smoothing():
  difference = CHOSEN - REJECTED
  np.testing.assert_allclose(
    reward.bradley_terry_loss(CHOSEN, REJECTED, label_smoothing=0.1),
    -0.9 * np.log(_sigmoid(difference)) - 0.1 * np.log(_sigmoid(-difference)),
    rtol=1e-5,
  )


def test_soft_labels_contain_hard_and_swapped_and_smoothed_ones():
  def soft(probability, **options):
    return reward.bradley_terry_loss(
      CHOSEN, REJECTED, label_prob=np.full(3, probability), margin=0.3, **options
    )

  hard = reward.bradley_terry_loss(CHOSEN, REJECTED, margin=0.3)
  swapped = reward.bradley_terry_loss(REJECTED, CHOSEN, margin=0.3)
  np.testing.assert_array_equal(soft(1.0), hard)
  np.testing.assert_array_equal(soft(0.0), swapped)
  np.testing.assert_allclose(soft(0.7), 0.7 * hard + 0.3 * swapped, rtol=1e-6)
  np.testing.assert_allclose(soft(1.0, label_smoothing=0.3), soft(0.7), rtol=1e-6)


def test_optimum_of_a_soft_label_is_its_log_odds():
  best = np.log(0.8 / 0.2)
  gradient = jax.grad(
    lambda r: reward.bradley_terry_loss(r, jnp.zeros(1), label_prob=jnp.array([0.8])).sum()
  )
  np.testing.assert_allclose(gradient(jnp.array([best])), 0.0, atol=1e-6)


def test_gradient_and_extremes():
  jax.test_util.check_grads(
    reward.bradley_terry_loss, (CHOSEN, REJECTED), 1, ["rev"], rtol=2e-2, eps=1e-2
  )
  extremes = jnp.array([1e4, -1e4])
  loss, gradient = jax.value_and_grad(
    lambda r: reward.bradley_terry_loss(r, -r).sum(), has_aux=False
  )(extremes)
  np.testing.assert_allclose(loss, 2e4)
  np.testing.assert_allclose(gradient, [0.0, -2.0])


def test_jit_equals_eager():
  jitted = jax.jit(reward.bradley_terry_loss)(CHOSEN, REJECTED)
  np.testing.assert_allclose(jitted, reward.bradley_terry_loss(CHOSEN, REJECTED), rtol=1e-6)


@pytest.mark.parametrize(
  "arguments, options, message",
  [
    ((CHOSEN[:, None], REJECTED[:, None]), {}, "chosen_rewards must have rank 1"),
    ((CHOSEN, REJECTED[:2]), {}, "one shape"),
    ((CHOSEN, REJECTED), {"label_smoothing": 0.7}, "label_smoothing must be in"),
    ((CHOSEN, REJECTED), {"margin": np.ones(2)}, "margin must be a scalar or"),
    ((CHOSEN, REJECTED), {"label_prob": np.ones((3, 1))}, "label_prob must be"),
  ],
)
def test_wrong_arguments_are_refused(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    reward.bradley_terry_loss(*arguments, **options)
