"""Records to batches, by grain.

Everything up to the last step moves record *indices*: shuffled, mixed, packed and grouped into
global batches alike on every host; then each host takes its rows and gathers their tokens. So all
hosts make the same number of steps, a batch does not depend on the number of hosts, and the whole
state of an iterator (`get_state`, `set_state`) is a few integers.

The keyword arguments are those of `batching.Batching`, and: length, to which `encoding`'s policy
`overlong` fits every sequence; buckets, shorter lengths for batches that need no more. A record or
an option that cannot be used raises InputError.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from align_jax.data import encoding
from align_jax.data.batching import Batch, Batching, tokenised
from align_jax.data.mixture import Mixture
from align_jax.data.pairs import padded_batches, tokenise_pairs
from align_jax.data.records import Demonstration, Feedback, Preference, Prompt
from align_jax.errors import InputError


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
  token of a segment, which nothing predicts. T is `length`, or one of `buckets` that fits.
  """
  plan = Batching(batch_size, seed, epochs, shuffle, pad_last, shard_index, shard_count)

  def encode(record):
    encoded = encoding.encode_demonstration(record, tokenizer, length, overlong)
    return None if encoded is None else (encoded,)

  if pack and buckets is not None:
    raise InputError("rows are packed or bucketed, not both")
  source = tokenised(records, encode, tokenizer, plan)
  corpus, weight = source.corpus, source.column("weight")
  corpus.mask[corpus.starts] = False

  def assemble(record: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> Batch:
    batch = corpus.gather(corpus.starts[record] + positions, segment_ids > 0)
    loss_mask = batch["mask"] * weight[record]
    return {
      "tokens": batch["tokens"],
      "segment_ids": segment_ids,
      "positions": positions,
      "loss_mask": loss_mask,
    }

  def assemble_padded(rows: np.ndarray, length: int) -> Batch:
    segment_ids = corpus.rows(rows, length)["segment_ids"]
    positions = np.arange(length, dtype=np.int32) * segment_ids
    return assemble(np.broadcast_to(rows[:, None], segment_ids.shape), segment_ids, positions)

  if pack:
    return source.packed(assemble, length)
  return source.padded(assemble_padded, length, buckets=buckets)


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
  pairs = tokenise_pairs(records, tokenizer, plan, length=length, overlong=overlong)
  return padded_batches(pairs, length, buckets=buckets)


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

  def encode(record):
    encoded = encoding.encode_feedback(record, tokenizer, length, overlong)
    return None if encoded is None else (encoded,)

  source = tokenised(records, encode, tokenizer, plan)
  corpus, count = source.corpus, len(source.kept)
  weight, label = source.column("weight"), source.column("label")
  if count < 2:
    raise InputError("KTO needs at least two records: an answer is paired with another's prompt")

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
    others = (rows + rng.integers(1, count, len(rows))) % count
    return np.stack([rows, others], axis=1)

  return source.padded(assemble, length, extend=with_other)


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

  def encode(record):
    tokens = encoding.encode_prompt(record, tokenizer, length, overlong)
    return None if tokens is None else ((tokens, np.zeros(len(tokens), bool)),)

  source = tokenised(records, encode, tokenizer, plan)

  def assemble(rows: np.ndarray, length: int) -> Batch:
    shown = np.maximum(rows, 0)
    return {
      "tokens": source.corpus.rows(shown, length)["tokens"],
      "lengths": source.corpus.lengths[shown].astype(np.int32),
      "index": np.where(rows < 0, -1, source.kept[rows]).astype(np.int32),
    }

  return source.padded(assemble, length)
