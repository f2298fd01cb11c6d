"""Batched generation: one compiled prefill and decode loop per shape."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.sampling.distribution import Decoding, draw, make_decoding

PROMPT_BUCKET = 16  # prompt lengths are rounded up to a multiple of this
ROW_BUCKET = 8  # and numbers of rows to a multiple of this, or to a power of two below it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """What was generated: contiguous rows of prompt, then response, then padding."""

  tokens: np.ndarray  # [B, S] int32
  prompt_lengths: np.ndarray  # [B] int32
  response_mask: np.ndarray  # [B, S] bool; true on sampled tokens, the EOS included
  logprobs: np.ndarray  # [B, S] f32, of the token at t under the distribution it was drawn from
  finished: np.ndarray  # [B] bool; an EOS token was drawn

  @property
  def lengths(self) -> np.ndarray:
    """[B] numbers of sampled tokens."""
    return self.response_mask.sum(axis=1)

  def responses(self) -> list[np.ndarray]:
    """The sampled tokens of every row, its EOS included."""
    return [row[mask] for row, mask in zip(self.tokens, self.response_mask)]


def generate(
  model: models.Transformer,
  params: Any,
  prompts: Sequence[np.ndarray] | np.ndarray,
  *,
  max_new_tokens: int,
  eos_ids: Sequence[int],
  pad_id: int,
  rng: jax.Array,
  lengths: np.ndarray | None = None,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  lora: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  prompt_ids: Sequence[int] | None = None,
  batch_size: int | None = None,
) -> Samples:
  """Samples one response to every prompt.

  Row b draws its token at position t with the key fold_in(fold_in(rng, prompt_ids[b]), t), so a
  response depends on its prompt, its id and the seed, and not on the batch it travelled in.

  Args:
    model: the Flax module.
    params: its parameters.
    prompts: B arrays of token ids; or one right-padded [B, P] array together with `lengths`.
    max_new_tokens: N, the most tokens to draw for a row; drawing stops when all rows are done.
    eos_ids: the tokens that end a response (and belong to it).
    pad_id: fills the rows behind the response. It may be an EOS id: nothing is found by token id.
    rng: PRNG key.
    lengths: [B], if `prompts` is a padded array.
    temperature: 0 decodes greedily.
    top_k: see `Decoding`, as for `top_p` and `min_p`.
    top_p: see `Decoding`.
    min_p: see `Decoding`.
    lora: a "lora" collection, or None for the bare model.
    mesh: splits the rows over `data` and `fsdp`.
    prompt_ids: [B] integers; 0, 1, 2... by default. Two rows of the same prompt need different ids.
    batch_size: rows decoded at a time; all of them by default.

  Returns:
    `Samples` of NumPy arrays with S = P + N, P being the longest prompt (or the width of the padded
    array) rounded up to a multiple of 16. A program is compiled for each (rows, P, N) and kind of
    distribution.

  Raises:
    InputError: on an empty prompt or a setting out of range.
  """
  decoding = make_decoding(temperature, top_k, top_p, min_p)
  if max_new_tokens < 1:
    raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  tokens, lengths = pad_prompts(prompts, lengths, pad_id)
  ids = np.arange(len(tokens)) if prompt_ids is None else np.asarray(prompt_ids)
  if ids.shape != lengths.shape:
    raise InputError(f"there are {len(tokens)} prompts and {ids.size} prompt_ids")
  rows = row_bucket(len(tokens), batch_size)
  if mesh is not None:
    if jax.process_count() > 1:
      raise InputError(
        "generate works within one process: sampling on several hosts is not built yet"
      )
    ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    rows = -(-rows // ways) * ways
  run = functools.partial(
    generate_rows,
    model,
    {"params": params} if lora is None else {"params": params, "lora": lora},
    rng=rng,
    max_new_tokens=max_new_tokens,
    eos_ids=np.array(eos_ids, np.int32),
    pad_id=np.int32(pad_id),
    decoding=decoding,
  )
  parts = []
  for start in range(0, len(tokens), rows):
    part = slice(start, start + rows)
    batch = _fill(tokens[part], lengths[part], ids[part], rows)
    parts.append(run(*(batch if mesh is None else sharding.put_batch(batch, mesh))))
  # One transfer at the end: the device decodes the next group while Python prepares it.
  return jax.tree.map(lambda *x: np.concatenate(x)[: len(tokens)], *jax.device_get(parts))


def pad_prompts(
  prompts: Sequence[np.ndarray] | np.ndarray, lengths: np.ndarray | None, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded (tokens [B, P] int32, lengths [B] int32), P a multiple of `PROMPT_BUCKET`."""
  if lengths is None:
    lengths = np.array([len(p) for p in prompts], np.int32)
  lengths = np.asarray(lengths, np.int32)
  if len(prompts) != len(lengths):
    raise InputError(f"there are {len(prompts)} prompts and {len(lengths)} lengths")
  if not len(lengths):
    raise InputError("there are no prompts to generate from")
  if lengths.min() < 1:
    raise InputError(f"prompt {int(np.argmin(lengths))} is empty: there is nothing to continue")
  # A padded array keeps its own width, so that batches of one stream share one program.
  width = prompts.shape[1] if isinstance(prompts, np.ndarray) else int(lengths.max())
  width = -(-width // PROMPT_BUCKET) * PROMPT_BUCKET
  tokens = np.full((len(prompts), width), pad_id, np.int32)
  for row, prompt, length in zip(tokens, prompts, lengths):
    row[:length] = np.asarray(prompt)[:length]
  return tokens, lengths


def row_bucket(count: int, batch_size: int | None = None) -> int:
  """How many rows to decode at a time for `count` prompts: few different numbers, few programs."""
  if batch_size is not None and batch_size < 1:
    raise InputError(f"batch_size must be at least 1, got {batch_size}")
  if count < ROW_BUCKET:
    rows = 1 << (count - 1).bit_length()
  else:
    rows = -(-count // ROW_BUCKET) * ROW_BUCKET
  return rows if batch_size is None else min(rows, batch_size)


def _fill(tokens, lengths, ids, rows: int):
  """Adds rows of length 0 (done before they begin) up to `rows`."""
  missing = rows - len(tokens)
  return (
    np.pad(tokens, ((0, missing), (0, 0))),
    np.pad(lengths, (0, missing)),
    np.pad(ids, (0, missing)).astype(np.uint32),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """What decoding writes, besides the cache."""

  step: jax.Array  # [] tokens drawn so far
  tokens: jax.Array  # [B, S]
  logprobs: jax.Array  # [B, S]
  sampled: jax.Array  # [B, S] bool
  ended: jax.Array  # [B] bool: nothing more is written
  finished: jax.Array  # [B] bool: ended by an EOS


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def generate_rows(
  model: models.Transformer,
  variables: Any,
  tokens: jax.Array,
  lengths: jax.Array,
  ids: jax.Array,
  rng: jax.Array,
  *,
  max_new_tokens: int,
  eos_ids: jax.Array,
  pad_id: jax.Array,
  decoding: Decoding,
) -> Samples:
  """The compiled part of `generate`: tokens [B, P] padded, lengths [B] (0: no row), ids [B]."""
  count, width = tokens.shape
  row_keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(ids)
  cache = models.init_cache(model, count, width + max_new_tokens)
  rows = _start(tokens, lengths, max_new_tokens, pad_id)
  hidden, cache = _forward(model, variables, cache, rows.tokens[:, :width], None)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]

  def sample(rows, hidden):
    logits = model.apply(variables, hidden[:, 0], method=models.Transformer.unembed)
    position = lengths + rows.step
    keys = jax.vmap(jax.random.fold_in)(row_keys, position)
    return _write(rows, position, *draw(keys, logits, decoding), eos_ids)

  def step(carry):
    rows, cache = carry
    position = (lengths + rows.step - 1)[:, None]
    token = jnp.take_along_axis(rows.tokens, position, axis=1)
    hidden, cache = _forward(model, variables, cache, token, position)
    return sample(rows, hidden), cache

  def going(carry):
    return (carry[0].step < max_new_tokens) & ~jnp.all(carry[0].ended)

  rows = sample(rows, jnp.take_along_axis(hidden, last, axis=1))
  rows, _ = jax.lax.while_loop(going, step, (rows, cache))
  return Samples(rows.tokens, lengths, rows.sampled, rows.logprobs, rows.finished)


def _start(tokens, lengths, max_new_tokens: int, pad_id) -> _Rows:
  count, width = tokens.shape
  shape = count, width + max_new_tokens
  prompt = jnp.where(jnp.arange(width) < lengths[:, None], tokens, pad_id)
  return _Rows(
    step=jnp.zeros((), jnp.int32),
    tokens=jnp.pad(prompt, ((0, 0), (0, max_new_tokens)), constant_values=pad_id),
    logprobs=jnp.zeros(shape, jnp.float32),
    sampled=jnp.zeros(shape, bool),
    ended=lengths == 0,
    finished=jnp.zeros(count, bool),
  )


def _write(rows: _Rows, position, token, logprob, eos_ids) -> _Rows:
  """The rows with one more token each, at `position` [B]."""
  # A row that has ended writes nothing: its index lies outside and is dropped.
  count, size = rows.tokens.shape
  at = jnp.arange(count), jnp.where(rows.ended, size, position)
  is_eos = jnp.isin(token, eos_ids) & ~rows.ended
  return _Rows(
    rows.step + 1,
    rows.tokens.at[at].set(token, mode="drop"),
    rows.logprobs.at[at].set(logprob, mode="drop"),
    rows.sampled.at[at].set(True, mode="drop"),
    rows.ended | is_eos,
    rows.finished | is_eos,
  )


def _forward(model, variables, cache, tokens, positions):
  hidden, changed = model.apply(
    {**variables, "cache": cache},
    tokens,
    positions,
    method=models.Transformer.hidden,
    mutable=["cache"],
  )
  return hidden, changed["cache"]


def decode_texts(samples: Samples, tokenizer: Any) -> list[str]:
  """The responses as text, without their special tokens."""
  return [tokenizer.decode(row, skip_special_tokens=True) for row in samples.responses()]
