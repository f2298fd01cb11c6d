"""The one definition of the distribution a token is drawn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from align_jax.errors import InputError


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["temperature", "top_p", "min_p"],
  meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Decoding:
  """How logits become a distribution: temperature, then top-k, then top-p, then min-p.

  A pytree: only `top_k`, and which fields are None, decide what is compiled.
  """

  temperature: jax.typing.ArrayLike | None = 1.0  # None: greedy
  top_k: int | None = None  # the k most likely tokens
  top_p: jax.typing.ArrayLike | None = None  # the smallest set of likeliest tokens of mass p
  min_p: jax.typing.ArrayLike | None = None  # tokens at least this fraction as likely as the first


def make_decoding(
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
) -> Decoding:
  """A checked `Decoding`; a temperature of 0 is greedy and takes no other setting."""
  if not temperature >= 0:
    raise InputError(f"temperature must not be negative, got {temperature}")
  if top_k is not None and top_k < 1:
    raise InputError(f"top_k must be at least 1, got {top_k}")
  for name, value in (("top_p", top_p), ("min_p", min_p)):
    if value is not None and not 0 < value <= 1:
      raise InputError(f"{name} must be in (0, 1], got {value}")
  if temperature > 0:
    return Decoding(temperature, top_k, top_p, min_p)
  if (top_k, top_p, min_p) != (None, None, None):
    raise InputError("temperature 0 is greedy: top_k, top_p and min_p would be ignored")
  return Decoding(None)


def distribution_logprobs(logits: jax.Array, decoding: Decoding) -> jax.Array:
  """log of the distribution that `decoding` draws from; −∞ for the tokens it rules out.

  Tokens as likely as the last one let in are let in too, so ties never depend on an order.

  Args:
    logits: [..., V].
    decoding: not greedy.

  Returns:
    [..., V], float32, normalised.
  """
  logits = logits.astype(jnp.float32) / decoding.temperature
  if decoding.top_k is not None and decoding.top_k < logits.shape[-1]:
    weakest = jax.lax.top_k(logits, decoding.top_k)[0][..., -1:]
    logits = jnp.where(logits < weakest, -jnp.inf, logits)
  if decoding.top_p is not None:
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending)
    inside = jnp.cumsum(probs, axis=-1) - probs < decoding.top_p
    weakest = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < weakest, -jnp.inf, logits)
  if decoding.min_p is not None:
    weakest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(decoding.min_p)
    logits = jnp.where(logits < weakest, -jnp.inf, logits)
  return jax.nn.log_softmax(logits)


def draw(keys: jax.Array, logits: jax.Array, decoding: Decoding) -> tuple[jax.Array, jax.Array]:
  """One token a row and its log-prob under the distribution it was drawn from.

  Args:
    keys: [B] PRNG keys, one a row; unused by greedy decoding.
    logits: [B, V].
    decoding: the distribution.

  Returns:
    (tokens [B] int32, logprobs [B] float32). A greedy token has the log-prob of the untempered
    model, as its own distribution would say 0.
  """
  if decoding.temperature is None:
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    tokens = jnp.argmax(logprobs, axis=-1)
  else:
    logprobs = distribution_logprobs(logits, decoding)
    tokens = jax.vmap(jax.random.categorical)(keys, logprobs)
  chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
  return tokens.astype(jnp.int32), chosen
