"""Tests of the losses that hold each response against a point of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import pointwise, preference

NCA = functools.partial(pointwise.nca_loss, beta=0.1)
BCO = functools.partial(pointwise.bco_loss, beta=0.1)
SPPO = functools.partial(pointwise.sppo_loss, beta=0.1)
APO_ZERO = functools.partial(pointwise.apo_zero_loss, beta=0.1)
APO_DOWN = functools.partial(pointwise.apo_down_loss, beta=0.1)
UNSHIFTED_BCO = functools.partial(BCO, shift=0.0)


def _log_loss(x):  # -log σ(x), in float64
  return np.logaddexp(0.0, -x)


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _gradients(loss, a, b):
  """The slopes at log-ratios a of the chosen and b of the rejected response."""
  zero = jnp.zeros(1)
  gradient = jax.grad(lambda c, r: loss(c, r, zero, zero).sum(), (0, 1))
  return tuple(float(g[0]) for g in gradient(jnp.array([a]), jnp.array([b])))


@pytest.mark.parametrize(
  "loss, at_reference, at_pair",
  [
    (NCA, 1.386294, 1.234247),
    (UNSHIFTED_BCO, 1.386294, 1.072216),
    (SPPO, 50.0, 9.0),
    (APO_ZERO, 1.0, 0.827707),
    (APO_DOWN, 1.0, 0.881646),
  ],
)
def test_golden_pair(loss, at_reference, at_pair):
  pair = (np.array([x]) for x in (-40.0, -55.0, -42.0, -50.0))
  np.testing.assert_allclose(loss(*pair), [at_pair], atol=1e-6)
  chosen, rejected = np.array([-40.0, -3.0]), np.array([-55.0, -8.0])
  np.testing.assert_allclose(loss(chosen, rejected, chosen, rejected), at_reference, atol=1e-6)


@pytest.mark.parametrize(
  "loss, formula",
  [
    (NCA, lambda a, b: _log_loss(0.1 * a) + 0.5 * _log_loss(-0.1 * a) + 0.5 * _log_loss(-0.1 * b)),
    (
      functools.partial(BCO, shift=0.4),
      lambda a, b: _log_loss(0.1 * a - 0.4) + _log_loss(0.4 - 0.1 * b),
    ),
    (SPPO, lambda a, b: (a - 5.0) ** 2 + (b + 5.0) ** 2),
    (APO_ZERO, lambda a, b: 1.0 - _sigmoid(0.1 * a) + _sigmoid(0.1 * b)),
    (APO_DOWN, lambda a, b: _sigmoid(0.1 * a) + 1.0 - _sigmoid(0.1 * (a - b))),
  ],
)
def test_formulas_against_numpy(loss, formula):
  rng = np.random.default_rng(0)
  four = [rng.normal(-40.0, 5.0, 6).astype(np.float32) for _ in range(4)]
  chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in four)
  np.testing.assert_allclose(
    loss(*four), formula(chosen - ref_chosen, rejected - ref_rejected), rtol=1e-4
  )


@pytest.mark.parametrize("loss", [NCA, UNSHIFTED_BCO, SPPO, APO_ZERO, APO_DOWN])
def test_what_dpo_cannot_tell_apart_these_can(loss):
  # Log-ratios (2, -5) and (-3, -10): one difference, two policies.
  risen = [np.array([x]) for x in (2.0, -5.0, 0.0, 0.0)]
  fallen = [np.array([x]) for x in (-3.0, -10.0, 0.0, 0.0)]
  np.testing.assert_allclose(
    preference.dpo_loss(*risen, beta=0.1), preference.dpo_loss(*fallen, beta=0.1), rtol=1e-6
  )
  assert np.abs(loss(*risen) - loss(*fallen)) > 0.01


@pytest.mark.parametrize("a, b", [(0.0, 0.0), (3.0, -4.0), (-4.0, 3.0)])
def test_apo_zero_parts_the_two_and_apo_down_lowers_both(a, b):
  chosen, rejected = _gradients(APO_ZERO, a, b)
  assert chosen < 0.0 < rejected
  # At the reference β·(¼ - ¼) cancels; elsewhere it depends, but the sum of the two is σ′(r⁺) > 0.
  chosen, rejected = _gradients(APO_DOWN, a, b)
  assert rejected > 0.0
  assert chosen + rejected == pytest.approx(0.1 * _sigmoid(0.1 * a) * _sigmoid(-0.1 * a), rel=1e-4)


@pytest.mark.parametrize(
  "loss, chosen, rejected",
  [(SPPO, 5.0, -5.0), (NCA, 10.0 * np.log(2.0), None)],
)
def test_bounded_rewards_rest_at_their_optimum(loss, chosen, rejected):
  slopes = _gradients(loss, chosen, -5.0 if rejected is None else rejected)
  assert slopes[0] == pytest.approx(0.0, abs=1e-6)
  assert _gradients(loss, chosen + 1.0, -5.0)[0] > 1e-3
  if rejected is not None:
    assert slopes[1] == pytest.approx(0.0, abs=1e-6)


def test_bco_rests_on_its_shift_which_is_a_constant():
  four = [jnp.array([x]) for x in (4.0, 4.0, 0.0, 0.0)]
  np.testing.assert_allclose(BCO(*four, 0.4), 2.0 * np.log(2.0), rtol=1e-6)
  assert jax.grad(lambda shift: BCO(*four, shift).sum())(0.1) == 0.0


def test_a_shift_per_row_is_refused():
  x = np.zeros(3)
  with pytest.raises(ValueError, match="bco_loss: shift must be a scalar"):
    BCO(x, x, x, x, x)
