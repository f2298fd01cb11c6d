"""Tests of DPO and its family: golden values, formulas in NumPy, and what the members share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import preference, reward

DPO = functools.partial(preference.dpo_loss, beta=0.1)
CDPO = functools.partial(preference.cdpo_loss, beta=0.1)
IPO = functools.partial(preference.ipo_loss, tau=0.1)
IPO_MEAN = functools.partial(preference.ipo_mean_loss, tau=0.1)
HINGE = functools.partial(preference.hinge_loss, beta=0.1)
ROBUST = functools.partial(preference.robust_loss, beta=0.1)
EXO = functools.partial(preference.exo_loss, beta=0.1, label_smoothing=1e-3)
DISCOPOP = functools.partial(preference.discopop_loss, beta=0.1, temperature=0.05)
DPO_NORM = functools.partial(preference.dpo_norm_loss, beta=0.1)
DPOP = functools.partial(preference.dpop_loss, beta=0.1)
R_DPO = functools.partial(preference.r_dpo_loss, beta=0.1)
F_DPO = functools.partial(preference.f_dpo_loss, beta=0.1)
LN_2 = 0.693147


@pytest.fixture(scope="module")
def four():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(-40.0, 5.0, 6).astype(np.float32) for _ in range(4))


def _log_ratios(four):
  chosen, rejected, ref_chosen, ref_rejected = (np.asarray(x, np.float64) for x in four)
  return chosen - ref_chosen, rejected - ref_rejected


def _log_loss(x):  # -log σ(x), in float64
  return np.logaddexp(0.0, -x)


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _golden_pair():
  # Log-ratios 2 for the chosen and -5 for the rejected response: a difference of 7.
  return tuple(jnp.array([x]) for x in (-40.0, -55.0, -42.0, -50.0))


def _at(loss, difference):
  """Value and slope of the loss where the log-ratios differ by so much."""
  zero = jnp.zeros(1)
  value, slope = jax.value_and_grad(lambda x: loss(x, zero, zero, zero).sum())(
    jnp.array([difference], jnp.float32)
  )
  return float(value), float(slope[0])


@pytest.mark.parametrize(
  "loss, at_reference, at_pair",
  [
    (DPO, LN_2, 0.403186),
    (functools.partial(DPO, label_smoothing=0.1), LN_2, 0.473186),
    (functools.partial(CDPO, label_smoothing=0.1), LN_2, 0.473186),
    (IPO, 25.0, 4.0),
    (HINGE, 1.0, 0.3),
    (functools.partial(ROBUST, label_smoothing=0.1), LN_2, 0.315686),
    (EXO, 2.761231, 1.657292),
    (DISCOPOP, 0.846574, 0.496585),
    # The same four numbers, were they means: these two see no other difference.
    (DPO_NORM, LN_2, 0.403186),
    (IPO_MEAN, 25.0, 4.0),
  ],
)
def test_golden_pair(loss, at_reference, at_pair):
  np.testing.assert_allclose(loss(*_golden_pair()), [at_pair], atol=1e-6)
  chosen, rejected = np.array([-40.0, -3.0]), np.array([-55.0, -8.0])
  np.testing.assert_allclose(loss(chosen, rejected, chosen, rejected), at_reference, atol=1e-6)


def test_golden_gradient_weight_of_dpo():
  gradient = jax.grad(lambda *four: DPO(*four).sum(), argnums=(0, 1, 2, 3))(*_golden_pair())
  weight = 0.1 * 0.331812
  np.testing.assert_allclose(np.ravel(gradient), [-weight, weight, weight, -weight], atol=1e-7)


@pytest.mark.parametrize(
  "loss, formula",
  [
    (DPO, lambda a, b: _log_loss(0.1 * (a - b))),
    (
      functools.partial(CDPO, label_smoothing=0.2),
      lambda a, b: 0.8 * _log_loss(0.1 * (a - b)) + 0.2 * _log_loss(0.1 * (b - a)),
    ),
    (IPO, lambda a, b: (a - b - 5.0) ** 2),
    (IPO_MEAN, lambda a, b: (a - b - 5.0) ** 2),
    (HINGE, lambda a, b: np.maximum(0.0, 1.0 - 0.1 * (a - b))),
    (
      functools.partial(ROBUST, label_smoothing=0.2),
      lambda a, b: (0.8 * _log_loss(0.1 * (a - b)) - 0.2 * _log_loss(0.1 * (b - a))) / 0.6,
    ),
    (
      functools.partial(EXO, label_smoothing=0.05),
      lambda a, b: (
        _sigmoid(0.1 * (a - b)) * np.log(_sigmoid(0.1 * (a - b)) / 0.95)
        + _sigmoid(0.1 * (b - a)) * np.log(_sigmoid(0.1 * (b - a)) / 0.05)
      ),
    ),
    (
      functools.partial(DISCOPOP, temperature=0.3),
      lambda a, b: (
        (1.0 - _sigmoid((a - b) / 3.0)) * _log_loss(0.1 * (a - b))
        + _sigmoid((a - b) / 3.0) * np.exp(-0.1 * (a - b))
      ),
    ),
    (DPO_NORM, lambda a, b: _log_loss(0.1 * (a - b))),
    (
      functools.partial(DPOP, penalty=5.0),
      lambda a, b: _log_loss(0.1 * (a - b - 5.0 * np.maximum(0.0, -a))),
    ),
    (functools.partial(F_DPO, divergence="reverse_kl"), lambda a, b: _log_loss(0.1 * (a - b))),
    (
      functools.partial(F_DPO, divergence="forward_kl"),
      lambda a, b: _log_loss(0.1 * (np.exp(-b) - np.exp(-a))),
    ),
    (
      functools.partial(F_DPO, divergence="js"),
      lambda a, b: _log_loss(
        0.1 * np.log(2.0 * np.exp(a) / (1.0 + np.exp(a)))
        - 0.1 * np.log(2.0 * np.exp(b) / (1.0 + np.exp(b)))
      ),
    ),
    (
      functools.partial(F_DPO, divergence="alpha", alpha=0.3),
      lambda a, b: _log_loss(0.1 * ((1 - np.exp(a) ** -0.3) / 0.3 - (1 - np.exp(b) ** -0.3) / 0.3)),
    ),
  ],
)
def test_formulas_against_numpy(four, loss, formula):
  np.testing.assert_allclose(loss(*four), formula(*_log_ratios(four)), rtol=1e-4, atol=1e-6)


def test_r_dpo_against_numpy_and_its_direction(four):
  chosen_lengths, rejected_lengths = np.array([9, 2, 5, 7, 1, 30.0]), np.array([3, 8, 5, 1, 2, 4.0])
  a, b = _log_ratios(four)
  np.testing.assert_allclose(
    R_DPO(*four, chosen_lengths, rejected_lengths, alpha=0.05),
    _log_loss(0.1 * (a - b) + 0.05 * (chosen_lengths - rejected_lengths)),
    rtol=1e-4,
  )
  # A chosen response that is longer teaches less, one that is shorter teaches more.
  push = jax.grad(lambda c, y, n: -R_DPO(c, *four[1:], y, n, alpha=0.05).sum())
  plain = jax.grad(lambda c: -DPO(c, *four[1:]).sum())(four[0])
  long, short = np.full(6, 9.0), np.full(6, 2.0)
  assert np.all(push(four[0], long, short) < plain)
  assert np.all(push(four[0], short, long) > plain)


@pytest.mark.parametrize(
  "loss",
  [
    functools.partial(CDPO, label_smoothing=0.0),
    functools.partial(ROBUST, label_smoothing=0.0),
    functools.partial(DPOP, penalty=0.0),
    lambda *four: R_DPO(*four, np.arange(6.0), np.full(6, 3.0), alpha=0.0),
    lambda *four: R_DPO(*four, np.arange(6.0), np.arange(6.0), alpha=0.7),
    functools.partial(F_DPO, divergence="reverse_kl"),
    functools.partial(F_DPO, divergence="alpha", alpha=1e-4),
    DPO_NORM,
  ],
)
def test_members_that_are_dpo_at_a_special_setting(four, loss):
  np.testing.assert_allclose(loss(*four), DPO(*four), rtol=2e-3)


def test_dpo_is_bradley_terry_on_implicit_rewards(four):
  chosen, rejected, ref_chosen, ref_rejected = four
  rewards = (
    preference.implicit_reward(chosen, ref_chosen, beta=0.1),
    preference.implicit_reward(rejected, ref_rejected, beta=0.1),
  )
  np.testing.assert_allclose(
    DPO(*four, label_smoothing=0.1),
    reward.bradley_terry_loss(*rewards, label_smoothing=0.1),
    rtol=1e-4,
  )


@pytest.mark.parametrize("flipped", [0.05, 0.3])
def test_robust_loss_is_unbiased_under_flipped_labels_and_cdpo_is_not(four, flipped):
  chosen, rejected, ref_chosen, ref_rejected = four

  def expected(loss):
    as_is = loss(*four, label_smoothing=flipped)
    swapped = loss(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=flipped)
    return (1.0 - flipped) * as_is + flipped * swapped

  np.testing.assert_allclose(expected(ROBUST), DPO(*four), rtol=1e-3)
  assert np.all(np.abs(expected(CDPO) / DPO(*four) - 1.0) > 1e-3)


@pytest.mark.parametrize(
  "loss, optimum, least",
  [
    (IPO, 5.0, 0.0),
    (functools.partial(EXO, label_smoothing=0.1), 10.0 * np.log(9.0), 0.0),
    # The entropy of the label, which no policy can go below.
    (
      functools.partial(CDPO, label_smoothing=0.1),
      10.0 * np.log(9.0),
      -0.9 * np.log(0.9) - 0.1 * np.log(0.1),
    ),
  ],
)
def test_bounded_losses_rest_at_their_optimum_and_pull_back_beyond_it(loss, optimum, least):
  value, slope = _at(loss, optimum)
  assert value == pytest.approx(least, abs=1e-6) and slope == pytest.approx(0.0, abs=1e-6)
  assert _at(loss, optimum - 1.0)[1] < -1e-4 and _at(loss, optimum + 1.0)[1] > 1e-4
  assert _at(DPO, optimum + 1.0)[1] < 0.0  # which never pulls back


def test_hinge_stops_at_its_margin():
  assert _at(HINGE, 9.9)[1] == pytest.approx(-0.1)
  assert _at(HINGE, 10.1) == (0.0, 0.0)


@pytest.mark.parametrize("x", [-3.0, 0.5, 4.0])
def test_exo_with_a_vanishing_smoothing_is_the_chance_of_losing(x):
  # ε → 0: exo + H = -ln ε · σ(-x), with H the entropy of [σ(x), σ(-x)].
  value, _ = _at(functools.partial(EXO, label_smoothing=1e-12), 10.0 * x)
  p = _sigmoid(-x)
  entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
  assert value + entropy == pytest.approx(12.0 * np.log(10.0) * p, rel=1e-5)


def test_discopop_goes_from_logistic_to_exponential():
  assert _at(DISCOPOP, -30.0)[0] == pytest.approx(_log_loss(-3.0), rel=1e-5)
  assert _at(DISCOPOP, 30.0)[0] == pytest.approx(np.exp(-3.0), rel=1e-5)


def test_losses_on_means_are_those_on_sums_of_responses_of_one_length(four):
  means = [x / 8.0 for x in four]
  np.testing.assert_allclose(
    preference.dpo_norm_loss(*means, beta=0.8), preference.dpo_loss(*four, beta=0.1), rtol=1e-4
  )
  np.testing.assert_allclose(
    64.0 * preference.ipo_mean_loss(*means, tau=0.8), preference.ipo_loss(*four, tau=0.1), rtol=1e-3
  )


def test_dpop_pulls_the_chosen_up_where_it_fell_below_its_reference():
  zero = jnp.zeros(2)
  chosen, rejected = jnp.array([-2.0, 2.0]), jnp.array([-9.0, -9.0])
  loss = functools.partial(DPOP, penalty=5.0)
  gradient = jax.grad(lambda c: loss(c, rejected, zero, zero).sum())(chosen)
  won = np.array([7.0 - 5.0 * 2.0, 11.0])
  np.testing.assert_allclose(
    gradient, -0.1 * np.array([6.0, 1.0]) * _sigmoid(-0.1 * won), rtol=1e-4
  )
  # Both fall, the rejected faster: DPO is content, DPOP is not.
  start, fallen = (0.0, 0.0), (-2.0, -5.0)
  before, after = (tuple(np.array([x]) for x in (*pair, 0.0, 0.0)) for pair in (start, fallen))
  assert DPO(*after) < DPO(*before) and loss(*after) > loss(*before)


def test_alpha_divergence_runs_from_the_reverse_to_the_forward_kl(four):
  alpha = functools.partial(F_DPO, divergence="alpha")
  np.testing.assert_allclose(
    alpha(*four, alpha=1.0), F_DPO(*four, divergence="forward_kl"), rtol=1e-6
  )
  errors = [np.abs(alpha(*four, alpha=a) - DPO(*four)).max() for a in (1e-1, 1e-2, 1e-3)]
  assert errors[0] > 5.0 * errors[1] > 25.0 * errors[2]


def test_forward_kl_keeps_its_gradient_where_the_exponential_overflows():
  forward = functools.partial(F_DPO, divergence="forward_kl")
  assert _at(forward, -19.0)[1] == pytest.approx(-0.1 * np.exp(19.0), rel=1e-4)
  for difference in (-21.0, -100.0, -1e4):
    assert _at(forward, difference)[1] == pytest.approx(-0.1 * np.exp(20.0), rel=1e-4)
  # The tangent has no step where it begins.
  assert _at(forward, -20.001)[0] == pytest.approx(_at(forward, -19.999)[0], rel=5e-3)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: DPO(x[:, None], x, x, x), "dpo_loss: policy_chosen_logps must have rank 1"),
    (lambda x: DPO(x, x, x, x[:1]), "one shape"),
    (lambda x: preference.dpo_loss(x, x, x, x, beta=0.0), "beta must be positive"),
    (lambda x: DPO(x, x, x, x, label_smoothing=0.6), "label_smoothing must be in"),
    (lambda x: preference.ipo_loss(x, x, x, x, tau=-1.0), "tau must be positive"),
    (lambda x: R_DPO(x, x, x, x, x[:1], x, alpha=0.1), "one shape"),
    (lambda x: F_DPO(x, x, x, x, divergence="kl"), "divergence must be one of reverse_kl"),
    (lambda x: F_DPO(x, x, x, x, divergence="alpha"), "alpha=None does not go with"),
    (lambda x: F_DPO(x, x, x, x, divergence="js", alpha=0.5), "alpha=0.5 does not go with"),
    (lambda x: preference.implicit_reward(x, x[:1], beta=0.1), "implicit_reward: .*one shape"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros(3, np.float32))
