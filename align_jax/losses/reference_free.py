"""Losses that learn a policy from preferences without a reference: SimPO, ORPO, CPO, SLiC-HF.

A `*_logps` is the log-probability of a whole response: the *sum* over its tokens; a `*_mean_logps`
is that sum divided by the number of tokens.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs

_NEAR_ONE = 1e-6  # log-odds are linear above log p = -1e-6: at p = 1 they and their slope are ∞


def simpo_loss(
  policy_chosen_mean_logps: jax.Array,
  policy_rejected_mean_logps: jax.Array,
  *,
  beta: float,
  gamma: float,
) -> jax.Array:
  """−log σ(β·(w − l) − γ), with w and l the log-probs per token of the chosen and the rejected.

  Args:
    policy_chosen_mean_logps: [B], w = log π(y⁺|x)/|y⁺|.
    policy_rejected_mean_logps: [B], l = log π(y⁻|x)/|y⁻|.
    beta: β > 0, in tokens/nat; the paper has 2 to 10.
    gamma: γ ≥ 0, the margin of reward to win by.

  Returns:
    [B], float32.

  Raises:
    ValueError: if the log-probs are not both [B], or a hyper-parameter is out of range.

  References:
    Meng et al. 2024, https://arxiv.org/abs/2405.14734. The paper tunes γ/β; this is γ itself.
  """
  _check.positive("simpo_loss", "beta", beta)
  _check.within("simpo_loss", "gamma", gamma, "[0, inf)")
  chosen, rejected = _means("simpo_loss", policy_chosen_mean_logps, policy_rejected_mean_logps)
  return _pairs.logistic(beta * (chosen - rejected) - gamma)


def alphapo_loss(
  policy_chosen_mean_logps: jax.Array,
  policy_rejected_mean_logps: jax.Array,
  *,
  beta: float,
  gamma: float,
  alpha: float,
) -> jax.Array:
  """−log σ(r⁺ − r⁻ − γ), with r = β·(1 − p^−α)/α and p the geometric mean probability of a token.

  Args:
    policy_chosen_mean_logps: [B], log p of the chosen response, log π(y⁺|x)/|y⁺|.
    policy_rejected_mean_logps: [B], log p of the rejected one, log π(y⁻|x)/|y⁻|.
    beta: β > 0, in tokens/nat.
    gamma: γ ≥ 0, the margin of reward to win by.
    alpha: α, any number. 0 is `simpo_loss`; above 0 improbable responses weigh more, below 0 less.

  Returns:
    [B], float32. p^−α runs on along its tangent beyond e²⁰, so that value and gradient are finite.

  Raises:
    ValueError: if the log-probs are not both [B], or a hyper-parameter is out of range.

  References:
    Gupta et al. 2025, https://arxiv.org/abs/2501.03884.
  """
  _check.positive("alphapo_loss", "beta", beta)
  _check.within("alphapo_loss", "gamma", gamma, "[0, inf)")
  _check.within("alphapo_loss", "alpha", alpha, "(-inf, inf)")
  means = _means("alphapo_loss", policy_chosen_mean_logps, policy_rejected_mean_logps)
  chosen, rejected = (_pairs.power_reward(x, alpha) for x in means)
  return _pairs.logistic(beta * (chosen - rejected) - gamma)


def orpo_loss(
  policy_chosen_mean_logps: jax.Array, policy_rejected_mean_logps: jax.Array, *, beta: float
) -> jax.Array:
  """−w − β·log σ(odds(w) − odds(l)), with odds(x) = x − log(1 − eˣ), the log-odds at log-prob x.

  Args:
    policy_chosen_mean_logps: [B], w = log π(y⁺|x)/|y⁺|.
    policy_rejected_mean_logps: [B], l = log π(y⁻|x)/|y⁻|.
    beta: β > 0, the weight of the odds ratio beside the likelihood (the paper's λ, 0.1 to 0.25).

  Returns:
    [B], float32. The log-odds run on along their tangent above x = −1e-6, so that responses of
    probability 1 have a finite value and keep a gradient.

  Raises:
    ValueError: if the log-probs are not both [B], or β is not positive.

  References:
    Hong et al. 2024, https://arxiv.org/abs/2403.07691.
  """
  _check.positive("orpo_loss", "beta", beta)
  chosen, rejected = _means("orpo_loss", policy_chosen_mean_logps, policy_rejected_mean_logps)
  return -chosen + beta * _pairs.logistic(_log_odds(chosen) - _log_odds(rejected))


def cpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  *,
  beta: float,
  sft_weight: float = 1.0,
) -> jax.Array:
  """−log σ(β·(w − l)) − λ·w, with w and l the log-probs of the chosen and the rejected.

  Args:
    policy_chosen_logps: [B], w = log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], l = log π(y⁻|x).
    beta: β > 0, in 1/nats.
    sft_weight: λ ≥ 0, the weight of the likelihood of the chosen response.

  Returns:
    [B], float32.

  Raises:
    ValueError: if the log-probs are not both [B], or a hyper-parameter is out of range.

  References:
    Xu et al. 2024, https://arxiv.org/abs/2401.08417. TRL's likelihood term is the mean over the
    tokens of the batch, here it is the sum over the response, as in the paper.
  """
  _check.positive("cpo_loss", "beta", beta)
  _check.within("cpo_loss", "sft_weight", sft_weight, "[0, inf)")
  chosen, rejected = _check.as_floats(
    "cpo_loss",
    1,
    policy_chosen_logps=policy_chosen_logps,
    policy_rejected_logps=policy_rejected_logps,
  )
  return _pairs.logistic(beta * (chosen - rejected)) - sft_weight * chosen


def slic_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  policy_target_logps: jax.Array,
  *,
  delta: float,
  sft_weight: float,
) -> jax.Array:
  """max(0, δ − w + l) − λ·log π(y_target|x), with w and l the log-probs of chosen and rejected.

  Args:
    policy_chosen_logps: [B], w = log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], l = log π(y⁻|x).
    policy_target_logps: [B], of the supervised target of the same prompt (or of the chosen response
      again), which keeps the policy near what it was fine-tuned on.
    delta: δ ≥ 0, in nats, by how much the chosen is to win.
    sft_weight: λ ≥ 0, the weight of that likelihood.

  Returns:
    [B], float32, in nats.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425, rank calibration with the
    cross-entropy regulariser. The hinge on log-ratios to a reference is `hinge_loss`.
  """
  _check.within("slic_loss", "delta", delta, "[0, inf)")
  _check.within("slic_loss", "sft_weight", sft_weight, "[0, inf)")
  chosen, rejected, target = _check.as_floats(
    "slic_loss",
    1,
    policy_chosen_logps=policy_chosen_logps,
    policy_rejected_logps=policy_rejected_logps,
    policy_target_logps=policy_target_logps,
  )
  return jax.nn.relu(delta - chosen + rejected) - sft_weight * target


def sft_loss(policy_chosen_mean_logps: jax.Array) -> jax.Array:
  """−log π(y⁺|x)/|y⁺|: supervised fine-tuning on the chosen response, for mixtures of losses.

  Args:
    policy_chosen_mean_logps: [B], log π(y⁺|x)/|y⁺|.

  Returns:
    [B], float32, in nats per token.

  Raises:
    ValueError: if the log-probs are not [B].

  References:
    Pang et al. 2024, https://arxiv.org/abs/2404.19733, eq. 1, its likelihood term. A response counts
    1 whatever its length; TRL's `sft` term averages over the tokens of the batch.
  """
  (chosen,) = _check.as_floats("sft_loss", 1, policy_chosen_mean_logps=policy_chosen_mean_logps)
  return -chosen


def _means(function: str, chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, ...]:
  return _check.as_floats(
    function, 1, policy_chosen_mean_logps=chosen, policy_rejected_mean_logps=rejected
  )


def _log_odds(log_prob: jax.Array) -> jax.Array:
  below = jnp.minimum(log_prob, -_NEAR_ONE)
  tangent = jnp.maximum(log_prob + _NEAR_ONE, 0.0) / _NEAR_ONE
  return below - jnp.log(-jnp.expm1(below)) + tangent
