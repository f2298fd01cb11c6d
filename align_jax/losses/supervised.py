"""Supervised losses: the log-probability of given tokens."""

import jax
import jax.numpy as jnp


def cross_entropy_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """−log softmax(logits)[label] = logsumexp(logits) − logits[label], unreduced.

  The label's logit is a masked sum, not a gather, so the vocabulary may be sharded.

  Args:
    logits: [..., V], any float type; computed in float32.
    labels: [...], integers in [0, V).

  Returns:
    [...], float32, in nats.

  Raises:
    ValueError: if the shapes do not agree.
  """
  if jnp.shape(logits)[:-1] != jnp.shape(labels):
    raise ValueError(
      "cross_entropy_loss: logits must have the shape of labels and a vocabulary axis, got "
      f"{jnp.shape(logits)} and {jnp.shape(labels)}."
    )
  logits = jnp.asarray(logits).astype(jnp.float32)
  labels = jnp.asarray(labels)
  vocab = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  label_logits = jnp.sum(jnp.where(vocab == labels[..., None], logits, 0.0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - label_logits


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """log p(tokensₜ | tokens₍<ₜ₎): the token at t is scored by the logits at t − 1.

  Args:
    logits: [B, T, V], of a causal model on `tokens`.
    tokens: [B, T], integers in [0, V).

  Returns:
    [B, T-1], float32; entry i belongs to `tokens[:, i + 1]`. The first token has no probability.

  Raises:
    ValueError: if the shapes do not agree.
  """
  if jnp.ndim(logits) != 3 or jnp.shape(logits)[:2] != jnp.shape(tokens):
    raise ValueError(
      f"token_logprobs: logits must be [B, T, V] and tokens [B, T], got {jnp.shape(logits)} and "
      f"{jnp.shape(tokens)}."
    )
  return -cross_entropy_loss(logits[:, :-1], tokens[:, 1:])
