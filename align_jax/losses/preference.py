"""Losses that learn a policy directly from preferences: DPO, IPO and KTO.

Every `*_logps` is the log-probability of a whole response: the *sum* over its tokens. A caller who
wants length normalisation passes means instead.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check


def implicit_reward(policy_logps: jax.Array, ref_logps: jax.Array, *, beta: float) -> jax.Array:
  """β·(log π(y|x) − log π_ref(y|x)): the reward for which π is the KL-regularised optimum.

  Args:
    policy_logps: [B], summed log-probs of the responses under the policy.
    ref_logps: [B], the same under the frozen reference.
    beta: β, the strength of the KL regularisation.

  Returns:
    [B], float32. Defined up to a term that depends on the prompt only.

  Raises:
    ValueError: if the arguments are not both [B].

  References:
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 5.
  """
  policy, ref = _check.as_floats(
    "implicit_reward", 1, policy_logps=policy_logps, ref_logps=ref_logps
  )
  return beta * (policy - ref)


def dpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """−(1 − ε)·log σ(βΔ) − ε·log σ(−βΔ), with Δ the difference of the two log-ratios.

  Δ = (log π(y⁺) − log π_ref(y⁺)) − (log π(y⁻) − log π_ref(y⁻)).

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in [0, ½], the share of labels believed to be flipped (conservative DPO).

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.
  """
  _check.positive("dpo_loss", "beta", beta)
  _check.probability("dpo_loss", "label_smoothing", label_smoothing, below=0.5)
  difference = beta * _log_ratio_difference(
    "dpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  # log(1 - σ(x)) = log σ(-x), which stays exact where σ(x) rounds to 1.
  return -(
    (1.0 - label_smoothing) * jax.nn.log_sigmoid(difference)
    + label_smoothing * jax.nn.log_sigmoid(-difference)
  )


def ipo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  tau: float,
) -> jax.Array:
  """(Δ − 1/(2τ))², with Δ the difference of the two log-ratios (see `dpo_loss`).

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    tau: τ > 0; the loss pulls Δ to 1/(2τ) and no further, so certain labels cannot drive it to ∞.

  Returns:
    [B], float32. 1/(4τ²) wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or τ is not positive.

  References:
    Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, on sums as the paper has it. TRL
    passes per-token means and calls τ `beta`.
  """
  _check.positive("ipo_loss", "tau", tau)
  difference = _log_ratio_difference(
    "ipo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return jnp.square(difference - 1.0 / (2.0 * tau))


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
  policy, ref, desirable = _check.as_floats(
    "kto_loss", 1, policy_logps=policy_logps, ref_logps=ref_logps, is_desirable=is_desirable
  )
  if jnp.ndim(kl_baseline):
    raise ValueError(f"kto_loss: kl_baseline must be a scalar, got {jnp.shape(kl_baseline)}.")
  gain = beta * (policy - ref - jax.lax.stop_gradient(kl_baseline))
  # 1 - σ(x) = σ(-x), without the cancellation.
  return jnp.where(
    desirable > 0.5,
    desirable_weight * jax.nn.sigmoid(-gain),
    undesirable_weight * jax.nn.sigmoid(gain),
  )


def _log_ratio_difference(
  function: str,
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
) -> jax.Array:
  policy_chosen, policy_rejected, ref_chosen, ref_rejected = _check.as_floats(
    function,
    1,
    policy_chosen_logps=policy_chosen_logps,
    policy_rejected_logps=policy_rejected_logps,
    ref_chosen_logps=ref_chosen_logps,
    ref_rejected_logps=ref_rejected_logps,
  )
  return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
