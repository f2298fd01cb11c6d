"""Ranked lists and rated answers as batches; length, buckets and overlong as in `pipeline`."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from align_jax.data import encoding
from align_jax.data.batching import Batch, Batching, tokenised
from align_jax.data.judged import Ranking, Rating
from align_jax.data.mixture import Mixture
from align_jax.data.records import Feedback
from align_jax.errors import InputError


def ranking_batches(
  records: Sequence[Ranking] | Mixture,
  tokenizer: Any,
  plan: Batching,
  *,
  length: int,
  buckets: Sequence[int] | None = None,
  overlong: str = "truncate",
) -> grain.DatasetIterator:
  """Batches of ranked lists, K slots a prompt, K the longest list's.

  Yields tokens, segment_ids int32 [B, K, T], response_mask float32 [B, K, T], ranks int32 [B, K] (0 =
  an empty slot) and weight float32 [B].
  """

  def encode(record):
    return encoding.encode_responses(
      record.prompt, record.responses, tokenizer, length, overlong, record.source
    )

  source = tokenised(records, encode, tokenizer, plan)
  corpus, weight = source.corpus, source.column("weight")
  kept = [source.records[i] for i in source.kept]
  sizes = np.array([len(record.responses) for record in kept])
  slots = np.arange(sizes.max())
  ranks = np.zeros((len(kept), len(slots)), np.int32)
  for row, record in zip(ranks, kept):
    row[: len(record.ranks)] = record.ranks
  first = np.cumsum(sizes) - sizes

  def assemble(rows: np.ndarray, length: int) -> Batch:
    real = (slots < sizes[rows][:, None]) & (rows >= 0)[:, None]
    batch = corpus.rows(np.where(real, first[rows][:, None] + slots, -1), length)
    return {
      "tokens": batch["tokens"],
      "segment_ids": batch["segment_ids"],
      "response_mask": batch["mask"].astype(np.float32),
      "ranks": np.where(real, ranks[rows], 0),
      "weight": np.where(rows < 0, np.float32(0), weight[rows]),
    }

  lengths = np.maximum.reduceat(corpus.lengths, first)
  return source.padded(assemble, length, lengths=lengths, buckets=buckets)


def rating_batches(
  records: Sequence[Rating] | Mixture,
  tokenizer: Any,
  plan: Batching,
  aspects: Sequence[str],
  *,
  length: int,
  buckets: Sequence[int] | None = None,
  overlong: str = "truncate",
) -> grain.DatasetIterator:
  """Batches of rated answers, A aspects each.

  Yields tokens, segment_ids int32 [B, T], response_mask float32 [B, T], ratings and rated (1 where
  there is a rating) float32 [B, A], and weight float32 [B]. InputError for an aspect that no record
  rates, or a record that rates none of them.
  """

  def encode(record):
    answered = Feedback(record.prompt, record.completion, True, record.weight, record.source)
    encoded = encoding.encode_feedback(answered, tokenizer, length, overlong)
    return None if encoded is None else (encoded,)

  source = tokenised(records, encode, tokenizer, plan)
  corpus, weight = source.corpus, source.column("weight")
  ratings, rated = _table([source.records[i] for i in source.kept], aspects)

  def assemble(rows: np.ndarray, length: int) -> Batch:
    batch = corpus.rows(rows, length)
    return {
      "tokens": batch["tokens"],
      "segment_ids": batch["segment_ids"],
      "response_mask": batch["mask"].astype(np.float32),
      "ratings": ratings[rows],
      "rated": rated[rows],
      "weight": np.where(rows < 0, np.float32(0), weight[rows]),
    }

  return source.padded(assemble, length, buckets=buckets)


def _table(records: Sequence[Rating], aspects: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """(ratings, rated) [n, A]."""
  rated = np.array([[aspect in r.ratings for aspect in aspects] for r in records], np.float32)
  for aspect, count in zip(aspects, rated.sum(axis=0)):
    if not count:
      raise InputError(f"aspects: no record rates {aspect!r}")
  if not rated.any(axis=1).all():
    bare = records[int(np.argmin(rated.any(axis=1)))]
    raise InputError(f"{bare.source}: field 'ratings' has none of {', '.join(aspects)}")
  values = [[record.ratings.get(aspect, 0.0) for aspect in aspects] for record in records]
  return np.array(values, np.float32), rated
