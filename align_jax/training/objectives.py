"""Objectives: where a model meets a loss.

An objective maps `(trainable, frozen, batch, rng)` to `(loss_sum, {name: Mean})`.  What trains is what
is differentiated: the weights themselves, or LoRA adapters on the frozen weights `frozen["base"]`.
The reference policy is `frozen["ref"]`, or with LoRA the same base without its adapter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from align_jax import losses, models
from align_jax.losses import Mean
from align_jax.training.step import Metrics, Objective


def policy_variables(trainable, frozen) -> dict[str, Any]:
  """The collections to apply the model with: full weights, or base and adapter."""
  if "base" in frozen:
    return {"params": frozen["base"], "lora": trainable}
  return {"params": trainable}


def reference_variables(frozen) -> dict[str, Any]:
  """The reference; with LoRA the base itself, so no second copy exists, unless it has moved."""
  if "ref_lora" in frozen:
    return {"params": frozen["base"], "lora": frozen["ref_lora"]}
  if not {"ref", "base"} & set(frozen):
    raise ValueError("the objective needs a reference: frozen has neither 'ref' nor 'base'")
  return {"params": frozen["ref"] if "ref" in frozen else frozen["base"]}


def response_logps(model, variables, batch, prefix: str = "", *, chunk: int | None) -> jax.Array:
  """[B], the summed log-probs of the response tokens of `batch[prefix + "tokens"]` [B, T]."""
  mask = batch[prefix + "response_mask"][:, 1:]
  logprobs = models.token_logprobs(
    model,
    variables,
    batch[prefix + "tokens"],
    segment_ids=batch[prefix + "segment_ids"],
    chunk_size=chunk,
    where=mask,
  )
  return losses.masked_sum(logprobs, mask, axis=1)


def nll(model, variables, batch, weight: jax.Array, *, chunk: int | None) -> Mean:
  """Of rows of tokens, segment_ids and perhaps positions, each [B, T]; weight [B, T-1]."""
  total = models.weighted_logprob(
    model,
    variables,
    batch["tokens"],
    positions=batch.get("positions"),
    segment_ids=batch["segment_ids"],
    weight=weight,
    chunk_size=chunk,
  )
  return Mean(-total, jnp.sum(weight.astype(jnp.float32)))


def sft_objective(model, *, chunk: int | None = None) -> Objective:
  """Cross-entropy on response tokens, summed; its weight is their number (times example weights)."""

  def objective(trainable, frozen, batch, rng):
    del rng
    same_segment = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    weight = batch["loss_mask"][:, 1:] * same_segment
    loss = nll(model, policy_variables(trainable, frozen), batch, weight, chunk=chunk)
    return loss.total, {"loss": loss, "tokens": token_count(batch["segment_ids"])}

  return objective


def response_scores(model, variables, head, tokens, segment_ids, response_mask) -> jax.Array:
  """[B], or [B, H]: the head read at the last response token, found by position, never by token id.

  A row without any response token is read at its last real token.
  """
  hidden = model.apply(variables, tokens, segment_ids=segment_ids, method="hidden")
  places = jnp.arange(tokens.shape[1])
  inside = jnp.where(
    jnp.any(response_mask > 0, axis=1)[:, None], response_mask > 0, segment_ids > 0
  )
  last = jnp.max(jnp.where(inside, places, 0), axis=1)
  at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
  return models.scalar_head(head, at_last)[:, 0]


def reward_variables(trainable, frozen) -> dict[str, Any]:
  """The trunk of a reward or value model: its own weights, or base and adapter."""
  return policy_variables(trainable["lora" if "base" in frozen else "trunk"], frozen)


def pair_rewards(model, variables, head, batch) -> jax.Array:
  """[P, 2], or [P, 2, H] of H heads: the rewards of both answers of every pair, from either layout."""
  shape = (-1, 2, *jnp.shape(head["bias"]))
  if "last" not in batch:
    # The rows of a pair stay neighbours, on one device.
    names = ("tokens", "segment_ids", "response_mask")
    flat = {k: batch[k].reshape(-1, batch[k].shape[-1]) for k in names}
    return response_scores(model, variables, head, **flat).reshape(shape)
  names = ("tokens", "positions", "segment_ids", "branch_ids")
  hidden = model.apply(variables, *(batch[k] for k in names), method="hidden")
  at_last = jnp.take_along_axis(hidden, batch["last"][..., None], axis=1)
  return models.scalar_head(head, at_last).reshape(shape)


def reward_metrics(chosen, rejected, weight) -> Metrics:
  """Rewards of both answers, all of one shape, and how often the chosen one's is the higher."""
  accuracy = jnp.where(chosen == rejected, 0.5, chosen > rejected)  # a tie counts half
  return {
    "rewards/chosen": Mean.of(chosen, weight),
    "rewards/rejected": Mean.of(rejected, weight),
    "rewards/margin": Mean.of(chosen - rejected, weight),
    "rewards/accuracy": Mean.of(accuracy, weight),
  }


def token_count(*segment_ids) -> jax.Array:
  """Real tokens of a step, a plain sum: adding microbatches adds it too."""
  return sum(jnp.sum(s > 0) for s in segment_ids)
