"""Tests of the losses on single responses marked good or bad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import pointwise, unpaired

KTO = functools.partial(unpaired.kto_loss, beta=0.1)
APO = functools.partial(unpaired.apo_zero_unpaired_loss, beta=0.1)
BCO = functools.partial(unpaired.bco_unpaired_loss, beta=0.1)
GOOD, BAD = np.ones(6), np.zeros(6)


@pytest.fixture(scope="module")
def four():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(-40.0, 5.0, 6).astype(np.float32) for _ in range(4))


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def test_golden_kto():
  policy, ref = jnp.array([-40.0, -53.0]), jnp.array([-42.0, -50.0])
  loss = KTO(policy, ref, jnp.array([1, 0]), 0.5)
  np.testing.assert_allclose(loss, [0.462570, 0.413382], atol=1e-6)


def test_formulas_against_numpy(four):
  policy, _, ref, _ = four
  mark = np.array([1, 0, 0, 1, 1, 0])
  sign = np.where(mark == 1, 1.0, -1.0)
  ratio = policy.astype(np.float64) - ref
  np.testing.assert_allclose(
    KTO(policy, ref, mark, 2.0, desirable_weight=1.2, undesirable_weight=0.7),
    np.where(mark == 1, 1.2, 0.7) * (1.0 - _sigmoid(sign * 0.1 * (ratio - 2.0))),
    rtol=1e-4,
  )
  np.testing.assert_allclose(APO(policy, ref, mark), 1.0 - _sigmoid(sign * 0.1 * ratio), rtol=1e-4)
  np.testing.assert_allclose(
    BCO(policy, ref, mark, 0.4), np.logaddexp(0.0, -sign * (0.1 * ratio - 0.4)), rtol=1e-4
  )
  # A mark may be a boolean.
  np.testing.assert_array_equal(APO(policy, ref, mark == 1), APO(policy, ref, mark))


def test_policy_equal_to_reference(four):
  ref, mark = four[0], np.array([1, 0] * 3)
  np.testing.assert_allclose(KTO(ref, ref, mark, 0.0), 0.5)
  np.testing.assert_allclose(APO(ref, ref, mark), 0.5)
  np.testing.assert_allclose(BCO(ref, ref, mark, 0.0), 0.693147, rtol=1e-6)


def test_kto_at_its_baseline_is_half_the_weight(four):
  ref = four[0]
  loss = KTO(
    ref + 3.0, ref, np.array([1, 0] * 3), 3.0, desirable_weight=1.5, undesirable_weight=0.5
  )
  np.testing.assert_allclose(loss, [0.75, 0.25] * 3, atol=1e-6)


def test_the_two_halves_of_a_pair_are_the_loss_of_the_pair(four):
  chosen, rejected, ref_chosen, ref_rejected = four
  np.testing.assert_allclose(
    APO(chosen, ref_chosen, GOOD) + APO(rejected, ref_rejected, BAD),
    pointwise.apo_zero_loss(*four, beta=0.1),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    BCO(chosen, ref_chosen, GOOD, 0.4) + BCO(rejected, ref_rejected, BAD, 0.4),
    pointwise.bco_loss(*four, 0.4, beta=0.1),
    rtol=1e-6,
  )


def test_apo_is_kto_whose_baseline_is_zero(four):
  mark = np.array([1, 0] * 3)
  np.testing.assert_allclose(APO(*four[:2], mark), KTO(*four[:2], mark, 0.0), rtol=1e-6)
  assert np.all(APO(*four[:2], mark) != KTO(*four[:2], mark, 1.0))


def test_kto_gradient_signs_and_symmetry(four):
  policy, _, ref, _ = four
  gradient = jax.grad(lambda p, d: KTO(p, ref, d, 0.0).sum())
  up = gradient(policy, GOOD)
  down = gradient(policy, BAD)
  assert np.all(up < 0)
  np.testing.assert_allclose(up, -down, rtol=1e-5)


def test_kto_baseline_is_the_clipped_mean_without_gradient(four):
  policy, ref, _, _ = four
  mean = np.mean(policy - ref)
  assert unpaired.kto_kl_baseline(policy, ref) == pytest.approx(max(mean, 0.0), abs=1e-4)
  assert unpaired.kto_kl_baseline(ref, policy) == pytest.approx(max(-mean, 0.0), abs=1e-4)
  gradient = jax.grad(lambda p: unpaired.kto_kl_baseline(p + 100.0, ref))(jnp.asarray(policy))
  np.testing.assert_array_equal(gradient, 0.0)
  weight = np.array([1, 1, 0, 0, 0, 0])
  assert unpaired.kto_kl_baseline(ref + 1 + weight, ref, weight=weight) == pytest.approx(2.0)


@pytest.mark.parametrize("loss", [KTO, BCO])
def test_no_gradient_flows_into_the_baseline_or_the_shift(four, loss):
  policy, ref, _, _ = four
  assert jax.grad(lambda z: loss(policy, ref, GOOD, z).sum())(1.0) == 0.0
  assert np.all(loss(policy, ref, GOOD, 1.0) != loss(policy, ref, GOOD, 2.0))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: KTO(x, x, x, x), "kl_baseline must be a scalar"),
    (lambda x: BCO(x, x, x, x), "bco_unpaired_loss: shift must be a scalar"),
    (lambda x: unpaired.kto_kl_baseline(x[:1], x[:1]), "at least 2 examples"),
    (lambda x: unpaired.kto_kl_baseline(x, x, weight=x[:1]), "one shape"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros(3, np.float32))
