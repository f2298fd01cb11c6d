"""Log-probs of both answers of every pair, from either layout of a batch (see `data.pairs`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from align_jax import losses, models


class PairScores(NamedTuple):
  """What is read at the scored tokens of P pairs; [:, 0] is chosen, [:, 1] rejected.

  collision: log Σ_v π(v)² of the distribution a token was scored by; kl: KL(π_ref ‖ π) there, exact;
  None unless asked for.
  """

  logprobs: jax.Array  # [P, 2, T]
  mask: jax.Array  # [P, 2, T], 1 on the tokens of the response
  collision: jax.Array | None = None  # [P, 2, T]
  kl: jax.Array | None = None  # [P, 2, T]
  ref_logprobs: jax.Array | None = None  # [P, 2, T], where `kl` was asked for


def score_pairs(
  model,
  variables,
  batch,
  *,
  chunk: int | None,
  collision: bool = False,
  reference=None,
  temperature: float = 1.0,
) -> PairScores:
  """Scores a batch with one policy; with `reference`, another one's variables, against it as well."""
  found = score_tokens(
    model,
    variables,
    batch,
    chunk=chunk,
    collision=collision,
    reference=reference,
    temperature=temperature,
  )
  return PairScores(
    mask=response_mask(batch), **{name: by_response(batch, x) for name, x in found.items()}
  )


def score_tokens(
  model,
  variables,
  batch,
  *,
  chunk: int | None,
  collision: bool = False,
  reference=None,
  temperature: float = 1.0,
) -> dict[str, jax.Array]:
  """The fields of `PairScores` for every scored token in its place in the batch, [R, T].

  All distributions are softmax(logits / temperature).
  """
  hidden, targets = _hidden_and_targets(model, variables, batch)
  arrays = (hidden, targets)
  if reference is not None:
    arrays += (_hidden_and_targets(model, reference, batch)[0],)

  head = models.head_variables(model, variables)
  ref_head = models.head_variables(model, reference) if reference is not None else None

  def score(hidden, targets, ref_hidden=None):
    logits = model.apply(head, hidden, method="unembed") / temperature
    found = {"logprobs": models.target_logprobs(logits, targets)}
    if collision:
      twice = jax.nn.logsumexp(2.0 * logits, axis=-1)
      found["collision"] = twice - 2.0 * jax.nn.logsumexp(logits, axis=-1)
    if ref_hidden is not None:
      ref_logits = model.apply(ref_head, ref_hidden, method="unembed") / temperature
      found["ref_logprobs"] = models.target_logprobs(ref_logits, targets)
      found["kl"] = losses.exact_kl(ref_logits, logits)
    return found

  shared = "sources" in batch
  count = jnp.max(jnp.sum(batch["slots"] >= 0, axis=1)) if shared else None
  return models.map_positions(score, arrays, chunk_size=chunk, count=count)


def response_mask(batch) -> jax.Array:
  """[P, 2, T], 1 on the scored tokens of both responses."""
  if "sources" in batch:
    return by_response(batch, jnp.ones(batch["slots"].shape, jnp.float32))
  return batch["response_mask"][:, :, 1:]


def by_response(batch, values: jax.Array) -> jax.Array:
  """One value for every scored token as [P, 2, T], whatever the layout; 0 off the responses."""
  if "sources" not in batch:
    return values.reshape(*batch["tokens"].shape[:2], -1)
  rows, width = batch["slots"].shape
  slots = batch["last"].shape[1]
  empty = jnp.zeros((slots, width), values.dtype)
  # A token without a response has slot -1: moved behind the last slot, where it is dropped.
  slot = jnp.where(batch["slots"] < 0, slots, batch["slots"])
  scatter = jax.vmap(lambda s, p, v: empty.at[s, p].set(v, mode="drop"))
  return scatter(slot, batch["places"], values).reshape(rows * slots // 2, 2, width)


def aligned(batch, name: str) -> jax.Array:
  """[P, 2, T] of what the data pipeline gave for every scored token, as `ref_logprobs`."""
  if "sources" in batch:
    return by_response(batch, batch[name])
  return batch[name][:, :, 1:]


def _hidden_and_targets(model, variables, batch):
  """Hidden states that predict the scored tokens, and those tokens: [B, T, D] and [B, T]."""
  if "sources" in batch:
    return models.shared_hidden(model, variables, batch), batch["targets"]
  tokens, segment_ids = (
    x.reshape(-1, x.shape[-1]) for x in (batch["tokens"], batch["segment_ids"])
  )
  hidden = model.apply(variables, tokens, None, segment_ids, method="hidden")
  return hidden[:, :-1], tokens[:, 1:]
