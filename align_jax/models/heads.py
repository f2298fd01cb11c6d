"""What is read off a transformer: log-probs of given tokens, and one number per position."""

import jax
import jax.numpy as jnp

from align_jax import sharding
from align_jax.losses.masked import masked_sum
from align_jax.models import embedding
from align_jax.models.chunks import add_positions, map_positions
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


def weighted_logprob(
  model: Transformer,
  variables,
  tokens: jax.Array,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  *,
  weight: jax.Array,
  chunk_size: int | None = None,
) -> jax.Array:
  """Σ weight log π(token t | tokens before t), t = 1..T-1: [] float32; weight [B, T-1].

  The sum of weighted `token_logprobs`, where only the sum is wanted: as its gradient by every log-prob
  is known beforehand, the pass that finds the sum finds the gradients too, and no logits are computed
  again (Hsu et al. 2024, 2410.10989, do so for the mean).
  """
  hidden = model.apply(variables, tokens, positions, segment_ids, method=Transformer.hidden)
  head = head_variables(model, variables)

  def score(hidden, targets, weight):
    logits = model.apply(head, hidden, method=Transformer.unembed)
    return masked_sum(target_logprobs(logits, targets), weight)

  arrays = hidden[:, :-1], tokens[:, 1:], weight
  moved, count, _ = _counting_first(arrays, weight != 0, chunk_size, model)
  return add_positions(score, moved, chunk_size=chunk_size, count=count)


def _where(score, arrays, where, chunk_size: int | None, model):
  """`map_positions`, at the cost of the positions that count."""
  if where is None:
    return map_positions(score, arrays, chunk_size=chunk_size)
  counts = where != 0
  moved, count, back = _counting_first(arrays, counts, chunk_size, model)
  scores = map_positions(score, moved, chunk_size=chunk_size, count=count)
  if back is not None:
    scores = jax.tree.map(lambda x: _take(x, back), scores)
  return jax.tree.map(lambda x: jnp.where(counts, x, 0.0), scores)


def _counting_first(arrays, counts, chunk_size: int | None, model):
  """Every row with the positions that count in front, how many at most, and the order back.

  Over a split axis of time the positions stay where they are, as in one piece: moving them would
  gather them.
  """
  split = model.mesh is not None and model.mesh.shape.get("context", 1) > 1
  if split or chunk_size is None or chunk_size >= counts.shape[1]:
    return arrays, None, None
  order = jnp.argsort(~counts, axis=1, stable=True)
  moved = tuple(_take(x, order) for x in arrays)
  return moved, jnp.max(jnp.sum(counts, axis=1)), jnp.argsort(order, axis=1)


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
