"""What is read off a transformer: log-probs of given tokens, and one number per position."""

import jax
import jax.numpy as jnp

from align_jax.models.transformer import Transformer


def token_logprobs(
  model: Transformer,
  variables,
  tokens: jax.Array,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  *,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  return_entropy: bool = False,
):
  """log π(token t | tokens before t), t = 1..T-1, under softmax(logits / temperature): [B, T-1].

  tokens, positions, segment_ids [B, T] as for the model; with `return_entropy` a pair, the second
  being the entropy in nats of the distribution each token was scored by, [B, T-1].  `chunk_size`
  positions go through the LM head at a time and are recomputed in the backward pass, so logits
  [B, T, V] never exist at once.
  """
  if temperature <= 0:
    raise ValueError(f"temperature must be positive, not {temperature}")
  hidden = model.apply(variables, tokens, positions, segment_ids, method=Transformer.hidden)
  hidden, targets = hidden[:, :-1], tokens[:, 1:]

  def score(chunk):
    logits = model.apply(variables, chunk[0], method=Transformer.unembed) / temperature
    return _score(logits, chunk[1], return_entropy)

  if chunk_size is None or chunk_size >= targets.shape[1]:
    scores = score((hidden, targets))
  else:
    split = jax.tree.map(lambda x: _split(x, chunk_size), (hidden, targets))
    scores = jax.lax.map(jax.checkpoint(score, prevent_cse=False), split)  # [N, B, C]
    scores = jax.tree.map(lambda x: _join(x, targets.shape[1]), scores)
  return scores if return_entropy else scores[0]


def init_scalar_head(rng: jax.Array, dim: int) -> dict:
  """Kernel [D] of normal std 1/√(D+1) and zero bias, after Stiennon et al. 2020."""
  return {
    "kernel": jax.random.normal(rng, (dim,)) * (dim + 1) ** -0.5,
    "bias": jnp.zeros(()),
  }


def scalar_head(head, hidden: jax.Array) -> jax.Array:
  """hidden [B, T, D] . kernel + bias, [B, T] float32."""
  return jnp.dot(hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def _score(logits, targets, with_entropy):
  # A masked sum, not a gather: it also works where the vocabulary is split over devices.
  chosen = targets[..., None] == jnp.arange(logits.shape[-1])
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  logprobs = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - normalizer
  if not with_entropy:
    return (logprobs,)
  probs = jnp.exp(logits - normalizer[..., None])
  return logprobs, normalizer - jnp.sum(probs * logits, axis=-1)


def _split(x, size):
  """[B, T, ...] to [ceil(T / size), B, size, ...], zero-padded."""
  count = -(-x.shape[1] // size)
  pad = [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.moveaxis(jnp.pad(x, pad).reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _join(x, length):
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]
