"""Losses on pairs that hold each response against a point of its own, not only against the other.

What only knows the difference of the two log-ratios cannot tell a chosen response that became more
likely from one that merely fell less than the rejected one. These losses can.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs


def nca_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """−log σ(r⁺) − ½·log σ(−r⁺) − ½·log σ(−r⁻), with r = β·(log π − log π_ref) of each response.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32. 2·ln 2 wherever policy and reference agree; least in r⁺ at σ(r⁺) = ⅔.

  Raises:
    ValueError: if the log-probs are not all [B], or β is not positive.

  References:
    Chen et al. 2024, https://arxiv.org/abs/2402.05369, noise-contrastive alignment of two responses.
  """
  _check.positive("nca_loss", "beta", beta)
  chosen, rejected = _pairs.log_ratios(
    "nca_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  noise = _pairs.logistic(-beta * chosen) + _pairs.logistic(-beta * rejected)
  return _pairs.logistic(beta * chosen) + 0.5 * noise


def bco_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  shift: jax.typing.ArrayLike,
  *,
  beta: float,
) -> jax.Array:
  """−log σ(r⁺ − δ) − log σ(δ − r⁻), with r = β·(log π − log π_ref) of each response.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    shift: scalar δ, the running mean of all rewards r, in units of the reward; no gradient flows
      into it.
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32. 2·ln 2 wherever both rewards are at the shift.

  Raises:
    ValueError: if the log-probs are not all [B], the shift is not a scalar, or β is not positive.

  References:
    Jung et al. 2024, https://arxiv.org/abs/2404.04656, without its weights for a shift of the prompt
    distribution. TRL's `bco_pair` has δ = 0; its trainer of unpaired data has the running mean.
  """
  _check.positive("bco_loss", "beta", beta)
  shift = _check.constant("bco_loss", "shift", shift)
  chosen, rejected = _pairs.log_ratios(
    "bco_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return _pairs.logistic(beta * chosen - shift) + _pairs.logistic(shift - beta * rejected)


def sppo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """(a − 1/(2β))² + (b + 1/(2β))², with a and b the log-ratios of the chosen and the rejected.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    beta: β > 0, in 1/nats: the paper's 1/η.

  Returns:
    [B], float32, in nats². 1/(2β²) wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or β is not positive.

  References:
    Wu et al. 2024, https://arxiv.org/abs/2405.00675, with hard labels (a win probability of 1 or
    0), which TRL calls `sppo_hard`. The paper's reference is the previous iterate of the policy.
  """
  _check.positive("sppo_loss", "beta", beta)
  chosen, rejected = _pairs.log_ratios(
    "sppo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  target = 1.0 / (2.0 * beta)
  return jnp.square(chosen - target) + jnp.square(rejected + target)


def apo_zero_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """1 − σ(r⁺) + σ(r⁻), with r = β·(log π − log π_ref): the chosen up, the rejected down.

  For chosen responses that are better than what the policy writes.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32, in [0, 2]. 1 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or β is not positive.

  References:
    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266. The paper leaves out the constant 1.
  """
  _check.positive("apo_zero_loss", "beta", beta)
  chosen, rejected = _pairs.log_ratios(
    "apo_zero_loss",
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
  )
  # 1 - σ(x) = σ(-x), without the cancellation.
  return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """σ(r⁺) + 1 − σ(r⁺ − r⁻), with r = β·(log π − log π_ref): both down, the rejected further.

  For chosen responses that are worse than what the policy writes.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32, in [0, 2]. 1 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or β is not positive.

  References:
    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266. The paper leaves out the constant 1.
  """
  _check.positive("apo_down_loss", "beta", beta)
  chosen, rejected = _pairs.log_ratios(
    "apo_down_loss",
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
  )
  return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))
