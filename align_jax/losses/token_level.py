"""Preference losses that look inside the responses, and the weight of an off-policy pair.

Every [B, T] array is aligned with the tokens of one side's responses, chosen or rejected; a mask is 1
on the tokens that count and may have holes. What lies off a mask is never read.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs
from align_jax.losses.masked import masked_mean, masked_sum


def ld_dpo_loss(
  policy_chosen_logprobs: jax.Array,
  policy_rejected_logprobs: jax.Array,
  ref_chosen_logprobs: jax.Array,
  ref_rejected_logprobs: jax.Array,
  chosen_mask: jax.Array,
  rejected_mask: jax.Array,
  *,
  beta: float,
  alpha: float,
) -> jax.Array:
  """−log σ(βΔ), where a token beyond the length of the shorter response counts only α.

  Args:
    policy_chosen_logprobs: [B, T], log π of each token of y⁺.
    policy_rejected_logprobs: [B, T], of each token of y⁻.
    ref_chosen_logprobs: [B, T], log π_ref of each token of y⁺.
    ref_rejected_logprobs: [B, T], of each token of y⁻.
    chosen_mask: [B, T], 1 (or True) on the tokens of y⁺; holes take no place.
    rejected_mask: [B, T], the same for y⁻.
    beta: β > 0, the strength of the implied KL penalty.
    alpha: α in [0, 1]. 1 is `dpo_loss` on the sums, 0 cuts both to the shorter length.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the arrays are not all [B, T], or a hyper-parameter is out of range.

  References:
    Liu et al. 2024 (LD-DPO), https://arxiv.org/abs/2409.06411. Policy and reference are weighted
    alike, so that Δ is 0 where the two agree.
  """
  _check.positive("ld_dpo_loss", "beta", beta)
  _check.within("ld_dpo_loss", "alpha", alpha, "[0, 1]")
  chosen, rejected, chosen_on, rejected_on = _token_log_ratios(
    "ld_dpo_loss",
    policy_chosen_logprobs,
    policy_rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    chosen_mask=chosen_mask,
    rejected_mask=rejected_mask,
  )
  chosen_place, rejected_place = (jnp.cumsum(on, axis=1) for on in (chosen_on, rejected_on))
  shorter = jnp.minimum(chosen_place[:, -1:], rejected_place[:, -1:])
  chosen_weight = chosen_on * jnp.where(chosen_place > shorter, alpha, 1.0)
  rejected_weight = rejected_on * jnp.where(rejected_place > shorter, alpha, 1.0)
  difference = masked_sum(chosen, chosen_weight, axis=1)
  difference -= masked_sum(rejected, rejected_weight, axis=1)
  return _pairs.logistic(beta * difference)


def step_dpo_loss(
  policy_chosen_logprobs: jax.Array,
  policy_rejected_logprobs: jax.Array,
  ref_chosen_logprobs: jax.Array,
  ref_rejected_logprobs: jax.Array,
  chosen_step_mask: jax.Array,
  rejected_step_mask: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """−log σ(βΔ), with Δ summed over one step of reasoning: the first in which the rejected errs.

  Args:
    policy_chosen_logprobs: [B, T], log π of each token of the chosen reasoning.
    policy_rejected_logprobs: [B, T], of each token of the rejected one.
    ref_chosen_logprobs: [B, T], log π_ref of each token of the chosen reasoning.
    ref_rejected_logprobs: [B, T], of each token of the rejected one.
    chosen_step_mask: [B, T], 1 (or True) on the tokens of the step that is right. The steps before
      it, which both share, belong to the prompt.
    rejected_step_mask: [B, T], the same for the step that is wrong.
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the arrays are not all [B, T], or β is not positive.

  References:
    Lai et al. 2024 (Step-DPO), https://arxiv.org/abs/2406.18629.
  """
  _check.positive("step_dpo_loss", "beta", beta)
  chosen, rejected, chosen_on, rejected_on = _token_log_ratios(
    "step_dpo_loss",
    policy_chosen_logprobs,
    policy_rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    chosen_step_mask=chosen_step_mask,
    rejected_step_mask=rejected_step_mask,
  )
  difference = masked_sum(chosen, chosen_on, axis=1) - masked_sum(rejected, rejected_on, axis=1)
  return _pairs.logistic(beta * difference)


def tdpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  chosen_kl: jax.Array,
  rejected_kl: jax.Array,
  *,
  beta: float,
  alpha: float,
  detach_chosen: bool = True,
) -> jax.Array:
  """−log σ(βΔ − αβ·(K⁻ − K⁺)), with K = Σₜ KL(π_ref ‖ π) at the tokens of each response.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    chosen_kl: [B], K⁺ ≥ 0, nats: the forward KL over the vocabulary, summed over the tokens of y⁺.
    rejected_kl: [B], K⁻, the same for y⁻. Its gradient keeps the policy near on what it rejects.
    beta: β > 0, the strength of the implied KL penalty.
    alpha: α ≥ 0, the weight of the KL terms; the paper has 0.5.
    detach_chosen: whether K⁺ has no gradient. True is TDPO₂; False with α = 1 is TDPO₁.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the arrays are not all [B], or a hyper-parameter is out of range.

  References:
    Zeng et al. 2024, https://arxiv.org/abs/2404.11999.
  """
  _check.positive("tdpo_loss", "beta", beta)
  _check.within("tdpo_loss", "alpha", alpha, "[0, inf)")
  difference = _pairs.log_ratio_difference(
    "tdpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  chosen_kl, rejected_kl, _ = _check.as_floats(
    "tdpo_loss",
    1,
    chosen_kl=chosen_kl,
    rejected_kl=rejected_kl,
    policy_chosen_logps=policy_chosen_logps,
  )
  chosen_kl = jax.lax.stop_gradient(chosen_kl) if detach_chosen else chosen_kl
  return _pairs.logistic(beta * (difference - alpha * (rejected_kl - chosen_kl)))


def wpo_weight(
  policy_chosen_logprobs: jax.Array,
  policy_rejected_logprobs: jax.Array,
  chosen_collision: jax.Array,
  rejected_collision: jax.Array,
  chosen_mask: jax.Array,
  rejected_mask: jax.Array,
) -> jax.Array:
  """min(1, w⁺·w⁻), w = exp(meanₜ(log π(yₜ) − log Σᵥ π(v)²)): how on-policy a pair is.

  Σᵥ π(v)² is the expected probability of a token that the policy draws itself, so a response that
  it could have written has a weight near 1, whatever its entropy.

  Args:
    policy_chosen_logprobs: [B, T], log π of each token of y⁺.
    policy_rejected_logprobs: [B, T], of each token of y⁻.
    chosen_collision: [B, T], log Σᵥ π(v)² at each of the places of y⁺, nats.
    rejected_collision: [B, T], the same for y⁻.
    chosen_mask: [B, T], 1 (or True) on the tokens of y⁺.
    rejected_mask: [B, T], the same for y⁻.

  Returns:
    [B], float32, in [0, 1] and free of gradient, to multiply any loss of the pair with. An empty
    response counts as w = 1.

  Raises:
    ValueError: if the arrays are not all [B, T].

  References:
    Zhou et al. 2024 (WPO), https://arxiv.org/abs/2406.11827, eq. 2 with the sampled alignment of
    weights.
  """
  chosen, rejected, chosen_collision, rejected_collision, *masks = _check.as_floats(
    "wpo_weight",
    2,
    policy_chosen_logprobs=policy_chosen_logprobs,
    policy_rejected_logprobs=policy_rejected_logprobs,
    chosen_collision=chosen_collision,
    rejected_collision=rejected_collision,
    chosen_mask=chosen_mask,
    rejected_mask=rejected_mask,
  )
  log_weight = masked_mean(chosen - chosen_collision, masks[0], axis=1)
  log_weight += masked_mean(rejected - rejected_collision, masks[1], axis=1)
  return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_weight, 0.0)))


def _token_log_ratios(
  function: str, *logprobs: jax.Array, **masks: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The two log-ratios per token and the two masks as booleans, all [B, T]."""
  chosen, rejected, ref_chosen, ref_rejected = _pairs.as_four(
    function, *logprobs, unit="logprobs", rank=2
  )
  first, second, _ = _check.as_floats(function, 2, **masks, policy_chosen_logprobs=chosen)
  return chosen - ref_chosen, rejected - ref_rejected, first > 0, second > 0
