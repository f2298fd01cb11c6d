"""Preference objectives: the model scores both answers, the losses of the family compare them.

Everything a loss may ask for is an array with a name; `preferences` says which ones it takes.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from align_jax import losses
from align_jax.losses import Mean
from align_jax.training import objectives, pair_scores
from align_jax.training.pair_scores import PairScores
from align_jax.training.preferences import PreferenceConfig
from align_jax.training.step import Carry, Metrics, Objective

Arrays = Mapping[str, jax.Array]


def preference_objective(
  model, config: PreferenceConfig, *, chunk: int | None = None, temperature: float = 1.0
) -> Objective:
  """The objective on pairs, or on single responses with a thumb up or down.

  Pairs may be scored at the temperature at which they were sampled; unpaired objectives are at 1.
  """
  if not config.unpaired:
    return _pair_objective(model, config, chunk, temperature)
  if temperature != 1.0:
    raise ValueError(f"objective {config.name!r} is not built for temperature {temperature}")
  return _feedback_objective(model, config, chunk)


def preference_evaluation(
  model, config: PreferenceConfig, *, chunk: int | None = None
) -> Objective:
  """Metrics on held-out pairs; unpaired objectives have no loss of pairs, only rewards there."""
  if not config.unpaired:
    return _pair_objective(model, config, chunk)
  pairs = _pair_objective(model, PreferenceConfig("dpo", beta=config.reward_scale), chunk)

  def objective(trainable, frozen, batch, rng):
    loss_sum, metrics = pairs(trainable, frozen, batch, rng)
    del metrics["loss"]
    return loss_sum, metrics

  return objective


def _pair_objective(
  model, config: PreferenceConfig, chunk: int | None, temperature: float = 1.0
) -> Objective:
  def objective(trainable, frozen, batch, rng):
    del rng
    policy, ref = _scores(model, config, trainable, frozen, batch, chunk, temperature)
    arrays = _pair_arrays(config, policy, ref, batch, frozen)
    weight = batch["weight"].reshape(-1)
    if config.wpo:
      weight = weight * losses.wpo_weight(
        *_both(policy.logprobs), *_both(policy.collision), *_both(policy.mask)
      )
    given = batch["weight"].reshape(-1)
    metrics = _pair_metrics(config, arrays, weight, given)
    # WPO scales each pair's loss; it does not change how many pairs the mean is over.
    count = jnp.sum(given)
    label_prob = batch["label_prob"].reshape(-1)
    loss = _mixed_loss(config, arrays, label_prob, weight, count, metrics)
    metrics["loss"] = Mean(loss, count)
    metrics["tokens"] = objectives.token_count(batch["segment_ids"])
    return loss, metrics

  return objective


def _scores(
  model, config, trainable, frozen, batch, chunk, temperature
) -> tuple[PairScores, jax.Array | None]:
  """The policy's scores, and the reference's log-probs [P, 2, T]: recomputed, cached, or None."""
  variables = objectives.policy_variables(trainable, frozen)
  score = functools.partial(
    pair_scores.score_pairs, model, batch=batch, chunk=chunk, temperature=temperature
  )
  if config.needs_distributions:
    reference = objectives.reference_variables(frozen)
    policy = score(variables, collision=config.wpo, reference=reference)
    return policy, jax.lax.stop_gradient(policy.ref_logprobs)
  policy = score(variables, collision=config.wpo)
  if not config.needs_reference:
    return policy, None
  if "ref_logprobs" in batch:
    return policy, pair_scores.aligned(batch, "ref_logprobs")
  ref = score(objectives.reference_variables(frozen))
  return policy, jax.lax.stop_gradient(ref.logprobs)


def _pair_arrays(config, policy: PairScores, ref, batch, frozen) -> dict[str, jax.Array]:
  """All that the losses may ask for, under the names they ask by."""
  lengths = jnp.sum(policy.mask, axis=-1)
  found = {("", "lengths"): lengths, ("", "mask"): policy.mask}
  for who, logprobs in (("policy_", policy.logprobs), ("ref_", ref)):
    if logprobs is not None:
      sums = losses.masked_sum(logprobs, policy.mask, axis=-1)
      found |= {(who, "logprobs"): logprobs, (who, "logps"): sums}
      found[who, "mean_logps"] = sums / jnp.maximum(lengths, 1.0)
  if policy.kl is not None:
    found["", "kl"] = losses.masked_sum(policy.kl, policy.mask, axis=-1)
  if "chosen_step_mask" in config.arrays:
    found["", "step_mask"] = pair_scores.aligned(batch, "step_mask")
  arrays = {"pair_mask": (batch["weight"].reshape(-1) > 0).astype(jnp.float32)}
  for (who, what), both in found.items():
    arrays |= {f"{who}chosen_{what}": both[:, 0], f"{who}rejected_{what}": both[:, 1]}
  if "shift" in config.arrays:
    arrays["shift"] = frozen["shift"].compute()
  return arrays


def _mixed_loss(config, arrays: Arrays, label_prob, weight, count, metrics: Metrics) -> jax.Array:
  """Σ over members of weight · Σ over pairs; a soft label p is the expectation over both orders."""
  swapped = {_swap(name): x for name, x in arrays.items()}
  total = 0.0
  for member, share in config.members:
    settings = config.settings(member)
    loss = member.loss(**_arguments(member, arrays), **settings)
    over = weight
    if member.batchwise:  # sorted: the real pairs come first, and their labels are hard
      over = (jnp.arange(len(weight)) < jnp.sum(arrays["pair_mask"])).astype(jnp.float32)
    else:
      other = member.loss(**_arguments(member, swapped), **settings)
      loss = label_prob * loss + (1.0 - label_prob) * other
    loss_sum = losses.masked_sum(loss, over)
    if len(config.members) > 1:
      metrics[f"loss/{member.name}"] = Mean(loss_sum, count)
    total += share * loss_sum
  return total


def _arguments(member, arrays: Arrays) -> dict[str, jax.Array]:
  known = {"policy_target_logps": "policy_chosen_logps"}  # SLiC is regularised to the chosen answer
  return {name: arrays[known.get(name, name)] for name in member.arrays}


def _swap(name: str) -> str:
  if "chosen" in name:
    return name.replace("chosen", "rejected")
  return name.replace("rejected", "chosen")


def _pair_metrics(config, arrays: Arrays, weight, given_weight) -> Metrics:
  """Rewards are scaled log-ratios to the reference, or without one the log-probs that are compared."""
  of = "mean_logps" if "policy_chosen_mean_logps" in config.lead.arrays else "logps"
  rewards = []
  for which in ("chosen", "rejected"):
    reward = arrays[f"policy_{which}_{of}"]
    if config.needs_reference:
      reward = reward - arrays[f"ref_{which}_{of}"]
    rewards.append(config.reward_scale * reward)
  metrics = objectives.reward_metrics(*rewards, given_weight) | {
    "logps/chosen": Mean.of(arrays["policy_chosen_logps"], given_weight),
    "logps/rejected": Mean.of(arrays["policy_rejected_logps"], given_weight),
  }
  if config.wpo:
    metrics["wpo/weight"] = Mean(jnp.sum(weight), jnp.sum(given_weight))
  if "shift" in arrays:
    metrics["bco/shift"] = Mean.of(arrays["shift"])
  return metrics


def _feedback_objective(model, config: PreferenceConfig, chunk: int | None) -> Objective:
  ((member, _),) = config.members
  settings, scale = config.settings(member), config.reward_scale

  def objective(trainable, frozen, batch, rng):
    del rng
    policy = objectives.policy_variables(trainable, frozen)
    policy = objectives.response_logps(model, policy, batch, chunk=chunk)
    reference = objectives.reference_variables(frozen)
    ref = jax.lax.stop_gradient(objectives.response_logps(model, reference, batch, chunk=chunk))
    point = _reference_point(member, batch, frozen)
    arrays = {"policy_logps": policy, "ref_logps": ref, "is_desirable": batch["is_desirable"]}
    loss = member.loss(**arrays, **point, **settings)
    weight, up = batch["weight"], batch["is_desirable"]
    rewards = scale * (policy - ref)
    # The baseline is in nats, like the log-ratios; the shift is a reward.
    threshold = scale * point.get("kl_baseline", 0.0) + point.get("shift", 0.0)
    segments = [v for k, v in batch.items() if k.endswith("segment_ids")]
    metrics = {
      "loss": Mean.of(loss, weight),
      "rewards/chosen": Mean.of(rewards, weight * up),
      "rewards/rejected": Mean.of(rewards, weight * (1 - up)),
      "rewards/accuracy": Mean.of((rewards > threshold) == (up > 0), weight),
      "logps/chosen": Mean.of(policy, weight * up),
      "logps/rejected": Mean.of(policy, weight * (1 - up)),
      "tokens": objectives.token_count(*segments),
    } | {_POINT_METRICS[name]: Mean.of(value) for name, value in point.items()}
    return metrics["loss"].total, metrics

  return objective


_POINT_METRICS = {"kl_baseline": "kl/baseline", "shift": "bco/shift"}


def _reference_point(member, batch, frozen) -> dict[str, jax.Array]:
  """What single responses are compared with: KTO's baseline, BCO's running mean, or nothing."""
  if "kl_baseline" in member.arrays:
    return {"kl_baseline": batch["kl_baseline"][0]}
  return {"shift": frozen["shift"].compute()} if "shift" in member.arrays else {}


def prepare(model, config: PreferenceConfig, *, chunk: int | None = None):
  """What must see a whole batch before it is split: KTO's baseline as `kl_baseline` [B], or None."""
  if "kl_baseline" not in config.arrays:
    return None

  def add_baseline(trainable, frozen, batch):
    policy, ref = (
      objectives.response_logps(model, variables, batch, "mismatched_", chunk=chunk)
      for variables in (
        objectives.policy_variables(trainable, frozen),
        objectives.reference_variables(frozen),
      )
    )
    baseline = losses.kto_kl_baseline(policy, ref, weight=batch["weight"])
    return batch | {"kl_baseline": jnp.broadcast_to(baseline, policy.shape)}

  return add_baseline


def carried(config: PreferenceConfig, trainable, frozen) -> dict:
  """What the objective takes from step to step, at its start: BCO's shift, TR-DPO's reference."""
  start = {}
  if "shift" in config.arrays:
    start["shift"] = Mean(jnp.zeros(()), jnp.zeros(()))
  if config.sync_every:
    start |= {"ref_lora": trainable} if "base" in frozen else {"ref": trainable}
  return start


def carry(config: PreferenceConfig) -> Carry | None:
  """How that is renewed behind every step; None where nothing is carried.

  BCO's shift is the mean reward of all examples so far (Jung et al. 2024, https://arxiv.org/abs/
  2404.04656); theirs includes the batch at hand, which would cost a second forward pass. TR-DPO
  (Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656) moves the reference every `sync_every`
  steps: π_ref ← α π + (1 - α) π_ref, on the weights.
  """
  if "shift" not in config.arrays and not config.sync_every:
    return None

  def renew(carried, params, metrics, steps):
    carried = dict(carried)
    if "shift" in carried:
      for name in ("rewards/chosen", "rewards/rejected"):
        carried["shift"] = carried["shift"] + metrics[name]
    moves = steps % max(config.sync_every, 1) == 0
    for name in {"ref", "ref_lora"} & set(carried):
      carried[name] = jax.tree.map(
        lambda old, new: jnp.where(
          moves, (1.0 - config.sync_alpha) * old + config.sync_alpha * new, old
        ).astype(old.dtype),
        carried[name],
        params,
      )
    return carried

  return renew


def _both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x[:, 0], x[:, 1]
