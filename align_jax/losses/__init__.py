"""Losses of alignment as pure functions: arrays in, unreduced float32 arrays out."""

from align_jax.losses.kl import adaptive_kl_coef, exact_kl, kl_estimate
from align_jax.losses.masked import Mean, masked_mean, masked_sum, masked_whiten
from align_jax.losses.policy import (
  gae,
  kl_shaped_rewards,
  ppo_policy_loss,
  ppo_value_loss,
  probability_ratio,
)
from align_jax.losses.preference import (
  dpo_loss,
  implicit_reward,
  ipo_loss,
  kto_kl_baseline,
  kto_loss,
)
from align_jax.losses.reward import bradley_terry_loss
from align_jax.losses.supervised import cross_entropy_loss, token_logprobs

__all__ = [
  "Mean",
  "adaptive_kl_coef",
  "bradley_terry_loss",
  "cross_entropy_loss",
  "dpo_loss",
  "exact_kl",
  "gae",
  "implicit_reward",
  "ipo_loss",
  "kl_estimate",
  "kl_shaped_rewards",
  "kto_kl_baseline",
  "kto_loss",
  "masked_mean",
  "masked_sum",
  "masked_whiten",
  "ppo_policy_loss",
  "ppo_value_loss",
  "probability_ratio",
  "token_logprobs",
]
