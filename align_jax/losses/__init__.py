"""Losses of alignment as pure functions: arrays in, unreduced float32 arrays out."""

from align_jax.losses.kl import (
  adaptive_kl_coef,
  exact_kl,
  kl_estimate,
)
from align_jax.losses.masked import (
  Mean,
  masked_mean,
  masked_sum,
  masked_whiten,
)
from align_jax.losses.pointwise import (
  apo_down_loss,
  apo_zero_loss,
  bco_loss,
  nca_loss,
  sppo_loss,
)
from align_jax.losses.policy import (
  gae,
  kl_shaped_rewards,
  ppo_policy_loss,
  ppo_value_loss,
  probability_ratio,
)
from align_jax.losses.preference import (
  cdpo_loss,
  discopop_loss,
  dpo_loss,
  dpo_norm_loss,
  dpop_loss,
  exo_loss,
  f_dpo_loss,
  hinge_loss,
  implicit_reward,
  ipo_loss,
  ipo_mean_loss,
  r_dpo_loss,
  robust_loss,
)
from align_jax.losses.reference_free import (
  alphapo_loss,
  cpo_loss,
  orpo_loss,
  sft_loss,
  simpo_loss,
  slic_loss,
)
from align_jax.losses.reward import (
  bradley_terry_loss,
  plackett_luce_loss,
  rao_kupper_loss,
)
from align_jax.losses.supervised import cross_entropy_loss, token_logprobs
from align_jax.losses.token_level import (
  ld_dpo_loss,
  step_dpo_loss,
  tdpo_loss,
  wpo_weight,
)
from align_jax.losses.transport import aot_loss, aot_unpaired_loss
from align_jax.losses.unpaired import (
  apo_zero_unpaired_loss,
  bco_unpaired_loss,
  kto_kl_baseline,
  kto_loss,
)

__all__ = [
  "Mean",
  "adaptive_kl_coef",
  "alphapo_loss",
  "aot_loss",
  "aot_unpaired_loss",
  "apo_down_loss",
  "apo_zero_loss",
  "apo_zero_unpaired_loss",
  "bco_loss",
  "bco_unpaired_loss",
  "bradley_terry_loss",
  "cdpo_loss",
  "cpo_loss",
  "cross_entropy_loss",
  "discopop_loss",
  "dpo_loss",
  "dpo_norm_loss",
  "dpop_loss",
  "exact_kl",
  "exo_loss",
  "f_dpo_loss",
  "gae",
  "hinge_loss",
  "implicit_reward",
  "ipo_loss",
  "ipo_mean_loss",
  "kl_estimate",
  "kl_shaped_rewards",
  "kto_kl_baseline",
  "kto_loss",
  "ld_dpo_loss",
  "masked_mean",
  "masked_sum",
  "masked_whiten",
  "nca_loss",
  "orpo_loss",
  "plackett_luce_loss",
  "ppo_policy_loss",
  "ppo_value_loss",
  "probability_ratio",
  "r_dpo_loss",
  "rao_kupper_loss",
  "robust_loss",
  "sft_loss",
  "simpo_loss",
  "slic_loss",
  "sppo_loss",
  "step_dpo_loss",
  "tdpo_loss",
  "token_logprobs",
  "wpo_weight",
]
