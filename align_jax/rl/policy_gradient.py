"""Policy gradients on a scored rollout: PPO as InstructGPT has it, GRPO, RLOO and their relatives.

Trainable: {"policy": weights or lora} and, with the estimator gae, "value": {"trunk" or "lora", "head"}.
Frozen: "base" (with a LoRA policy; it is then the reference as well) or "ref", and "value" (with a
LoRA value model).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from align_jax import losses, models
from align_jax.losses import Mean
from align_jax.rl import rollouts
from align_jax.rl.advantages import estimate_advantages, explained_variance, importance_weights
from align_jax.rl.config import PolicyGradientConfig, SamplingConfig
from align_jax.rl.state import OnlineState
from align_jax.rl.update import Learner, run_updates
from align_jax.training import objectives
from align_jax.training import step as step_lib


def policy_gradient_learner(
  model: models.Transformer,
  config: PolicyGradientConfig,
  *,
  sampling: SamplingConfig,
  tx: optax.GradientTransformation,
  value_model: models.Transformer | None = None,
  accumulate: int = 1,
) -> Learner:
  """`(state, frozen, batch) -> (state, metrics)`: log-probs, advantages, `config.updates` steps.

  Where the batch has `layouts`, as `layout.make_layouts` makes them, the models see their rows.

  Args:
    model: the policy's module (with its `lora_scale`).
    config: estimator, loss and what surrounds them.
    sampling: what the batch was sampled with; its rows are listed prompt by prompt.
    tx: the optimizer; see `training.optimizer.by_part` for policy and value in one.
    value_model: the critic's module, with the estimator gae; it must share the tokenizer.
    accumulate: parts of a minibatch that are differentiated one after the other.
  """
  objective = policy_gradient_objective(model, value_model, config, sampling.temperature)
  parts = config.minibatches * accumulate
  prepare = functools.partial(averaged, config=config, max_length=sampling.max_new_tokens)

  def learn(state: OnlineState, frozen, batch):
    layouts = batch.pop("layouts", None)
    laid = {} if layouts is None else {"layout": layouts["scoring"]}
    batch = rollouts.score_rollout(
      model,
      value_model,
      state.params,
      frozen,
      batch | laid,
      temperature=sampling.temperature,
      chunk=config.logits_chunk,
      parts=parts,
    )
    batch = estimate_advantages(
      batch,
      config,
      samples_per_prompt=sampling.samples_per_prompt,
      kl_coef=state.kl_coef,
      baseline=batch["baseline"],
    )
    batch = importance_weights(batch, config)
    state, changes = run_updates(
      state,
      frozen,
      _rows(batch, state.kl_coef),
      objective=objective,
      tx=tx,
      epochs=config.epochs,
      minibatches=config.minibatches,
      accumulate=accumulate,
      prepare=prepare,
      order=layouts and layouts["order"],
      beside=layouts and {"layout": layouts["updates"]},
    )
    metrics = _batch_metrics(batch, state.kl_coef) | changes
    return _next_kl_coef(state, metrics, len(batch["score"]), config), metrics

  return learn


def _rows(batch: dict[str, jax.Array], kl_coef) -> dict[str, jax.Array]:
  """What an update reads, all [B, ...]; a group that is to be left out has no token in the mask."""
  names = {"tokens", "segment_ids", "old_logprobs", "ref_logprobs", "old_values"}
  names |= {"advantages", "returns", "importance"}
  rows = {name: x for name, x in batch.items() if name in names or name.startswith("ptx_")}
  rows["mask"] = batch["mask"] * batch["keep"][:, None]
  return rows | {"kl_coef": jnp.broadcast_to(kl_coef, batch["keep"].shape)}


def averaged(params, frozen, rows, *, config: PolicyGradientConfig, max_length: int):
  """The minibatch with weights of its tokens that sum to 1 over all of its rows.

  So policy, value and pretraining losses are means of their own, however the rows are split up.
  """
  del params, frozen
  limit = max_length if config.average == "constant" else None

  def normalised(mask, over, limit=None):
    weights, total = losses.averaging_weights(mask, over=over, max_length=limit)
    return weights / jnp.maximum(total, 1e-8)

  count = rows["mask"].shape[0]
  added = {
    "policy_weight": normalised(rows["mask"], config.average, limit),
    "value_weight": normalised(rows["mask"], "token"),
    "share": jnp.full(count, 1.0 / count),
  }
  if "ptx_loss_mask" in rows:
    same = rows["ptx_segment_ids"][..., 1:] == rows["ptx_segment_ids"][..., :-1]
    mask = rows["ptx_loss_mask"][..., 1:] * same
    added["ptx_weight"] = mask / jnp.maximum(jnp.sum(mask), 1e-8)
  return rows | added


def policy_gradient_objective(
  model: models.Transformer,
  value_model: models.Transformer | None,
  config: PolicyGradientConfig,
  temperature: float,
) -> step_lib.Objective:
  """Policy loss + KL loss − entropy bonus, averaged as asked; + coef · value loss + coef · NLL (ptx).

  Of rows with `policy_weight`, `value_weight` and `share`, which sum to 1 over a minibatch.
  """

  def objective(trainable, frozen, rows, rng):
    del rng
    policy = objectives.policy_variables(trainable["policy"], frozen)
    logprobs, entropy = rollouts.policy_logprobs(
      model, policy, rows, temperature=temperature, chunk=config.logits_chunk
    )
    of_policy = _policy_loss(logprobs, rows, config)
    loss = of_policy
    if config.kl.place == "loss":
      kl = losses.kl_loss(logprobs, rows["ref_logprobs"], rows["old_logprobs"], kind=config.kl.kind)
      loss = loss + rows["kl_coef"][:, None] * kl
    if config.entropy_coef:
      loss = loss - config.entropy_coef * entropy
    total = losses.masked_sum(loss, rows["policy_weight"])
    share = jnp.sum(rows["share"])
    metrics = {"ppo/policy_loss": Mean(losses.masked_sum(of_policy, rows["policy_weight"]), share)}
    if value_model is not None:
      value_loss = _value_loss(value_model, trainable, frozen, rows, config)
      metrics["value/loss"] = Mean(value_loss, share)
      total += config.value.coef * value_loss
    if "ptx_weight" in rows:
      metrics["ptx/loss"] = Mean(_ptx_loss(model, policy, rows, config.logits_chunk), share)
      total += config.ptx_coef * metrics["ptx/loss"].total
    metrics |= {"loss": Mean(total, share)} | _ratio_metrics(logprobs, rows, config)
    return total, metrics

  return objective


def _policy_loss(logprobs, rows, config: PolicyGradientConfig) -> jax.Array:
  """[B, T], times the importance weights if there are any."""
  old, advantages, mask = rows["old_logprobs"], rows["advantages"], rows["mask"]
  clip = {"clip_eps": config.clip_eps, "clip_eps_high": config.clip_eps_high}
  if config.loss == "ppo":
    loss = losses.ppo_policy_loss(logprobs, old, advantages, **clip, dual_clip=config.dual_clip)
  elif config.loss == "cispo":
    loss = losses.cispo_loss(logprobs, old, advantages, **clip)
  elif config.loss == "gspo":
    loss = losses.gspo_token_loss(logprobs, old, advantages, mask, **clip)
  else:
    loss = losses.reinforce_loss(logprobs, advantages)
  return loss * rows["importance"] if "importance" in rows else loss


def _value_loss(value_model, trainable, frozen, rows, config: PolicyGradientConfig) -> jax.Array:
  values = rollouts.token_values(value_model, trainable["value"], frozen, rows)
  loss = losses.ppo_value_loss(
    values, rows["old_values"], rows["returns"], clip_eps=config.value.clip_eps
  )
  return losses.masked_sum(loss, rows["value_weight"])


def _ptx_loss(model, policy, rows, chunk: int | None) -> jax.Array:
  """−Σ w·log π of the pretraining rows [B, M, L] that travel with the responses."""
  names = ("tokens", "positions", "segment_ids")
  flat = {name: _flat(rows[f"ptx_{name}"]) for name in names}
  weight = _flat(rows["ptx_weight"])
  logprobs = models.token_logprobs(model, policy, **flat, chunk_size=chunk, where=weight)
  return -losses.masked_sum(logprobs, weight)


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _ratio_metrics(logprobs, rows, config: PolicyGradientConfig) -> step_lib.Metrics:
  """How far the policy has moved within this iteration; a maximum travels as Mean(maximum, 1)."""
  mask, advantages, old = rows["mask"], rows["advantages"], rows["old_logprobs"]
  ratio = losses.probability_ratio(logprobs, old)
  ratio = jnp.where(mask > 0, jax.lax.stop_gradient(ratio), 1.0)
  one = jnp.ones(())
  metrics = {
    "ppo/kl_old": Mean.of(losses.kl_estimate(old, logprobs, kind="k3"), mask),
    "ppo/ratio_max": Mean(jnp.max(ratio), one),
    "ppo/first_ratio_error_max": Mean(jnp.max(jnp.abs(ratio - 1.0)), one),
  }
  if config.loss == "reinforce":
    return metrics
  if config.loss == "gspo":
    mean = losses.masked_mean(jnp.log(ratio), mask, axis=1)
    ratio = jnp.broadcast_to(jnp.exp(mean)[:, None], mask.shape)
  high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
  low = jnp.inf if config.clip_eps is None else config.clip_eps
  if config.loss == "cispo":  # cuts the weight, whatever the advantage's sign
    binds = (ratio > 1 + high) | (ratio < 1 - low)
  else:
    binds = jnp.where(advantages > 0, ratio > 1 + high, (advantages < 0) & (ratio < 1 - low))
  return metrics | {"ppo/clip_fraction": Mean.of(binds, mask)}


def _batch_metrics(batch, kl_coef) -> step_lib.Metrics:
  mask = batch["mask"]
  metrics = rollouts.policy_metrics(batch) | {"kl_coef": kl_coef}
  k1 = losses.kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], kind="k1")
  metrics["rows/kl"] = losses.masked_sum(k1, mask, axis=1)
  if "importance" in batch:
    metrics["ppo/importance_mean"] = Mean.of(batch["importance"], mask)
  if "returns" in batch:
    metrics["value/mean"] = Mean.of(batch["old_values"], mask)
    metrics["value/explained_variance"] = explained_variance(
      batch["old_values"], batch["returns"], mask
    )
  return metrics


def _next_kl_coef(
  state: OnlineState, metrics, batch_size: int, config: PolicyGradientConfig
) -> OnlineState:
  """Adaptive, where asked for; it waits while only the value model learns."""
  if config.kl.target is None:
    return state
  renewed = losses.adaptive_kl_coef(
    state.kl_coef,
    metrics["kl/ref"].compute(),
    target=config.kl.target,
    horizon=config.kl.horizon,
    batch_size=batch_size,
  )
  waiting = 0 if config.value is None else config.value.warmup
  return dataclasses.replace(state, kl_coef=jnp.where(state.step < waiting, state.kl_coef, renewed))
