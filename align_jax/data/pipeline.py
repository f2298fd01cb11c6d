"""Records to batches, by grain.

Everything up to the last step moves record *indices*: shuffled, mixed, packed and grouped into
global batches alike on every host; then each host takes its rows and gathers their tokens. So all
hosts make the same number of steps, a batch does not depend on the number of hosts, and the whole
state of an iterator (`get_state`, `set_state`) is a few integers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from align_jax.data import encoding, streams
from align_jax.data.corpus import Corpus, build
from align_jax.data.mixture import Mixture
from align_jax.data.records import Demonstration, Feedback, Preference, Prompt
from align_jax.data.streams import Stream, Windows
from align_jax.errors import InputError

Batch = dict[str, np.ndarray]
_PACK_WINDOW = 1024  # records packed together: more waste less and mix epochs more
_BUCKET_WINDOW = 32  # batches whose records are sorted into buckets together


@dataclasses.dataclass(frozen=True)
class Batching:
  """How a stream is cut into batches; the keyword arguments of the functions below.

  batch_size: rows of a *global* batch; each of `shard_count` hosts gets batch_size / shard_count.
  seed: of the shuffling, another order each epoch.   epochs: None repeats for ever.
  pad_last: fill the last partial batch with empty rows of weight 0 (evaluation); else it is
    dropped.
  """

  batch_size: int
  seed: int = 0
  epochs: int | None = None
  shuffle: bool = True
  pad_last: bool = False
  shard_index: int = 0
  shard_count: int = 1

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.shard_count:
      raise InputError(
        f"batch_size {self.batch_size} does not divide among {self.shard_count} hosts"
      )
    if not 0 <= self.shard_index < self.shard_count:
      raise InputError(f"shard_index {self.shard_index} is not below {self.shard_count}")
    if self.pad_last and self.epochs is None:
      raise InputError("pad_last needs a number of epochs")


def sft_batches(
  records: Sequence[Demonstration] | Mixture,
  tokenizer: Any,
  *,
  length: int,
  batch_size: int,
  seed: int = 0,
  epochs: int | None = None,
  pack: bool = True,
  buckets: Sequence[int] | None = None,
  overlong: str = "truncate",
  shuffle: bool = True,
  pad_last: bool = False,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.DatasetIterator:
  """Batches of demonstrations, packed several to a row or one to a row.

  Yields tokens, segment_ids (0 = padding), positions (from 0 in every segment) int32 [B, T] and
  loss_mask float32 [B, T]: the record's weight on response tokens, 0 elsewhere and on every first
  token of a segment, which nothing predicts. T is `length`, or the smallest of `buckets` that fits.
  """
  plan = Batching(batch_size, seed, epochs, shuffle, pad_last, shard_index, shard_count)
  items, weights = _components(records)

  def encode(record):
    encoded = encoding.encode_demonstration(record, tokenizer, length, overlong)
    return None if encoded is None else (encoded,)

  corpus, kept = build(items, encode, tokenizer)
  corpus.mask[corpus.starts] = False
  value = np.array([items[i].weight for i in kept], np.float32)
  stream = _stream(kept, weights, records, plan)
  if pack:
    if buckets is not None:
      raise InputError("rows are packed or bucketed, not both")
    return _packed(stream, corpus, value, length, plan)

  def assemble(rows: np.ndarray, length: int) -> Batch:
    batch = corpus.rows(rows, length)
    weight = np.where(rows < 0, 0.0, value[rows])
    return {
      "tokens": batch["tokens"],
      "segment_ids": batch["segment_ids"],
      "positions": np.arange(length, dtype=np.int32) * batch["segment_ids"],
      "loss_mask": (batch["mask"] * weight[:, None]).astype(np.float32),
    }

  return _batched(stream, assemble, corpus.lengths, length, buckets, plan)


def preference_batches(
  records: Sequence[Preference] | Mixture,
  tokenizer: Any,
  *,
  length: int,
  batch_size: int,
  seed: int = 0,
  epochs: int | None = None,
  buckets: Sequence[int] | None = None,
  overlong: str = "truncate",
  shuffle: bool = True,
  pad_last: bool = False,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.DatasetIterator:
  """Batches of pairs, padded in pairs; [:, 0] is chosen and [:, 1] rejected.

  Yields tokens, segment_ids (1 real, 0 padding) int32 [B, 2, T], response_mask float32 [B, 2, T],
  and weight, margin, label_prob float32 [B].
  """
  plan = Batching(batch_size, seed, epochs, shuffle, pad_last, shard_index, shard_count)
  items, weights = _components(records)

  def encode(record):
    return encoding.encode_preference(record, tokenizer, length, overlong)

  corpus, kept = build(items, encode, tokenizer)
  weight, margin, label_prob = (
    np.array([getattr(items[i], name) for i in kept], np.float32)
    for name in ("weight", "margin", "label_prob")
  )

  def assemble(rows: np.ndarray, length: int) -> Batch:
    pairs = np.where(rows[:, None] < 0, -1, 2 * rows[:, None] + np.arange(2))
    batch = corpus.rows(pairs, length)
    return {
      "tokens": batch["tokens"],
      "segment_ids": batch["segment_ids"],
      "response_mask": batch["mask"].astype(np.float32),
      "weight": np.where(rows < 0, np.float32(0), weight[rows]),
      "margin": margin[rows],
      "label_prob": label_prob[rows],
    }

  stream = _stream(kept, weights, records, plan)
  lengths = corpus.lengths.reshape(-1, 2).max(axis=1)
  return _batched(stream, assemble, lengths, length, buckets, plan)


def feedback_batches(
  records: Sequence[Feedback] | Mixture,
  tokenizer: Any,
  *,
  length: int,
  batch_size: int,
  seed: int = 0,
  epochs: int | None = None,
  overlong: str = "truncate",
  shuffle: bool = True,
  pad_last: bool = False,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.DatasetIterator:
  """Batches of judged answers, each with a mismatched one for KTO's KL baseline.

  Yields tokens, segment_ids int32 [B, T], response_mask float32 [B, T], is_desirable, weight
  float32 [B], and mismatched_{tokens, segment_ids, response_mask}: the same prompt with the answer
  of another record, drawn anew every time. The baseline is a mean over the batch, so a batch of one
  is refused.
  """
  plan = Batching(batch_size, seed, epochs, shuffle, pad_last, shard_index, shard_count)
  if batch_size < 2:
    raise InputError("KTO's baseline is a mean over the batch: batch_size must be at least 2")
  items, weights = _components(records)

  def encode(record):
    encoded = encoding.encode_feedback(record, tokenizer, length, overlong)
    return None if encoded is None else (encoded,)

  corpus, kept = build(items, encode, tokenizer)
  if len(kept) < 2:
    raise InputError("KTO needs at least two records: an answer is paired with another's prompt")
  weight = np.array([items[i].weight for i in kept], np.float32)
  label = np.array([items[i].label for i in kept], np.float32)

  def assemble(rows: np.ndarray, length: int) -> Batch:
    rows, others = rows.T
    batch, other = corpus.rows(rows, length), corpus.crossed_rows(rows, others, length)
    return {
      "tokens": batch["tokens"],
      "segment_ids": batch["segment_ids"],
      "response_mask": batch["mask"].astype(np.float32),
      "is_desirable": label[rows],
      "weight": np.where(rows < 0, np.float32(0), weight[rows]),
      "mismatched_tokens": other["tokens"],
      "mismatched_segment_ids": other["segment_ids"],
      "mismatched_response_mask": other["mask"].astype(np.float32),
    }

  def with_other(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    others = (rows + rng.integers(1, len(kept), len(rows))) % len(kept)
    return np.stack([rows, others], axis=1)

  stream = _stream(kept, weights, records, plan)
  return _batched(stream, assemble, corpus.lengths, length, None, plan, with_other)


def prompt_batches(
  records: Sequence[Prompt] | Mixture,
  tokenizer: Any,
  *,
  length: int,
  batch_size: int,
  seed: int = 0,
  epochs: int | None = None,
  overlong: str = "drop",
  shuffle: bool = True,
  pad_last: bool = False,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.DatasetIterator:
  """Batches of prompts to answer: tokens int32 [B, P] right-padded, lengths [B], index [B].

  `index` is the position in the record list (a mixture: in its components one after the other). A
  row that only fills a padded batch has index -1 and repeats a real prompt, so that a sampler meets
  no empty row.
  """
  plan = Batching(batch_size, seed, epochs, shuffle, pad_last, shard_index, shard_count)
  items, weights = _components(records)

  def encode(record):
    tokens = encoding.encode_prompt(record, tokenizer, length, overlong)
    return None if tokens is None else ((tokens, np.zeros(len(tokens), bool)),)

  corpus, kept = build(items, encode, tokenizer)

  def assemble(rows: np.ndarray, length: int) -> Batch:
    return {
      "tokens": corpus.rows(np.maximum(rows, 0), length)["tokens"],
      "lengths": corpus.lengths[np.maximum(rows, 0)].astype(np.int32),
      "index": np.where(rows < 0, -1, kept[rows]).astype(np.int32),
    }

  stream = _stream(kept, weights, records, plan)
  return _batched(stream, assemble, corpus.lengths, length, None, plan)


def _components(records: Sequence[Any] | Mixture) -> tuple[tuple[Any, ...], tuple[float, ...]]:
  if isinstance(records, Mixture):
    return records.records, records.weights
  if not records:
    raise InputError("there are no records")
  return tuple(records), (1.0,)


def _stream(kept: np.ndarray, weights: tuple[float, ...], records: Any, plan: Batching) -> Stream:
  """The indices into `kept`; an epoch of a mixture is as many draws as it has records."""
  sizes = [len(c) for c in records.components] if isinstance(records, Mixture) else [len(records)]
  edges = np.searchsorted(kept, np.cumsum([0, *sizes])).tolist()
  for i, (start, stop) in enumerate(zip(edges, edges[1:])):
    if start == stop:
      raise InputError(f"mixture: all records of '{records.names[i]}' were dropped as too long")
  total = None if plan.epochs is None else len(kept) * plan.epochs
  return Stream(tuple(edges), weights, plan.seed, plan.shuffle, total)


def _batched(
  stream: Stream,
  assemble: Callable[[np.ndarray, int], Batch],
  lengths: np.ndarray,
  length: int,
  buckets: Sequence[int] | None,
  plan: Batching,
  extend: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
) -> grain.DatasetIterator:
  """Batches of padded rows as long as their bucket; `extend` adds columns to the indices."""
  sizes = _buckets(buckets, length)
  window = plan.batch_size * (1 if len(sizes) == 1 else _BUCKET_WINDOW)

  def regroup(indices: np.ndarray, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    groups = streams.bucket(lengths[indices], sizes, plan.batch_size)
    batches = [(size, indices[items]) for size, items in groups]
    if not plan.pad_last:
      batches = [(size, rows) for size, rows in batches if len(rows) == plan.batch_size]
    return batches if extend is None else [(size, extend(rows, rng)) for size, rows in batches]

  batches = Windows(stream, window, regroup)
  return iter(batches.map(lambda b: assemble(_local(b[1], plan, -1), b[0])))


def _packed(
  stream: Stream, corpus: Corpus, value: np.ndarray, length: int, plan: Batching
) -> grain.DatasetIterator:
  """Batches of packed rows: every slot knows its record and its position in it."""

  def regroup(indices: np.ndarray, rng: np.random.Generator) -> list[tuple[np.ndarray, ...]]:
    rows = streams.best_fit(corpus.lengths[indices], length)
    return [_layout(indices[row], corpus.lengths, length) for row in rows]

  def assemble(rows: tuple[np.ndarray, ...]) -> Batch:
    record, segment_ids, positions = (_local(array, plan, 0) for array in rows)
    batch = corpus.gather(corpus.starts[record] + positions, segment_ids > 0)
    return {
      "tokens": batch["tokens"],
      "segment_ids": segment_ids,
      "positions": positions,
      "loss_mask": batch["mask"] * value[record],
    }

  rows = Windows(stream, max(_PACK_WINDOW, 8 * plan.batch_size), regroup)
  return iter(rows.batch(plan.batch_size, drop_remainder=not plan.pad_last).map(assemble))


def _layout(records: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
  """(record, segment_id, position) [length] of a row that holds the records one after the other."""
  sizes = lengths[records]
  starts = np.cumsum(sizes) - sizes
  row = np.zeros((3, length), np.int32)
  row[0, : sizes.sum()] = np.repeat(records, sizes)
  row[1, : sizes.sum()] = np.repeat(np.arange(1, len(records) + 1), sizes)
  row[2, : sizes.sum()] = np.arange(sizes.sum()) - np.repeat(starts, sizes)
  return tuple(row)


def _buckets(buckets: Sequence[int] | None, length: int) -> tuple[int, ...]:
  if buckets is None:
    return (length,)
  sizes = tuple(sorted({*buckets, length}))
  if sizes[0] < 1 or sizes[-1] > length:
    raise InputError(f"buckets {list(buckets)} must lie between 1 and the length {length}")
  return sizes


def _local(rows: np.ndarray, plan: Batching, fill: int) -> np.ndarray:
  """This host's rows of a global batch, after filling up what the last batch lacks."""
  missing = plan.batch_size - len(rows)
  filled = np.concatenate([rows, np.full((missing, *rows.shape[1:]), fill, rows.dtype)])
  return filled[plan.shard_index :: plan.shard_count]
