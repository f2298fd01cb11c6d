"""Attention a tile of queries and keys at a time, in plain JAX: no [T, T] array on any platform.

The softmax is carried from tile to tile (Rabe & Staats 2021, 2112.05682); the backward pass computes
the tiles again from the logsumexps (Dao et al. 2022, 2205.14135).  A tile of queries meets only tiles
of keys that it can see, so packed rows cost what their segments cost, and branches not each other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from align_jax.models.attention import MASKED, SAVED_NAME, Rows, seen

BLOCK = 512  # tokens of a tile
SERIAL_BLOCK = 64  # small enough for a CPU's cache, and for short segments


class Options(NamedTuple):
  """What does not depend on the data.

  serial: rows and heads one after the other, as plain matrix products, in tiles that fit a CPU's
  cache. With jaxlib 0.10.2 heads side by side take 3 % more of a training step; with earlier ones,
  where products with batch dimensions ran at a fifth of their speed, far more.
  """

  scale: float
  softcap: float | None
  window: int | None
  serial: bool

  @property
  def block(self) -> int:
    return SERIAL_BLOCK if self.serial else BLOCK

  def padded_length(self, length: int) -> int:
    """The next multiple of a tile; short rows are one tile."""
    return length if length <= self.block else -(-length // self.block) * self.block


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, queries: Rows, keys: Rows, options: Options
) -> jax.Array:
  """softmax(scale q.k) v: q [B, T, K, G, H], k and v [B, S, K, H] -> [B, T, K, G, H].

  `queries` and `keys` say who the T and the S tokens are; every query sees a key.  T and S are
  multiples of the tile or shorter than it.
  """
  return _attend(options, q, k, v, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, *args):
  return _forward(options, *args)[0]


def _forward(options, q, k, v, queries, keys):
  forward = functools.partial(_forward_of_head, options)
  out, logsumexp = _by_head(forward, options, queries, keys, q, k, v)
  out, logsumexp = (checkpoint_name(x, SAVED_NAME) for x in (out.astype(q.dtype), logsumexp))
  return out, (q, k, v, queries, keys, out, logsumexp)


def _backward(options, saved, d_out):
  q, k, v, queries, keys, out, logsumexp = saved
  backward = functools.partial(_backward_of_head, options)
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
  dq, dk, dv = _by_head(backward, options, queries, keys, q, k, v, d_out, logsumexp, delta)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _by_head(function, options, queries, keys, *heads):
  """function(tiles, *heads) for every row and key head; heads [B, T, K, ...], as its outputs."""
  tiles = _Tiles.of(options, queries, keys)
  if not options.serial:
    over = _Tiles(0, 0, None, None)
    of_row = jax.vmap(function, in_axes=(None, *(1 for _ in heads)), out_axes=1)
    return jax.vmap(of_row, in_axes=(over, *(0 for _ in heads)))(tiles, *heads)

  def of_row(row):
    tiles, heads = row
    return jax.lax.map(lambda head: function(tiles, *head), heads)

  heads = tuple(jnp.moveaxis(x, 2, 1) for x in heads)
  found = jax.lax.map(of_row, (tiles, heads))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), found)


def _forward_of_head(options, tiles, q, k, v):
  """q [T, G, H], k and v [S, H] -> output [T, G, H] and logsumexp [T, G], float32."""
  count, size = tiles.order.shape[0], min(options.block, q.shape[0]) * q.shape[1]
  flat = _flat(q)

  def of_tile(i):
    q_i = _tile(flat, i, size)

    def step(n, carry):
      j, (top, total, out) = tiles.order[i, n], carry
      scores, _ = _scores(options, tiles, q_i, _tile(k, j, options.block), i, j)
      new_top = jnp.maximum(top, _largest(options, scores))
      weights, decay = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
      values = _product("qs,sh->qh", weights.astype(v.dtype), _tile(v, j, options.block))
      return new_top, total * decay + weights.sum(-1), out * decay[:, None] + values

    start = jnp.full(size, MASKED), jnp.zeros(size), jnp.zeros(q_i.shape)
    top, total, out = jax.lax.fori_loop(0, tiles.until[i], step, start)
    return out / total[:, None], top + jnp.log(total)

  out, logsumexp = jax.lax.map(of_tile, jnp.arange(count))
  return out.reshape(q.shape), logsumexp.reshape(q.shape[:2])


def _backward_of_head(options, tiles, q, k, v, d_out, logsumexp, delta):
  """With p the weights and Δ = Σ out d_out: dv = pᵀ d_out, ds = p (d_out vᵀ − Δ), dq = ds k, dk = dsᵀ q."""
  count, size = tiles.order.shape[0], min(options.block, q.shape[0]) * q.shape[1]
  queries = [_flat(x) for x in (q, d_out, logsumexp, delta)]

  def of_tile(carry, i):
    q_i, do_i, sum_i, delta_i = (_tile(x, i, size) for x in queries)

    def step(n, carry):
      j, (dk, dv, dq) = tiles.order[i, n], carry
      k_j, v_j = (_tile(x, j, options.block) for x in (k, v))
      scores, slope = _scores(options, tiles, q_i, k_j, i, j)
      weights = jnp.exp(scores - sum_i[:, None])
      ds = _product("qh,sh->qs", do_i, v_j) - delta_i[:, None]
      ds = (weights * ds * slope).astype(q.dtype)
      dk = _add(dk, j, _product("sq,qh->sh", _turned(options, ds), q_i))
      weights = _turned(options, weights.astype(v.dtype))
      dv = _add(dv, j, _product("sq,qh->sh", weights, do_i))
      return dk, dv, dq + _product("qs,sh->qh", ds, k_j)

    start = (*carry, jnp.zeros(q_i.shape))
    dk, dv, dq = jax.lax.fori_loop(0, tiles.until[i], step, start)
    return (dk, dv), dq

  start = jnp.zeros(k.shape), jnp.zeros(v.shape)
  (dk, dv), dq = jax.lax.scan(of_tile, start, jnp.arange(count))
  return dq.reshape(q.shape), dk, dv


def _flat(x: jax.Array) -> jax.Array:
  """[T, G, ...] as [T G, ...]: products of two plain matrices, which XLA does not rearrange."""
  return x.reshape(-1, *x.shape[2:])


def _largest(options: Options, x: jax.Array) -> jax.Array:
  """Of every row [Q, S]; on CPU halves against each other, as XLA's maximum takes seven times as long."""
  while options.serial and x.shape[1] % 2 == 0 and x.shape[1] > 16:
    x = jnp.maximum(*jnp.split(x, 2, axis=1))
  return x.max(axis=1)


def _turned(options: Options, x: jax.Array) -> jax.Array:
  """The transpose; on CPU made by itself, as XLA would compute x again, column by column."""
  if not options.serial:
    return x.T
  return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).T)


class _Tiles(NamedTuple):
  """Who is in the tiles of a row, and which tiles of keys each tile of queries can see.

  order: for each tile of queries all tiles of keys, first the `until` that it sees. Of B rows everything
  has an axis more in front, but for `order` and `until` where rows go side by side: then all go
  through the tiles that one of them needs.
  """

  queries: Rows  # [T]
  keys: Rows  # [S]
  order: jax.Array  # [T / tile, S / tile]
  until: jax.Array  # [T / tile]

  @classmethod
  def of(cls, options: Options, queries: Rows, keys: Rows) -> "_Tiles":
    """Of B rows; a tile is seen unless places, segments, branches or window rule all its pairs out."""
    q, k = (_bounds_of(rows, options.block) for rows in (queries, keys))
    reach = k.places[0][:, None] <= q.places[1][:, :, None]
    if queries.segment_ids is not None:
      reach &= _meet(q.segment_ids, k.segment_ids)
    if queries.branch_ids is not None:
      trunk = k.branch_ids[0][:, None] == 0
      reach &= trunk | _meet(q.branch_ids, k.branch_ids)
    if options.window is not None:
      which = "places" if queries.branch_ids is None else "positions"
      nearest = getattr(q, which)[0][:, :, None] - getattr(k, which)[1][:, None]
      reach &= nearest < options.window
    if not options.serial:
      reach = reach.any(axis=0)
    order = jnp.argsort(~reach, axis=-1, stable=True)
    return cls(queries, keys, order, reach.sum(axis=-1))


def _meet(queries: tuple, keys: tuple) -> jax.Array:
  """Whether ranges (least, largest) [B, T / tile] and [B, S / tile] overlap, [B, T / tile, S / tile]."""
  q, k = ([x[:, :, None] for x in queries], [x[:, None] for x in keys])
  return (k[0] <= q[1]) & (q[0] <= k[1])


def _bounds_of(rows: Rows, block: int) -> Rows:
  """`_bounds` of each field; padding, at a row's end, counts as a segment behind all others."""
  ids = rows.segment_ids
  if ids is not None:
    ids = jnp.where(ids == 0, jnp.iinfo(ids.dtype).max, ids)
  return jax.tree.map(lambda x: _bounds(x, block), rows._replace(segment_ids=ids))


def _bounds(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """Least and largest number of each tile, [B, T / tile]."""
  tiles = x.reshape(x.shape[0], -1, min(block, x.shape[1]))
  return tiles.min(axis=2), tiles.max(axis=2)


def _tile(x: jax.Array, i: jax.Array, block: int) -> jax.Array:
  size = min(block, x.shape[0])
  return jax.lax.dynamic_slice_in_dim(x, i * size, size)


def _add(x: jax.Array, i: jax.Array, part: jax.Array) -> jax.Array:
  size = part.shape[0]
  return jax.lax.dynamic_update_slice_in_dim(x, _tile(x, i, size) + part, i * size, axis=0)


def _scores(options, tiles, q, k, i, j):
  """Scaled, capped and masked scores [T G, S] of tiles i and j, and their slope in q.k."""
  scores, slope = options.scale * _product("qh,sh->qs", q, k), options.scale
  if options.softcap is not None:
    capped = jnp.tanh(scores / options.softcap)
    scores, slope = options.softcap * capped, slope * (1 - capped * capped)
  queries, keys = _who(tiles.queries, i, options.block), _who(tiles.keys, j, options.block)
  mask = seen(queries, keys, options.window)[0]
  mask = jnp.repeat(mask, q.shape[0] // mask.shape[0], axis=0)  # once for every head of the group
  return jnp.where(mask, scores, MASKED), slope


def _who(rows: Rows, i: jax.Array, block: int) -> Rows:
  """Tile i of a row, as one row."""
  return jax.tree.map(lambda x: _tile(x, i, block)[None], rows)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
