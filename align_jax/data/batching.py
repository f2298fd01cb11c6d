"""From a stream of record indices to this host's rows of tokens."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from align_jax.data import streams
from align_jax.data.corpus import Corpus, build
from align_jax.data.mixture import Mixture
from align_jax.data.streams import Stream, Traced, Windows
from align_jax.errors import InputError

Batch = dict[str, np.ndarray]
Encode = Callable[[Any], Sequence[Any] | None]
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
    if self.batch_size < 1 or self.shard_count < 1 or self.batch_size % self.shard_count:
      raise InputError(
        f"batch_size {self.batch_size} does not divide among {self.shard_count} hosts"
      )
    if not 0 <= self.shard_index < self.shard_count:
      raise InputError(f"shard_index {self.shard_index} is not below {self.shard_count}")
    if self.seed < 0 or (self.epochs is not None and self.epochs < 1):
      raise InputError(f"seed {self.seed} and epochs {self.epochs} must not be below 0 and 1")
    if self.pad_last and self.epochs is None:
      raise InputError("pad_last needs a number of epochs")

  def local(self, rows: np.ndarray, fill: int) -> np.ndarray:
    """This host's rows of a global batch, after filling up what the last batch lacks."""
    missing = self.batch_size - len(rows)
    filled = np.concatenate([rows, np.full((missing, *rows.shape[1:]), fill, rows.dtype)])
    return self.share(filled)

  def share(self, rows: np.ndarray) -> np.ndarray:
    """This host's run of the rows of a global batch: those of all hosts in order are the batch."""
    size = len(rows) // self.shard_count
    return rows[self.shard_index * size : (self.shard_index + 1) * size]


@dataclasses.dataclass(frozen=True)
class Source:
  """Tokenised records and their order; `kept` [K] are the indices of those not dropped."""

  records: tuple[Any, ...]
  kept: np.ndarray
  corpus: Corpus
  stream: Stream
  plan: Batching

  def column(self, name: str) -> np.ndarray:
    """A field of the kept records, float32 [K]."""
    return np.array([getattr(self.records[i], name) for i in self.kept], np.float32)

  def names(self, rows: np.ndarray) -> list[str]:
    """Where each of these kept records was read, file and line."""
    return [self.records[self.kept[i]].source or f"record {self.kept[i]}" for i in rows]

  def padded(
    self,
    assemble: Callable[[np.ndarray, int], Batch],
    length: int,
    *,
    lengths: np.ndarray | None = None,
    buckets: Sequence[int] | None = None,
    extend: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
  ) -> grain.DatasetIterator:
    """Batches of assemble(rows, T), a record a row, T the length of their bucket.

    lengths: of the records where a record is not one sequence. extend: adds columns to the rows.
    """
    lengths = self.corpus.lengths if lengths is None else lengths
    sizes, plan = _buckets(buckets, length), self.plan

    def regroup(indices: np.ndarray, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
      groups = streams.bucket(lengths[indices], sizes, plan.batch_size)
      batches = [(size, indices[items]) for size, items in groups]
      if not plan.pad_last:
        batches = [(size, rows) for size, rows in batches if len(rows) == plan.batch_size]
      return batches if extend is None else [(size, extend(rows, rng)) for size, rows in batches]

    window = plan.batch_size * (1 if len(sizes) == 1 else _BUCKET_WINDOW)
    batches = Windows(self.stream, window, regroup)
    return Traced(
      batches,
      lambda batch: assemble(plan.local(batch[1], -1), batch[0]),
      lambda batch: self.names(batch[1] if batch[1].ndim == 1 else batch[1][:, 0]),
    )

  def packed(
    self, assemble: Callable[[np.ndarray, np.ndarray, np.ndarray], Batch], length: int
  ) -> grain.DatasetIterator:
    """Batches of assemble(record, segment_ids, positions) [B, length], several records a row."""

    def regroup(indices: np.ndarray, rng: np.random.Generator) -> list[tuple[np.ndarray, ...]]:
      rows = streams.best_fit(self.corpus.lengths[indices], length)
      return [_layout(indices[row], self.corpus.lengths, length) for row in rows]

    plan = self.plan
    rows = Windows(self.stream, max(_PACK_WINDOW, 8 * plan.batch_size), regroup)
    batches = rows.batch(plan.batch_size, drop_remainder=not plan.pad_last)
    return Traced(
      batches,
      lambda batch: assemble(*(plan.local(array, 0) for array in batch)),
      lambda batch: self.names(batch[0][(batch[1] > 0) & (batch[2] == 0)]),
    )


def tokenised(
  records: Sequence[Any] | Mixture, encode: Encode, tokenizer: Any, plan: Batching
) -> Source:
  """Tokenises all records; an epoch of a mixture is as many draws as it has records."""
  mixed = isinstance(records, Mixture)
  items = records.records if mixed else tuple(records)
  if not items:
    raise InputError("there are no records")
  corpus, kept = build(items, encode, tokenizer)
  sizes = [len(c) for c in records.components] if mixed else [len(items)]
  edges = np.searchsorted(kept, np.cumsum([0, *sizes])).tolist()
  for i, (start, stop) in enumerate(zip(edges, edges[1:])):
    if start == stop:
      raise InputError(f"mixture: all records of '{records.names[i]}' were dropped as too long")
  total = None if plan.epochs is None else len(kept) * plan.epochs
  weights = records.weights if mixed else (1.0,)
  stream = Stream(tuple(edges), weights, plan.seed, plan.shuffle, total)
  return Source(items, kept, corpus, stream, plan)


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
