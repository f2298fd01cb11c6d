"""Preference pairs as batches, in one of two layouts that give the same numbers.

padded   both answers as whole sequences [B, 2, T], each with its own copy of the prompt: here
shared   the prompt once, then both answers behind it, several pairs packed to a row: `shared_rows`
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from align_jax.data import encoding
from align_jax.data.batching import Batch, Batching, Source, tokenised
from align_jax.data.corpus import Corpus
from align_jax.data.mixture import Mixture
from align_jax.data.records import Preference
from align_jax.errors import InputError

# Sequence numbers [n] of a corpus -> for each one array, a value for every scored token of it.
Reference = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Tokenised pairs: pair i is the sequences 2i (chosen) and 2i + 1 (rejected) of the corpus.

  shared [K]: how many tokens both sequences of a pair begin with, at most their prompt.
  scored [N] bool: of the corpus' flat tokens, those of responses, a sequence's first one excepted.
  steps [N] bool: those of the step where the answers of a pair part; None unless asked for.
  columns: more arrays [K, ...] by name, which travel with each pair; 0 in an empty slot.
  """

  source: Source
  shared: np.ndarray
  scored: np.ndarray
  steps: np.ndarray | None = None
  columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def corpus(self) -> Corpus:
    return self.source.corpus

  @functools.cached_property
  def costs(self) -> np.ndarray:
    """Tokens of each pair with its prompt held once, [K]."""
    return self.corpus.lengths.reshape(-1, 2).sum(axis=1) - self.shared

  @property
  def kept(self) -> np.ndarray:
    """Numbers of the records that the pairs are, [K]."""
    return self.source.kept

  @property
  def response_lengths(self) -> np.ndarray:
    """Scored tokens of both responses, [K, 2]."""
    return np.diff(self.scored_edges).reshape(-1, 2)

  @functools.cached_property
  def scored_edges(self) -> np.ndarray:
    """Sequence s has the scored tokens [scored_edges[s], scored_edges[s + 1]), [S + 1]."""
    counts = np.add.reduceat(self.scored.astype(np.int64), self.corpus.starts)
    return np.concatenate([[0], np.cumsum(counts)])


def tokenise_pairs(
  records: Sequence[Preference] | Mixture,
  tokenizer: Any,
  plan: Batching,
  *,
  length: int,
  overlong: str = "truncate",
  steps: bool = False,
) -> Pairs:
  """Encodes all pairs; with `steps`, marks the step (a line of text) in which their answers part."""

  def encode(record):
    return encoding.encode_preference(record, tokenizer, length, overlong)

  source = tokenised(records, encode, tokenizer, plan)
  corpus = source.corpus
  shared = np.array([_shared(corpus, pair) for pair in range(len(source.kept))], np.int64)
  scored = corpus.mask.copy()
  scored[corpus.starts] = False  # nothing predicts it
  return Pairs(source, shared, scored, _steps(corpus, scored, tokenizer) if steps else None)


def padded_batches(
  pairs: Pairs,
  length: int,
  *,
  buckets: Sequence[int] | None = None,
  reference: Reference | None = None,
):
  """Batches of the padded layout, see `pipeline.preference_batches`; ref_logprobs [B, 2, T] too
  where `reference` is given, and step_mask [B, 2, T] where the pairs know their steps. InputError
  where a sequence is longer than `length`.
  """
  source, corpus = pairs.source, pairs.corpus
  weight, margin, label_prob = map(source.column, ("weight", "margin", "label_prob"))

  def assemble(rows: np.ndarray, length: int) -> Batch:
    sequences = np.where(rows[:, None] < 0, -1, 2 * rows[:, None] + np.arange(2))
    batch = corpus.rows(sequences, length)
    at = corpus.starts[sequences][..., None] + np.arange(length)
    real = batch["segment_ids"] > 0
    extra = {name: _filled(column, rows) for name, column in pairs.columns.items()}
    if reference is not None:
      extra["ref_logprobs"] = np.zeros(real.shape, np.float32)
      places = real & pairs.scored[np.where(real, at, 0)]
      extra["ref_logprobs"][places] = np.concatenate(reference(sequences[sequences >= 0]))
    if pairs.steps is not None:
      extra["step_mask"] = (real & pairs.steps[np.where(real, at, 0)]).astype(np.float32)
    return {
      "tokens": batch["tokens"],
      "segment_ids": batch["segment_ids"],
      "response_mask": batch["mask"].astype(np.float32),
      "weight": np.where(rows < 0, np.float32(0), weight[rows]),
      "margin": margin[rows],
      "label_prob": label_prob[rows],
    } | extra

  lengths = corpus.lengths.reshape(-1, 2).max(axis=1)
  if lengths.max() > length:
    raise InputError(f"length {length}: the longest sequence has {lengths.max()} tokens")
  return source.padded(assemble, length, lengths=lengths, buckets=buckets)


def _filled(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
  empty = (rows < 0).reshape(-1, *[1] * (column.ndim - 1))
  return np.where(empty, column.dtype.type(0), column[rows])


def _shared(corpus: Corpus, pair: int) -> int:
  a, b = 2 * pair, 2 * pair + 1
  limit = int(min(corpus.prompt_lengths[a], corpus.prompt_lengths[b]))
  one, other = (corpus.tokens[corpus.starts[s] : corpus.starts[s] + limit] for s in (a, b))
  differ = np.flatnonzero(one != other)
  return int(differ[0]) if len(differ) else limit


def _steps(corpus: Corpus, scored: np.ndarray, tokenizer: Any) -> np.ndarray:
  """From the first response token that differs to the end of its line, in both answers."""
  ends = np.array(["\n" in tokenizer.decode([i]) for i in range(len(tokenizer))])
  steps = np.zeros(len(corpus.tokens), bool)
  for pair in range(len(corpus.lengths) // 2):
    spans = []
    for s in (2 * pair, 2 * pair + 1):
      span = slice(corpus.starts[s], corpus.starts[s] + corpus.lengths[s])
      spans.append(corpus.starts[s] + np.flatnonzero(scored[span]))
    size = min(map(len, spans))
    differ = np.flatnonzero(corpus.tokens[spans[0][:size]] != corpus.tokens[spans[1][:size]])
    first = int(differ[0]) if len(differ) else size
    for span in spans:
      rest = span[first:]
      end = np.flatnonzero(ends[corpus.tokens[rest]])
      steps[rest[: int(end[0]) + 1] if len(end) else rest] = True
  return steps
