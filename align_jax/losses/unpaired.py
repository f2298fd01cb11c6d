"""Losses that learn a policy from single responses, each marked good or bad: KTO and its relatives.

Every `*_logps` is the log-probability of a whole response: the *sum* over its tokens.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs


def kto_kl_baseline(
  policy_logps_mismatched: jax.Array,
  ref_logps_mismatched: jax.Array,
  *,
  weight: jax.Array | None = None,
) -> jax.Array:
  """z₀ = max(0, mean(log π(y′|x) − log π_ref(y′|x))) over mismatched pairs; carries no gradient.

  Args:
    policy_logps_mismatched: [B], summed log-probs of another example's response y′ to prompt x.
    ref_logps_mismatched: [B], the same under the frozen reference.
    weight: [B], 0 for the rows that are padding; ones by default.

  Returns:
    [], float32, an estimate of KL(π ‖ π_ref) shared by the whole batch.

  Raises:
    ValueError: if the arguments are not all [B], or B < 2: with one example nothing is mismatched.

  References:
    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.2.
  """
  weight = jnp.ones(jnp.shape(policy_logps_mismatched)) if weight is None else weight
  policy, ref, weight = _check.as_floats(
    "kto_kl_baseline",
    1,
    policy_logps_mismatched=policy_logps_mismatched,
    ref_logps_mismatched=ref_logps_mismatched,
    weight=weight,
  )
  if policy.size < 2:
    raise ValueError(f"kto_kl_baseline: needs a batch of at least 2 examples, got {policy.size}.")
  mean = jnp.sum(weight * (policy - ref)) / jnp.maximum(jnp.sum(weight), 1.0)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
  policy_logps: jax.Array,
  ref_logps: jax.Array,
  is_desirable: jax.Array,
  kl_baseline: jax.typing.ArrayLike,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> jax.Array:
  """λ_D·(1 − σ(β(r − z₀))) for a desirable response, λ_U·(1 − σ(β(z₀ − r))) for an undesirable one.

  r = log π(y|x) − log π_ref(y|x).

  Args:
    policy_logps: [B], log π(y|x), summed over the response.
    ref_logps: [B], log π_ref(y|x).
    is_desirable: [B], 1 (or True) for a response marked good, 0 for one marked bad.
    kl_baseline: scalar z₀ of the *whole* batch, from `kto_kl_baseline`; no gradient flows into it.
    beta: β > 0, the strength of the implied KL penalty.
    desirable_weight: λ_D. The paper asks for λ_D·n_D / (λ_U·n_U) in [1, 3/2].
    undesirable_weight: λ_U.

  Returns:
    [B], float32. λ/2 for an example at the baseline.

  Raises:
    ValueError: if the arrays are not all [B], the baseline is not a scalar, or β is not positive.

  References:
    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 8. The
    paper adds the constant λ_y; its gradient is the same.
  """
  _check.positive("kto_loss", "beta", beta)
  log_ratio, sign = _log_ratio("kto_loss", policy_logps, ref_logps, is_desirable)
  gain = beta * (log_ratio - _check.constant("kto_loss", "kl_baseline", kl_baseline))
  weight = jnp.where(sign > 0, desirable_weight, undesirable_weight)
  # 1 - σ(x) = σ(-x), without the cancellation.
  return weight * jax.nn.sigmoid(-sign * gain)


def apo_zero_unpaired_loss(
  policy_logps: jax.Array, ref_logps: jax.Array, is_desirable: jax.Array, *, beta: float
) -> jax.Array:
  """1 − σ(r) for a desirable response, σ(r) for an undesirable one, r = β·(log π − log π_ref).

  Args:
    policy_logps: [B], log π(y|x), summed over the response.
    ref_logps: [B], log π_ref(y|x).
    is_desirable: [B], 1 (or True) for a response marked good, 0 for one marked bad.
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32, in [0, 1]. ½ wherever policy and reference agree.

  Raises:
    ValueError: if the arrays are not all [B], or β is not positive.

  References:
    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266; the two halves of `apo_zero_loss`.
    It is `kto_loss` with a baseline of 0.
  """
  _check.positive("apo_zero_unpaired_loss", "beta", beta)
  log_ratio, sign = _log_ratio("apo_zero_unpaired_loss", policy_logps, ref_logps, is_desirable)
  # 1 - σ(x) = σ(-x), without the cancellation.
  return jax.nn.sigmoid(-sign * beta * log_ratio)


def bco_unpaired_loss(
  policy_logps: jax.Array,
  ref_logps: jax.Array,
  is_desirable: jax.Array,
  shift: jax.typing.ArrayLike,
  *,
  beta: float,
) -> jax.Array:
  """−log σ(r − δ) for a desirable response, −log σ(δ − r) for an undesirable one.

  r = β·(log π(y|x) − log π_ref(y|x)): a classifier whose logit is the reward.

  Args:
    policy_logps: [B], log π(y|x), summed over the response.
    ref_logps: [B], log π_ref(y|x).
    is_desirable: [B], 1 (or True) for a response marked good, 0 for one marked bad.
    shift: scalar δ, the running mean of all rewards r, in units of the reward; no gradient flows
      into it.
    beta: β > 0, the strength of the implied KL penalty.

  Returns:
    [B], float32. ln 2 for an example at the shift.

  Raises:
    ValueError: if the arrays are not all [B], the shift is not a scalar, or β is not positive.

  References:
    Jung et al. 2024, https://arxiv.org/abs/2404.04656, without its weights for a shift of the prompt
    distribution; the two halves of `bco_loss`.
  """
  _check.positive("bco_unpaired_loss", "beta", beta)
  shift = _check.constant("bco_unpaired_loss", "shift", shift)
  log_ratio, sign = _log_ratio("bco_unpaired_loss", policy_logps, ref_logps, is_desirable)
  return _pairs.logistic(sign * (beta * log_ratio - shift))


def _log_ratio(
  function: str, policy_logps: jax.Array, ref_logps: jax.Array, is_desirable: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """log π − log π_ref, and 1 for a desirable response or −1 for an undesirable one; both [B]."""
  policy, ref, desirable = _check.as_floats(
    function, 1, policy_logps=policy_logps, ref_logps=ref_logps, is_desirable=is_desirable
  )
  return policy - ref, jnp.where(desirable > 0.5, 1.0, -1.0)
