"""Tests of alignment via optimal transport."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import preference, transport

AOT = functools.partial(transport.aot_loss, beta=0.1)
AOT_UNPAIRED = functools.partial(transport.aot_unpaired_loss, beta=0.1)
both = pytest.mark.parametrize("loss", [AOT, AOT_UNPAIRED])


@pytest.fixture(scope="module")
def four():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(-40.0, 5.0, 8).astype(np.float32) for _ in range(4))


def _log_loss(x):  # -log σ(x), in float64
  return np.logaddexp(0.0, -x)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_formulas_against_numpy(four, label_smoothing):
  chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in four)
  quantiles = {
    AOT: np.sort(chosen - rejected) - np.sort(ref_chosen - ref_rejected),
    AOT_UNPAIRED: np.sort(chosen - ref_chosen) - np.sort(rejected - ref_rejected),
  }
  for loss, difference in quantiles.items():
    expected = (1.0 - label_smoothing) * _log_loss(0.1 * difference)
    expected += label_smoothing * _log_loss(-0.1 * difference)
    np.testing.assert_allclose(loss(*four, label_smoothing=label_smoothing), expected, rtol=1e-4)


@both
def test_one_pair_is_dpo_and_equal_policies_are_ln_2(four, loss):
  one = [x[:1] for x in four]
  np.testing.assert_allclose(
    loss(*one, label_smoothing=0.1),
    preference.dpo_loss(*one, beta=0.1, label_smoothing=0.1),
    rtol=1e-5,
  )
  pair = [np.array([x]) for x in (-40.0, -55.0, -42.0, -50.0)]
  np.testing.assert_allclose(loss(*pair), [0.403186], atol=1e-6)


def test_a_policy_that_is_its_reference_starts_at_ln_2(four):
  chosen, rejected, _, _ = four
  np.testing.assert_allclose(AOT(chosen, rejected, chosen, rejected), 0.693147, atol=1e-6)
  np.testing.assert_allclose(AOT_UNPAIRED(chosen, rejected, chosen, rejected), 0.693147, atol=1e-6)


@both
def test_the_order_of_the_rows_does_not_matter(four, loss):
  order = np.random.default_rng(1).permutation(8)
  np.testing.assert_array_equal(loss(*(x[order] for x in four)), loss(*four))


def test_unpaired_does_not_know_which_chosen_goes_with_which_rejected(four):
  chosen, rejected, ref_chosen, ref_rejected = four
  moved = chosen, np.roll(rejected, 3), ref_chosen, np.roll(ref_rejected, 3)
  np.testing.assert_array_equal(AOT_UNPAIRED(*moved), AOT_UNPAIRED(*four))
  assert np.abs(AOT(*moved) - AOT(*four)).max() > 1e-2


@both
@pytest.mark.parametrize("mask", [[1, 0, 1, 1, 0, 1, 1, 0], [0] * 7 + [1], [1] * 8, [0] * 8])
@pytest.mark.parametrize("poison", [np.nan, -np.inf, 3.0])
def test_a_masked_batch_is_the_batch_without_its_empty_slots(four, loss, mask, poison):
  mask = np.array(mask)
  real = mask.sum()
  poisoned = tuple(jnp.where(mask, x, poison * i) for i, x in enumerate(four, start=1))
  result, gradients = jax.value_and_grad(lambda *x: loss(*x, mask).sum(), (0, 1, 2, 3))(*poisoned)
  assert np.isfinite(result)
  np.testing.assert_allclose(loss(*poisoned, mask)[:real], loss(*(x[mask > 0] for x in four)))
  np.testing.assert_array_equal(loss(*poisoned, mask)[real:], 0.0)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient[mask == 0], 0.0)
    assert np.all(gradient[mask > 0] != 0.0)


@both
def test_a_mask_of_booleans_will_do(four, loss):
  mask = np.arange(8) < 5
  np.testing.assert_array_equal(loss(*four, mask), loss(*four, mask.astype(np.float32)))
