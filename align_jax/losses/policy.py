"""PPO on token sequences: shaped rewards, advantages, and the clipped losses.

Every [B, T] array here is aligned with the *sampled tokens*: entry t holds the log-prob of the t-th
token, the value of the state before it, and the reward for having chosen it. `mask` is 1 on sampled
tokens and may have holes (tool output, say), which belong to the environment.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check

_MAX_LOG_RATIO = 20.0  # keeps the ratio finite; a policy this far away is clipped anyway


def ppo_policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  *,
  clip_eps: float,
  clip_eps_high: float | None = None,
  dual_clip: float | None = None,
) -> jax.Array:
  """−min(ρÂ, clip(ρ, 1 − ε, 1 + ε_high)·Â), with ρ = π/π_old of each token.

  With `dual_clip` = c the loss of a token with Â < 0 is at most −c·Â, however far ρ has run away.

  Args:
    logprobs: [B, T], log π of the sampled tokens; the only argument that is differentiated.
    old_logprobs: [B, T], under the policy that sampled them.
    advantages: [B, T], Â; whitened by the caller if at all.
    clip_eps: ε in [0, 1), the paper's 0.2.
    clip_eps_high: the upper ε, if it differs (DAPO's clip-higher, 0.28).
    dual_clip: c > 1, for example 3; None for PPO as published.

  Returns:
    [B, T], float32, unmasked. At ρ = 1 its gradient is the policy gradient −Â·∇log π.

  Raises:
    ValueError: if the arrays are not all [B, T], or a hyper-parameter is out of range.

  References:
    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; dual clip: Ye et al. 2019,
    https://arxiv.org/abs/1912.09729, eq. 5; clip-higher: https://arxiv.org/abs/2503.14476. Here
    |log ρ| is held to 20, so that ρ stays finite.
  """
  name = "ppo_policy_loss"
  _check.probability(name, "clip_eps", clip_eps)
  if dual_clip is not None and not dual_clip > 1.0:
    raise ValueError(f"{name}: dual_clip must be above 1, got {dual_clip}.")
  logprobs, old, advantages = _check.as_floats(
    name, 2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
  )
  high = clip_eps if clip_eps_high is None else clip_eps_high
  ratio = probability_ratio(logprobs, old)
  advantages = jax.lax.stop_gradient(advantages)
  surrogate = jnp.minimum(
    ratio * advantages, jnp.clip(ratio, 1.0 - clip_eps, 1.0 + high) * advantages
  )
  if dual_clip is not None:
    floor = jnp.where(advantages < 0, dual_clip * advantages, -jnp.inf)
    surrogate = jnp.maximum(surrogate, floor)
  return -surrogate


def probability_ratio(logprobs: jax.Array, old_logprobs: jax.Array) -> jax.Array:
  """ρ = π/π_old = exp(log π − log π_old), the exponent held to ±20; no gradient into π_old.

  Args:
    logprobs: [B, T], under the policy.
    old_logprobs: [B, T], under the policy that sampled.

  Returns:
    [B, T], float32, positive and finite.

  Raises:
    ValueError: if the arguments are not both [B, T].
  """
  logprobs, old = _check.as_floats(
    "probability_ratio", 2, logprobs=logprobs, old_logprobs=old_logprobs
  )
  return jnp.exp(jnp.clip(logprobs - jax.lax.stop_gradient(old), -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def ppo_value_loss(
  values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip_eps: float | None
) -> jax.Array:
  """½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²).

  Args:
    values: [B, T], V of the state before each token; the only argument that is differentiated.
    old_values: [B, T], V at the time of sampling.
    returns: [B, T], R, the targets from `gae`.
    clip_eps: ε ≥ 0, or None for the plain squared error.

  Returns:
    [B, T], float32, unmasked.

  Raises:
    ValueError: if the arrays are not all [B, T], or ε is negative.

  References:
    Schulman et al. 2017 (its code), and Huang et al. 2024, https://arxiv.org/abs/2403.17031.
  """
  values, old, returns = _check.as_floats(
    "ppo_value_loss", 2, values=values, old_values=old_values, returns=returns
  )
  old, returns = jax.lax.stop_gradient((old, returns))
  loss = jnp.square(values - returns)
  if clip_eps is not None:
    if clip_eps < 0:
      raise ValueError(f"ppo_value_loss: clip_eps must not be negative, got {clip_eps}.")
    clipped = old + jnp.clip(values - old, -clip_eps, clip_eps)
    loss = jnp.maximum(loss, jnp.square(clipped - returns))
  return 0.5 * loss


def gae(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Âₜ = δₜ + γλ·Âₜ₊₁ with δₜ = rₜ + γ·V₍ₜ₊₁₎ − Vₜ, where t + 1 is the next *masked-in* token.

  A hole in the mask is passed through: it takes no time step, so neither V nor Â is discounted or
  read there. After the last token V = Â = 0 (the episode ends).

  Args:
    rewards: [B, T], rₜ for the token at t; read on the mask only.
    values: [B, T], Vₜ of the state before the token at t; read on the mask only.
    mask: [B, T], 1 (or True) on sampled tokens.
    gamma: γ in [0, 1]; 1 for language models.
    lam: λ in [0, 1]; 0 gives the one-step error δ, 1 gives Σ rewards-to-go − V.

  Returns:
    (advantages [B, T], returns [B, T]): Â and Â + V, float32, both 0 off the mask and free of
    gradient. Never whitened.

  Raises:
    ValueError: if the arrays are not all [B, T], or γ or λ is outside [0, 1].

  References:
    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.
  """
  _check.probability("gae", "gamma", gamma)
  _check.probability("gae", "lam", lam)
  rewards, values, mask = _check.as_floats("gae", 2, rewards=rewards, values=values, mask=mask)
  mask = mask > 0
  rewards, values = jax.lax.stop_gradient(
    (jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0))
  )

  def backwards(later, now):
    next_advantage, next_value = later
    reward, value, on = now
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    later = jnp.where(on, advantage, next_advantage), jnp.where(on, value, next_value)
    return later, jnp.where(on, advantage, 0.0)

  end = jnp.zeros(rewards.shape[:1], jnp.float32)
  _, advantages = jax.lax.scan(backwards, (end, end), (rewards.T, values.T, mask.T), reverse=True)
  return advantages.T, advantages.T + values


def kl_shaped_rewards(
  score: jax.Array,
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  *,
  kl_coef: jax.typing.ArrayLike,
) -> jax.Array:
  """rₜ = −β·(log π − log π_ref)ₜ on every sampled token, plus the score on the last of them.

  Args:
    score: [B], the reward of the whole response.
    logprobs: [B, T], of the sampled tokens under the policy that sampled them.
    ref_logprobs: [B, T], under the frozen reference.
    mask: [B, T], 1 (or True) on sampled tokens. The last one is found by position, never by a
      token id, so a padding id equal to the EOS id does no harm.
    kl_coef: β, a scalar (it may be traced: an adaptive controller changes it every batch).

  Returns:
    [B, T], float32, 0 off the mask and free of gradient. An empty response earns nothing: it has no
    token to carry its score.

  Raises:
    ValueError: if the shapes do not agree.

  References:
    Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 2, with the KL term per token.
  """
  name = "kl_shaped_rewards"
  logprobs, ref, mask = _check.as_floats(
    name, 2, logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask
  )
  (score,) = _check.as_floats(name, 1, score=score)
  if score.shape != logprobs.shape[:1]:
    raise ValueError(f"{name}: score must be [B] = {logprobs.shape[:1]}, got {score.shape}.")
  on = mask > 0
  is_last = on & (jnp.cumsum(on[:, ::-1], axis=1)[:, ::-1] == 1)
  penalty = jnp.where(on, kl_coef * (logprobs - ref), 0.0)
  return jax.lax.stop_gradient(jnp.where(is_last, score[:, None], 0.0) - penalty)
