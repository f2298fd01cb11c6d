"""XPO and Nash-MD: exact expectations over everything that can be sampled; what is kept or paired.

On a task of two steps, where arm 2 ends the episode after its first token, all 25 pairs of paths are
counted with their probability; exact objectives are written out in NumPy, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses

CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
PATHS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
MASK = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]], np.float32)
WEIGHTS = np.array([0.3, -0.2, 0.4, 0.5, -0.5, -0.1, 0.6])  # 3 logits, and 2 after arm 0, 2 after 1
REF_WEIGHTS = np.array([-0.2, 0.4, 0.0, -0.4, 0.3, 0.5, 0.1])
PREFERENCE = 0.5 + np.array(  # P(row ≻ column), with a circle 0 ≻ 1 ≻ 2 ≻ 0: no reward explains it
  [
    [0.0, 0.3, -0.4, 0.1, 0.2],
    [-0.3, 0.0, 0.35, -0.2, 0.1],
    [0.4, -0.35, 0.0, 0.2, -0.1],
    [-0.1, 0.2, -0.2, 0.0, 0.45],
    [-0.2, -0.1, 0.1, -0.45, 0.0],
  ]
)
BETA = 0.6


def _log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _logprobs(weights):
  """log π of the tokens of every path, [5, 2] float64, 0 off the mask."""
  first, second = _log_softmax(weights[:3]), _log_softmax(weights[3:].reshape(2, 2))
  return np.stack([first[PATHS[:, 0]], second[PATHS[:, 0] % 2, PATHS[:, 1]]], axis=1) * MASK


def _model(weights):
  first = jax.nn.log_softmax(weights[:3])[PATHS[:, 0]]
  second = jax.nn.log_softmax(weights[3:].reshape(2, 2))[PATHS[:, 0] % 2, PATHS[:, 1]]
  return jnp.stack([first, second], axis=1) * MASK


def _model_logps(weights):
  return jnp.sum(_model(weights), axis=1)


def _chance(weights):
  return np.exp(_logprobs(weights).sum(1))


def _mixture(weights, share):
  """The token-by-token geometric mixture π^(1−w)·π_ref^w as a distribution of paths."""
  logits = []
  for here, there in zip(np.split(weights, [3, 5]), np.split(REF_WEIGHTS, [3, 5])):
    logits.append((1 - share) * _log_softmax(here) + share * _log_softmax(there))
  return _chance(np.concatenate(logits))


def _differences(objective, at, step=1e-5):
  """The gradient by central differences, in float64."""
  moves = np.eye(len(at)) * step
  return np.array([(objective(at + m) - objective(at - m)) / (2 * step) for m in moves])


def _gradient(loss, at=WEIGHTS):
  return np.asarray(jax.grad(loss)(jnp.asarray(at, jnp.float32)))


REF_LOGPS = _logprobs(REF_WEIGHTS).sum(1)
REF = np.exp(REF_LOGPS)


# Nash-MD.


def _game(weights, opponent):
  """−P(π ≻ π′) + β·KL(π ‖ π_ref)."""
  logps = _logprobs(weights).sum(1)
  chance = np.exp(logps)
  return -chance @ PREFERENCE @ opponent + BETA * chance @ (logps - REF_LOGPS)


def _expected_nash(weights, opponent, sampled=None, beta=BETA):
  """The expected loss over y from `sampled` weights (π itself by default), y′ from the opponent."""
  y, other = np.indices((5, 5)).reshape(2, -1)
  logps = _model_logps(weights)[y]
  old = None if sampled is None else _logprobs(sampled).sum(1)[y]
  chance = _chance(np.asarray(WEIGHTS) if sampled is None else sampled)[y] * opponent[other]
  loss = losses.nash_md_loss(logps, REF_LOGPS[y], PREFERENCE[y, other], old, beta=beta)
  return jnp.sum(chance * loss)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_nash_md_has_the_gradient_of_the_regularised_game(share):
  opponent = _mixture(WEIGHTS, share)
  exact = _differences(lambda w: _game(w, opponent), WEIGHTS)
  CLOSE(_gradient(lambda w: _expected_nash(w, opponent)), exact)
  CLOSE(_expected_nash(jnp.asarray(WEIGHTS), opponent), _game(WEIGHTS, opponent) + 0.5)
  # The gradient through the opponent is another one, and is not taken.
  through = _differences(lambda w: _game(w, _mixture(w, share)), WEIGHTS)
  if share < 1:
    assert np.abs(through - exact).max() > 0.01


def test_nash_md_off_policy_is_corrected_by_the_ratio():
  sampled = WEIGHTS + np.array([0.3, -0.2, 0.1, -0.3, 0.2, 0.4, -0.1])
  opponent = _mixture(sampled, 0.5)
  exact = _differences(lambda w: _game(w, opponent), WEIGHTS)
  CLOSE(_gradient(lambda w: _expected_nash(w, opponent, sampled)), exact)
  uncorrected = _gradient(
    lambda w: jnp.sum(
      _chance(sampled)
      * losses.nash_md_loss(_model_logps(w), REF_LOGPS, PREFERENCE @ opponent, beta=BETA)
    )
  )
  assert np.abs(uncorrected - exact).max() > 0.01


def test_a_kl_of_tokens_by_themselves_is_not_the_games():
  """Σₜ log-ratioₜ·log πₜ, the form TRL has, lacks what the first token does to the second's KL."""
  opponent = _mixture(WEIGHTS, 0.5)
  exact = _differences(lambda w: _game(w, opponent), WEIGHTS)
  ratio = _logprobs(WEIGHTS) - _logprobs(REF_WEIGHTS)
  payoff = PREFERENCE @ opponent - 0.5

  def of_tokens(weights):
    tokens = _model(weights)
    kl = jnp.sum(ratio * tokens, axis=1)
    return jnp.sum(_chance(WEIGHTS) * (BETA * kl - payoff * jnp.sum(tokens, axis=1)))

  later = (
    BETA
    * (_chance(WEIGHTS) * ratio[:, 1])
    @ np.array([_differences(lambda w, i=i: _logprobs(w)[i, 0], WEIGHTS) for i in range(5)])
  )
  CLOSE(_gradient(of_tokens) + later, exact)
  assert np.abs(later).max() > 0.02


def test_in_self_play_the_gradient_vanishes_at_the_nash_equilibrium_alone():
  """The equilibrium as the fixed point π ∝ π_ref·exp(P(y ≻ π)/β) of a game without a best response."""
  logits = np.array([0.2, -0.3, 0.1, 0.0, -0.2])
  ref = np.exp(_log_softmax(logits))
  policy = ref
  for _ in range(500):
    target = ref * np.exp(PREFERENCE @ policy / BETA)
    policy = 0.8 * policy + 0.2 * target / target.sum()
  against = PREFERENCE @ policy

  def loss(theta, payoff):
    logps = jax.nn.log_softmax(theta)
    return jnp.sum(policy * losses.nash_md_loss(logps, np.log(ref), payoff, beta=BETA))

  gradient = functools.partial(_gradient, at=np.log(policy))
  np.testing.assert_allclose(gradient(lambda x: loss(x, against)), 0.0, atol=1e-6)
  mixed = np.sqrt(policy * ref)
  elsewhere = gradient(lambda x: loss(x, PREFERENCE @ (mixed / mixed.sum())))
  assert np.abs(elsewhere).max() > 1e-3


def test_nash_md_refuses_shapes_and_settings_by_name():
  rows = np.zeros(3)
  with pytest.raises(ValueError, match="^nash_md_loss: beta must be"):
    losses.nash_md_loss(rows, rows, rows, beta=-0.1)
  with pytest.raises(ValueError, match="^nash_md_loss: .*one shape.*preferences"):
    losses.nash_md_loss(rows, rows, rows[:2], beta=0.1)
  with pytest.raises(ValueError, match="^nash_md_loss: .*old_logps must have rank 1"):
    losses.nash_md_loss(rows, rows, rows, rows[:, None], beta=0.1)


# XPO.


def _expected_xpo(weights, alpha):
  """Over y ~ π (as sampled at WEIGHTS), ỹ ~ π_ref and the label."""
  policy, ref = np.indices((5, 5)).reshape(2, -1)
  logps = _model_logps(weights)
  chance = _chance(WEIGHTS)[policy] * REF[ref]
  total = 0.0
  for good, bad in ((policy, ref), (ref, policy)):
    loss = losses.xpo_loss(
      logps[good], logps[bad], REF_LOGPS[good], REF_LOGPS[bad], logps[ref], beta=BETA, alpha=alpha
    )
    total += jnp.sum(chance * PREFERENCE[good, bad] * loss)
  return total


def test_xpo_is_dpo_and_pays_for_leaving_the_reference():
  def dpo(weights):
    ratio = _logprobs(weights).sum(1) - REF_LOGPS
    label = np.log1p(np.exp(-BETA * (ratio[:, None] - ratio[None])))
    both = PREFERENCE * label + PREFERENCE.T * label.T
    return _chance(WEIGHTS) @ both @ REF

  def forward_kl(weights):
    return REF @ (REF_LOGPS - _logprobs(weights).sum(1))

  CLOSE(_expected_xpo(jnp.asarray(WEIGHTS), 0.0), dpo(WEIGHTS))
  without = _gradient(lambda w: _expected_xpo(w, 0.0))
  CLOSE(without, _differences(dpo, WEIGHTS))
  with_bonus = _gradient(lambda w: _expected_xpo(w, 0.7))
  CLOSE(with_bonus - without, -0.7 * _differences(forward_kl, WEIGHTS))


def test_xpo_at_alpha_zero_is_dpo_row_by_row():
  rows = [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(-9, 2, (5, 6))]
  expected = losses.dpo_loss(*rows[:4], beta=0.3)
  np.testing.assert_array_equal(losses.xpo_loss(*rows, beta=0.3, alpha=0.0), expected)
  CLOSE(losses.xpo_loss(*rows, beta=0.3, alpha=0.1), expected + 0.1 * rows[4])


# Selection.

SCORES = np.array([[0.1, 3.0, -2.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -4.0, -3.0, -2.0]])


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_exactly_the_best_are_kept_and_of_equals_the_earlier(keep):
  expected = np.zeros_like(SCORES)
  for kept, row in zip(expected, SCORES):
    kept[sorted(range(4), key=lambda i: (-row[i], i))[:keep]] = 1.0
  kept = losses.best_of_group(SCORES, keep=keep)
  assert kept.dtype == jnp.float32
  np.testing.assert_array_equal(kept, expected)
  np.testing.assert_array_equal(
    jax.jit(functools.partial(losses.best_of_group, keep=keep))(SCORES), expected
  )


@pytest.mark.parametrize("keep", [0, 5])
def test_more_than_there_are_cannot_be_kept(keep):
  with pytest.raises(ValueError, match=r"^best_of_group: keep must be in \[1, 4\]"):
    losses.best_of_group(SCORES, keep=keep)


def test_best_and_worst_and_no_weight_to_a_group_of_equals():
  best, worst, weight = losses.best_and_worst(SCORES)
  np.testing.assert_array_equal(best, [1, 0, 0])
  np.testing.assert_array_equal(worst, [2, 3, 1])
  np.testing.assert_array_equal(weight, [1.0, 0.0, 1.0])
  with pytest.raises(ValueError, match="^best_and_worst: scores must hold groups of 2"):
    losses.best_and_worst(SCORES[:, :1])


def test_the_best_does_not_depend_on_the_order_unless_tied():
  rng = np.random.default_rng(3)
  scores = rng.permuted(np.arange(40.0).reshape(5, 8), axis=1)
  order = rng.permutation(8)
  best, worst, _ = losses.best_and_worst(scores)
  moved_best, moved_worst, _ = losses.best_and_worst(scores[:, order])
  np.testing.assert_array_equal(order[moved_best], best)
  np.testing.assert_array_equal(order[moved_worst], worst)
  kept = losses.best_of_group(scores, keep=3)
  np.testing.assert_array_equal(losses.best_of_group(scores[:, order], keep=3), kept[:, order])


def test_a_threshold_keeps_what_reaches_it():
  np.testing.assert_array_equal(losses.above_threshold(SCORES, threshold=3.0), SCORES >= 3.0)
  flat = np.random.default_rng(1).normal(size=200).astype(np.float32)
  for share in (0.0, 0.5, 0.9, 1.0):
    kept = losses.above_threshold(flat, threshold=jnp.quantile(flat, share))
    assert abs(float(kept.mean()) - (1.0 - share)) <= 1 / 200
    assert kept[np.argmax(flat)] == 1.0
  with pytest.raises(ValueError, match="^above_threshold: threshold must be a scalar"):
    losses.above_threshold(flat, threshold=np.zeros(200))


def test_no_selection_carries_a_gradient():
  def kept(scores):
    total = losses.best_of_group(scores, keep=2).sum() + losses.best_and_worst(scores)[2].sum()
    return total + losses.above_threshold(scores, threshold=jnp.quantile(scores, 0.5)).sum()

  np.testing.assert_array_equal(jax.grad(kept)(jnp.asarray(SCORES)), 0.0)
