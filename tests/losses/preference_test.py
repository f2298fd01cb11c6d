"""Tests of the preference losses."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax.losses import preference, reward

DPO = functools.partial(preference.dpo_loss, beta=0.1)
IPO = functools.partial(preference.ipo_loss, tau=0.1)
KTO = functools.partial(preference.kto_loss, beta=0.1)


@pytest.fixture(scope="module")
def four():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(-40.0, 5.0, 6).astype(np.float32) for _ in range(4))


def _golden_pair():
  # Log-ratios 2 for the chosen and -5 for the rejected response: a difference of 7.
  return tuple(jnp.array([x]) for x in (-40.0, -55.0, -42.0, -50.0))


@pytest.mark.parametrize(
  "loss, expected",
  [
    (DPO, 0.403186),
    (functools.partial(DPO, label_smoothing=0.1), 0.473186),
    (IPO, 4.0),
  ],
)
def test_golden_pair(loss, expected):
  np.testing.assert_allclose(loss(*_golden_pair()), [expected], atol=1e-6)


def test_golden_gradient_weight_of_dpo():
  gradient = jax.grad(lambda *four: DPO(*four).sum(), argnums=(0, 1, 2, 3))(*_golden_pair())
  weight = 0.1 * 0.331812
  np.testing.assert_allclose(np.ravel(gradient), [-weight, weight, weight, -weight], atol=1e-7)


def test_golden_kto():
  policy, ref = jnp.array([-40.0, -53.0]), jnp.array([-42.0, -50.0])
  loss = KTO(policy, ref, jnp.array([1, 0]), 0.5)
  np.testing.assert_allclose(loss, [0.462570, 0.413382], atol=1e-6)


@pytest.mark.parametrize("loss, expected", [(DPO, 0.693147), (IPO, 25.0)])
def test_policy_equal_to_reference(four, loss, expected):
  chosen, rejected, _, _ = four
  np.testing.assert_allclose(loss(chosen, rejected, chosen, rejected), expected, rtol=1e-5)


def test_kto_at_its_baseline_is_half_the_weight(four):
  ref = four[0]
  loss = KTO(
    ref + 3.0, ref, np.array([1, 0] * 3), 3.0, desirable_weight=1.5, undesirable_weight=0.5
  )
  np.testing.assert_allclose(loss, [0.75, 0.25] * 3, atol=1e-6)


def test_formulas_against_numpy(four):
  chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in four)
  difference = (chosen - ref_chosen) - (rejected - ref_rejected)
  sigmoid = 1.0 / (1.0 + np.exp(-0.1 * difference))
  np.testing.assert_allclose(DPO(*four), -np.log(sigmoid), rtol=1e-4)
  np.testing.assert_allclose(
    DPO(*four, label_smoothing=0.2), -0.8 * np.log(sigmoid) - 0.2 * np.log(1 - sigmoid), rtol=1e-4
  )
  np.testing.assert_allclose(IPO(*four), (difference - 5.0) ** 2, rtol=1e-4)


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


def test_ipo_is_zero_at_its_target_and_pulls_back_beyond_it():
  zeros = jnp.zeros(3)
  gradient = jax.grad(lambda chosen: IPO(chosen, zeros, zeros, zeros).sum())
  at_target = jnp.array([4.0, 5.0, 6.0])
  np.testing.assert_allclose(gradient(at_target), [-2.0, 0.0, 2.0], atol=1e-5)
  # DPO never pulls back.
  assert np.all(jax.grad(lambda c: DPO(c, zeros, zeros, zeros).sum())(at_target) < 0)


def test_kto_gradient_signs_and_symmetry(four):
  policy, _, ref, _ = four
  gradient = jax.grad(lambda p, d: KTO(p, ref, d, 0.0).sum())
  up = gradient(policy, np.ones(6))
  down = gradient(policy, np.zeros(6))
  assert np.all(up < 0)
  np.testing.assert_allclose(up, -down, rtol=1e-5)


def test_kto_baseline_is_the_clipped_mean_without_gradient(four):
  policy, ref, _, _ = four
  mean = np.mean(policy - ref)
  assert preference.kto_kl_baseline(policy, ref) == pytest.approx(max(mean, 0.0), abs=1e-4)
  assert preference.kto_kl_baseline(ref, policy) == pytest.approx(max(-mean, 0.0), abs=1e-4)
  gradient = jax.grad(lambda p: preference.kto_kl_baseline(p + 100.0, ref))(jnp.asarray(policy))
  np.testing.assert_array_equal(gradient, 0.0)
  weight = np.array([1, 1, 0, 0, 0, 0])
  assert preference.kto_kl_baseline(ref + 1 + weight, ref, weight=weight) == pytest.approx(2.0)


def test_no_gradient_flows_into_the_baseline_given_to_kto(four):
  policy, ref, _, _ = four
  gradient = jax.grad(lambda z: KTO(policy, ref, np.ones(6), z).sum())(1.0)
  assert gradient == 0.0


def test_check_grads(four):
  small = tuple(x / 10.0 for x in four)
  for loss in (DPO, IPO):
    jax.test_util.check_grads(loss, small, 1, ["rev"], rtol=2e-2, eps=1e-2)
  for label in (0, 1):
    jax.test_util.check_grads(
      functools.partial(KTO, is_desirable=np.full(6, label), kl_baseline=0.2),
      small[:2],
      1,
      ["rev"],
      rtol=2e-2,
      eps=1e-2,
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_are_finite(sign):
  big, zero = jnp.full(2, sign * 1e4), jnp.zeros(2)
  losses = [
    functools.partial(DPO, label_smoothing=0.1),
    IPO,
    lambda p, r, *rest: KTO(p, r, jnp.array([1, 0]), 0.0),
  ]
  for loss in losses:

    def total(p, loss=loss):
      return loss(p, -p, zero, zero).sum()

    value, gradient = jax.value_and_grad(total)(big)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_jit_equals_eager(four):
  for loss in (DPO, IPO):
    np.testing.assert_allclose(jax.jit(loss)(*four), loss(*four), rtol=1e-5)
  desirable = np.array([1, 0, 1, 0, 1, 0])
  np.testing.assert_allclose(
    jax.jit(KTO)(*four[:2], desirable, 0.3), KTO(*four[:2], desirable, 0.3), rtol=1e-5
  )


def test_outputs_are_float32_from_half_precision(four):
  halves = tuple(jnp.asarray(x, jnp.bfloat16) for x in four)
  assert DPO(*halves).dtype == jnp.float32


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: DPO(x[:, None], x, x, x), "policy_chosen_logps must have rank 1"),
    (lambda x: DPO(x, x, x, x[:1]), "one shape"),
    (lambda x: preference.dpo_loss(x, x, x, x, beta=0.0), "beta must be positive"),
    (lambda x: DPO(x, x, x, x, label_smoothing=0.6), "label_smoothing must be in"),
    (lambda x: preference.ipo_loss(x, x, x, x, tau=-1.0), "tau must be positive"),
    (lambda x: KTO(x, x, x, x), "kl_baseline must be a scalar"),
    (lambda x: preference.kto_kl_baseline(x[:1], x[:1]), "at least 2 examples"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros(3, np.float32))
