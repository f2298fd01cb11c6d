"""Losses of policy gradients beyond PPO's, the KL and the entropy beside them, and their averages.

Every [B, T] array is aligned with the sampled tokens, as in `policy`; the mask is 1 on them and may
have holes. Advantages carry no gradient here, wherever they come from.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check
from align_jax.losses.kl import kl_estimate
from align_jax.losses.masked import Mean, masked_mean, masked_sum
from align_jax.losses.policy import ppo_policy_loss, probability_ratio


def reinforce_loss(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
  """−Â·log π, whose gradient is the policy gradient −Â·∇log π.

  Args:
    logprobs: [B, T], log π of the sampled tokens; the only argument that is differentiated.
    advantages: [B, T], Â of every token; that of a whole response is repeated over its tokens.

  Returns:
    [B, T], float32, unmasked. The value says nothing; the gradient is right only while π is the
    policy that sampled.

  Raises:
    ValueError: if the arrays are not both [B, T].

  References:
    Williams 1992, https://doi.org/10.1007/BF00992696.
  """
  logprobs, advantages = _check.as_floats(
    "reinforce_loss", 2, logprobs=logprobs, advantages=advantages
  )
  return -jax.lax.stop_gradient(advantages) * logprobs


def cispo_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  *,
  clip_eps_high: float,
  clip_eps: float | None = None,
) -> jax.Array:
  """−sg[clip(ρ, 1 − ε, 1 + ε_high)]·Â·log π, with ρ = π/π_old of each token.

  Unlike PPO's, a clipped token keeps its gradient: the weight is cut, not the update.

  Args:
    logprobs: [B, T], log π of the sampled tokens; the only argument that is differentiated.
    old_logprobs: [B, T], under the policy that sampled them.
    advantages: [B, T], Â.
    clip_eps_high: ε_high ≥ 0; the weight is at most 1 + ε_high.
    clip_eps: ε in [0, 1]; None, as in the paper's experiments, for no lower bound.

  Returns:
    [B, T], float32, unmasked. At ρ = 1 its gradient is that of `reinforce_loss`.

  Raises:
    ValueError: if the arrays are not all [B, T], or a hyper-parameter is out of range.

  References:
    MiniMax 2025 (MiniMax-M1), https://arxiv.org/abs/2506.13585, eq. 4 and 5. TRL's `epsilon_high`
    is the bound itself (5.0, say), here as in the paper and in verl it is the bound less 1.
  """
  name = "cispo_loss"
  _check.within(name, "clip_eps_high", clip_eps_high, "[0, inf)")
  low = 0.0
  if clip_eps is not None:
    _check.within(name, "clip_eps", clip_eps, "[0, 1]")
    low = 1.0 - clip_eps
  logprobs, old, advantages = _check.as_floats(
    name, 2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
  )
  weight = jnp.clip(probability_ratio(logprobs, old), low, 1.0 + clip_eps_high)
  return reinforce_loss(logprobs, weight * advantages)


def gspo_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps: float,
  clip_eps_high: float | None = None,
) -> jax.Array:
  """−min(s·Â, clip(s, 1 − ε, 1 + ε_high)·Â), with s = (π(y|x)/π_old(y|x))^(1/|y|) of a response.

  Args:
    logprobs: [B, T], log π of the sampled tokens; the only argument that is differentiated.
    old_logprobs: [B, T], under the policy that sampled them.
    advantages: [B], Â of every response.
    mask: [B, T], 1 (or True) on sampled tokens; |y| counts these.
    clip_eps: ε in [0, 1]; the paper's 3e-4, s being a mean over tokens.
    clip_eps_high: the upper ε, if it differs (4e-4).

  Returns:
    [B], float32; 0 for an empty response, which is to be left out of the mean. At s = 1 the gradient
    is −Â·∇mean(log π): a token of a long response counts less, as in GRPO.

  Raises:
    ValueError: if the shapes do not agree, or a hyper-parameter is out of range.

  References:
    Zheng et al. 2025, https://arxiv.org/abs/2507.18071, eq. 5 to 7. For |y| = 1 it is PPO's loss.
  """
  name = "gspo_loss"
  (advantages,) = _check.as_floats(name, 1, advantages=advantages)
  log_ratio, on = _sequence_log_ratio(name, logprobs, old_logprobs, mask, clip_eps, clip_eps_high)
  if advantages.shape != on.shape[:1]:
    raise ValueError(f"{name}: advantages must be [B] = {on.shape[:1]}, got {advantages.shape}.")
  mean = masked_mean(log_ratio, on, axis=1)[:, None]
  loss = ppo_policy_loss(
    mean, jnp.zeros_like(mean), advantages[:, None], clip_eps=clip_eps, clip_eps_high=clip_eps_high
  )
  return jnp.where(jnp.any(on, axis=1), loss[:, 0], 0.0)


def gspo_token_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps: float,
  clip_eps_high: float | None = None,
) -> jax.Array:
  """GSPO with an advantage per token: sₜ = sg[s]·π/sg[π], clipped with its sequence.

  Args:
    logprobs: [B, T], log π of the sampled tokens; the only argument that is differentiated.
    old_logprobs: [B, T], under the policy that sampled them.
    advantages: [B, T], Â of every token.
    mask: [B, T], 1 (or True) on sampled tokens.
    clip_eps: ε in [0, 1], as in `gspo_loss`.
    clip_eps_high: the upper ε, if it differs.

  Returns:
    [B, T], float32, 0 off the mask. Where all tokens of a response have one advantage, its mean over
    them has the value and the gradient of `gspo_loss`.

  Raises:
    ValueError: if the arrays are not all [B, T], or a hyper-parameter is out of range.

  References:
    Zheng et al. 2025, https://arxiv.org/abs/2507.18071, section 4.3. It is verl's `gspo`.
  """
  name = "gspo_token_loss"
  _, advantages = _check.as_floats(name, 2, logprobs=logprobs, advantages=advantages)
  log_ratio, on = _sequence_log_ratio(name, logprobs, old_logprobs, mask, clip_eps, clip_eps_high)
  mean = masked_mean(log_ratio, on, axis=1)[:, None]
  of_token = jax.lax.stop_gradient(mean) + log_ratio - jax.lax.stop_gradient(log_ratio)
  loss = ppo_policy_loss(
    of_token, jnp.zeros_like(of_token), advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high
  )
  return jnp.where(on, loss, 0.0)


def kl_loss(
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  old_logprobs: jax.Array | None = None,
  *,
  kind: str,
) -> jax.Array:
  """The value of k1, k2 or k3 (`kl_estimate`) with the gradient of the reverse KL, d·∇log π.

  With d = log π − log π_ref, over tokens sampled from π, and differentiated as they stand:
    k1  ∇log π           zero in expectation: no penalty at all
    k2  d·∇log π         the gradient of KL(π ‖ π_ref)
    k3  (1 − e⁻ᵈ)·∇log π  that of KL(π_ref ‖ π)
  So the gradient here is always k2's, and `kind` only says what is reported.

  It is the gradient of a token's KL at the states that were visited. A token also decides which states
  come later; that part of the KL of whole responses is missed by any per-token loss, and is had from
  the KL in the reward (`kl_shaped_rewards`), or from this loss on sums, [B, 1].

  Args:
    logprobs: [B, T], of the sampled tokens; the only argument that is differentiated.
    ref_logprobs: [B, T], under the frozen reference.
    old_logprobs: [B, T], under the policy that sampled, if π has moved on since: value and gradient
      are multiplied with sg[π/π_old]. The gradient is then also that of (π/π_old)·k3, ρ
      differentiated.
    kind: "k1", "k2" or "k3", of the value.

  Returns:
    [B, T], float32, unmasked.

  Raises:
    ValueError: if the arrays are not all [B, T], or the kind is unknown.

  References:
    Schulman 2020, http://joschu.net/blog/kl-approx.html; Tang and Munos 2025,
    https://arxiv.org/abs/2506.09477. GRPO's paper and TRL differentiate k3 as it stands; verl's
    "k3+" is this function.
  """
  name = "kl_loss"
  logprobs, ref = _check.as_floats(name, 2, logprobs=logprobs, ref_logprobs=ref_logprobs)
  value, difference = jax.lax.stop_gradient((kl_estimate(logprobs, ref, kind=kind), logprobs - ref))
  loss = value + difference * (logprobs - jax.lax.stop_gradient(logprobs))
  if old_logprobs is None:
    return loss
  _, old = _check.as_floats(name, 2, logprobs=logprobs, old_logprobs=old_logprobs)
  return jax.lax.stop_gradient(probability_ratio(logprobs, old)) * loss


def token_entropy(logits: jax.Array) -> jax.Array:
  """H = −Σᵥ p(v)·log p(v) of softmax(logits), at every position; subtract c·H from the loss.

  Args:
    logits: [..., V]; −∞ forbids a token. Pass them as they were sampled from (temperature and all).

  Returns:
    [...], float32, in nats, between 0 and log V.

  References:
    Mnih et al. 2016, https://arxiv.org/abs/1602.01783, section 4. As a bonus in the loss it is
    differentiated at the states that were visited, as everywhere.
  """
  logp = jax.nn.log_softmax(jnp.asarray(logits).astype(jnp.float32))
  # The `where` keeps 0 * -inf out of the value and of the gradient.
  return -jnp.sum(jnp.exp(logp) * jnp.where(logp > -jnp.inf, logp, 0.0), axis=-1)


def aggregate(
  losses: jax.Array, mask: jax.Array, *, over: str, max_length: int | None = None
) -> Mean:
  """One mean of token losses; what is divided by decides how much a long response counts.

  Over B responses (rows with a token) of |yᵢ| tokens each:
    "sequence"  Σᵢ (Σₜ ℓᵢₜ)/|yᵢ| / B   GRPO: a token of a short response counts more
    "token"     Σᵢₜ ℓᵢₜ / Σᵢ |yᵢ|       DAPO: every token of the batch counts the same
    "constant"  Σᵢₜ ℓᵢₜ / (B·L)         Dr.GRPO: ditto, and free of the batch's lengths
  Of a policy gradient only "constant" leaves the expectation unbiased (up to 1/L).

  Args:
    losses: [B, T], of every token.
    mask: [B, T], 1 (or True) on the tokens that count. Empty rows are no responses: they add neither
      to the total nor to the weight.
    over: "sequence", "token" or "constant".
    max_length: L > 0 of "constant", the budget of tokens, and given only there; 1 sums over tokens.

  Returns:
    A Mean (total, weight), so that parts of a batch add up to the whole.

  Raises:
    ValueError: if the arrays are not both [B, T], `over` is unknown, or L is missing or not wanted.

  References:
    Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3; Yu et al. 2025,
    https://arxiv.org/abs/2503.14476, eq. 8; Liu et al. 2025, https://arxiv.org/abs/2503.20783.
    TRL's "grpo" and "dr_grpo" divide by the number of rows, empty ones included.
  """
  values, mask = _check.as_floats("aggregate", 2, losses=losses, mask=mask)
  weights, total = averaging_weights(mask, over=over, max_length=max_length)
  return Mean(masked_sum(values, weights), total)


def averaging_weights(
  mask: jax.Array, *, over: str, max_length: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """(wᵢₜ [B, T], W []): the mean that `aggregate` takes is Σ wᵢₜ·ℓᵢₜ / W.

  With them known for a whole batch, parts of it can be differentiated one after the other.

  Args:
    mask: [B, T], 1 (or True) on the tokens that count.
    over: "sequence", "token" or "constant", as for `aggregate`.
    max_length: L of "constant".

  Returns:
    (float32 [B, T], 0 off the mask; float32 [], 0 if no token counts).

  Raises:
    ValueError: if the mask is not [B, T], `over` is unknown, or L is missing or not wanted.
  """
  name = "averaging_weights"
  (mask,) = _check.as_floats(name, 2, mask=mask)
  if over not in ("sequence", "token", "constant"):
    raise ValueError(f"{name}: over must be sequence, token or constant, got {over!r}.")
  if (over == "constant") != (max_length is not None):
    raise ValueError(f'{name}: max_length must be given exactly when over is "constant".')
  if over == "token":
    return mask, jnp.sum(mask)
  rows = jnp.sum(jnp.any(mask > 0, axis=1).astype(jnp.float32))
  if over == "sequence":
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0), rows
  _check.positive(name, "max_length", max_length)
  return mask, rows * max_length


def _sequence_log_ratio(
  function: str, logprobs, old_logprobs, mask, clip_eps: float, clip_eps_high: float | None
) -> tuple[jax.Array, jax.Array]:
  """log π − log π_old, 0 off the mask and without a gradient into π_old, and the mask; [B, T]."""
  _check.within(function, "clip_eps", clip_eps, "[0, 1]")
  if clip_eps_high is not None:
    _check.within(function, "clip_eps_high", clip_eps_high, "[0, inf)")
  logprobs, old, mask = _check.as_floats(
    function, 2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask
  )
  on = mask > 0
  old = jax.lax.stop_gradient(old)
  return jnp.where(on, logprobs, 0.0) - jnp.where(on, old, 0.0), on
