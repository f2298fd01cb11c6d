"""Tokenised sequences held flat in memory, and the gathering of rows from them."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from align_jax.errors import InputError

_QUIET = 2_000  # more records than this show a progress bar


@dataclasses.dataclass(frozen=True)
class Corpus:
  """S sequences one after the other: sequence s is tokens[starts[s] : starts[s] + lengths[s]].

  tokens [N] int32, mask [N] bool, starts [S], lengths [S], prompt_lengths [S] (tokens before the
  response). A sequence index of -1 stands for an empty one.
  """

  tokens: np.ndarray
  mask: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  prompt_lengths: np.ndarray
  pad_id: int

  def rows(self, sequences: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """tokens, segment_ids (1 = real) and mask, each [..., length], right-padded."""
    at = np.arange(length)
    real = at < np.where(sequences < 0, 0, self.lengths[sequences])[..., None]
    return self.gather(self.starts[sequences][..., None] + at, real)

  def crossed_rows(
    self, prompts: np.ndarray, responses: np.ndarray, length: int
  ) -> dict[str, np.ndarray]:
    """The prompt of one sequence followed by the response of another, cut at `length`."""
    at = np.arange(length)
    prompt = self.prompt_lengths[prompts][:, None]
    answer_start = self.prompt_lengths[responses][:, None]
    total = prompt + self.lengths[responses][:, None] - answer_start
    real = (at < total) & (prompts[:, None] >= 0)
    own = self.starts[prompts][:, None] + at
    other = self.starts[responses][:, None] + answer_start + at - prompt
    return self.gather(np.where(at < prompt, own, other), real)

  def gather(self, index: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """The flat positions `index` where `real`, padding elsewhere."""
    index = np.where(real, index, 0)
    return {
      "tokens": np.where(real, self.tokens[index], self.pad_id).astype(np.int32),
      "segment_ids": real.astype(np.int32),
      "mask": np.where(real, self.mask[index], False),
    }


def build(
  records: Sequence[Any], encode: Callable[[Any], Sequence[Any] | None], tokenizer: Any
) -> tuple[Corpus, np.ndarray]:
  """Encodes every record to one or more (tokens, mask) sequences.

  Returns the corpus and the indices [K] of the records kept, whose sequences follow each other in
  it.
  """
  kept, tokens, masks = [], [], []
  bar = tqdm.tqdm(
    records,
    "tokenising",
    unit=" records",
    disable=len(records) <= _QUIET,
    leave=False,
    mininterval=0.5 if sys.stderr.isatty() else 10.0,
  )
  for i, record in enumerate(bar):
    sequences = encode(record)
    if sequences is not None:
      kept.append(i)
      for sequence in sequences:
        tokens.append(sequence[0])
        masks.append(sequence[1])
  if not kept:
    raise InputError(f"all {len(records)} records were dropped as too long")
  if len(kept) < len(records):
    logging.warning("dropped %d of %d records as too long", len(records) - len(kept), len(records))
  lengths = np.array([len(t) for t in tokens], np.int64)
  prompts = np.array([np.argmax(m) if m.any() else len(m) for m in masks], np.int64)
  starts = np.cumsum(lengths) - lengths
  corpus = Corpus(
    np.concatenate(tokens), np.concatenate(masks), starts, lengths, prompts, pad_id(tokenizer)
  )
  return corpus, np.array(kept)


def pad_id(tokenizer: Any) -> int:
  """Any id will do for padding, since masks go by position; without one EOS or 0 serves."""
  known = (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
  return int(next(known))
