"""Tests of the losses that look inside the responses: LD-DPO, Step-DPO, TDPO, and WPO's weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import preference, token_level

LD_DPO = functools.partial(token_level.ld_dpo_loss, beta=0.1)
STEP_DPO = functools.partial(token_level.step_dpo_loss, beta=0.1)
TDPO = functools.partial(token_level.tdpo_loss, beta=0.1, alpha=0.5)
B, T = 6, 9


@pytest.fixture(scope="module")
def tokens():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(-2.0, 1.0, (B, T)).astype(np.float32) for _ in range(4))


@pytest.fixture(scope="module")
def masks():
  """With holes and at many offsets; row 0 has equal lengths, row 1 an empty rejected response."""
  rng = np.random.default_rng(1)
  chosen, rejected = (rng.random((2, B, T)) < 0.6).astype(np.float32)
  rejected[0] = chosen[0, ::-1]
  rejected[1] = 0.0
  return chosen, rejected


def _log_loss(x):  # -log σ(x), in float64
  return np.logaddexp(0.0, -x)


def _sums(tokens, masks):
  return tuple((x * masks[i % 2]).sum(axis=1) for i, x in enumerate(tokens))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo_against_a_loop_over_tokens(tokens, masks, alpha):
  chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in tokens)
  expected = []
  for row in range(B):
    ratios = [
      (chosen - ref_chosen)[row][masks[0][row] > 0],
      (rejected - ref_rejected)[row][masks[1][row] > 0],
    ]
    public = min(len(x) for x in ratios)
    a, b = (x[:public].sum() + alpha * x[public:].sum() for x in ratios)
    expected.append(_log_loss(0.1 * (a - b)))
  np.testing.assert_allclose(LD_DPO(*tokens, *masks, alpha=alpha), expected, rtol=1e-4)


def test_ld_dpo_between_its_ends(tokens, masks):
  full = LD_DPO(*tokens, *masks, alpha=1.0)
  np.testing.assert_allclose(full, preference.dpo_loss(*_sums(tokens, masks), beta=0.1), rtol=1e-5)
  public = LD_DPO(*tokens, *masks, alpha=0.0)
  # Equal lengths do not depend on α, others do; nothing is public where one response is empty.
  is_even = masks[0].sum(axis=1) == masks[1].sum(axis=1)
  assert is_even[0] and not np.all(is_even)
  np.testing.assert_array_equal(public == full, is_even)
  np.testing.assert_allclose(public[1], np.log(2.0), rtol=1e-6)
  # Unlike TRL's, it starts at ln 2: the reference is weighted like the policy.
  np.testing.assert_allclose(
    LD_DPO(*tokens[:2], *tokens[:2], *masks, alpha=0.3), np.log(2.0), rtol=1e-6
  )


def test_ld_dpo_gives_a_private_token_alpha_of_the_gradient_of_a_public_one(tokens):
  masks = np.ones((B, T)), np.arange(T) < np.full((B, 1), 4)
  gradient = jax.grad(lambda c: LD_DPO(c, *tokens[1:], *masks, alpha=0.3).sum())(tokens[0])
  np.testing.assert_allclose(gradient[:, 4:], 0.3 * gradient[:, :1] * np.ones(T - 4), rtol=1e-5)
  np.testing.assert_allclose(gradient[:, :4], gradient[:, :1] * np.ones(4), rtol=1e-5)


def test_step_dpo_is_dpo_on_the_step(tokens, masks):
  np.testing.assert_allclose(
    STEP_DPO(*tokens, *masks), preference.dpo_loss(*_sums(tokens, masks), beta=0.1), rtol=1e-5
  )
  everything = np.ones((B, T)), np.ones((B, T))
  np.testing.assert_allclose(
    STEP_DPO(*tokens, *everything),
    preference.dpo_loss(*(x.sum(axis=1) for x in tokens), beta=0.1),
    rtol=1e-5,
  )


def test_a_prefix_that_both_share_cancels(tokens):
  chosen, rejected, ref_chosen, ref_rejected = (x.copy() for x in tokens)
  rejected[:, :4], ref_rejected[:, :4] = chosen[:, :4], ref_chosen[:, :4]
  shared = chosen, rejected, ref_chosen, ref_rejected
  whole, step = np.ones((B, T)), np.broadcast_to(np.arange(T) >= 4, (B, T))
  np.testing.assert_allclose(
    STEP_DPO(*shared, whole, whole), STEP_DPO(*shared, step, step), rtol=1e-4
  )
  assert np.all(STEP_DPO(*shared, whole, step) != STEP_DPO(*shared, step, step))


@pytest.mark.parametrize("loss", [functools.partial(LD_DPO, alpha=0.3), STEP_DPO])
def test_what_lies_off_the_mask_is_never_read(tokens, masks, loss):
  poisoned = [np.where(masks[i % 2] > 0, x, np.nan) for i, x in enumerate(tokens)]
  np.testing.assert_array_equal(loss(*poisoned, *masks), loss(*tokens, *masks))
  gradients = jax.grad(lambda c, r: loss(c, r, *poisoned[2:], *masks).sum(), (0, 1))(*poisoned[:2])
  for gradient, mask in zip(gradients, masks):
    np.testing.assert_array_equal(gradient != 0, mask > 0)


def _four_and_kls():
  rng = np.random.default_rng(2)
  four = [rng.normal(-40.0, 5.0, B).astype(np.float32) for _ in range(4)]
  return four, [rng.uniform(0.0, 9.0, B).astype(np.float32) for _ in range(2)]


def test_tdpo_against_numpy_and_dpo():
  four, (chosen_kl, rejected_kl) = _four_and_kls()
  chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in four)
  difference = (chosen - ref_chosen) - (rejected - ref_rejected)
  np.testing.assert_allclose(
    TDPO(*four, chosen_kl, rejected_kl),
    _log_loss(0.1 * difference - 0.5 * 0.1 * (rejected_kl - chosen_kl)),
    rtol=1e-4,
  )
  dpo = preference.dpo_loss(*four, beta=0.1)
  np.testing.assert_allclose(TDPO(*four, np.zeros(B), np.zeros(B)), dpo, rtol=1e-6)
  np.testing.assert_allclose(TDPO(*four, chosen_kl, rejected_kl, alpha=0.0), dpo, rtol=1e-6)
  np.testing.assert_allclose(
    TDPO(*four[:2], *four[:2], chosen_kl, chosen_kl), np.log(2.0), rtol=1e-6
  )


def test_tdpo_learns_from_the_kl_of_the_rejected_and_of_the_chosen_only_if_asked():
  four, kls = _four_and_kls()

  def gradients(**options):
    return jax.grad(lambda *k: TDPO(*four, *k, **options).sum(), (0, 1))(*kls)

  chosen, rejected = gradients()
  np.testing.assert_array_equal(chosen, 0.0)
  assert np.all(rejected > 0.0)  # a policy that strays on what it rejects pays for it
  chosen, rejected = gradients(alpha=1.0, detach_chosen=False)
  np.testing.assert_allclose(chosen, -rejected, rtol=1e-6)
  np.testing.assert_array_equal(
    TDPO(*four, *kls, detach_chosen=False), TDPO(*four, *kls, detach_chosen=True)
  )


def _wpo_arrays(logits, tokens):
  logp = np.asarray(jax.nn.log_softmax(logits))
  chosen = np.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
  return chosen, np.log(np.exp(2.0 * logp).sum(axis=-1))


def test_wpo_weight_against_numpy(masks):
  rng = np.random.default_rng(3)
  sides = [
    _wpo_arrays(rng.normal(0.0, 1.5, (B, T, 11)), rng.integers(0, 11, (B, T))) for _ in range(2)
  ]
  log_weight = np.zeros(B)
  for (logprobs, collision), mask in zip(sides, masks):
    for row in range(B):
      on = mask[row] > 0
      log_weight[row] += (logprobs - collision)[row][on].mean() if on.any() else 0.0
  (chosen, chosen_collision), (rejected, rejected_collision) = sides
  # Off the masks there may be anything.
  chosen, rejected = (np.where(m > 0, x, np.nan) for x, m in zip((chosen, rejected), masks))
  weight = token_level.wpo_weight(chosen, rejected, chosen_collision, rejected_collision, *masks)
  np.testing.assert_allclose(weight, np.minimum(1.0, np.exp(log_weight)), rtol=1e-4)
  assert 0.0 < weight.min() < 0.9


def _weight(chosen, rejected):
  """wpo_weight of pairs of (logprobs, collision)."""
  mask = np.ones((B, T))
  return token_level.wpo_weight(chosen[0], rejected[0], chosen[1], rejected[1], mask, mask)


def test_wpo_weighs_what_the_policy_would_write_1_and_what_it_would_not_less():
  tokens = np.random.default_rng(4).integers(0, 11, (B, T))
  uniform = _wpo_arrays(np.zeros((B, T, 11)), tokens)
  np.testing.assert_allclose(_weight(uniform, uniform), 1.0, rtol=1e-5)
  sure = _wpo_arrays(50.0 * np.eye(11)[tokens], tokens)
  np.testing.assert_allclose(_weight(sure, uniform), 1.0, rtol=1e-5)
  # A greedy response of an uncertain policy is above 1 and capped.
  greedy = _wpo_arrays(np.eye(11)[tokens], tokens)
  assert np.all(greedy[0] > greedy[1])
  np.testing.assert_array_equal(_weight(greedy, greedy), 1.0)
  # Tokens it would never write: e⁻⁵⁰ on one side.
  foreign = _wpo_arrays(50.0 * np.eye(11)[(tokens + 1) % 11], tokens)
  np.testing.assert_allclose(_weight(foreign, sure), np.exp(-50.0), rtol=1e-3)
  np.testing.assert_allclose(_weight(uniform, foreign), np.exp(-50.0), rtol=1e-3)


def test_wpo_weight_is_a_constant_in_float32_and_checks_its_shapes(tokens):
  one = jnp.ones((B, T))

  def weight(chosen, rejected=tokens[1]):
    return token_level.wpo_weight(chosen, rejected, tokens[2], tokens[3], one, one)

  np.testing.assert_array_equal(jax.grad(lambda x: weight(x).sum())(tokens[0]), 0.0)
  np.testing.assert_allclose(jax.jit(weight)(tokens[0]), weight(tokens[0]), rtol=1e-5)
  assert weight(jnp.asarray(tokens[0], jnp.bfloat16)).dtype == jnp.float32
  for end in (1e4, -1e4):
    assert np.all(np.isfinite(weight(np.full((B, T), end))))
  with pytest.raises(ValueError, match="wpo_weight: policy_chosen_logprobs must have rank 2"):
    weight(tokens[0][0])
  with pytest.raises(ValueError, match="wpo_weight: .*one shape"):
    weight(tokens[0][:2])
