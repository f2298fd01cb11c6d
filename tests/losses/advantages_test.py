"""Tests of the advantages: loops in NumPy, and expected gradients summed over every possible group."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.losses import advantages

HOLES = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8], np.float32)
LOGITS = np.array([0.4, -0.3, 0.1])  # a bandit with three arms
REWARDS = np.array([1.0, -0.5, 0.2])
GROUPED = {  # everything that compares the responses to one prompt
  "rloo": advantages.rloo_advantages,
  "grpo": advantages.grpo_advantages,
  "dr_grpo": advantages.dr_grpo_advantages,
  "reinforce_pp_baseline": advantages.reinforce_pp_baseline_advantages,
}


@pytest.fixture
def scores():
  return np.random.default_rng(0).normal(2.0, 1.5, size=(4, 5)).astype(np.float32)


def _softmax(logits):
  return np.exp(logits) / np.exp(logits).sum()


def test_group_advantages_against_a_loop(scores):
  rloo, grpo, centred = np.zeros((3, 4, 5))
  for p, i in np.ndindex(4, 5):
    group = [float(x) for x in scores[p]]
    mean = sum(group) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in group) / 4)
    rloo[p, i] = group[i] - sum(group[:i] + group[i + 1 :]) / 4
    grpo[p, i] = (group[i] - mean) / (std + 0.01)
    centred[p, i] = group[i] - mean
  batch_std = math.sqrt((centred**2).sum() / 20)  # of a mean of 0
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(advantages.rloo_advantages(scores), rloo)
  close(advantages.grpo_advantages(scores, eps=0.01), grpo)
  close(advantages.dr_grpo_advantages(scores), centred)
  close(advantages.reinforce_pp_baseline_advantages(scores), centred / batch_std)


def test_the_estimators_are_multiples_of_each_other(scores):
  centred = np.asarray(advantages.dr_grpo_advantages(scores))
  np.testing.assert_allclose(advantages.rloo_advantages(scores), centred * 5 / 4, rtol=1e-5)
  one = scores[:1]
  np.testing.assert_allclose(  # one group: the std over the batch is that over the group, but for n - 1
    advantages.reinforce_pp_baseline_advantages(one),
    advantages.grpo_advantages(one, eps=0.0) * math.sqrt(5 / 4),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    advantages.reinforce_advantages(one[0]), advantages.dr_grpo_advantages(one)[0], rtol=1e-5
  )


def test_reinforce_with_each_kind_of_baseline():
  scores, own = np.array([1.0, 4.0, 1.0]), np.array([0.5, 1.0, -1.0])
  np.testing.assert_allclose(advantages.reinforce_advantages(scores), [-1.0, 2.0, -1.0])
  np.testing.assert_allclose(advantages.reinforce_advantages(scores, 0.25), [0.75, 3.75, 0.75])
  np.testing.assert_allclose(advantages.reinforce_advantages(scores, own), [0.5, 3.0, 2.0])
  np.testing.assert_allclose(advantages.reinforce_advantages(scores[:1], 0.25), [0.75])


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_equal_rewards_teaches_nothing(name):
  """0.1 is no sum of powers of 2: the mean of seven of it is another number than 0.1."""
  result = GROUPED[name](np.full((2, 7), 0.1, np.float32))
  np.testing.assert_allclose(result, 0.0, atol=1e-3)
  if name == "grpo":
    np.testing.assert_array_equal(advantages.grpo_advantages(np.full((2, 7), 0.1), eps=0.0), 0.0)


def test_huge_rewards_are_finite():
  scores = np.array([[1e6, -1e6, 1e6], [1e-20, 0.0, 0.0]], np.float32)
  for function in GROUPED.values():
    assert np.all(np.isfinite(function(scores)))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_against_a_loop(gamma):
  rewards = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
  expected = np.zeros((3, 8))
  for row in range(3):
    later = 0.0
    for t in reversed(range(8)):
      if HOLES[row, t]:
        expected[row, t] = later = rewards[row, t] + gamma * later
  poisoned = np.where(HOLES > 0, rewards, np.nan)
  result = advantages.returns_to_go(poisoned, HOLES, gamma=gamma)
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_reinforce_pp_against_a_loop(gamma):
  rng = np.random.default_rng(2)
  score, logprobs, ref = rng.normal(size=3), rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
  returns = []
  for row, t in zip(*np.nonzero(HOLES)):
    to_come = [s for s in range(t, 8) if HOLES[row, s]]  # the score is paid with the last of them
    kl = sum(gamma**k * (logprobs - ref)[row, s] for k, s in enumerate(to_come))
    returns.append(gamma ** (len(to_come) - 1) * score[row] - 0.3 * kl)
  mean = sum(returns) / len(returns)
  std = math.sqrt(sum((x - mean) ** 2 for x in returns) / len(returns))
  expected = np.zeros((3, 8))
  expected[HOLES > 0] = (np.array(returns) - mean) / std
  rewards = losses.kl_shaped_rewards(score, logprobs, ref, HOLES, kl_coef=0.3)
  result = advantages.reinforce_pp_advantages(rewards, HOLES, gamma=gamma)
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_empty_responses_and_equal_returns_are_finite():
  nothing = np.zeros((2, 4))
  for function in (advantages.returns_to_go, advantages.reinforce_pp_advantages):
    np.testing.assert_array_equal(function(nothing, nothing), 0.0)
  last = np.array([[0.0, 0.0, 0.7]] * 2)  # every token has the same return
  np.testing.assert_allclose(
    advantages.reinforce_pp_advantages(last, np.ones((2, 3))), 0.0, atol=1e-3
  )


def test_overlong_penalty_by_hand():
  penalty = functools.partial(advantages.overlong_penalty, max_length=20480, cache=4096)
  lengths = np.array([0, 16384, 16385, 18432, 20480, 20481, 10**6])
  np.testing.assert_allclose(
    penalty(lengths), [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0, -1.0], rtol=1e-6
  )


def test_dynamic_sampling_keeps_groups_that_differ():
  right = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 0, 1]], np.float32)
  mask = np.asarray(advantages.dynamic_sampling_mask(right))
  np.testing.assert_array_equal(mask, [0, 0, 1, 1])
  taught = np.any(np.asarray(advantages.grpo_advantages(right)) != 0, axis=1)
  np.testing.assert_array_equal(taught, mask > 0)


def test_importance_weights_by_hand():
  ratio = np.array([[0.3, 0.5, 1.0, 1.9, 4.0, 6.0]])
  old, sampler = np.log(ratio) - 2.0, np.full((1, 6), -2.0)
  np.testing.assert_allclose(
    advantages.truncated_importance_weights(old, sampler, cap=2.0),
    [[0.3, 0.5, 1.0, 1.9, 2.0, 2.0]],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    advantages.masked_importance_weights(old, sampler, low=0.4, high=5.0),
    [[0.0, 0.5, 1.0, 1.9, 4.0, 0.0]],
    rtol=1e-5,
  )
  far = np.array([[-1e4, 1e4]])
  assert np.all(np.isfinite(advantages.truncated_importance_weights(far, 0 * far, cap=2.0)))
  assert not np.any(advantages.masked_importance_weights(far, 0 * far, low=0.4, high=5.0))


def test_nothing_carries_a_gradient(scores):
  mask = np.ones((4, 5))
  calls = [
    lambda x: advantages.reinforce_advantages(x[0], x[1]),
    lambda x: advantages.reinforce_pp_advantages(x, mask),
    lambda x: advantages.overlong_penalty(x[0], max_length=4, cache=4),
    lambda x: advantages.truncated_importance_weights(x, x * 0.5, cap=2.0),
    lambda x: advantages.masked_importance_weights(x, x * 0.5, low=0.0, high=9.0),
    *GROUPED.values(),
  ]
  for call in calls:
    gradient = jax.grad(lambda x, call=call: jnp.sum(call(x) * np.arange(1.0, 6.0)))(scores)
    np.testing.assert_array_equal(gradient, 0.0)


def test_float32_and_the_same_when_compiled(scores):
  mask = (scores > 1.0).astype(np.float32)
  calls = [
    lambda x: advantages.reinforce_advantages(x[0]),
    lambda x: advantages.reinforce_pp_advantages(x, mask, gamma=0.9),
    lambda x: advantages.overlong_penalty(x[0], max_length=4, cache=3),
    lambda x: advantages.dynamic_sampling_mask(x),
    lambda x: advantages.truncated_importance_weights(x, x * 0.5, cap=2.0),
    lambda x: advantages.masked_importance_weights(x, x * 0.5, low=0.5, high=5.0),
    *GROUPED.values(),
  ]
  for call in calls:
    assert call(jnp.asarray(scores, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(call)(scores), call(scores), rtol=1e-4, atol=1e-6)


def _expected_gradient(estimate, size, logits=LOGITS, rewards=REWARDS):
  """E[mean_i Â_i ∇log π(a_i)] over all groups of `size` arms, each with its exact probability."""
  groups = np.array(list(itertools.product(range(len(logits)), repeat=size)))
  probability = _softmax(logits)[groups].prod(axis=1)
  assert probability.sum() == pytest.approx(1.0)
  values = jax.vmap(estimate)(jnp.asarray(rewards[groups], jnp.float32))

  def loss(theta):
    logprobs = jax.nn.log_softmax(theta)[groups]
    return jnp.sum(probability[:, None] * losses.reinforce_loss(logprobs, values)) / size

  return -np.asarray(jax.grad(loss)(jnp.asarray(logits, jnp.float32)))


def _exact_gradient(logits=LOGITS, rewards=REWARDS):
  """∇E[r] = π(a)·(r(a) − E[r]) of a softmax."""
  policy = _softmax(logits)
  return policy * (rewards - policy @ rewards)


def _of_group(function):
  return lambda scores: function(scores[None])[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rloo_and_given_baselines_have_exactly_the_policy_gradient(size):
  exact = _exact_gradient()
  close = functools.partial(np.testing.assert_allclose, desired=exact, rtol=1e-5, atol=1e-6)
  close(_expected_gradient(_of_group(advantages.rloo_advantages), size))
  for baseline in (0.0, 3.0, -7.0):
    close(_expected_gradient(lambda x, b=baseline: advantages.reinforce_advantages(x, b), size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_mean_that_contains_the_sample_shrinks_the_gradient(size):
  expected = _exact_gradient() * (size - 1) / size
  for estimate in (_of_group(advantages.dr_grpo_advantages), advantages.reinforce_advantages):
    np.testing.assert_allclose(_expected_gradient(estimate, size), expected, rtol=1e-5, atol=1e-6)


def _grpo_factor(q, size):
  """Expected GRPO gradient over ∇q, for rewards 0 and 1 with success probability q."""
  total = 0.0
  for k in range(1, size):
    chance = math.comb(size, k) * q**k * (1 - q) ** (size - k)
    total += chance * math.sqrt(k * (size - k) * size * (size - 1)) / size**2
  return total / (q * (1 - q))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("q", [0.05, 0.3, 0.5, 0.9])
def test_the_bias_of_grpo_on_right_and_wrong_is_known(q, size):
  logits = np.log([q, 0.6 * (1 - q), 0.4 * (1 - q)])
  rewards = np.array([1.0, 0.0, 0.0])
  estimate = _of_group(functools.partial(advantages.grpo_advantages, eps=0.0))
  np.testing.assert_allclose(
    _expected_gradient(estimate, size, logits, rewards),
    _grpo_factor(q, size) * _exact_gradient(logits, rewards),
    rtol=1e-4,
    atol=1e-6,
  )
  constant = {2: math.sqrt(1 / 2), 3: math.sqrt(4 / 3)}
  assert size > 3 or _grpo_factor(q, size) == pytest.approx(constant[size])


def test_grpo_overweighs_prompts_that_are_easy_or_hard_and_dr_grpo_does_not():
  hard, even, easy = (_grpo_factor(q, 6) for q in (0.05, 0.5, 0.95))
  assert hard > 1.15 * even and easy == pytest.approx(hard)
  # Rewards in between: within one prompt even the direction is another.
  rewards = np.array([1.0, 0.9, -3.0])
  exact = _exact_gradient(rewards=rewards)
  for function, parallel in (
    (advantages.grpo_advantages, False),
    (advantages.dr_grpo_advantages, True),
  ):
    gradient = _expected_gradient(_of_group(function), 4, rewards=rewards)
    cosine = gradient @ exact / np.linalg.norm(gradient) / np.linalg.norm(exact)
    assert (cosine > 1 - 1e-6) if parallel else (0.5 < cosine < 0.98)


def test_whitening_two_responses_leaves_only_their_order():
  """Its bias in the smallest batch: ±1 for the better and the worse, however far apart they are."""
  estimate = _of_group(advantages.reinforce_pp_baseline_advantages)
  policy = _softmax(LOGITS)
  expected = np.zeros(3)
  for a, b in itertools.product(range(3), repeat=2):
    sign = np.sign(REWARDS[a] - REWARDS[b])
    expected += policy[a] * policy[b] * sign * (np.eye(3)[a] - np.eye(3)[b]) / 2
  for rewards in (REWARDS, np.exp(5 * REWARDS)):
    gradient = _expected_gradient(estimate, 2, rewards=rewards)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "call, message",
  [
    *[
      (lambda x, f=f, n=n: f(x[:, :1]), f"^{n}_advantages: scores must hold groups")
      for n, f in GROUPED.items()
    ],
    *[
      (lambda x, f=f, n=n: f(x[0]), f"^{n}_advantages: scores must have rank 2")
      for n, f in GROUPED.items()
    ],
    (lambda x: advantages.dynamic_sampling_mask(x[:, :1]), "must hold groups"),
    (lambda x: advantages.grpo_advantages(x, eps=-1.0), "eps must be in"),
    (lambda x: advantages.reinforce_advantages(x), "scores must have rank 1"),
    (lambda x: advantages.reinforce_advantages(x[0, :1]), "at least 2 responses"),
    (lambda x: advantages.reinforce_advantages(x[0], x[0, :2]), "baseline must be"),
    (lambda x: advantages.returns_to_go(x, x[:, :2]), "^returns_to_go: .*one shape"),
    (lambda x: advantages.returns_to_go(x, x, gamma=1.1), "^returns_to_go: gamma must be in"),
    (lambda x: advantages.reinforce_pp_advantages(x[0], x[0]), "^reinforce_pp_.* must have rank 2"),
    (lambda x: advantages.overlong_penalty(x[0], max_length=4, cache=0), "cache must be above 0"),
    (lambda x: advantages.overlong_penalty(x[0], max_length=4, cache=5), "at most max_length"),
    (lambda x: advantages.overlong_penalty(x, max_length=4, cache=2), "lengths must have rank 1"),
    (lambda x: advantages.truncated_importance_weights(x, x, cap=0.0), "cap must be positive"),
    (lambda x: advantages.truncated_importance_weights(x, x[:, :2], cap=2.0), "one shape"),
    (lambda x: advantages.masked_importance_weights(x, x, low=1.1, high=2.0), "low must be in"),
    (lambda x: advantages.masked_importance_weights(x, x, low=0.5, high=0.9), "high must be in"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros((2, 3), np.float32))
