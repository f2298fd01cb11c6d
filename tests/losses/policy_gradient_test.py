"""Tests of the policy-gradient losses: loops in NumPy, identities, and exact expectations.

The expectations are sums over everything that can be sampled: the arms of a bandit, or the five
trajectories of a task of two steps, where arm 2 ends the episode after its first token.
"""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax import losses
from align_jax.losses import policy_gradient

GSPO = functools.partial(policy_gradient.gspo_loss, clip_eps=0.2, clip_eps_high=0.3)
GSPO_TOKEN = functools.partial(policy_gradient.gspo_token_loss, clip_eps=0.2, clip_eps_high=0.3)
CISPO = functools.partial(policy_gradient.cispo_loss, clip_eps_high=0.5)
HOLES = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8], np.float32)


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=(3, 8)).astype(np.float32) for _ in range(4))


@pytest.fixture(scope="module")
def of_response():
  return np.array([1.5, -0.7, 2.0], np.float32)


def _gradient(loss, at):
  return np.asarray(jax.grad(lambda x: jnp.sum(loss(x)))(jnp.asarray(at, jnp.float32)))


def _clipped(ratio, advantage, low, high):
  return -min(ratio * advantage, min(max(ratio, low), high) * advantage)


# Loops and closed forms.


def test_reinforce_is_minus_advantage_times_logprob(arrays):
  logprobs, advantages, _, _ = arrays
  result = policy_gradient.reinforce_loss(logprobs, advantages)
  np.testing.assert_allclose(result, -advantages * logprobs, rtol=1e-6)
  np.testing.assert_array_equal(
    _gradient(lambda x: policy_gradient.reinforce_loss(x, advantages), logprobs), -advantages
  )


def test_cispo_against_a_loop(arrays):
  new, old, advantages, _ = arrays
  value, gradient = np.zeros((2, 3, 8))
  for i in np.ndindex(3, 8):
    weight = min(max(np.exp(new[i] - old[i]), 0.9), 1.5)
    gradient[i] = -weight * advantages[i]
    value[i] = gradient[i] * new[i]
  loss = functools.partial(CISPO, clip_eps=0.1)
  np.testing.assert_allclose(loss(new, old, advantages), value, rtol=1e-5)
  np.testing.assert_allclose(
    _gradient(lambda x: loss(x, old, advantages), new), gradient, rtol=1e-5
  )
  without = CISPO(new, old, advantages)  # no lower bound
  weight = np.minimum(np.exp(new - old), 1.5)
  np.testing.assert_allclose(without, -weight * advantages * new, rtol=1e-5)


def test_gspo_against_a_loop(arrays, of_response):
  new, old, per_token, _ = arrays
  value, tokens = np.zeros(3), np.zeros((3, 8))
  for row in range(2):  # row 2 is an empty response
    on = [t for t in range(8) if HOLES[row, t]]
    ratio = np.exp(sum(new[row, t] - old[row, t] for t in on) / len(on))
    value[row] = _clipped(ratio, of_response[row], 0.8, 1.3)
    for t in on:
      tokens[row, t] = _clipped(ratio, per_token[row, t], 0.8, 1.3)
  np.testing.assert_allclose(GSPO(new, old, of_response, HOLES), value, rtol=1e-5)
  np.testing.assert_allclose(GSPO_TOKEN(new, old, per_token, HOLES), tokens, rtol=1e-5)


def test_entropy_against_a_loop_and_at_its_ends():
  logits = np.random.default_rng(3).normal(size=(2, 3, 5))
  expected = np.zeros((2, 3))
  for i in np.ndindex(2, 3):
    p = np.exp(logits[i]) / np.exp(logits[i]).sum()
    expected[i] = -sum(x * np.log(x) for x in p)
  np.testing.assert_allclose(policy_gradient.token_entropy(logits), expected, rtol=1e-5)
  assert policy_gradient.token_entropy(np.full(7, 3.0)) == pytest.approx(np.log(7), rel=1e-6)
  ends = jnp.array([[0.0, -jnp.inf, 0.0], [1e4, -1e4, 0.0]])
  np.testing.assert_allclose(policy_gradient.token_entropy(ends), [np.log(2), 0.0], atol=1e-6)
  assert np.all(np.isfinite(_gradient(policy_gradient.token_entropy, ends)))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  closed = -p * (np.log(p) + expected[..., None])  # of H in the logits
  np.testing.assert_allclose(
    _gradient(policy_gradient.token_entropy, logits), closed, rtol=1e-4, atol=1e-6
  )


def test_aggregation_against_a_loop(arrays):
  x = arrays[0]
  poisoned = np.where(HOLES > 0, x, np.nan)
  rows = [[x[row, t] for t in range(8) if HOLES[row, t]] for row in range(2)]
  lengths = [len(row) for row in rows]
  expected = {
    "sequence": (sum(sum(row) / len(row) for row in rows), 2),
    "token": (sum(map(sum, rows)), sum(lengths)),
    "constant": (sum(map(sum, rows)), 2 * 100),
  }
  for over, (total, weight) in expected.items():
    length = 100 if over == "constant" else None
    mean = policy_gradient.aggregate(poisoned, HOLES, over=over, max_length=length)
    np.testing.assert_allclose([mean.total, mean.weight], [total, weight], rtol=1e-5)
    halves = [
      policy_gradient.aggregate(poisoned[part], HOLES[part], over=over, max_length=length)
      for part in (slice(1), slice(1, 3))
    ]
    np.testing.assert_allclose((halves[0] + halves[1]).compute(), total / weight, rtol=1e-5)
    nothing = policy_gradient.aggregate(x, np.zeros((3, 8)), over=over, max_length=length)
    assert float(nothing.weight) == 0 and float(nothing.compute()) == 0

    def mean_of(x, over=over, length=length):
      return policy_gradient.aggregate(x, HOLES, over=over, max_length=length).compute()

    gradient = _gradient(mean_of, x)
    share = {"sequence": 1 / (2 * np.array([*lengths, 1])), "token": 1 / 12, "constant": 1 / 200}
    np.testing.assert_allclose(gradient, HOLES * np.reshape(share[over], (-1, 1)), rtol=1e-5)


def test_with_one_length_all_aggregations_agree(arrays):
  mask = np.ones((3, 8))
  means = [
    policy_gradient.aggregate(arrays[0], mask, over=over, max_length=length).compute()
    for over, length in (("sequence", None), ("token", None), ("constant", 8))
  ]
  np.testing.assert_allclose(means, np.mean(arrays[0]), rtol=1e-5)
  assert float(losses.Mean.of(arrays[0], mask).compute()) == pytest.approx(float(means[1]))


# Identities.


def test_at_ratio_one_every_loss_has_the_policy_gradient(arrays, of_response):
  logprobs, advantages, _, _ = arrays
  expected = _gradient(lambda x: policy_gradient.reinforce_loss(x, advantages), logprobs)
  ppo = functools.partial(losses.ppo_policy_loss, clip_eps=0.2)
  for loss in (ppo, CISPO):
    gradient = _gradient(lambda x, loss=loss: loss(x, logprobs, advantages), logprobs)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
  token = _gradient(lambda x: GSPO_TOKEN(x, logprobs, advantages, HOLES), logprobs)
  np.testing.assert_allclose(token, expected * HOLES, rtol=1e-6)

  def grpo(x):
    repeated = jnp.broadcast_to(of_response[:, None], x.shape)
    loss = policy_gradient.reinforce_loss(x, repeated)
    return policy_gradient.aggregate(loss, HOLES, over="sequence").total

  sequence = _gradient(lambda x: GSPO(x, logprobs, of_response, HOLES), logprobs)
  np.testing.assert_allclose(sequence, _gradient(grpo, logprobs), rtol=1e-5)


def test_gspo_of_single_tokens_is_ppo(arrays):
  new, old, advantages, _ = (x.reshape(-1, 1) for x in arrays)
  one = np.ones_like(new)

  def ppo(x):
    return losses.ppo_policy_loss(x, old, advantages, clip_eps=0.2, clip_eps_high=0.3)

  def gspo(x):
    return GSPO(x, old, advantages[:, 0], one)[:, None]

  def by_token(x):
    return GSPO_TOKEN(x, old, advantages, one)

  for loss in (gspo, by_token):
    np.testing.assert_allclose(loss(new), ppo(new), rtol=1e-5)
    np.testing.assert_allclose(_gradient(loss, new), _gradient(ppo, new), rtol=1e-5)


def test_gspo_by_token_is_gspo_where_a_response_has_one_advantage(arrays, of_response):
  new, old, _, _ = arrays
  near = old + 0.1 * new  # some clipped, some not

  def of_tokens(x):
    repeated = jnp.broadcast_to(of_response[:, None], x.shape)
    return losses.masked_mean(GSPO_TOKEN(x, old, repeated, HOLES), HOLES, axis=1)

  def whole(x):
    return GSPO(x, old, of_response, HOLES)

  for at in (near, new):
    np.testing.assert_allclose(of_tokens(at), whole(at), rtol=1e-5)
    np.testing.assert_allclose(_gradient(of_tokens, at), _gradient(whole, at), rtol=1e-5)
  assert np.any(_gradient(whole, near) != 0)


def test_gspo_clips_a_response_as_one(arrays):
  old = np.zeros((1, 2), np.float32)
  apart = np.array([[2.0, -2.0]], np.float32)  # ratios 7.4 and 0.14, of the response 1
  gradient = _gradient(lambda x: GSPO(x, old, np.ones(1), np.ones((1, 2))), apart)
  np.testing.assert_allclose(gradient, [[-0.5, -0.5]], rtol=1e-6)
  gradient = _gradient(lambda x: GSPO(x, old, np.ones(1), np.ones((1, 2))), apart + 0.3)
  np.testing.assert_array_equal(gradient, 0.0)


def test_cispo_keeps_the_gradient_that_ppo_cuts():
  new, old, advantage = np.log([[2.0]]), np.zeros((1, 1)), np.ones((1, 1))
  ppo = functools.partial(losses.ppo_policy_loss, clip_eps=0.5)
  assert _gradient(lambda x: ppo(x, old, advantage), new) == 0.0
  assert _gradient(lambda x: CISPO(x, old, advantage), new) == pytest.approx(-1.5)


# Hygiene.


def _calls(arrays, of_response):
  new, old, advantages, ref = arrays
  return {
    "reinforce": (lambda x: policy_gradient.reinforce_loss(x, advantages), new),
    "cispo": (lambda x: CISPO(x, old, advantages), new),
    "gspo": (lambda x: GSPO(x, old, of_response, HOLES), new),
    "gspo_token": (lambda x: GSPO_TOKEN(x, old, advantages, HOLES), new),
    "kl": (lambda x: policy_gradient.kl_loss(x, ref, kind="k3"), new),
    "kl_old": (lambda x: policy_gradient.kl_loss(x, ref, old, kind="k3"), new),
    "token_entropy": (policy_gradient.token_entropy, new),
    "aggregate": (
      lambda x: policy_gradient.aggregate(x, HOLES, over="sequence").compute(),
      new,
    ),
  }


def test_float32_the_same_when_compiled_and_finite_at_extremes(arrays, of_response):
  for name, (call, new) in _calls(arrays, of_response).items():
    assert call(jnp.asarray(new, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(call)(new), call(new), rtol=1e-5, atol=1e-6)
    for end in (-1e4, 1e4):
      far = np.full_like(new, end)
      assert np.all(np.isfinite(call(far))), name
      assert np.all(np.isfinite(_gradient(call, far))), name


def test_the_gradient_of_gspo_and_entropy_is_that_of_finite_differences(arrays, of_response):
  """The others are surrogates: their gradient is not that of their value."""
  calls = _calls(arrays, of_response)
  for name in ("reinforce", "gspo", "token_entropy", "aggregate"):
    call, new = calls[name]
    jax.test_util.check_grads(call, (new,), 1, ["rev"], rtol=2e-2, atol=2e-3, eps=1e-3)


def test_only_the_new_logprobs_are_differentiated(arrays, of_response):
  new, old, advantages, ref = arrays
  calls = [
    (policy_gradient.reinforce_loss, (new, advantages)),
    (CISPO, (new, old, advantages)),
    (lambda *x: GSPO(*x, HOLES), (new, old, of_response)),
    (lambda *x: GSPO_TOKEN(*x, HOLES), (new, old, advantages)),
    (functools.partial(policy_gradient.kl_loss, kind="k3"), (new, ref, old)),
  ]
  for call, arguments in calls:
    others = tuple(range(1, len(arguments)))
    gradients = jax.grad(lambda *x, call=call: call(*x).sum(), others)(*arguments)
    assert all(not np.any(g) for g in gradients)


def test_nothing_off_the_mask_is_read(arrays, of_response):
  new, old, advantages, _ = arrays
  poison = functools.partial(np.where, HOLES > 0)
  bad_new, bad_old = poison(new, np.nan), poison(old, np.nan)
  pairs = [
    (lambda x, o: GSPO(x, o, of_response, HOLES), new, bad_new),
    (lambda x, o: GSPO_TOKEN(x, o, advantages, HOLES), new, bad_new),
  ]
  for call, good, bad in pairs:
    np.testing.assert_array_equal(call(good, old), call(bad, bad_old))
    np.testing.assert_array_equal(
      _gradient(lambda x, call=call: call(x, old), good),
      _gradient(lambda x, call=call: call(x, bad_old), bad),
    )


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: policy_gradient.reinforce_loss(x, x[0]), "^reinforce_loss: advantages must have"),
    (lambda x: policy_gradient.reinforce_loss(x, x[:, :2]), "^reinforce_loss: .*one shape"),
    (lambda x: CISPO(x, x, x[0]), "^cispo_loss: advantages must have rank 2"),
    (lambda x: CISPO(x, x, x, clip_eps=1.1), "^cispo_loss: clip_eps must be in"),
    (lambda x: policy_gradient.cispo_loss(x, x, x, clip_eps_high=-0.1), "clip_eps_high must be"),
    (lambda x: GSPO(x, x, x, x), "^gspo_loss: advantages must have rank 1"),
    (lambda x: GSPO(x, x, x[0], x), r"^gspo_loss: advantages must be \[B\]"),
    (lambda x: GSPO(x, x, x[:, 0], x[:, :2]), "^gspo_loss: .*one shape"),
    (lambda x: GSPO(x, x, x[:, 0], x, clip_eps=-0.1), "^gspo_loss: clip_eps must be in"),
    (lambda x: GSPO_TOKEN(x, x, x[0], x), "^gspo_token_loss: advantages must have rank 2"),
    (lambda x: GSPO_TOKEN(x, x, x, x, clip_eps_high=-0.1), "^gspo_token_loss: clip_eps_high must"),
    (lambda x: policy_gradient.kl_loss(x, x, kind="k4"), "k1, k2, k3"),
    (lambda x: policy_gradient.kl_loss(x, x[0], kind="k1"), "^kl_loss: ref_logprobs must have"),
    (lambda x: policy_gradient.kl_loss(x, x, x[0], kind="k1"), "^kl_loss: old_logprobs must have"),
    (lambda x: policy_gradient.aggregate(x, x, over="batch"), "over must be"),
    (lambda x: policy_gradient.aggregate(x, x, over="constant"), "max_length must be given"),
    (lambda x: policy_gradient.aggregate(x, x, over="token", max_length=9), "max_length must be"),
    (lambda x: policy_gradient.aggregate(x, x, over="constant", max_length=0), "must be positive"),
    (lambda x: policy_gradient.aggregate(x, x[:, :1], over="token"), "^aggregate: .*one shape"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros((2, 3), np.float32))
