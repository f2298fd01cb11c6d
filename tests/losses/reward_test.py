"""Tests of the losses on scalar rewards."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.stats

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


def test_centering_fixes_the_offset_and_nothing_else():
  plain = reward.bradley_terry_loss(CHOSEN, REJECTED, margin=0.3)
  np.testing.assert_allclose(
    reward.bradley_terry_loss(CHOSEN, REJECTED, margin=0.3, centering=0.01),
    plain + 0.01 * (CHOSEN + REJECTED) ** 2,
    rtol=1e-6,
  )

  def pull(offset, centering):
    return jax.grad(
      lambda o: reward.bradley_terry_loss(
        jnp.array([1.0]) + o, jnp.array([-1.0]) + o, centering=centering
      ).sum()
    )(offset)

  assert pull(3.0, 0.0) == pytest.approx(0.0, abs=1e-7)
  assert pull(3.0, 0.01) == pytest.approx(0.01 * 2.0 * 6.0 * 2.0, rel=1e-5)
  assert pull(0.0, 0.01) == pytest.approx(0.0, abs=1e-7)


def _outcomes(first, second, theta):
  return [
    reward.rao_kupper_loss(first, second, np.full(3, outcome), theta=theta)
    for outcome in (1.0, 0.5, 0.0)
  ]


@pytest.mark.parametrize("theta", [1.001, 2.0, 7.0])
def test_rao_kupper_against_numpy_and_as_a_distribution(theta):
  losses = _outcomes(CHOSEN, REJECTED, theta)
  first, second = np.exp(CHOSEN.astype(np.float64)), np.exp(REJECTED.astype(np.float64))
  wins, defeats = first / (first + theta * second), second / (second + theta * first)
  np.testing.assert_allclose(losses[0], -np.log(wins), rtol=1e-5)
  np.testing.assert_allclose(losses[2], -np.log(defeats), rtol=1e-5)
  tie = (theta**2 - 1) * first * second / ((first + theta * second) * (second + theta * first))
  np.testing.assert_allclose(losses[1], -np.log(tie), rtol=1e-4)
  np.testing.assert_allclose(sum(np.exp(-x) for x in losses), 1.0, rtol=1e-5)


def test_rao_kupper_is_symmetric_and_likes_a_tie_most_between_equals():
  swapped = _outcomes(REJECTED, CHOSEN, 2.0)[::-1]
  np.testing.assert_allclose(_outcomes(CHOSEN, REJECTED, 2.0), swapped, rtol=1e-6)
  tie = _outcomes(CHOSEN, CHOSEN, 2.0)[1]
  np.testing.assert_allclose(np.exp(-tie), 1.0 / 3.0, rtol=1e-5)
  assert np.all(_outcomes(CHOSEN, REJECTED, 2.0)[1] > tie)


def test_rao_kupper_without_ties_is_bradley_terry():
  wins, tie, defeats = _outcomes(CHOSEN, REJECTED, 1.0)
  np.testing.assert_allclose(wins, reward.bradley_terry_loss(CHOSEN, REJECTED), rtol=1e-6)
  np.testing.assert_allclose(defeats, reward.bradley_terry_loss(REJECTED, CHOSEN), rtol=1e-6)
  np.testing.assert_array_equal(tie, np.inf)


def test_thurstone_against_scipy_and_its_share_of_raters():
  rng = np.random.default_rng(1)
  means, logs = rng.normal(size=(2, 64)).astype(np.float32), rng.normal(size=(2, 64)) * 0.5
  share = rng.random(64).astype(np.float32)
  z = (means[0] - means[1]) / np.sqrt(np.exp(2 * logs[0]) + np.exp(2 * logs[1]))
  expected = -share * scipy.stats.norm.logcdf(z) - (1 - share) * scipy.stats.norm.logcdf(-z)
  found = reward.thurstone_loss(*means, *logs, label_prob=share)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  # Raters drawn from the two normals prefer the first response that often.
  draws = means[:, :1] + np.exp(logs[:, :1]) * rng.normal(size=(2, 200_000))
  assert abs(np.mean(draws[0] > draws[1]) - scipy.stats.norm.cdf(z[0])) < 0.005


def test_thurstone_learns_how_divided_raters_are():
  """Of a pair on which all agree and one that is evenly split, only the split one has a wide reward."""

  def loss(p):
    means, logs = p["mean"], p["log"]
    votes = np.array([0.98, 0.55], np.float32)
    return reward.thurstone_loss(means, jnp.zeros(2), logs, logs, label_prob=votes).sum()

  slope = jax.jit(jax.grad(loss))
  p = {"mean": jnp.ones(2), "log": jnp.zeros(2)}
  for _ in range(400):
    gradient = slope(p)
    p = {"mean": p["mean"], "log": p["log"] - 2.0 * gradient["log"]}
  z = np.asarray(p["mean"] / (jnp.sqrt(2.0) * jnp.exp(p["log"])))
  np.testing.assert_allclose(scipy.stats.norm.cdf(z), [0.98, 0.55], atol=5e-3)


def test_thurstone_is_finite_far_out():
  extremes = np.array([-1e4, 1e4, 0.0], np.float32)
  arguments = (extremes, -extremes, extremes, extremes)
  value, gradient = jax.value_and_grad(lambda m: reward.thurstone_loss(m, *arguments[1:]).sum())(
    extremes
  )
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_decorrelation_against_numpy_with_padding():
  rng = np.random.default_rng(0)
  lengths = rng.integers(3, 40, 50).astype(np.float32)
  quality, length = rng.normal(size=(2, 50)) + 0.05 * lengths * np.array([[-1], [1]])
  expected = abs(np.corrcoef(quality, lengths)[0, 1]) - np.corrcoef(length, lengths)[0, 1]
  found = reward.decorrelation_loss(quality, length, lengths)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  padded = [np.append(x, [99.0, -7.0]) for x in (quality, length, lengths)]
  weight = np.append(np.ones(50), [0, 0])
  np.testing.assert_allclose(reward.decorrelation_loss(*padded, weight=weight), expected, rtol=1e-4)


def test_decorrelation_leads_one_head_to_length_and_the_other_away():
  lengths = jnp.array([1.0, 2.0, 3.0, 6.0])
  down = jax.grad(lambda q, r: reward.decorrelation_loss(q, r, lengths), (0, 1))
  quality, length = jnp.array([0.0, 1.0, 3.0, 4.0]), jnp.array([1.0, 0.0, 2.0, 0.0])
  before = np.corrcoef(quality, lengths)[0, 1], np.corrcoef(length, lengths)[0, 1]
  for _ in range(300):
    of_quality, of_length = down(quality, length)
    quality, length = quality - 0.1 * of_quality, length - 0.1 * of_length
  after = np.corrcoef(quality, lengths)[0, 1], np.corrcoef(length, lengths)[0, 1]
  assert abs(after[0]) < 0.05 < before[0] and after[1] > 0.99 > before[1]


@pytest.mark.parametrize("still", [0, 1, 2])
def test_decorrelation_of_what_does_not_vary(still):
  arguments = [jnp.arange(4.0), jnp.arange(4.0) ** 2, jnp.array([1.0, 5.0, 2.0, 2.0])]
  arguments[still] = jnp.ones(4)
  value, gradient = jax.value_and_grad(reward.decorrelation_loss)(*arguments)
  assert np.isfinite(value) and np.isfinite(gradient).all()
