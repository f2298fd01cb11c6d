"""Attention a tile of queries and keys at a time, in plain JAX: no [T, T] array on any platform.

The softmax is carried from tile to tile (Rabe & Staats 2021, 2112.05682); the backward pass computes
the tiles again from the logsumexps (Dao et al. 2022, 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp

from align_jax.models.attention import MASKED, Rows, seen

BLOCK = 512


def padded_length(length: int) -> int:
  """The next multiple of a tile; short rows are one tile."""
  return length if length <= BLOCK else -(-length // BLOCK) * BLOCK


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  queries: Rows,
  keys: Rows,
  window: int | None,
  *,
  scale: float,
  softcap: float | None,
) -> jax.Array:
  """softmax(scale q.k) v: q [B, T, K, G, H], k and v [B, S, K, H] -> [B, T, K, G, H].

  `queries` and `keys` say who the T and the S tokens are; every query sees a key.  T and S are
  multiples of the tile or shorter than it.
  """
  return _attend((scale, softcap, window), q, k, v, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, *args):
  return _forward(options, *args)[0]


def _forward(options, q, k, v, queries, keys):
  scale = options[0]
  tiles = _Tiles(options, queries, keys)
  q_scaled = q * scale
  b, t, kv, g, h = q.shape

  def step(carry, i, j, mask):
    top, total, out = (tiles.query(x, i) for x in carry)
    scores, _ = tiles.scores(tiles.query(q_scaled, i), tiles.key(k, j), mask)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])
    decay = jnp.exp(top - new_top)
    values = jnp.einsum(
      "btkgs,bskh->btkgh", weights.astype(v.dtype), tiles.key(v, j),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    new = new_top, total * decay + weights.sum(-1), out * decay[..., None] + values
    return tuple(tiles.put_query(x, i, part) for x, part in zip(carry, new))

  start = (
    jnp.full((b, t, kv, g), MASKED, jnp.float32),
    jnp.zeros((b, t, kv, g), jnp.float32),
    jnp.zeros((b, t, kv, g, h), jnp.float32),
  )
  top, total, out = tiles.scan(step, start)
  logsumexp = top + jnp.log(total)
  out = (out / total[..., None]).astype(q.dtype)
  return out, (q, k, v, queries, keys, out, logsumexp)


def _backward(options, saved, d_out):
  """With p the weights and Δ = Σ out d_out: dv = pᵀ d_out, ds = p (d_out vᵀ − Δ), dq = ds k, dk = dsᵀ q."""
  scale = options[0]
  q, k, v, queries, keys, out, logsumexp = saved
  tiles = _Tiles(options, queries, keys)
  q_scaled = q * scale
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def step(carry, i, j, mask):
    dq, dk, dv = carry
    q_i, do_i = tiles.query(q_scaled, i), tiles.query(d_out, i)
    k_j, v_j = tiles.key(k, j), tiles.key(v, j)
    scores, slope = tiles.scores(q_i, k_j, mask)
    weights = jnp.exp(scores - tiles.query(logsumexp, i)[..., None])
    ds = einsum("btkgh,bskh->btkgs", do_i, v_j) - tiles.query(delta, i)[..., None]
    ds = (weights * ds * slope).astype(q.dtype)
    weights = weights.astype(v.dtype)
    dq = tiles.add_query(dq, i, einsum("btkgs,bskh->btkgh", ds, k_j))
    dk = tiles.add_key(dk, j, einsum("btkgs,btkgh->bskh", ds, q_i))
    dv = tiles.add_key(dv, j, einsum("btkgs,btkgh->bskh", weights, do_i))
    return dq, dk, dv

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  dq, dk, dv = tiles.scan(step, start)
  return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


class _Tiles:
  """The pairs of tiles of one attention; a pair in which nobody sees anybody is skipped."""

  def __init__(self, options, queries: Rows, keys: Rows):
    _, self.softcap, self.window = options
    self.queries, self.keys = queries, keys
    lengths = queries.places.shape[1], keys.places.shape[1]
    self.sizes = tuple(min(BLOCK, length) for length in lengths)
    self.counts = tuple(length // size for length, size in zip(lengths, self.sizes))

  def scan(self, step, carry):
    """step(carry, i, j, mask) over all pairs."""

    def one(carry, pair):
      i, j = pair
      queries = jax.tree.map(lambda x: self.query(x, i), self.queries)
      keys = jax.tree.map(lambda x: self.key(x, j), self.keys)
      mask = seen(queries, keys, self.window)[:, :, None, None]
      return jax.lax.cond(mask.any(), lambda c: step(c, i, j, mask), lambda c: c, carry), None

    places = jnp.arange(self.counts[0] * self.counts[1])
    return jax.lax.scan(one, carry, (places // self.counts[1], places % self.counts[1]))[0]

  def query(self, x, i):
    return jax.lax.dynamic_slice_in_dim(x, i * self.sizes[0], self.sizes[0], axis=1)

  def key(self, x, j):
    return jax.lax.dynamic_slice_in_dim(x, j * self.sizes[1], self.sizes[1], axis=1)

  def put_query(self, x, i, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * self.sizes[0], axis=1)

  def add_query(self, x, i, part):
    return self.put_query(x, i, self.query(x, i) + part)

  def add_key(self, x, j, part):
    place = j * self.sizes[1]
    return jax.lax.dynamic_update_slice_in_dim(x, self.key(x, j) + part, place, axis=1)

  def scores(self, q, k, mask):
    """Capped and masked scores [B, T, K, G, S] of two tiles, and the cap's slope there."""
    scores = jnp.einsum("btkgh,bskh->btkgs", q, k, preferred_element_type=jnp.float32)
    slope = 1.0
    if self.softcap is not None:
      capped = jnp.tanh(scores / self.softcap)
      scores, slope = self.softcap * capped, 1 - capped * capped
    return jnp.where(mask, scores, MASKED), slope
