"""Tests of the losses without a reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import preference, reference_free

SIMPO = functools.partial(reference_free.simpo_loss, beta=2.5, gamma=1.4)
ALPHAPO = functools.partial(reference_free.alphapo_loss, beta=2.5, gamma=1.4)
ORPO = functools.partial(reference_free.orpo_loss, beta=0.1)
CPO = functools.partial(reference_free.cpo_loss, beta=0.1)
SLIC = functools.partial(reference_free.slic_loss, delta=1.0, sft_weight=0.2)


@pytest.fixture(scope="module")
def means():
  rng = np.random.default_rng(0)
  return tuple(rng.uniform(-3.0, -0.2, 6).astype(np.float32) for _ in range(2))


@pytest.fixture(scope="module")
def sums():
  rng = np.random.default_rng(1)
  return tuple(rng.normal(-40.0, 5.0, 6).astype(np.float32) for _ in range(2))


def _log_loss(x):  # -log σ(x), in float64
  return np.logaddexp(0.0, -x)


def _power(x, alpha):
  return (1.0 - np.exp(x) ** -alpha) / alpha


def _log_odds(x):
  return np.log(np.exp(x) / (1.0 - np.exp(x)))


def test_golden_values():
  chosen, rejected = np.array([-1.0]), np.array([-1.2])
  np.testing.assert_allclose(SIMPO(chosen, rejected), [1.241154], atol=1e-6)
  np.testing.assert_allclose(ALPHAPO(chosen, rejected, alpha=0.0), [1.241154], atol=1e-6)
  # ORPO at weight 1: the likelihood term 0.5 and the log-loss 0.320300 of log-odds 0.974077.
  loss = reference_free.orpo_loss(np.array([-0.5]), np.array([-1.0]), beta=1.0)
  np.testing.assert_allclose(loss, [0.5 + 0.320300], atol=1e-6)
  assert _log_odds(-0.5) - _log_odds(-1.0) == pytest.approx(0.974077, abs=1e-6)


@pytest.mark.parametrize(
  "loss, formula",
  [
    (SIMPO, lambda w, l: _log_loss(2.5 * (w - l) - 1.4)),
    (
      functools.partial(ALPHAPO, alpha=0.3),
      lambda w, l: _log_loss(2.5 * _power(w, 0.3) - 2.5 * _power(l, 0.3) - 1.4),
    ),
    (
      functools.partial(ALPHAPO, alpha=-0.3),
      lambda w, l: _log_loss(2.5 * _power(w, -0.3) - 2.5 * _power(l, -0.3) - 1.4),
    ),
    (ORPO, lambda w, l: -w + 0.1 * _log_loss(_log_odds(w) - _log_odds(l))),
    (CPO, lambda w, l: _log_loss(0.1 * (w - l)) - w),
    (functools.partial(CPO, sft_weight=0.3), lambda w, l: _log_loss(0.1 * (w - l)) - 0.3 * w),
    (
      lambda w, l: SLIC(w, l, w + l),
      lambda w, l: np.maximum(0.0, 1.0 - w + l) - 0.2 * (w + l),
    ),
    (lambda w, l: reference_free.sft_loss(w), lambda w, l: -w),
  ],
)
def test_formulas_against_numpy(means, loss, formula):
  np.testing.assert_allclose(
    loss(*means), formula(*(x.astype(np.float64) for x in means)), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  "loss",
  [
    functools.partial(CPO, sft_weight=0.0),
    functools.partial(reference_free.simpo_loss, beta=0.1, gamma=0.0),
    functools.partial(reference_free.alphapo_loss, beta=0.1, gamma=0.0, alpha=0.0),
  ],
)
def test_members_that_are_dpo_with_a_uniform_reference(sums, loss):
  zeros = np.zeros(6)
  np.testing.assert_allclose(
    loss(*sums), preference.dpo_loss(*sums, zeros, zeros, beta=0.1), rtol=1e-5
  )


def test_alphapo_is_continuous_in_alpha_and_simpo_at_zero(means):
  np.testing.assert_array_equal(ALPHAPO(*means, alpha=0.0), SIMPO(*means))
  for alpha in (1e-6, -1e-6):
    np.testing.assert_allclose(ALPHAPO(*means, alpha=alpha), SIMPO(*means), rtol=1e-4)
  away = [np.abs(ALPHAPO(*means, alpha=a) - SIMPO(*means)).max() for a in (0.01, 0.1, 0.5)]
  assert 1e-3 < away[0] < away[1] < away[2]


def test_simpo_wants_more_than_a_win():
  # Won by γ/β = 0.56 nats per token: still ln 2.
  loss = SIMPO(np.array([-0.44]), np.array([-1.0]))
  np.testing.assert_allclose(loss, 0.693147, rtol=1e-5)


def test_length_does_not_enter_simpo_but_does_enter_cpo(means):
  chosen, rejected = means
  lengths = np.array([2.0, 9.0, 4.0, 30.0, 7.0, 1.0])
  first = CPO(chosen * lengths, rejected * lengths)
  assert np.all(np.abs(first - CPO(chosen * 5.0, rejected * 5.0)) > 1e-3)


@pytest.mark.parametrize("rejected", [-1e-4, -1e-7, 0.0])
def test_orpo_still_pushes_down_a_rejected_response_that_is_certain(rejected):
  chosen = jnp.array([-2.0])
  gradient = jax.grad(lambda l: ORPO(chosen, l).sum())(jnp.array([rejected]))
  # d odds/dx = 1/(1 - eˣ), held to 1e6; σ of a lost pair is 1.
  slope = min(1.0 / -np.expm1(rejected), 1e6) if rejected else 1e6
  np.testing.assert_allclose(gradient, 0.1 * slope, rtol=1e-3)


def test_slic_ranks_up_to_its_margin_and_no_further():
  chosen, rejected, target = jnp.array([-3.0, -3.0]), jnp.array([-3.5, -4.5]), jnp.zeros(2)
  gradient = jax.grad(lambda *x: SLIC(*x).sum(), (0, 1, 2))(chosen, rejected, target)
  np.testing.assert_allclose(gradient[0], [-1.0, 0.0])
  np.testing.assert_allclose(gradient[1], [1.0, 0.0])
  np.testing.assert_allclose(gradient[2], [-0.2, -0.2])
  np.testing.assert_allclose(SLIC(chosen, rejected, target), [0.5, 0.0])


@pytest.mark.parametrize("loss", [CPO, ORPO])
def test_a_pair_won_by_far_still_pulls_on_its_chosen_response(loss):
  won = jnp.array([-1e-3]), jnp.array([-1e3])
  gradient = jax.grad(lambda w, l: loss(w, l).sum(), (0, 1))(*won)
  np.testing.assert_allclose(gradient[0], -1.0, atol=1e-4)
  np.testing.assert_allclose(gradient[1], 0.0, atol=1e-4)
