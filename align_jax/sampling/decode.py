"""The compiled parts of generation: prefill, admission to the rows in flight, decoding, resizing.

Every row in flight owns a row of the caches, where slot = position. Rows may be of different ages; a
row that has ended stays, does no harm, and is overwritten when another takes its place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from align_jax import models, sharding
from align_jax.models import embedding
from align_jax.sampling.distribution import Decoding, draw

# By platform. XLA's CPU scheduler cuts all weights of a layer out of their stack before the first is
# used, and then reads them from memory again; in the order of a plain program they are in the cache.
_DECODING = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
  """Whose logits are sampled: one set of variables, or (1-weight) of the first + weight of two."""

  variables: tuple[Any, ...]  # one or two sets of collections of the same module
  weight: jax.typing.ArrayLike | None = None  # None with one set


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
  """P prompts, read once and ready to be continued by any number of rows."""

  lengths: jax.Array  # [P]
  budgets: jax.Array  # [P]
  keys: jax.Array  # [P] keys fold_in(rng, prompt id)
  logits: jax.Array  # [P, V] of the token behind the prompt
  seen: jax.Array | None  # [P, V] bool, where the distribution asks for it
  caches: tuple[Any, ...]  # of W slots, one per variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What is known of each of B rows in flight, and the up to N tokens it has drawn."""

  lengths: jax.Array  # [B] of the prompt
  budgets: jax.Array  # [B]
  keys: jax.Array  # [B] keys fold_in(prompt's, sample index)
  counts: jax.Array  # [B] tokens drawn
  last: jax.Array  # [B] the newest of them, not in the cache yet
  tokens: jax.Array  # [B, N]
  logprobs: jax.Array  # [B, N]
  ended: jax.Array  # [B] bool: nothing more is written; true of rows not in use
  finished: jax.Array  # [B] bool: ended by an EOS
  seen: jax.Array | None  # [B, V] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flight:
  """All rows in flight with their caches."""

  rows: Rows
  caches: tuple[Any, ...]


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def prefill(
  model: models.Transformer,
  policy: Policy,
  tokens: jax.Array,
  lengths: jax.Array,
  ids: jax.Array,
  budgets: jax.Array,
  rng: jax.Array,
  decoding: Decoding,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> Prefilled:
  """Reads tokens [P, W], of which lengths [P] are real; ids, budgets [P] as in `Prompts`."""
  caches = [models.init_cache(model, *tokens.shape) for _ in policy.variables]
  hidden, caches = _forward(model, policy, _split(caches, mesh), tokens, None)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  hidden = [jnp.take_along_axis(h, last, axis=1)[:, 0] for h in hidden]
  seen = None
  if decoding.repetition_penalty is not None:
    vocab, inside = model.config.vocab_size, jnp.arange(tokens.shape[1]) < lengths[:, None]
    at = jnp.arange(len(tokens))[:, None], jnp.where(inside, tokens, vocab)
    seen = jnp.zeros((len(tokens), vocab), bool).at[at].set(True, mode="drop")
  keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(ids)
  return Prefilled(lengths, budgets, keys, _logits(model, policy, hidden), seen, caches)


@functools.partial(
  jax.jit, static_argnames=("model", "policies", "rows", "slots", "budget", "mesh")
)
def empty_flight(
  model: models.Transformer,
  prefilled: Prefilled,
  *,
  policies: int,
  rows: int,
  slots: int,
  budget: int,
  mesh: jax.sharding.Mesh | None = None,
) -> Flight:
  """No rows in flight, but room for `rows`; `prefilled` only says of what kind."""
  numbers = jnp.zeros(rows, jnp.int32)
  seen = prefilled.seen
  empty = Rows(
    lengths=numbers,
    budgets=numbers,
    keys=jnp.repeat(prefilled.keys[:1], rows),
    counts=numbers,
    last=numbers,
    tokens=jnp.zeros((rows, budget), jnp.int32),
    logprobs=jnp.zeros((rows, budget), jnp.float32),
    ended=jnp.ones(rows, bool),
    finished=jnp.zeros(rows, bool),
    seen=None if seen is None else jnp.zeros((rows, seen.shape[1]), bool),
  )
  caches = tuple(models.init_cache(model, rows, slots) for _ in range(policies))
  return Flight(_split(empty, mesh, axis=0), _split(caches, mesh))


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("flight",))
def admit(
  flight: Flight,
  prefilled: Prefilled,
  slots: jax.Array,
  sources: jax.Array,
  indices: jax.Array,
  eos_ids: jax.Array,
  decoding: Decoding,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> Flight:
  """Row slots[i] becomes sample indices[i] of prompt sources[i] and draws its first token.

  All [R] int32; a slot that does not exist is nobody's.
  """
  pick = lambda x: None if x is None else x[sources]  # noqa: E731
  zeros, budget = jnp.zeros_like(slots), flight.rows.tokens.shape[1]
  newcomers = Rows(
    lengths=prefilled.lengths[sources],
    budgets=prefilled.budgets[sources],
    keys=jax.vmap(jax.random.fold_in)(prefilled.keys[sources], indices),
    counts=zeros,
    last=zeros,
    tokens=jnp.zeros((len(slots), budget), jnp.int32),
    logprobs=jnp.zeros((len(slots), budget), jnp.float32),
    ended=jnp.zeros(len(slots), bool),
    finished=jnp.zeros(len(slots), bool),
    seen=pick(prefilled.seen),
  )
  newcomers = _draw(newcomers, prefilled.logits[sources], eos_ids, decoding)
  put = lambda all, new: all.at[slots].set(new, mode="drop")  # noqa: E731
  rows = jax.tree.map(put, flight.rows, newcomers)

  def insert(cache, new):
    return cache.at[:, slots, :, : new.shape[3]].set(new[:, sources], mode="drop")

  caches = jax.tree.map(insert, flight.caches, prefilled.caches)
  return Flight(_split(rows, mesh, axis=0), _split(caches, mesh))


def decode(
  model: models.Transformer,
  policy: Policy,
  flight: Flight,
  stopped: jax.Array,
  steps: jax.Array,
  patience: jax.Array,
  eos_ids: jax.Array,
  decoding: Decoding,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> Flight:
  """Up to `steps` tokens for every row; less when `patience` rows have ended or a cache is full.

  stopped [B] bool: rows that something else has ended.
  """
  slots = jax.tree.leaves(flight.caches)[0].shape[3]

  def going(carry):
    step, rows, _ = carry
    reach = jnp.max(jnp.where(rows.ended, 0, rows.lengths + rows.counts))
    return (step < steps) & (jnp.sum(rows.ended) < patience) & (reach <= slots)

  def forward(carry):
    step, rows, caches = carry
    position = jnp.maximum(rows.lengths + rows.counts - 1, 0)[:, None]
    hidden, caches = _forward(model, policy, caches, rows.last[:, None], position)
    logits = _logits(model, policy, [h[:, 0] for h in hidden])
    return step + 1, _draw(rows, logits, eos_ids, decoding), caches

  rows = dataclasses.replace(flight.rows, ended=flight.rows.ended | stopped)
  start = jnp.zeros((), jnp.int32), rows, flight.caches
  _, rows, caches = jax.lax.while_loop(going, forward, start)
  return Flight(_split(rows, mesh, axis=0), _split(caches, mesh))


@functools.cache
def decode_on(platform: str) -> Callable:
  """The compiled `decode` of a platform; it reuses the memory of its flight."""
  return jax.jit(
    decode,
    static_argnames=("model", "mesh"),
    donate_argnames=("flight",),
    compiler_options=_DECODING.get(platform),
  )


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def resize(caches: Any, slots: int, *, mesh: jax.sharding.Mesh | None = None) -> Any:
  """The caches with `slots` slots; none beyond may be in use."""

  def change(cache):
    missing = max(slots - cache.shape[3], 0)
    return jnp.pad(cache[:, :, :, :slots], [(0, 0)] * 3 + [(0, missing), (0, 0)])

  return _split(jax.tree.map(change, caches), mesh)


def _draw(rows: Rows, logits, eos_ids, decoding: Decoding) -> Rows:
  """The rows with one more token each; those that have ended stay as they are."""
  keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.lengths + rows.counts)
  token, logprob = draw(keys, logits, decoding, rows.seen)
  # A row that has ended writes nothing: its index lies outside and is dropped.
  count, size = rows.tokens.shape
  row, active = jnp.arange(count), ~rows.ended
  at = row, jnp.where(active, rows.counts, size)
  is_eos = jnp.isin(token, eos_ids) & active
  counts = rows.counts + active
  return dataclasses.replace(
    rows,
    counts=counts,
    last=jnp.where(active, token, rows.last),
    tokens=rows.tokens.at[at].set(token, mode="drop"),
    logprobs=rows.logprobs.at[at].set(logprob, mode="drop"),
    ended=rows.ended | is_eos | (counts >= rows.budgets),
    finished=rows.finished | is_eos,
    seen=None if rows.seen is None else rows.seen.at[row, token].set(True),
  )


def _logits(model, policy: Policy, hidden) -> jax.Array:
  """[B, V] of hidden states [B, D]: whole rows, which are sent instead of the table of the head."""
  mesh = getattr(model, "mesh", None)
  logits = [
    embedding.whole_rows(model.apply(variables, h, method=models.Transformer.unembed), mesh)
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
  return [hidden for hidden, _ in out], tuple(changed["cache"] for _, changed in out)


def _split(tree, mesh, axis: int = 1):
  """The tree with the rows on `axis` split over the mesh, always alike: one program is enough.

  Not where weights are split over `tensor` too: with caches held to this placement, XLA's partitioner
  (jax 0.10.2, data = fsdp = tensor = 2) makes the keys of some rows wrong. It places them itself then.
  """
  if mesh is None or mesh.shape["tensor"] > 1:
    return tree
  spec = jax.sharding.PartitionSpec(*[None] * axis, sharding.BATCH_AXES)
  place = jax.sharding.NamedSharding(mesh, spec)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), tree)
