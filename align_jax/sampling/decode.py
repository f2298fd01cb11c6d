"""The compiled part of generation: prefill and decode loop."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from align_jax import models
from align_jax.sampling.distribution import Decoding, draw
from align_jax.sampling.samples import Samples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
  """Whose logits are sampled: one set of variables, or (1-weight) of the first + weight of two."""

  variables: tuple[Any, ...]  # one or two sets of collections of the same module
  weight: jax.typing.ArrayLike | None = None  # None with one set


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """What decoding writes, besides the caches."""

  step: jax.Array  # [] tokens drawn so far
  tokens: jax.Array  # [B, S]
  logprobs: jax.Array  # [B, S]
  sampled: jax.Array  # [B, S] bool
  ended: jax.Array  # [B] bool: nothing more is written
  finished: jax.Array  # [B] bool: ended by an EOS
  seen: jax.Array | None  # [B, V] bool, where the distribution asks for it


@functools.partial(jax.jit, static_argnames=("model", "samples_per_prompt", "size"))
def generate_rows(
  model: models.Transformer,
  policy: Policy,
  tokens: jax.Array,
  lengths: jax.Array,
  ids: jax.Array,
  budgets: jax.Array,
  rng: jax.Array,
  *,
  samples_per_prompt: int,
  size: int,
  eos_ids: jax.Array,
  pad_id: jax.Array,
  decoding: Decoding,
) -> Samples:
  """Tokens [P, W] padded, lengths [P] (0: no row), ids [P], budgets [P] -> P * G rows of `size`."""
  count, width = tokens.shape
  repeat = functools.partial(_repeat, times=samples_per_prompt)
  keys = _row_keys(rng, ids, samples_per_prompt)
  hidden, caches = _prefill(model, policy, tokens, lengths, size)
  hidden, caches = repeat(hidden), jax.tree.map(lambda x: repeat(x, axis=1), caches)
  tokens, lengths, budgets = repeat(tokens), repeat(lengths), repeat(budgets)
  rows = _start(model, tokens, lengths, size, pad_id, decoding)

  def sample(rows, hidden):
    logits = _logits(model, policy, hidden)
    position = lengths + rows.step
    drawn = draw(jax.vmap(jax.random.fold_in)(keys, position), logits, decoding, rows.seen)
    return _write(rows, position, *drawn, eos_ids, budgets)

  def step(carry):
    rows, caches = carry
    position = (lengths + rows.step - 1)[:, None]
    token = jnp.take_along_axis(rows.tokens, position, axis=1, mode="clip")
    hidden, caches = _forward(model, policy, caches, token, position)
    return sample(rows, [h[:, 0] for h in hidden]), caches

  rows, _ = jax.lax.while_loop(
    lambda carry: ~jnp.all(carry[0].ended), step, (sample(rows, hidden), caches)
  )
  return Samples(rows.tokens, lengths, rows.sampled, rows.logprobs, rows.finished)


def _repeat(tree, times: int, axis: int = 0):
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=axis), tree)


def _row_keys(rng, ids, samples_per_prompt: int) -> jax.Array:
  """[P * G] keys fold_in(fold_in(rng, id), sample index)."""
  of_prompt = jax.vmap(functools.partial(jax.random.fold_in, rng))(ids)
  indices = jnp.arange(samples_per_prompt)
  keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_prompt, indices)
  return keys.reshape(-1)


def _prefill(model, policy: Policy, tokens, lengths, size: int):
  """The last hidden state [P, D] of every prompt and its cache of `size` slots, per variables."""
  caches = [models.init_cache(model, len(tokens), size) for _ in policy.variables]
  hidden, caches = _forward(model, policy, caches, tokens, None)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  return [jnp.take_along_axis(h, last, axis=1)[:, 0] for h in hidden], caches


def _logits(model, policy: Policy, hidden) -> jax.Array:
  """[B, V] of hidden states [B, D]."""
  logits = [
    model.apply(variables, h, method=models.Transformer.unembed)
    for variables, h in zip(policy.variables, hidden)
  ]
  if policy.weight is None:
    return logits[0]
  return (1 - policy.weight) * logits[0] + policy.weight * logits[1]


def _forward(model, policy: Policy, caches, tokens, positions):
  """Hidden states [B, T, D] and the caches with `tokens` in them, per variables."""
  out = [
    model.apply(
      {**variables, "cache": cache},
      tokens,
      positions,
      method=models.Transformer.hidden,
      mutable=["cache"],
    )
    for variables, cache in zip(policy.variables, caches)
  ]
  return [hidden for hidden, _ in out], [changed["cache"] for _, changed in out]


def _start(model, tokens, lengths, size: int, pad_id, decoding: Decoding) -> _Rows:
  count, width = tokens.shape
  inside = jnp.arange(width) < lengths[:, None]
  seen = None
  if decoding.repetition_penalty is not None:
    vocab = model.config.vocab_size
    at = jnp.arange(count)[:, None], jnp.where(inside, tokens, vocab)
    seen = jnp.zeros((count, vocab), bool).at[at].set(True, mode="drop")
  prompt = jnp.where(inside, tokens, pad_id)
  return _Rows(
    step=jnp.zeros((), jnp.int32),
    tokens=jnp.pad(prompt, ((0, 0), (0, size - width)), constant_values=pad_id),
    logprobs=jnp.zeros((count, size), jnp.float32),
    sampled=jnp.zeros((count, size), bool),
    ended=lengths == 0,
    finished=jnp.zeros(count, bool),
    seen=seen,
  )


def _write(rows: _Rows, position, token, logprob, eos_ids, budgets) -> _Rows:
  """The rows with one more token each, at `position` [B]."""
  # A row that has ended writes nothing: its index lies outside and is dropped.
  count, size = rows.tokens.shape
  at = jnp.arange(count), jnp.where(rows.ended, size, position)
  is_eos = jnp.isin(token, eos_ids) & ~rows.ended
  seen = rows.seen
  if seen is not None:
    seen = seen.at[jnp.arange(count), token].set(True)
  return _Rows(
    rows.step + 1,
    rows.tokens.at[at].set(token, mode="drop"),
    rows.logprobs.at[at].set(logprob, mode="drop"),
    rows.sampled.at[at].set(True, mode="drop"),
    rows.ended | is_eos | (rows.step + 1 >= budgets),
    rows.finished | is_eos,
    seen,
  )
