"""The one definition of the distribution a token is drawn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from align_jax.errors import InputError

_LANES = 128


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
    top_p = None if top_p == 1 else top_p  # all of it, whatever a sum of probabilities rounds to
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
    enough = lambda inside: jnp.sum(inside, axis=-1) >= decoding.top_k  # noqa: E731
    logits = _keep(logits, enough)
  if decoding.top_p is not None:
    probs = jax.nn.softmax(logits)
    enough = lambda inside: _sum(jnp.where(inside, probs, 0.0)) >= decoding.top_p  # noqa: E731
    logits = _keep(logits, enough)
  if decoding.min_p is not None:
    weakest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(decoding.min_p)
    logits = jnp.where(logits < weakest, -jnp.inf, logits)
  return logits


def _keep(logits: jax.Array, enough) -> jax.Array:
  """−∞ but at the likeliest tokens, as few as are `enough` ([..., V] bool -> [...] bool), and ties.

  Floats are ordered as their bits are (of negative ones, the bits turned over), so the weakest
  logit let in is found bit by bit: 32 passes, where a sort of a vocabulary takes many more.
  """
  bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
  ordered = jax.lax.bitcast_convert_type(
    bits ^ jnp.where(bits < 0, jnp.int32(-1), jnp.int32(-(2**31))), jnp.uint32
  )

  def try_bit(i, weakest):
    higher = weakest | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(enough(ordered >= higher[..., None]), higher, weakest)

  weakest = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(logits.shape[:-1], jnp.uint32))
  return jnp.where(ordered >= weakest[..., None], logits, -jnp.inf)


def draw(
  keys: jax.Array, logits: jax.Array, decoding: Decoding, seen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """One token a row and its log-prob under the distribution it was drawn from.

  The token is the first whose cumulative probability exceeds one uniform number of the row's key:
  one random number a row, where the Gumbel trick takes one for every token of the vocabulary.

  Args:
    keys: [B] PRNG keys, one a row; unused by greedy decoding.
    logits: [B, V].
    decoding: the distribution.
    seen: [B, V] bool, see `distribution_logprobs`.

  Returns:
    (tokens [B] int32, logprobs [B] float32). A greedy token has the log-prob of the untempered
    (but penalised) model, as its own distribution would say 0.
  """
  greedy = decoding.temperature is None
  logits = (_penalised if greedy else _kept_logits)(logits, decoding, seen)
  best = jnp.max(logits, axis=-1, keepdims=True)
  weights = _blocks(jnp.exp(logits - best))
  sums = jnp.sum(weights, axis=-2)
  total = jnp.sum(sums, axis=-1)
  if greedy:
    # The first of the best, as argmax has it, by a minimum: a CPU vectorises that.
    places = jnp.arange(logits.shape[-1])
    tokens = jnp.min(jnp.where(logits == best, places, places[-1]), axis=-1)
  else:
    tokens = _invert(weights, sums, jax.vmap(jax.random.uniform)(keys))
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - best
  return tokens.astype(jnp.int32), chosen[:, 0] - jnp.log(total)


def _blocks(x: jax.Array) -> jax.Array:
  """[..., V] cut into _LANES interleaved parts, [..., V / _LANES, _LANES], zeros added."""
  missing = -x.shape[-1] % _LANES
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
  return x.reshape(*x.shape[:-1], -1, _LANES)


def _sum(x: jax.Array) -> jax.Array:
  """The sum over the last axis, [...]: over rows of lanes first, which a CPU adds side by side."""
  return jnp.sum(jnp.sum(_blocks(x), axis=-2), axis=-1)


def _invert(weights: jax.Array, sums: jax.Array, uniform: jax.Array) -> jax.Array:
  """[B] tokens: where the running sum of weights [B, V / _LANES, _LANES] exceeds uniform * total.

  The order is lane by lane: first the lane is found by the sums [B, _LANES], then the token in it.
  """
  reached = jnp.cumsum(sums, axis=-1)
  target = uniform * reached[:, -1]  # uniform < 1: below the last sum in float32 too
  lane = jnp.argmax(reached > target[:, None], axis=-1)[:, None]
  before = jnp.where(lane > 0, jnp.take_along_axis(reached, jnp.maximum(lane - 1, 0), axis=-1), 0.0)
  column = jnp.take_along_axis(weights, lane[:, :, None], axis=-1)[..., 0]
  inside = jnp.cumsum(column, axis=-1) > target[:, None] - before
  # The lane's own sum may have been rounded another way: then it is the last token that can be.
  last = column.shape[-1] - 1 - jnp.argmax(column[:, ::-1] > 0, axis=-1)
  row = jnp.where(jnp.any(inside, axis=-1), jnp.argmax(inside, axis=-1), last)
  return row * _LANES + lane[:, 0]
