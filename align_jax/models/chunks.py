"""What costs much memory at every position, computed a chunk of positions at a time."""

import functools

import jax
import jax.numpy as jnp


def map_positions(score, arrays, *, chunk_size: int | None, count: jax.Array | None = None):
  """`score(*arrays)` in chunks of positions, each recomputed in the backward pass.

  arrays: [B, T, ...] each; score: their chunks [B, C, ...] to a tree of arrays [B, C]. With
  `count` [], the positions from `count` on are empty in every row: chunks of nothing else are
  skipped, in the backward pass too, and give 0.
  """
  length = arrays[0].shape[1]
  if chunk_size is None or chunk_size >= length:
    return score(*arrays)
  scores = _in_chunks(*_chunked(score, arrays, chunk_size, count))  # [N, B, C]
  return jax.tree.map(lambda x: _join(x, length), scores)


def add_positions(score, arrays, *, chunk_size: int | None, count: jax.Array | None = None):
  """The sum of `score(*arrays)` over chunks of positions; nothing is computed again to differentiate it.

  arrays: [B, T, ...] each; score: their chunks [B, C, ...] to a number. `count` as of `map_positions`.
  """
  if chunk_size is None or chunk_size >= arrays[0].shape[1]:
    return score(*arrays)
  return _sum_of_chunks(*_chunked(score, arrays, chunk_size, count))


def _chunked(score, arrays, chunk_size: int, count):
  """score of chunks and of what it closes over, how many are not empty, the latter, and the chunks."""
  chunks = tuple(_split(x, chunk_size) for x in arrays)
  number = len(chunks[0]) if count is None else -(-count // chunk_size)
  score, learned = jax.closure_convert(score, *(x[0] for x in chunks))
  return score, number, learned, chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(score, number, learned, chunks):
  """score(*chunk, *learned) for the first `number` chunks, 0 for the others.

  A loop each way, whose end depends on the data. Of a scan over chunks and conditions XLA carries
  what every chunk's forward pass leaves, the table among it, from one condition to the next.
  """

  def step(i, found):
    return _put(found, i, score(*_chunk(chunks, i), *learned))

  shapes = jax.eval_shape(score, *_chunk(chunks, 0), *learned)
  found = jax.tree.map(lambda s: jnp.zeros((len(chunks[0]), *s.shape), s.dtype), shapes)
  return _loop(number, len(chunks[0]), step, found)


def _in_chunks_forward(score, number, learned, chunks):
  return _in_chunks(score, number, learned, chunks), (number, learned, chunks)


def _in_chunks_backward(score, saved, d_scores):
  number, learned, chunks = saved

  def step(i, gradients):
    pull = jax.vjp(score, *_chunk(chunks, i), *learned)[1]
    return _with(gradients, i, pull(_chunk(d_scores, i)))

  d_chunks, d_learned = _loop(number, len(chunks[0]), step, _no_gradients(chunks, learned))
  return None, d_learned, d_chunks


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(score, number, learned, chunks):
  """Σ score(*chunk, *learned) over the first `number` chunks."""

  def step(i, total):
    return total + score(*_chunk(chunks, i), *learned)

  return _loop(number, len(chunks[0]), step, jnp.zeros(()))


def _sum_of_chunks_forward(score, number, learned, chunks):
  def step(i, found):
    value, pull = jax.vjp(score, *_chunk(chunks, i), *learned)
    return found[0] + value, _with(found[1], i, pull(jnp.ones_like(value)))

  start = jnp.zeros(()), _no_gradients(chunks, learned)
  return _loop(number, len(chunks[0]), step, start)


def _sum_of_chunks_backward(score, gradients, d_total):
  d_chunks, d_learned = jax.tree.map(lambda x: (x * d_total).astype(x.dtype), gradients)
  return None, d_learned, d_chunks


_sum_of_chunks.defvjp(_sum_of_chunks_forward, _sum_of_chunks_backward)


def _no_gradients(chunks, learned):
  """Zeros for chunks and what is learned; targets, being integers, have no gradient."""
  floating = (jnp.issubdtype(x.dtype, jnp.floating) for x in chunks)
  d_chunks = tuple(jnp.zeros_like(x) if f else None for x, f in zip(chunks, floating))
  return d_chunks, [jnp.zeros_like(x) for x in learned]


def _with(gradients, i, found):
  """`gradients` with those of chunk i, which come in one row: the chunk's, then what is learned."""
  d_chunks, d_learned = gradients
  d_chunk = tuple(None if x is None else d for x, d in zip(d_chunks, found))
  added = jax.tree.map(jnp.add, d_learned, list(found[len(d_chunks) :]))
  return _put(d_chunks, i, d_chunk), added


def _loop(number, most: int, step, start):
  """`fori_loop(0, number, step, start)`; its condition says how often at most, for `scale.flops`."""

  def goes_on(carry):
    return (carry[0] < most) & (carry[0] < number)

  def body(carry):
    return carry[0] + 1, step(*carry)

  return jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), start))[1]


def _chunk(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def _put(tree, i, parts):
  return jax.tree.map(lambda x, part: x.at[i].set(part), tree, parts)


def _split(x, size):
  """[B, T, ...] to [ceil(T / size), B, size, ...], zero-padded."""
  count = -(-x.shape[1] // size)
  pad = [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.moveaxis(jnp.pad(x, pad).reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _join(x, length):
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]
