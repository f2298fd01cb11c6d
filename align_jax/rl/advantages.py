"""From scored rollouts to advantages, by the name of an estimator."""

import jax
import jax.numpy as jnp

from align_jax import losses
from align_jax.rl.config import GROUPED, PER_TOKEN, PolicyGradientConfig

_GROUPED = {name: getattr(losses, f"{name}_advantages") for name in GROUPED}


def estimate_advantages(
  batch: dict[str, jax.Array],
  config: PolicyGradientConfig,
  *,
  samples_per_prompt: int,
  kl_coef: jax.Array,
  baseline: jax.Array,
) -> dict[str, jax.Array]:
  """The batch with `advantages` [B, T], 0 off the mask, and for `gae` with `returns` [B, T].

  A KL in the reward is taken off token by token (gae, reinforce_pp) or, as the k1 of the whole
  response, off the score. Rewards are whitened (scale only) before GAE where asked for; returns never.

  Args:
    batch: score [B]; mask, old_logprobs, ref_logprobs and, for gae, old_values [B, T].
    config: says which estimator.
    samples_per_prompt: G; rows are listed prompt by prompt.
    kl_coef: [], today's coefficient.
    baseline: [], what `reinforce` takes off the scores: it must not know them.
  """
  in_reward = kl_coef if config.kl.place == "reward" else 0.0
  added = {}
  if config.estimator in PER_TOKEN:
    advantages, added = _per_token(batch, config, in_reward)
  else:
    mask = batch["mask"]
    k1 = losses.masked_sum(batch["old_logprobs"] - batch["ref_logprobs"], mask, axis=1)
    scores = batch["score"] - in_reward * k1
    if config.estimator == "reinforce":
      of_response = losses.reinforce_advantages(scores, baseline)
    else:
      of_response = _GROUPED[config.estimator](scores.reshape(-1, samples_per_prompt)).reshape(-1)
    advantages = jnp.where(mask > 0, of_response[:, None], 0.0)
  if config.whiten_advantages:
    advantages = losses.masked_whiten(advantages, batch["mask"])
  return batch | {"advantages": advantages} | added


def _per_token(batch, config: PolicyGradientConfig, kl_coef):
  mask = batch["mask"]
  rewards = losses.kl_shaped_rewards(
    batch["score"], batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef=kl_coef
  )
  if config.estimator == "reinforce_pp":
    return losses.reinforce_pp_advantages(rewards, mask, gamma=config.gamma), {}
  if config.whiten_rewards:
    rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
  advantages, returns = losses.gae(
    rewards, batch["old_values"], mask, gamma=config.gamma, lam=config.value.lam
  )
  return advantages, {"returns": returns}


def importance_weights(
  batch: dict[str, jax.Array], config: PolicyGradientConfig
) -> dict[str, jax.Array]:
  """The batch with `importance` [B, T]: what the trainer's policy is to the sampler, if asked for."""
  if config.importance is None:
    return batch
  pair = batch["old_logprobs"], batch["sampler_logprobs"]
  if config.importance.kind == "truncated":
    weights = losses.truncated_importance_weights(*pair, cap=config.importance.high)
  else:
    weights = losses.masked_importance_weights(
      *pair, low=config.importance.low, high=config.importance.high
    )
  return batch | {"importance": weights}


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
  """1 − Var(R − V)/Var(R) over the mask: 1 is a perfect critic, 0 one that knows only the mean.

  values, returns, mask [B, T] -> []; 0 where all returns are equal.
  """

  def variance(x):
    return losses.masked_mean((x - losses.masked_mean(x, mask)) ** 2, mask)

  total = variance(returns)
  known = total > 1e-12
  return jnp.where(known, 1.0 - variance(returns - values) / jnp.where(known, total, 1.0), 0.0)
