"""What is read off a transformer: log-probs of given tokens, and one number per position."""

import functools

import jax
import jax.numpy as jnp

from align_jax import sharding
from align_jax.models import embedding
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
  where: jax.Array | None = None,
):
  """log π(token t | tokens before t), t = 1..T-1, under softmax(logits / temperature): [B, T-1].

  tokens, positions, segment_ids [B, T] as for the model; with `return_entropy` a pair, the second
  being the entropy in nats of the distribution each token was scored by, [B, T-1].  `chunk_size`
  positions go through the LM head at a time and are recomputed in the backward pass, so logits
  [B, T, V] never exist at once.  Where `where` [B, T-1] is 0 the result is 0; those positions are
  moved behind the others, and chunks of nothing else never meet the head.
  """
  hidden = model.apply(variables, tokens, positions, segment_ids, method=Transformer.hidden)
  return target_scores(
    model, variables, hidden[:, :-1], tokens[:, 1:], chunk_size=chunk_size, temperature=temperature,
    return_entropy=return_entropy, where=where,
  )  # fmt: skip


def shared_hidden(model: Transformer, variables, rows) -> jax.Array:
  """The hidden states [R, T, D] that predict the scored tokens of rows with `sources` and branches.

  rows: tokens, positions, segment_ids, branch_ids and sources, int32 [R, T], as of `shared_batches`.
  """
  names = ("tokens", "positions", "segment_ids", "branch_ids")
  hidden = model.apply(variables, *(rows[name] for name in names), method="hidden")
  return jnp.take_along_axis(hidden, rows["sources"][..., None], axis=1)


def target_scores(
  model: Transformer,
  variables,
  hidden: jax.Array,
  targets: jax.Array,
  *,
  chunk_size: int | None = None,
  temperature: float = 1.0,
  return_entropy: bool = False,
  where: jax.Array | None = None,
):
  """`token_logprobs` of targets [B, T] from the hidden states [B, T, D] that predict them."""
  if temperature <= 0:
    raise ValueError(f"temperature must be positive, not {temperature}")
  head = head_variables(model, variables)

  def score(hidden, targets):
    logits = model.apply(head, hidden, method=Transformer.unembed) / temperature
    return _score(logits, targets, return_entropy)

  scores = _where(score, (hidden, targets), where, chunk_size, model)
  return scores if return_entropy else scores[0]


def _where(score, arrays, where, chunk_size: int | None, model):
  """`map_positions`, at the cost of the positions that count."""
  if where is None:
    return map_positions(score, arrays, chunk_size=chunk_size)
  counts = where != 0
  # Over a split axis of time the positions stay where they are: moving them would gather them.
  split = model.mesh is not None and model.mesh.shape.get("context", 1) > 1
  if split or chunk_size is None or chunk_size >= counts.shape[1]:
    scores = map_positions(score, arrays, chunk_size=chunk_size)
  else:
    order = jnp.argsort(~counts, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    moved = tuple(_take(x, order) for x in arrays)
    count = jnp.max(jnp.sum(counts, axis=1))
    scores = map_positions(score, moved, chunk_size=chunk_size, count=count)
    scores = jax.tree.map(lambda x: _take(x, back), scores)
  return jax.tree.map(lambda x: jnp.where(counts, x, 0.0), scores)


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
  """x [B, T, ...] with every row's positions in the order [B, T]."""
  return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def head_variables(model: Transformer, variables):
  """`variables` for `unembed` in chunks: the table is moved, and its gradient summed, just once."""
  mesh = getattr(model, "mesh", None)
  if mesh is None:
    return variables
  params = variables["params"]
  name = "embedding" if model.config.tie_embeddings else "unembedding"
  params = {**params, name: sharding.on_device(params[name])}
  if model.config.tie_embeddings:
    moved = {"embedding": embedding.by_classes(params["embedding"], mesh)}
  else:
    table, used = params["unembedding"], (None, "classes")
    moved = {"unembedding": sharding.gathered(table, mesh, embedding.HEAD_AXES, used=used)}
  return {**variables, "params": {**params, **moved}}


def map_positions(score, arrays, *, chunk_size: int | None, count: jax.Array | None = None):
  """`score(*arrays)` in chunks of positions, each recomputed in the backward pass.

  arrays: [B, T, ...] each; score: their chunks [B, C, ...] to a tree of arrays [B, C]. With
  `count` [], the positions from `count` on are empty in every row: chunks of nothing else are
  skipped, in the backward pass too, and give 0.
  """
  length = arrays[0].shape[1]
  if chunk_size is None or chunk_size >= length:
    return score(*arrays)
  chunks = tuple(_split(x, chunk_size) for x in arrays)
  number = len(chunks[0]) if count is None else -(-count // chunk_size)
  score, learned = jax.closure_convert(score, *(x[0] for x in chunks))
  scores = _in_chunks(score, number, learned, chunks)  # [N, B, C]
  return jax.tree.map(lambda x: _join(x, length), scores)


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
    found = pull(_chunk(d_scores, i))
    d_chunk = tuple(None if x is None else d for x, d in zip(gradients[0], found))
    d_learned = list(found[len(chunks) :])
    return _put(gradients[0], i, d_chunk), jax.tree.map(jnp.add, gradients[1], d_learned)

  # Targets, being integers, have no gradient.
  d_chunks = tuple(
    jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else None for x in chunks
  )
  zeros = d_chunks, [jnp.zeros_like(x) for x in learned]
  d_chunks, d_learned = _loop(number, len(chunks[0]), step, zeros)
  return None, d_learned, d_chunks


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


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


def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """log softmax(logits)[target], [B, T] float32; logits [B, T, V] float32, targets [B, T]."""
  return _score(logits, targets, False)[0]


def init_scalar_head(rng: jax.Array, dim: int, outputs: int | None = None) -> dict:
  """Kernel [D] of normal std 1/√(D+1) and zero bias, after Stiennon et al. 2020.

  With `outputs` H several heads side by side, kernel [D, H] and bias [H].
  """
  shape = () if outputs is None else (outputs,)
  return {
    "kernel": jax.random.normal(rng, (dim, *shape)) * (dim + 1) ** -0.5,
    "bias": jnp.zeros(shape),
  }


def scalar_head(head, hidden: jax.Array) -> jax.Array:
  """hidden [B, T, D] . kernel + bias, [B, T] float32, or [B, T, H] of H heads."""
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
