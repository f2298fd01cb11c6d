"""Losses that learn a policy from the difference of two log-ratios: DPO and its family.

Every `*_logps` is the log-probability of a whole response: the *sum* over its tokens; a
`*_mean_logps` is that sum divided by the number of tokens. Throughout,
Δ = (log π(y⁺) − log π_ref(y⁺)) − (log π(y⁻) − log π_ref(y⁻)).
"""

import math

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs


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

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in [0, ½], the share of labels believed to be flipped (see `cdpo_loss`).

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7. TRL ignores `label_smoothing` in
    its loss of this name (`sigmoid`).
  """
  _check.positive("dpo_loss", "beta", beta)
  _check.within("dpo_loss", "label_smoothing", label_smoothing, "[0, 0.5]")
  difference = _pairs.log_ratio_difference(
    "dpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return _pairs.logistic(beta * difference, label_smoothing)


def cdpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """−(1 − ε)·log σ(βΔ) − ε·log σ(−βΔ): DPO that believes a share ε of the labels to be flipped.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in [0, ½]. The loss is least at σ(βΔ) = 1 − ε and pulls back beyond it.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf (conservative DPO).
  """
  _check.positive("cdpo_loss", "beta", beta)
  _check.within("cdpo_loss", "label_smoothing", label_smoothing, "[0, 0.5]")
  difference = _pairs.log_ratio_difference(
    "cdpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return _pairs.logistic(beta * difference, label_smoothing)


def ipo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  tau: float,
) -> jax.Array:
  """(Δ − 1/(2τ))², with Δ the difference of the two log-ratios.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    tau: τ > 0, in 1/nats; Δ is pulled to 1/(2τ) and no further, however certain the labels.

  Returns:
    [B], float32, in nats². 1/(4τ²) wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or τ is not positive.

  References:
    Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, on sums as the paper has it. TRL
    passes per-token means (`ipo_mean_loss`) and calls τ `beta`.
  """
  _check.positive("ipo_loss", "tau", tau)
  difference = _pairs.log_ratio_difference(
    "ipo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return jnp.square(difference - 1.0 / (2.0 * tau))


def ipo_mean_loss(
  policy_chosen_mean_logps: jax.Array,
  policy_rejected_mean_logps: jax.Array,
  ref_chosen_mean_logps: jax.Array,
  ref_rejected_mean_logps: jax.Array,
  *,
  tau: float,
) -> jax.Array:
  """(Δ̄ − 1/(2τ))², with Δ̄ the difference of the two log-ratios *per token*.

  Args:
    policy_chosen_mean_logps, policy_rejected_mean_logps: [B], log π(y|x)/|y| of y⁺ and of y⁻.
    ref_chosen_mean_logps, ref_rejected_mean_logps: [B], log π_ref(y|x)/|y| of y⁺ and of y⁻.
    tau: τ > 0, in tokens/nat; a response of n tokens is pulled n times as far as in `ipo_loss`.

  Returns:
    [B], float32, in (nats/token)². 1/(4τ²) wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or τ is not positive.

  References:
    TRL's `ipo`; in Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, Δ is of sums.
  """
  _check.positive("ipo_mean_loss", "tau", tau)
  difference = _pairs.log_ratio_difference(
    "ipo_mean_loss",
    policy_chosen_mean_logps,
    policy_rejected_mean_logps,
    ref_chosen_mean_logps,
    ref_rejected_mean_logps,
    unit="mean_logps",
  )
  return jnp.square(difference - 1.0 / (2.0 * tau))


def hinge_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """max(0, 1 − βΔ), with Δ the difference of the two log-ratios.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0; a pair that is won by Δ = 1/β has no gradient any more.

  Returns:
    [B], float32. 1 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or β is not positive.

  References:
    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657. Without a reference: `slic_loss`.
  """
  _check.positive("hinge_loss", "beta", beta)
  difference = _pairs.log_ratio_difference(
    "hinge_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return jax.nn.relu(1.0 - beta * difference)


def robust_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """[−(1 − ε)·log σ(βΔ) + ε·log σ(−βΔ)]/(1 − 2ε): under flipped labels, DPO's in expectation.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in [0, ½), the true share of flipped labels.

  Returns:
    [B], float32, below 0 where βΔ is large. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Chowdhury et al. 2024 (rDPO), https://arxiv.org/abs/2403.00409.
  """
  _check.positive("robust_loss", "beta", beta)
  _check.within("robust_loss", "label_smoothing", label_smoothing, "[0, 0.5)")
  difference = beta * _pairs.log_ratio_difference(
    "robust_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  kept, flipped = _pairs.logistic(difference), _pairs.logistic(-difference)
  return ((1.0 - label_smoothing) * kept - label_smoothing * flipped) / (
    1.0 - 2.0 * label_smoothing
  )


def exo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """KL([σ(βΔ), σ(−βΔ)] ‖ [1 − ε, ε]): the *reverse* KL to the smoothed label, DPO's being forward.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in (0, ½); without it the divergence is infinite. The paper has 1e-3.

  Returns:
    [B], float32, in nats; 0 at σ(βΔ) = 1 − ε. The gradient vanishes where βΔ is far from 0.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Ji et al. 2024, https://arxiv.org/abs/2402.00856, eq. 16.
  """
  _check.positive("exo_loss", "beta", beta)
  _check.within("exo_loss", "label_smoothing", label_smoothing, "(0, 0.5)")
  difference = beta * _pairs.log_ratio_difference(
    "exo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  win, lose = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
  return jnp.exp(win) * (win - math.log1p(-label_smoothing)) + jnp.exp(lose) * (
    lose - math.log(label_smoothing)
  )


def discopop_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  temperature: float,
) -> jax.Array:
  """−(1 − m)·log σ(βΔ) + m·e^(−βΔ), with m = σ(βΔ/t): DPO that turns exponential for pairs won.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    temperature: t in (0, 1], how sharply the two are mixed. The paper has 0.05.

  Returns:
    [B], float32. ½·(ln 2 + 1) wherever policy and reference agree. Not convex.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Lu et al. 2024, https://arxiv.org/abs/2406.08414, the loss that the paper calls LRML.
  """
  _check.positive("discopop_loss", "beta", beta)
  _check.within("discopop_loss", "temperature", temperature, "(0, 1]")
  difference = beta * _pairs.log_ratio_difference(
    "discopop_loss",
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
  )
  scaled = difference / temperature
  # One exponential: m·e⁻ˣ alone is 0·∞ for a pair that is badly lost.
  exponential = jnp.exp(jax.nn.log_sigmoid(scaled) - difference)
  return jax.nn.sigmoid(-scaled) * _pairs.logistic(difference) + exponential


def dpo_norm_loss(
  policy_chosen_mean_logps: jax.Array,
  policy_rejected_mean_logps: jax.Array,
  ref_chosen_mean_logps: jax.Array,
  ref_rejected_mean_logps: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """−log σ(βΔ̄), with Δ̄ the difference of the two log-ratios *per token*.

  Args:
    policy_chosen_mean_logps, policy_rejected_mean_logps: [B], log π(y|x)/|y| of y⁺ and of y⁻.
    ref_chosen_mean_logps, ref_rejected_mean_logps: [B], log π_ref(y|x)/|y| of y⁺ and of y⁻.
    beta: β > 0, in tokens/nat: about |y| times that of `dpo_loss` (Tülu 3 has 5).

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or β is not positive.

  References:
    Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124, length-normalised DPO.
  """
  _check.positive("dpo_norm_loss", "beta", beta)
  difference = _pairs.log_ratio_difference(
    "dpo_norm_loss",
    policy_chosen_mean_logps,
    policy_rejected_mean_logps,
    ref_chosen_mean_logps,
    ref_rejected_mean_logps,
    unit="mean_logps",
  )
  return _pairs.logistic(beta * difference)


def dpop_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  penalty: float,
) -> jax.Array:
  """−log σ(β·(Δ − λ·max(0, log π_ref(y⁺) − log π(y⁺)))): the chosen must not become less likely.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied KL penalty.
    penalty: λ ≥ 0; the paper has 50, with β = 0.3.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Pal et al. 2024 (Smaug, DPO-Positive), https://arxiv.org/abs/2402.13228.
  """
  _check.positive("dpop_loss", "beta", beta)
  _check.within("dpop_loss", "penalty", penalty, "[0, inf)")
  chosen, rejected = _pairs.log_ratios(
    "dpop_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return _pairs.logistic(beta * (chosen - rejected - penalty * jax.nn.relu(-chosen)))


def r_dpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  beta: float,
  alpha: float,
) -> jax.Array:
  """−log σ(βΔ + α·(|y⁺| − |y⁻|)): a longer response must have won by more than its length.

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    chosen_lengths: [B], |y⁺|, tokens.
    rejected_lengths: [B], |y⁻|, tokens.
    beta: β > 0, the strength of the implied KL penalty.
    alpha: α ≥ 0, the reward that one token of length explains away.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree and the lengths are equal.

  Raises:
    ValueError: if the arrays are not all [B], or a hyper-parameter is out of range.

  References:
    Park et al. 2024 (R-DPO), https://arxiv.org/abs/2403.19159.
  """
  _check.positive("r_dpo_loss", "beta", beta)
  _check.within("r_dpo_loss", "alpha", alpha, "[0, inf)")
  difference = _pairs.log_ratio_difference(
    "r_dpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  chosen, rejected, _ = _check.as_floats(
    "r_dpo_loss",
    1,
    chosen_lengths=chosen_lengths,
    rejected_lengths=rejected_lengths,
    policy_chosen_logps=policy_chosen_logps,
  )
  return _pairs.logistic(beta * difference + alpha * (chosen - rejected))


def f_dpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  divergence: str,
  alpha: float | None = None,
) -> jax.Array:
  """−log σ(β·(f′(ρ⁺) − f′(ρ⁻))), with ρ = π/π_ref: DPO for other divergences than the reverse KL.

  f′(ρ) up to a constant:  reverse_kl  log ρ (`dpo_loss`)    forward_kl  −1/ρ
                           js  log(2ρ/(1 + ρ))              alpha  (1 − ρ^−α)/α

  Args:
    policy_chosen_logps, policy_rejected_logps: [B], log π(y⁺|x) and log π(y⁻|x), sums.
    ref_chosen_logps, ref_rejected_logps: [B], log π_ref(y⁺|x) and log π_ref(y⁻|x).
    beta: β > 0, the strength of the implied penalty on the divergence.
    divergence: "reverse_kl", "forward_kl", "js" or "alpha".
    alpha: α in (0, 1], given for the α-divergence alone: 1 is the forward KL, α → 0 the reverse.

  Returns:
    [B], float32. ln 2 wherever policy and reference agree. ρ^−α runs on along its tangent beyond
    e²⁰, so that value and gradient stay finite and a lost pair keeps its gradient.

  Raises:
    ValueError: if the log-probs are not all [B], or a setting is out of range or given in vain.

  References:
    Wang et al. 2023, https://arxiv.org/abs/2309.16240, table 1. TRL bounds nothing but the
    α-divergence, at e⁸⁰, where the gradient ends.
  """
  _check.positive("f_dpo_loss", "beta", beta)
  if (alpha is not None) != (divergence == "alpha"):
    raise ValueError(f"f_dpo_loss: alpha={alpha} does not go with divergence={divergence!r}.")
  if divergence == "alpha":
    _check.within("f_dpo_loss", "alpha", alpha, "(0, 1]")
  ratios = _pairs.log_ratios(
    "f_dpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  chosen, rejected = (_derivative(x, divergence, alpha) for x in ratios)
  return _pairs.logistic(beta * (chosen - rejected))


def _derivative(log_ratio: jax.Array, divergence: str, alpha: float | None) -> jax.Array:
  """f′(ρ) at log ρ, up to a constant."""
  match divergence:
    case "reverse_kl":
      return log_ratio
    case "forward_kl":
      return _pairs.power_reward(log_ratio, alpha=1.0)
    case "js":
      return jax.nn.log_sigmoid(log_ratio)
    case "alpha":
      return _pairs.power_reward(log_ratio, alpha)
  raise ValueError(
    f"f_dpo_loss: divergence must be one of reverse_kl, forward_kl, js, alpha, got {divergence!r}."
  )
