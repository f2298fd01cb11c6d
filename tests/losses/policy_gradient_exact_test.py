"""Which policy-gradient estimators are unbiased, and what the bias of the others is: exact sums.

On a bandit of four arms, off policy, every arm is counted with its probability; on a task of two steps,
where arm 2 ends the episode after its first token, every trajectory or group of them. Nothing is
sampled, so what differs is bias. Exact gradients are written out in NumPy, in float64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses

CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def _log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# The bandit: π learns from arms that μ has drawn.

THETA = np.array([0.9, -0.4, 0.1, -0.6])
LOGPI, LOGMU = _log_softmax(THETA), _log_softmax(np.array([-0.3, 0.2, 0.0, 0.4]))
PI, MU = np.exp(LOGPI), np.exp(LOGMU)
RATIO = PI / MU  # about 3.0, 0.5, 1.0 and 0.3
ADVANTAGES = np.array([1.0, 0.7, -0.4, -1.2])


def _scores():
  """∇log π(a) in θ, one row per arm."""
  return np.eye(4) - PI


def _off_policy(loss):
  """Minus the expected gradient of loss(logprobs, old_logprobs, advantages), arms drawn from μ."""
  old, advantages = (np.asarray(x, np.float32)[:, None] for x in (LOGMU, ADVANTAGES))

  def total(theta):
    return jnp.sum(MU * loss(jax.nn.log_softmax(theta)[:, None], old, advantages)[:, 0])

  return -np.asarray(jax.grad(total)(jnp.asarray(THETA, jnp.float32)))


EXACT = (PI * ADVANTAGES) @ _scores()


def test_without_a_clip_ratios_correct_for_the_other_policy_exactly():
  one = np.ones((4, 1))
  unclipped = {"clip_eps": 1.0, "clip_eps_high": 1e6}
  CLOSE(_off_policy(functools.partial(losses.ppo_policy_loss, **unclipped)), EXACT)
  CLOSE(_off_policy(functools.partial(losses.cispo_loss, clip_eps_high=1e6)), EXACT)
  gspo = functools.partial(losses.gspo_loss, **unclipped)
  CLOSE(_off_policy(lambda x, old, a: gspo(x, old, a[:, 0], one)[:, None]), EXACT)
  truncated = functools.partial(_weighted, losses.truncated_importance_weights, cap=4.0)
  CLOSE(_off_policy(truncated), EXACT)
  uncorrected = _off_policy(lambda x, old, a: losses.reinforce_loss(x, a))
  CLOSE(uncorrected, (MU * ADVANTAGES) @ _scores())
  assert np.abs(uncorrected - EXACT).max() > 0.05


def _weighted(weights, logprobs, sampler_logprobs, advantages, **settings):
  weight = weights(logprobs, sampler_logprobs, **settings)
  return weight * losses.reinforce_loss(logprobs, advantages)


def test_the_clip_of_ppo_drops_the_arms_it_clips():
  gradient = _off_policy(functools.partial(losses.ppo_policy_loss, clip_eps=0.2))
  clipped = ((ADVANTAGES > 0) & (RATIO > 1.2)) | ((ADVANTAGES < 0) & (RATIO < 0.8))
  assert clipped.tolist() == [True, False, False, True]
  CLOSE(gradient - EXACT, -(PI * ADVANTAGES * clipped) @ _scores())
  # Its sign: less is learned along the exact gradient.
  assert (gradient - EXACT) @ EXACT < -0.1 * (EXACT @ EXACT)


@pytest.mark.parametrize("cap", [1.5, 2.0])
def test_the_caps_of_cispo_and_truncation_lack_the_excess(cap):
  lacking = -(np.maximum(PI - cap * MU, 0.0) * ADVANTAGES) @ _scores()
  assert np.abs(lacking).max() > 0.1 * np.abs(EXACT).max()
  truncated = functools.partial(_weighted, losses.truncated_importance_weights, cap=cap)
  cispo = functools.partial(losses.cispo_loss, clip_eps_high=cap - 1.0)
  for loss in (truncated, cispo):
    CLOSE(_off_policy(loss) - EXACT, lacking)


def test_masking_lacks_all_of_an_arm_outside_its_bounds():
  masked = functools.partial(_weighted, losses.masked_importance_weights, low=0.4, high=2.0)
  outside = (RATIO < 0.4) | (RATIO > 2.0)
  assert outside.tolist() == [True, False, False, True]
  CLOSE(_off_policy(masked) - EXACT, -(PI * ADVANTAGES * outside) @ _scores())


# The KL in the loss.


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_loss_has_the_value_asked_for_and_the_gradient_of_the_reverse_kl(kind):
  """On policy, and with π_old off policy; k1 and k3 as they stand are the negative controls."""
  ref = _log_softmax(np.array([0.5, 0.5, -1.0, 0.0]))
  difference = LOGPI - ref
  reverse = (PI * difference) @ _scores()
  ref32 = np.asarray(ref, np.float32)[:, None]
  on_policy = functools.partial(_expected_kl, PI, lambda x: losses.kl_loss(x, ref32, kind=kind))
  value, gradient = on_policy()
  expected = {"k1": difference, "k2": difference**2 / 2, "k3": np.expm1(-difference) + difference}
  CLOSE(value, PI @ expected[kind])
  CLOSE(gradient, reverse)
  old = np.asarray(LOGMU, np.float32)[:, None]
  value, gradient = _expected_kl(MU, lambda x: losses.kl_loss(x, ref32, old, kind=kind))
  CLOSE(value, PI @ expected[kind])
  CLOSE(gradient, reverse)
  _, naive = _expected_kl(PI, lambda x: losses.kl_estimate(x, ref32, kind=kind))
  forward = PI - np.exp(ref)  # of KL(π_ref ‖ π) in θ
  CLOSE(naive, {"k1": 0.0 * reverse, "k2": reverse, "k3": forward}[kind])
  assert np.abs(forward - reverse).max() > 0.25 * np.abs(reverse).max()


def _expected_kl(probability, loss):
  def total(theta):
    return jnp.sum(probability * loss(jax.nn.log_softmax(theta)[:, None])[:, 0])

  return jax.value_and_grad(total)(jnp.asarray(THETA, jnp.float32))


def test_k3_times_a_differentiated_ratio_is_the_same_gradient():
  ref, old = (np.asarray(_log_softmax(x), np.float32)[:, None] for x in (np.arange(4.0), LOGMU))

  def product(x):
    return losses.probability_ratio(x, old) * losses.kl_estimate(x, ref, kind="k3")

  at = np.asarray(LOGPI, np.float32)[:, None]
  for loss in (product, lambda x: losses.kl_loss(x, ref, old, kind="k3")):
    gradient = jax.grad(lambda x, loss=loss: loss(x).sum())(at)
    CLOSE(gradient[:, 0], RATIO * (LOGPI - ref[:, 0]))


# The task of two steps: after arm 0 or 1 comes one of two more, arm 2 is the end.

PATHS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
MASK = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]], np.float32)
RETURNS = np.array([1.0, -0.6, 0.3, 0.5, 0.8])
WEIGHTS = np.array([0.3, -0.2, 0.4, 0.5, -0.5, -0.1, 0.6])  # 3 logits, and 2 after arm 0, 2 after 1
REF_WEIGHTS = np.array([-0.2, 0.4, 0.0, -0.4, 0.3, 0.5, 0.1])


def _paths(weights):
  """log π of the tokens [5, 2], its gradient [5, 2, 7], and the probability of the paths [5]."""
  first, second = _log_softmax(weights[:3]), _log_softmax(weights[3:].reshape(2, 2))
  logprobs, scores = np.zeros((5, 2)), np.zeros((5, 2, 7))
  for i, (a, b) in enumerate(PATHS):
    logprobs[i, 0] = first[a]
    scores[i, 0, :3] = np.eye(3)[a] - np.exp(first)
    if a < 2:
      logprobs[i, 1] = second[a, b]
      scores[i, 1, 3 + 2 * a : 5 + 2 * a] = np.eye(2)[b] - np.exp(second[a])
  return logprobs, scores, np.exp(logprobs.sum(1))


LOGPROBS, SCORES, CHANCE = _paths(WEIGHTS)
REF_LOGPROBS = _paths(REF_WEIGHTS)[0]
EXACT_TWO = np.einsum("i,itk->k", CHANCE * RETURNS, SCORES)
LENGTHS = MASK.sum(1)


def _model(weights):
  """log π of the tokens [5, 2], differentiable; what is off the mask is arbitrary."""
  first = jax.nn.log_softmax(weights[:3])[PATHS[:, 0]]
  second = jax.nn.log_softmax(weights[3:].reshape(2, 2))[PATHS[:, 0] % 2, PATHS[:, 1]]
  return jnp.stack([first, second], axis=1)


def _expected(loss, size=1):
  """Minus the expected gradient of loss(logprobs [size, 2], paths [size]), summed over all groups."""
  groups = np.array(list(itertools.product(range(5), repeat=size)))
  chance = CHANCE[groups].prod(axis=1)
  assert chance.sum() == pytest.approx(1.0)

  def total(weights):
    return jnp.sum(chance * jax.vmap(loss)(_model(weights)[groups], groups))

  return -np.asarray(jax.grad(total)(jnp.asarray(WEIGHTS, jnp.float32)))


def _mean(token_losses, paths, over, max_length=None):
  mask = jnp.asarray(MASK)[paths]
  return losses.aggregate(token_losses, mask, over=over, max_length=max_length).compute()


def _surrogate(advantages, over="constant", max_length=1):
  """REINFORCE with advantages(paths [size]) -> [size], the same for all tokens of a response."""

  def loss(logprobs, paths):
    repeated = jnp.broadcast_to(advantages(paths)[:, None], logprobs.shape)
    return _mean(losses.reinforce_loss(logprobs, repeated), paths, over, max_length)

  return loss


def _scored(paths):
  return jnp.asarray(RETURNS, jnp.float32)[paths]


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_and_dr_grpo_over_two_steps(size):
  rloo = _expected(_surrogate(lambda paths: losses.rloo_advantages(_scored(paths)[None])[0]), size)
  CLOSE(rloo, EXACT_TWO)
  centred = _surrogate(
    lambda paths: losses.dr_grpo_advantages(_scored(paths)[None])[0], max_length=2
  )
  CLOSE(_expected(centred, size), EXACT_TWO * (size - 1) / size / 2)


def test_returns_to_go_with_the_kl_in_the_reward_have_the_exact_gradient():
  beta = 0.7
  log_ratio = ((LOGPROBS - REF_LOGPROBS) * MASK).sum(1)
  exact = np.einsum("i,itk->k", CHANCE * (RETURNS - beta * log_ratio), SCORES)
  rewards = losses.kl_shaped_rewards(RETURNS, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=beta)
  to_go = losses.returns_to_go(rewards, MASK)
  CLOSE(_expected(_of_tokens(to_go)), exact)
  assert np.abs(exact - EXACT_TWO).max() > 0.02


def _of_tokens(advantages):
  def loss(logprobs, paths):
    token_losses = losses.reinforce_loss(logprobs, advantages[paths])
    return _mean(token_losses, paths, "constant", 1)

  return loss


def test_gae_with_any_critic_at_lambda_one_and_with_the_true_one_at_any():
  rewards = losses.kl_shaped_rewards(RETURNS, LOGPROBS, LOGPROBS, MASK, kl_coef=0.0)
  after = [np.average(RETURNS[i], weights=CHANCE[i]) for i in ([0, 1], [2, 3])]
  true = np.stack([np.full(5, CHANCE @ RETURNS), [after[0]] * 2 + [after[1]] * 2 + [0.0]], axis=1)
  wrong = np.stack([np.full(5, 0.4), [-1.0] * 2 + [2.0] * 2 + [0.0]], axis=1)
  gradient = {}
  for name, values in (("true", true), ("wrong", wrong)):
    for lam in (0.0, 0.5, 1.0):
      advantages, _ = losses.gae(rewards, values, MASK, gamma=1.0, lam=lam)
      gradient[name, lam] = _expected(_of_tokens(advantages))
  for unbiased in (("true", 0.0), ("true", 0.5), ("true", 1.0), ("wrong", 1.0)):
    CLOSE(gradient[unbiased], EXACT_TWO)
  # At λ = 0 the first token is credited with the critic's opinion of the second state.
  believed = wrong[:, 1] * (LENGTHS > 1) + RETURNS * (LENGTHS == 1)
  expected = np.einsum("i,ik->k", CHANCE * believed, SCORES[:, 0])
  expected += np.einsum("i,ik->k", CHANCE * RETURNS, SCORES[:, 1])
  CLOSE(gradient["wrong", 0.0], expected)
  assert np.abs(expected - EXACT_TWO).max() > 0.1


def test_what_each_aggregation_does_to_responses_of_two_lengths():
  """A constant divisor only scales; a mean over the response halves what the longer ones teach."""
  one = jnp.float32(CHANCE @ RETURNS)

  def gradient(**how):
    return _expected(_surrogate(lambda paths: _scored(paths) - one, **how))

  CLOSE(gradient(over="constant", max_length=2), EXACT_TWO / 2)
  centred = RETURNS - CHANCE @ RETURNS
  halved = np.einsum("i,itk->k", CHANCE * centred / LENGTHS, SCORES)
  CLOSE(gradient(over="sequence", max_length=None), halved)
  # The end pays more than the mean here, and the short path that takes it counts double.
  assert halved[2] / np.abs(halved[:2]).sum() > EXACT_TWO[2] / np.abs(EXACT_TWO[:2]).sum()
  assert _cosine(halved, EXACT_TWO) < 0.99


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_over_the_tokens_of_a_batch_is_biased_by_its_lengths(size):
  def rloo(paths):
    return losses.rloo_advantages(_scored(paths)[None])[0]

  expected = np.zeros(7)
  for group in itertools.product(range(5), repeat=size):
    group = list(group)
    for i, path in enumerate(group):
      others = group[:i] + group[i + 1 :]
      advantage = RETURNS[path] - RETURNS[others].mean()
      share = CHANCE[group].prod() * advantage / LENGTHS[group].sum()
      expected += share * SCORES[path].sum(0)
  gradient = _expected(_surrogate(rloo, over="token", max_length=None), size)
  CLOSE(gradient, expected)
  assert _cosine(gradient, EXACT_TWO) < 1 - 1e-4


def _cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_gspo_on_policy_is_the_mean_over_each_response():
  old = jnp.asarray(LOGPROBS, jnp.float32)

  def loss(logprobs, paths):
    mask = jnp.asarray(MASK)[paths]
    return losses.gspo_loss(logprobs, old[paths], _scored(paths), mask, clip_eps=0.2).mean()

  CLOSE(_expected(loss), np.einsum("i,itk->k", CHANCE * RETURNS / LENGTHS, SCORES))


def test_a_kl_per_token_misses_what_a_token_does_to_later_states():
  difference = (LOGPROBS - REF_LOGPROBS) * MASK
  exact = np.einsum("i,itk->k", CHANCE * difference.sum(1), SCORES)
  at_states = np.einsum("it,itk->k", CHANCE[:, None] * difference, SCORES)
  later = np.einsum("i,ik->k", CHANCE * difference[:, 1], SCORES[:, 0])
  np.testing.assert_allclose(at_states + later, exact, atol=1e-12)
  assert np.abs(later).max() > 0.02
  ref = jnp.asarray(REF_LOGPROBS, jnp.float32)

  def of_tokens(logprobs, paths):
    return _mean(losses.kl_loss(logprobs, ref[paths], kind="k1"), paths, "constant", 1)

  def of_sums(logprobs, paths):
    mask = jnp.asarray(MASK)[paths]
    sums = [losses.masked_sum(x, mask, axis=1)[:, None] for x in (logprobs, ref[paths])]
    return jnp.sum(losses.kl_loss(*sums, kind="k2"))

  CLOSE(-_expected(of_tokens), at_states)
  CLOSE(-_expected(of_sums), exact)
