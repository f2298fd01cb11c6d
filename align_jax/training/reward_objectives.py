"""Objectives of reward models: of pairs by several rules, of ranked lists, of ratings; and of ensembles.

Every one maps `(trainable, frozen, batch, rng)` to `(loss_sum, {name: Mean})`, see `objectives`.
trainable is {"trunk" or "lora", "head"}; a head of H outputs has the kernel [D, H].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from align_jax import losses
from align_jax.losses import Mean
from align_jax.training import objectives
from align_jax.training.step import Metrics, Objective

# one: a head, Bradley–Terry (or with ties).  votes: one head a labeller.  spread: mean and log std over
# labellers.  two: quality and length.  members: one head a member of an ensemble on one trunk.
RULES = ("one", "votes", "spread", "two", "members")


@dataclasses.dataclass(frozen=True)
class PairLoss:
  """How pairs are learned from; the settings that a rule does not use stay as they are."""

  rule: str = "one"
  centering: float = 0.0  # of (r+ + r-)^2: one, votes, members
  label_smoothing: float = 0.0  # one, votes, members
  tie_theta: float | None = None  # Rao–Kupper, one
  correlation: float = 0.0  # two: weight of |corr(quality, length)| - corr(length, length)
  orthogonality: float = 0.0  # two: weight of |w_quality . w_length|
  bootstrap: int | None = None  # seed of each member's own weights of the pairs: members


def pair_objective(model, settings: PairLoss = PairLoss()) -> Objective:
  """Pairs of either layout; its weight is the pairs' (see `data.pairs`)."""
  rule = {"one": _one, "votes": _votes, "spread": _spread, "two": _two, "members": _members}[
    settings.rule
  ]

  def objective(trainable, frozen, batch, rng):
    del rng
    variables = objectives.reward_variables(trainable, frozen)
    scores = objectives.pair_rewards(model, variables, trainable["head"], batch)  # [P, 2, ...]
    flat = {
      name: batch[name].reshape(len(scores), *batch[name].shape[batch["weight"].ndim :])
      for name in ("weight", "margin", "label_prob", *_COLUMNS[settings.rule])
      if name in batch
    }
    loss, rewards, more = rule(scores, flat, settings, trainable["head"])
    metrics = objectives.reward_metrics(rewards[:, 0], rewards[:, 1], flat["weight"]) | more
    metrics |= {"loss": loss, "tokens": objectives.token_count(batch["segment_ids"])}
    return loss.total, metrics

  return objective


# What each rule reads of a batch besides weight, margin and label_prob: `Pairs.columns`.
_COLUMNS: dict[str, tuple[str, ...]] = {
  "one": (),
  "votes": ("votes",),  # [..., A], -1 where a labeller did not vote
  "spread": (),
  "two": ("lengths",),  # [..., 2], tokens of the responses
  "members": ("index",),  # of the record
}


def _bradley_terry(scores, batch, settings: PairLoss, label_prob) -> jax.Array:
  return losses.bradley_terry_loss(
    scores[:, 0],
    scores[:, 1],
    margin=batch["margin"],
    label_smoothing=settings.label_smoothing,
    label_prob=label_prob,
    centering=settings.centering,
  )


def _one(scores, batch, settings: PairLoss, head):
  del head
  if settings.tie_theta is None:
    loss = _bradley_terry(scores, batch, settings, batch["label_prob"])
  else:
    loss = losses.rao_kupper_loss(
      scores[:, 0], scores[:, 1], batch["label_prob"], theta=settings.tie_theta
    )
    loss += settings.centering * jnp.square(scores[:, 0] + scores[:, 1])
  return Mean.of(loss, batch["weight"]), scores, {}


def _votes(scores, batch, settings: PairLoss, head):
  """A labeller's head learns from that labeller's votes; a pair counts once, however many voted."""
  del head
  votes = batch["votes"]
  each = jax.vmap(
    lambda of_head, vote: _bradley_terry(of_head, batch, settings, jnp.maximum(vote, 0.0)),
    in_axes=(2, 1),
    out_axes=1,
  )(scores, votes)
  loss = losses.masked_mean(each, votes >= 0, axis=1)
  return Mean.of(loss, batch["weight"]), scores.mean(axis=2), {}


def _spread(scores, batch, settings: PairLoss, head):
  del settings, head
  means, log_stds = scores[..., 0], scores[..., 1]
  loss = losses.thurstone_loss(
    means[:, 0], means[:, 1], log_stds[:, 0], log_stds[:, 1], label_prob=batch["label_prob"]
  )
  spread = Mean.of(jnp.exp(log_stds).mean(axis=1), batch["weight"])
  return Mean.of(loss, batch["weight"]), means, {"rewards/rater_std": spread}


def _two(scores, batch, settings: PairLoss, head):
  """ODIN: their sum explains the labels, one is to be blind to length, the other to see it only.

  Correlated is what both answers to one prompt have beyond their mean. Over whole rewards, as in the
  paper, the kept head escapes by varying from prompt to prompt, which no preference constrains.
  """
  weight = batch["weight"]
  label = losses.bradley_terry_loss(
    scores[:, 0].sum(axis=-1), scores[:, 1].sum(axis=-1), label_prob=batch["label_prob"]
  )
  rewards = scores[..., 0]
  quality, length, lengths = (
    (x - x.mean(axis=1, keepdims=True)).reshape(-1)
    for x in (rewards, scores[..., 1], batch["lengths"])
  )
  penalty = losses.decorrelation_loss(quality, length, lengths, weight=jnp.repeat(weight, 2))
  kernel = head["kernel"]
  angle = jnp.abs(jnp.dot(kernel[:, 0], kernel[:, 1]))
  # A property of the batch, so it travels as that for each pair.
  extra = settings.correlation * penalty + settings.orthogonality * angle
  loss = Mean.of(label + extra, weight)
  return (
    loss,
    rewards,
    {"rewards/length_penalty": Mean.of(jnp.broadcast_to(penalty, weight.shape), weight)},
  )


def _members(scores, batch, settings: PairLoss, head):
  """The mean over members; each head learns from its own loss only, the trunk from all."""
  del head
  weights = jnp.tile(batch["weight"][:, None], scores.shape[2])
  if settings.bootstrap is not None:
    weights *= bootstrap_weights(settings.bootstrap, batch["index"], scores.shape[2])
  each = jax.vmap(
    lambda of_head: _bradley_terry(of_head, batch, settings, batch["label_prob"]),
    in_axes=2,
    out_axes=1,
  )(scores)
  loss = Mean(losses.masked_sum(each, weights) / weights.shape[1], jnp.sum(batch["weight"]))
  means = scores.mean(axis=2)
  spread = jnp.std(scores[:, 0] - scores[:, 1], axis=1)
  return loss, means, {"ensemble/margin_std": Mean.of(spread, batch["weight"])}


def bootstrap_weights(seed: int, index: jax.Array, members: int) -> jax.Array:
  """[P, K] Poisson(1) draws: how often each member's resample of the records holds record `index` [P].

  The same record has the same weight in every epoch; the draws of K members are independent.
  """
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
  return jax.vmap(lambda key: jax.random.poisson(key, 1.0, (members,)))(keys).astype(jnp.float32)


def ranking_objective(model, *, loss: str, centering: float = 0.0) -> Objective:
  """Ranked lists (`data.ranking_batches`): all pairs of a prompt in one example, or Plackett–Luce."""

  def objective(trainable, frozen, batch, rng):
    del rng
    scores = _grouped_scores(model, trainable, frozen, batch)
    ranks, weight = batch["ranks"], batch["weight"]
    if loss == "pairs":
      each = losses.all_pairs_loss(scores, ranks)
    else:
      order = jnp.argsort(jnp.where(ranks > 0, ranks, jnp.iinfo(ranks.dtype).max), axis=1)
      best_first, real = (jnp.take_along_axis(x, order, axis=1) for x in (scores, ranks > 0))
      each = losses.plackett_luce_loss(best_first, real)
    centred = losses.masked_mean(jnp.square(scores), ranks > 0, axis=1)
    found = Mean.of(each + centering * centred, weight)
    metrics = _ranking_metrics(scores, ranks, weight)
    return found.total, metrics | {
      "loss": found,
      "tokens": objectives.token_count(batch["segment_ids"]),
    }

  return objective


def _grouped_scores(model, trainable, frozen, batch) -> jax.Array:
  names = ("tokens", "segment_ids", "response_mask")
  flat = {k: batch[k].reshape(-1, batch[k].shape[-1]) for k in names}
  variables = objectives.reward_variables(trainable, frozen)
  scores = objectives.response_scores(model, variables, trainable["head"], **flat)
  return scores.reshape(batch["ranks"].shape)


def _ranking_metrics(scores, ranks, weight) -> Metrics:
  """Accuracy over pairs; chosen and rejected are the better and the worse of each pair."""
  pairs = losses.ranked_pairs(ranks) * weight[:, None, None]
  better, worse = jnp.broadcast_arrays(scores[:, :, None], scores[:, None, :])
  return objectives.reward_metrics(better, worse, pairs)


def rating_objective(model, aspects: tuple[str, ...]) -> Objective:
  """Squared error of each aspect's head (`data.rating_batches`); an answer counts once."""

  def objective(trainable, frozen, batch, rng):
    del rng
    names = ("tokens", "segment_ids", "response_mask")
    variables = objectives.reward_variables(trainable, frozen)
    scores = objectives.response_scores(
      model, variables, trainable["head"], **{k: batch[k] for k in names}
    )
    scores = scores.reshape(batch["ratings"].shape)
    weight, rated = batch["weight"], batch["rated"]
    error = scores - batch["ratings"]
    loss = Mean.of(losses.masked_mean(jnp.square(error), rated, axis=1), weight)
    metrics = {"loss": loss, "tokens": objectives.token_count(batch["segment_ids"])}
    for i, aspect in enumerate(aspects):
      known = rated[:, i] * weight
      metrics[f"ratings/{aspect}/error"] = Mean.of(jnp.abs(error[:, i]), known)
      metrics[f"ratings/{aspect}/mean"] = Mean.of(scores[:, i], known)
    return loss.total, metrics

  return objective


def ensemble_objective(objective: Objective, members: int) -> Objective:
  """K members at once under vmap: every leaf of `trainable` is stacked [K, ...], `frozen` is shared.

  A batch is {"0": ..., "1": ...}, one for each member and all of one shape; or, in an evaluation, one
  for all. The sums are scaled so that dividing by the weight of all members gives each its own mean: its
  gradient is that of training alone.
  """

  def run(trainable, frozen, batch, rng):
    own = "tokens" not in batch
    if own:
      batch = jax.tree.map(
        lambda *parts: jnp.stack(parts), *(batch[str(i)] for i in range(members))
      )
    over = jax.vmap(objective, in_axes=(0, None, 0 if own else None, None))
    _, metrics = over(trainable, frozen, batch, rng)
    loss, weight = metrics["loss"].total, metrics["loss"].weight
    fair = jnp.sum(weight) / jnp.maximum(weight, 1e-8)
    pooled = {name: _pooled(value) for name, value in metrics.items()}
    if not own:
      pooled["tokens"] = metrics["tokens"][0]
    return jnp.sum(loss * fair), pooled

  return run


def _pooled(value: Any):
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), value)
