"""Advantages without a critic, and what weighs or drops a response before its gradient is taken.

Scores of whole responses are [B]; where the responses to one prompt are compared they are [P, G]: row p
holds the G responses to prompt p, which is `scores.reshape(-1, G)` of a batch that lists the responses
prompt by prompt. So every group is full and the leave-one-out mean is defined. A KL penalty in the
reward is subtracted by the caller: from the scores (the k1 of a whole response), or token by token
with `kl_shaped_rewards`. Nothing here carries a gradient.

[B, T] arrays are aligned with the sampled tokens, as in `policy`; their mask may have holes.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check
from align_jax.losses.masked import masked_whiten
from align_jax.losses.policy import gae, probability_ratio


def reinforce_advantages(
  scores: jax.Array, baseline: jax.typing.ArrayLike | None = None
) -> jax.Array:
  """Â = r − b; by default b is the mean score of the batch.

  A baseline that does not know the response leaves the policy gradient unbiased. The batch mean
  contains it, which shrinks the expected gradient to (B − 1)/B of the exact one.

  Args:
    scores: [B], r, the reward of every response.
    baseline: [B] or [], b, for example a moving average or a value of the prompt; None for the mean.

  Returns:
    [B], float32.

  Raises:
    ValueError: if the scores are not [B], the baseline is neither [B] nor [], or the mean is asked
      of a single response.

  References:
    Williams 1992, https://doi.org/10.1007/BF00992696.
  """
  name = "reinforce_advantages"
  (scores,) = _check.as_floats(name, 1, scores=scores)
  if baseline is None:
    if scores.size < 2:
      raise ValueError(f"{name}: scores must hold at least 2 responses to have a mean baseline.")
    baseline = jnp.mean(scores)
  baseline = jnp.asarray(baseline).astype(jnp.float32)
  if baseline.shape not in ((), scores.shape):
    raise ValueError(f"{name}: baseline must be [] or {scores.shape}, got {baseline.shape}.")
  return jax.lax.stop_gradient(scores - baseline)


def rloo_advantages(scores: jax.Array) -> jax.Array:
  """Âᵢ = rᵢ − mean of the *other* rewards of its group: unbiased, and G/(G − 1) times Dr.GRPO's.

  Args:
    scores: [P, G], rewards of G responses to each of P prompts.

  Returns:
    [P, G], float32.

  Raises:
    ValueError: if the scores are not [P, G], or G < 2: without others there is no baseline.

  References:
    Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 2.3.
  """
  scores = _groups("rloo_advantages", scores)
  others = (jnp.sum(scores, axis=1, keepdims=True) - scores) / (scores.shape[1] - 1)
  return scores - others


def grpo_advantages(scores: jax.Array, *, eps: float = 1e-4) -> jax.Array:
  """Âᵢ = (rᵢ − mean)/(std + ε) within each group; exactly 0 in a group of equal rewards.

  The division reweighs prompts: with rewards 0 and 1 and success probability q, a group of G ≥ 4
  counts prompts near q = 0 and q = 1 more than their reward's gradient does. With G of 2 or 3 the
  expected gradient is that of the expected reward, times a constant.

  Args:
    scores: [P, G], rewards of G responses to each of P prompts.
    eps: ε ≥ 0. The paper's formula has none; 1e-4 is TRL's, 1e-6 verl's.

  Returns:
    [P, G], float32.

  Raises:
    ValueError: if the scores are not [P, G], G < 2, or ε is negative.

  References:
    Shao et al. 2024 (DeepSeekMath), https://arxiv.org/abs/2402.03300, section 4.1.2. The standard
    deviation is that of a sample (G − 1), as in TRL and verl; verl passes the score of a lone
    response through, here it is refused.
  """
  _check.within("grpo_advantages", "eps", eps, "[0, inf)")
  scores = _groups("grpo_advantages", scores)
  differs = jnp.max(scores, axis=1, keepdims=True) > jnp.min(scores, axis=1, keepdims=True)
  std = jnp.std(scores, axis=1, ddof=1, keepdims=True)
  return jnp.where(differs, _centred(scores) / jnp.where(differs, std + eps, 1.0), 0.0)


def dr_grpo_advantages(scores: jax.Array) -> jax.Array:
  """Âᵢ = rᵢ − mean of its group, the response itself included.

  The expected gradient is (G − 1)/G of the exact one: the same direction for every prompt.

  Args:
    scores: [P, G], rewards of G responses to each of P prompts.

  Returns:
    [P, G], float32.

  Raises:
    ValueError: if the scores are not [P, G], or G < 2.

  References:
    Liu et al. 2025 (Dr.GRPO), https://arxiv.org/abs/2503.20783; its sum over tokens, divided by a
    constant, is `aggregate` with over="constant".
  """
  return _centred(_groups("dr_grpo_advantages", scores))


def reinforce_pp_advantages(
  rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
  """REINFORCE++: returns-to-go of every token, whitened over all sampled tokens of the batch.

  Args:
    rewards: [B, T], per token, from `kl_shaped_rewards`: −β·k1, and the score on the last one.
    mask: [B, T], 1 (or True) on sampled tokens.
    gamma: γ in [0, 1].

  Returns:
    [B, T], float32, 0 off the mask.

  Raises:
    ValueError: if the arrays are not both [B, T], or γ is out of range.

  References:
    Hu et al. 2025, https://arxiv.org/abs/2501.03262. Mean and variance are those of the batch that
    is passed in, so pass the whole one. verl sets the return to 0 at a hole of the mask, so that
    tokens before a tool's output learn nothing of the score; here holes are passed through.
  """
  name = "reinforce_pp_advantages"
  _check.within(name, "gamma", gamma, "[0, 1]")
  rewards, mask = _check.as_floats(name, 2, rewards=rewards, mask=mask)
  return masked_whiten(returns_to_go(rewards, mask, gamma=gamma), mask)


def reinforce_pp_baseline_advantages(scores: jax.Array) -> jax.Array:
  """REINFORCE++-baseline: rᵢ − mean of its group, divided by the std of that over the whole batch.

  One scale for all prompts, so no prompt is weighed by its own difficulty as in GRPO.

  Args:
    scores: [P, G], rewards of G responses to each of P prompts.

  Returns:
    [P, G], float32; 0 if all groups are of equal rewards.

  Raises:
    ValueError: if the scores are not [P, G], or G < 2.

  References:
    Hu et al. 2025, https://arxiv.org/abs/2501.03262, which puts the KL in the loss (`kl_loss`).
    Here every response counts once in the standard deviation; verl counts its tokens.
  """
  centred = _centred(_groups("reinforce_pp_baseline_advantages", scores))
  return masked_whiten(centred, jnp.ones_like(centred))


def returns_to_go(rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0) -> jax.Array:
  """Rₜ = rₜ + γ·Rₜ₊₁, where t + 1 is the next *masked-in* token: `gae` at λ = 1 without a critic.

  Args:
    rewards: [B, T], rₜ for the token at t; read on the mask only.
    mask: [B, T], 1 (or True) on sampled tokens; a hole takes no time step.
    gamma: γ in [0, 1]; 1 for language models.

  Returns:
    [B, T], float32, 0 off the mask.

  Raises:
    ValueError: if the arrays are not both [B, T], or γ is out of range.
  """
  _check.within("returns_to_go", "gamma", gamma, "[0, 1]")
  rewards, mask = _check.as_floats("returns_to_go", 2, rewards=rewards, mask=mask)
  return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def overlong_penalty(lengths: jax.Array, *, max_length: int, cache: int) -> jax.Array:
  """0 up to max − cache tokens, then falling in a line to −1 at max and beyond.

  Args:
    lengths: [B], tokens of every response.
    max_length: the longest response allowed, in tokens; DAPO's 20480.
    cache: the interval before it in which the penalty sets in, in tokens; DAPO's 4096.

  Returns:
    [B], float32, in [−1, 0], to be added to the score (DAPO's scores are ±1).

  Raises:
    ValueError: if the lengths are not [B], or not 0 < cache <= max_length.

  References:
    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, eq. 13.
  """
  if not 0 < cache <= max_length:
    raise ValueError(
      f"overlong_penalty: cache must be above 0 and at most max_length = {max_length}, got {cache}."
    )
  (lengths,) = _check.as_floats("overlong_penalty", 1, lengths=lengths)
  return jax.lax.stop_gradient(jnp.clip((max_length - cache - lengths) / cache, -1.0, 0.0))


def dynamic_sampling_mask(scores: jax.Array) -> jax.Array:
  """1 for a group whose scores differ, 0 for one that is all right or all wrong.

  Equal scores give every response of the group an advantage of 0: the group costs time and thins out
  the batch's mean. DAPO samples on until the batch is full of groups that differ.

  Args:
    scores: [P, G], rewards of G responses to each of P prompts. Pass what is checked (right or
      wrong), not the sum with a length penalty, which differs in almost every group.

  Returns:
    [P], float32.

  Raises:
    ValueError: if the scores are not [P, G], or G < 2.

  References:
    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, eq. 11.
  """
  scores = _groups("dynamic_sampling_mask", scores)
  return (jnp.max(scores, axis=1) > jnp.min(scores, axis=1)).astype(jnp.float32)


def truncated_importance_weights(
  old_logprobs: jax.Array, sampler_logprobs: jax.Array, *, cap: float
) -> jax.Array:
  """min(π_old/μ, C): corrects a loss for tokens that came from μ, the sampler's policy, not π_old.

  Multiply the per-token loss with it. Exact where no ratio exceeds C; beyond, too little is learned:
  the expected gradient lacks Σ max(0, π − C·μ)·Â·∇log π over the tokens.

  Args:
    old_logprobs: [B, T], of the sampled tokens as the trainer computes them.
    sampler_logprobs: [B, T], log μ, as the sampler drew them (other kernels, precision or version).
    cap: C > 0, for example 2; 1 and less cut the ordinary token too.

  Returns:
    [B, T], float32, in (0, C].

  Raises:
    ValueError: if the arrays are not both [B, T], or C is not positive.

  References:
    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; Ionides 2008,
    https://doi.org/10.1198/106186008X320456. Token by token, as TRL's `token_truncate`.
  """
  name = "truncated_importance_weights"
  _check.positive(name, "cap", cap)
  return jnp.minimum(_mismatch(name, old_logprobs, sampler_logprobs), cap)


def masked_importance_weights(
  old_logprobs: jax.Array, sampler_logprobs: jax.Array, *, low: float, high: float
) -> jax.Array:
  """ρ = π_old/μ where low ≤ ρ ≤ high, else 0: a token on which the two disagree teaches nothing.

  Args:
    old_logprobs: [B, T], of the sampled tokens as the trainer computes them.
    sampler_logprobs: [B, T], log μ, as the sampler drew them.
    low: the smallest ratio that is kept, in [0, 1]; for example 0.5.
    high: the largest, 1 or more; for example 5.

  Returns:
    [B, T], float32, in {0} ∪ [low, high].

  Raises:
    ValueError: if the arrays are not both [B, T], or the bounds do not enclose 1.

  References:
    Ling Team 2025 (IcePop, in Ring-1T), https://arxiv.org/abs/2510.18855.
  """
  name = "masked_importance_weights"
  _check.within(name, "low", low, "[0, 1]")
  _check.within(name, "high", high, "[1, inf)")
  ratio = _mismatch(name, old_logprobs, sampler_logprobs)
  return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _groups(function: str, scores: jax.Array) -> jax.Array:
  """`scores` as float32 [P, G] without a gradient; groups of one are refused."""
  (scores,) = _check.as_floats(function, 2, scores=scores)
  if scores.shape[1] < 2:
    raise ValueError(
      f"{function}: scores must hold groups of at least 2 responses, got shape {scores.shape}."
    )
  return jax.lax.stop_gradient(scores)


def _centred(scores: jax.Array) -> jax.Array:
  return scores - jnp.mean(scores, axis=1, keepdims=True)


def _mismatch(function: str, old: jax.Array, sampler: jax.Array) -> jax.Array:
  old, sampler = _check.as_floats(function, 2, old_logprobs=old, sampler_logprobs=sampler)
  return jax.lax.stop_gradient(probability_ratio(old, sampler))
