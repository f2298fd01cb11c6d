"""The one definition of the distribution a token is drawn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from align_jax.errors import InputError


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["temperature", "top_p", "min_p", "repetition_penalty"],
  meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Decoding:
  """How logits become a distribution: penalty, temperature, then top-k, then top-p, then min-p.

  A pytree: only `top_k`, and which fields are None, decide what is compiled.
  """

  temperature: jax.typing.ArrayLike | None = 1.0  # None: greedy
  top_k: int | None = None  # the k most likely tokens
  top_p: jax.typing.ArrayLike | None = None  # the smallest set of likeliest tokens of mass p
  min_p: jax.typing.ArrayLike | None = None  # tokens at least this fraction as likely as the first
  # Logits of tokens that the row already holds: divided by this if positive, else multiplied.
  repetition_penalty: jax.typing.ArrayLike | None = None


def make_decoding(
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  repetition_penalty: float | None = None,
) -> Decoding:
  """A checked `Decoding`; a temperature of 0 is greedy and takes no setting but the penalty."""
  if not temperature >= 0:
    raise InputError(f"temperature must not be negative, got {temperature}")
  if top_k is not None and top_k < 1:
    raise InputError(f"top_k must be at least 1, got {top_k}")
  for name, value in (("top_p", top_p), ("min_p", min_p)):
    if value is not None and not 0 < value <= 1:
      raise InputError(f"{name} must be in (0, 1], got {value}")
  if repetition_penalty is not None and not 0 < repetition_penalty < float("inf"):
    raise InputError(f"repetition_penalty must be positive, got {repetition_penalty}")
  if temperature > 0:
    return Decoding(temperature, top_k, top_p, min_p, repetition_penalty)
  if (top_k, top_p, min_p) != (None, None, None):
    raise InputError("temperature 0 is greedy: top_k, top_p and min_p would be ignored")
  return Decoding(None, repetition_penalty=repetition_penalty)


def distribution_logprobs(
  logits: jax.Array, decoding: Decoding, seen: jax.Array | None = None
) -> jax.Array:
  """log of the distribution that `decoding` draws from; −∞ for the tokens it rules out.

  Tokens as likely as the last one let in are let in too, so ties never depend on an order.

  Args:
    logits: [..., V].
    decoding: not greedy.
    seen: [..., V] bool, the tokens of prompt and response so far; needed by repetition_penalty
      (Keskar et al. 2019, with the sign rule that Hugging Face gave it), else unused.

  Returns:
    [..., V], float32, normalised.
  """
  return jax.nn.log_softmax(_kept_logits(logits, decoding, seen))


def _penalised(logits, decoding: Decoding, seen) -> jax.Array:
  """Float32 logits, those of seen tokens made less likely."""
  logits = logits.astype(jnp.float32)
  penalty = decoding.repetition_penalty
  if penalty is None:
    return logits
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _kept_logits(logits, decoding: Decoding, seen) -> jax.Array:
  """Tempered logits with −∞ at what the truncations rule out; not normalised."""
  logits = _penalised(logits, decoding, seen) / decoding.temperature
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
  return logits


def draw(
  keys: jax.Array, logits: jax.Array, decoding: Decoding, seen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """One token a row and its log-prob under the distribution it was drawn from.

  Args:
    keys: [B] PRNG keys, one a row; unused by greedy decoding.
    logits: [B, V].
    decoding: the distribution.
    seen: [B, V] bool, see `distribution_logprobs`.

  Returns:
    (tokens [B] int32, logprobs [B] float32). A greedy token has the log-prob of the untempered
    (but penalised) model, as its own distribution would say 0.
  """
  if decoding.temperature is None:
    logprobs = jax.nn.log_softmax(_penalised(logits, decoding, seen))
    tokens = jnp.argmax(logprobs, axis=-1)
  else:
    logprobs = distribution_logprobs(logits, decoding, seen)
    tokens = jax.vmap(jax.random.categorical)(keys, logprobs)
  chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
  return tokens.astype(jnp.int32), chosen
