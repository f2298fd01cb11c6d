"""Tests of the PPO losses and advantages."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax.losses import policy

POLICY = functools.partial(policy.ppo_policy_loss, clip_eps=0.2)
VALUE = functools.partial(policy.ppo_value_loss, clip_eps=0.2)
HOLES = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8], np.float32)


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=(3, 8)).astype(np.float32) for _ in range(4))


def _loss_at(ratio, advantage, **options):
  loss = POLICY(
    jnp.log(jnp.array([[ratio]])), jnp.zeros((1, 1)), jnp.array([[advantage]]), **options
  )
  return float(loss[0, 0])


@pytest.mark.parametrize(
  "ratio, advantage, options, expected",
  [
    (1.0, 2.0, {}, -2.0),
    (1.1, 2.0, {}, -2.2),
    (1.5, 2.0, {}, -2.4),  # clipped at 1.2
    (0.5, 2.0, {}, -1.0),  # a bad step is never clipped away
    (0.5, -2.0, {}, 1.6),  # clipped at 0.8
    (1.5, -2.0, {}, 3.0),
    (1.5, 2.0, {"clip_eps_high": 0.28}, -2.56),
    (0.5, -2.0, {"clip_eps_high": 0.28}, 1.6),
    (50.0, -2.0, {}, 100.0),
    (50.0, -2.0, {"dual_clip": 3.0}, 6.0),
    (2.0, -2.0, {"dual_clip": 3.0}, 4.0),
    (50.0, 2.0, {"dual_clip": 3.0}, -2.4),
  ],
)
def test_policy_loss_by_hand(ratio, advantage, options, expected):
  assert _loss_at(ratio, advantage, **options) == pytest.approx(expected, rel=1e-5)


def test_gradient_at_ratio_one_is_the_policy_gradient(arrays):
  logprobs, advantages, _, _ = arrays
  gradient = jax.grad(lambda x: POLICY(x, logprobs, advantages, dual_clip=3.0).sum())(logprobs)
  np.testing.assert_allclose(gradient, -advantages, rtol=1e-6)


def test_clipped_tokens_have_no_gradient_and_only_they():
  log_ratio = jnp.log(jnp.array([[1.5, 0.5, 1.5, 0.5]]))
  advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
  gradient = jax.grad(lambda x: POLICY(x, jnp.zeros((1, 4)), advantages).sum())(log_ratio)
  np.testing.assert_allclose(gradient, [[0.0, -0.5, 1.5, 0.0]], rtol=1e-5)


def test_only_the_new_logprobs_are_differentiated(arrays):
  gradients = jax.grad(lambda *x: POLICY(*x).sum(), argnums=(1, 2))(*arrays[:3])
  np.testing.assert_array_equal(gradients, np.zeros((2, 3, 8)))
  gradients = jax.grad(lambda *x: VALUE(*x).sum(), argnums=(1, 2))(*arrays[:3])
  np.testing.assert_array_equal(gradients, np.zeros((2, 3, 8)))


def test_policy_loss_against_numpy(arrays):
  new, old, advantages, _ = arrays
  expected = np.zeros((3, 8))
  for index in np.ndindex(3, 8):
    ratio = np.exp(new[index] - old[index])
    clipped = min(max(ratio, 0.8), 1.2)
    expected[index] = -min(ratio * advantages[index], clipped * advantages[index])
  np.testing.assert_allclose(POLICY(new, old, advantages), expected, rtol=1e-5, atol=1e-6)


def test_value_loss_by_hand():
  values, old, returns = (
    jnp.array([[1.0, 1.0, 1.1]]),
    jnp.array([[0.0, 0.9, 2.0]]),
    jnp.array([[1.0, 2.0, 0.0]]),
  )
  # Held to 0.2, 1.0 and 1.8: the worse of the two errors counts.
  np.testing.assert_allclose(
    VALUE(values, old, returns), [[0.5 * 0.8**2, 0.5, 0.5 * 1.8**2]], rtol=1e-5
  )
  np.testing.assert_allclose(
    policy.ppo_value_loss(values, old, returns, clip_eps=None),
    [[0.0, 0.5, 0.5 * 1.1**2]],
    rtol=1e-5,
  )


def test_check_grads(arrays):
  new, old, advantages, returns = arrays
  jax.test_util.check_grads(
    lambda x: POLICY(x, old, advantages), (new,), 1, ["rev"], rtol=2e-2, atol=2e-2, eps=1e-3
  )
  jax.test_util.check_grads(
    lambda x: VALUE(x, old, returns), (new,), 1, ["rev"], rtol=2e-2, atol=2e-2, eps=1e-3
  )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("advantage", [1e4, -1e4])
def test_extremes_are_finite(sign, advantage):
  big, zero = jnp.full((1, 2), sign * 1e4), jnp.zeros((1, 2))
  for options in ({}, {"dual_clip": 3.0}):
    loss = functools.partial(POLICY, **options)

    def total(x, loss=loss):
      return loss(x, zero, jnp.full((1, 2), advantage)).sum()

    value, gradient = jax.value_and_grad(total)(big)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
  value, gradient = jax.value_and_grad(lambda x: VALUE(x, zero, -x).sum())(big)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_golden_gae():
  kl = jnp.array([[0.4, -0.2, 0.2]])
  rewards = policy.kl_shaped_rewards(
    jnp.ones(1), kl, jnp.zeros((1, 3)), jnp.ones((1, 3)), kl_coef=0.05
  )
  advantages, returns = policy.gae(
    rewards, jnp.array([[0.5, 0.6, 0.8]]), jnp.ones((1, 3)), gamma=1.0, lam=0.95
  )
  np.testing.assert_allclose(advantages, [[0.450975, 0.390500, 0.190000]], atol=1e-6)
  np.testing.assert_allclose(returns, [[0.950975, 0.990500, 0.990000]], atol=1e-6)


def _gae_of_one_row(rewards, values, gamma, lam):
  advantages, advantage = np.zeros(len(rewards)), 0.0
  for t in reversed(range(len(rewards))):
    next_value = values[t + 1] if t + 1 < len(values) else 0.0
    advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * advantage
    advantages[t] = advantage
  return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_gae_passes_through_holes_as_if_they_were_cut_out(arrays, gamma, lam):
  rewards, values, _, _ = arrays
  advantages, returns = policy.gae(rewards, values, HOLES, gamma=gamma, lam=lam)
  for row in range(3):
    on = HOLES[row] > 0
    expected = _gae_of_one_row(rewards[row][on], values[row][on], gamma, lam)
    np.testing.assert_allclose(np.asarray(advantages)[row][on], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      np.asarray(returns)[row][on], expected + values[row][on], rtol=1e-4, atol=1e-5
    )
  np.testing.assert_array_equal(np.asarray(advantages)[HOLES == 0], 0.0)
  np.testing.assert_array_equal(np.asarray(returns)[HOLES == 0], 0.0)


def test_gae_closed_forms(arrays):
  rewards, values, _, _ = arrays
  mask = np.ones((3, 8), np.float32)
  to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
  advantages, returns = policy.gae(rewards, values, mask, gamma=1.0, lam=1.0)
  np.testing.assert_allclose(advantages, to_go - values, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(returns, to_go, rtol=1e-4, atol=1e-5)
  next_values = np.concatenate([values[:, 1:], np.zeros((3, 1))], axis=1)
  advantages, _ = policy.gae(rewards, values, mask, gamma=0.9, lam=0.0)
  np.testing.assert_allclose(advantages, rewards + 0.9 * next_values - values, rtol=1e-4, atol=1e-5)


def test_nothing_off_the_mask_is_read(arrays):
  rewards, values, logprobs, ref = arrays

  def poison(x):
    return np.where(HOLES > 0, x, np.nan)

  clean = policy.gae(rewards, values, HOLES, gamma=1.0, lam=0.95)
  poisoned = policy.gae(poison(rewards), poison(values), HOLES, gamma=1.0, lam=0.95)
  np.testing.assert_array_equal(clean, poisoned)
  shaped = functools.partial(policy.kl_shaped_rewards, np.ones(3), mask=HOLES, kl_coef=0.1)
  np.testing.assert_array_equal(shaped(logprobs, ref), shaped(poison(logprobs), poison(ref)))


def test_score_lands_on_the_last_sampled_token(arrays):
  _, _, logprobs, ref = arrays
  score = np.array([2.0, 3.0, 5.0], np.float32)
  rewards = policy.kl_shaped_rewards(score, logprobs, ref, HOLES, kl_coef=0.1)
  expected = -0.1 * (logprobs - ref) * HOLES
  expected[0, 6] += 2.0
  expected[1, 7] += 3.0  # row 2 is an empty response, which has no token to reward
  np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)


def test_the_sum_of_shaped_rewards_is_score_minus_kl(arrays):
  _, _, logprobs, ref = arrays
  mask = np.ones((3, 8))
  rewards = policy.kl_shaped_rewards(np.ones(3), logprobs, ref, mask, kl_coef=0.3)
  np.testing.assert_allclose(
    rewards.sum(axis=1), 1.0 - 0.3 * (logprobs - ref).sum(axis=1), rtol=1e-4, atol=1e-5
  )


def test_the_kl_in_the_reward_carries_no_gradient(arrays):
  """peers 3.23: it acts as a reward, whose policy gradient is that of the reverse KL."""

  def total(logprobs, ref):
    return policy.kl_shaped_rewards(np.ones(3), logprobs, ref, np.ones((3, 8)), kl_coef=0.1).sum()

  gradients = jax.grad(total, argnums=(0, 1))(*arrays[:2])
  np.testing.assert_array_equal(gradients, np.zeros((2, 3, 8)))


def test_empty_responses_give_zeros(arrays):
  rewards, values, _, _ = arrays
  nothing = np.zeros((3, 8))
  shaped = policy.kl_shaped_rewards(np.ones(3), rewards, values, nothing, kl_coef=0.1)
  advantages, returns = policy.gae(shaped, values, nothing, gamma=1.0, lam=0.95)
  np.testing.assert_array_equal([shaped, advantages, returns], np.zeros((3, 3, 8)))


def test_jit_equals_eager(arrays):
  new, old, advantages, returns = arrays
  np.testing.assert_allclose(
    jax.jit(POLICY)(new, old, advantages), POLICY(new, old, advantages), rtol=1e-5
  )
  np.testing.assert_allclose(jax.jit(VALUE)(new, old, returns), VALUE(new, old, returns), rtol=1e-5)
  estimate = functools.partial(policy.gae, gamma=1.0, lam=0.95)
  np.testing.assert_allclose(
    jax.jit(estimate)(new, old, HOLES), estimate(new, old, HOLES), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: POLICY(x[0], x[0], x[0]), "logprobs must have rank 2"),
    (lambda x: POLICY(x, x, x[:, :1]), "one shape"),
    (lambda x: policy.ppo_policy_loss(x, x, x, clip_eps=-0.1), "clip_eps must be in"),
    (lambda x: POLICY(x, x, x, dual_clip=0.5), "dual_clip must be above 1"),
    (lambda x: policy.ppo_value_loss(x, x, x, clip_eps=-1.0), "must not be negative"),
    (lambda x: policy.gae(x, x, x[:, :2], gamma=1.0, lam=0.9), "one shape"),
    (lambda x: policy.gae(x, x, x, gamma=1.5, lam=0.9), "gamma must be in"),
    (lambda x: policy.kl_shaped_rewards(x, x, x, x, kl_coef=0.1), "score must have rank 1"),
    (lambda x: policy.kl_shaped_rewards(x[0], x, x, x, kl_coef=0.1), "score must be"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros((2, 3), np.float32))
