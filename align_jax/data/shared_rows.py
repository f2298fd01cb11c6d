"""Pairs in rows that hold every prompt once: [prompt, chosen, rejected], several pairs a row.

The prompt of a pair is the trunk of a segment and its two answers are branches that do not see each
other, so every token has the log-prob it has in a row of its own.
"""

import math
from collections.abc import Sequence

import grain
import numpy as np

from align_jax.data.batching import Batch
from align_jax.data.pairs import Pairs, Reference
from align_jax.data.streams import Traced, Windows, best_fit
from align_jax.errors import InputError

SLOTS = 8  # pairs a row may hold
_WINDOW = (
  64  # batches made of one window of the stream: the more, the more alike and the fewer shapes
)
_TILE = 64  # tokens; attention by tiles pads rows of other lengths


def shared_batches(
  pairs: Pairs,
  *,
  buckets: Sequence[int] | None = None,
  row_multiple: int = 1,
  long_from: int | None = None,
  reference: Reference | None = None,
) -> grain.DatasetIterator:
  """Batches of `batch_size` pairs in R rows of T tokens, with S slots for pairs in each.

  Yields tokens, positions, segment_ids (the pair's number in its row; 0 = padding) and branch_ids
  (0 prompt, 1 chosen, 2 rejected) int32 [R, T]. For every scored token, the real ones first:
  sources (the place in the row of the token that predicts it), targets (its id), slots
  (2 (pair - 1) + branch - 1; -1 where there is none) and places (its number in the response) int32
  [R, T]. For every pair: weight, margin, label_prob float32 [R, S], weight 0 in an empty slot, its own
  `columns` [R, S, ...], and last int32 [R, 2 S], the place of each response's last token. ref_logprobs
  and step_mask [R, T] as in `pairs.padded_batches`.

  T is the shortest of `buckets` that holds the longest pair of the batch, by default of a few
  lengths chosen from the data. R is a multiple of `row_multiple`, and rounded up to three
  significant bits, so that few shapes are compiled. Where T would be `long_from` or more, and no
  buckets are given, R is as small as it can be and T as short as holds the batch, rounded up to 64
  tokens, from 4,096 on to six significant bits: least padding, for attention whose cost does not grow
  with the row. A shuffled stream is regrouped within windows of 64 batches: pairs of like length
  together, and batches of like total. InputError if a pair is longer than the longest bucket.
  """
  plan, costs = pairs.source.plan, pairs.costs
  sizes = row_lengths(costs, buckets)
  long_from = None if buckets else long_from
  build = RowBuilder(
    pairs, sizes, row_multiple=row_multiple, long_from=long_from, reference=reference
  )

  def regroup(indices: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    if plan.shuffle:
      groups = _balanced(indices, costs, sizes, plan.batch_size, rng)
    else:
      groups = np.split(indices, range(plan.batch_size, len(indices), plan.batch_size))
    return groups if plan.pad_last else [g for g in groups if len(g) == plan.batch_size]

  window = plan.batch_size * _WINDOW
  return Traced(Windows(pairs.source.stream, window, regroup), build, pairs.source.names)


def row_lengths(costs: np.ndarray, buckets: Sequence[int] | None = None) -> tuple[int, ...]:
  """The lengths of rows: the longest pair's, and its halves while they hold 1.5 times the mean."""
  longest = int(costs.max())
  if buckets is not None:
    if min(buckets) < 1 or max(buckets) < longest:
      raise InputError(f"buckets {list(buckets)}: the longest pair needs a row of {longest} tokens")
    return tuple(sorted(buckets))
  sizes = [-(-longest // 16) * 16]
  while sizes[0] >= 32 and sizes[0] / 2 >= 1.5 * costs.mean():
    sizes.insert(0, -(-sizes[0] // 32) * 16)
  return tuple(sizes)


def _balanced(
  indices: np.ndarray,
  costs: np.ndarray,
  sizes: Sequence[int],
  batch_size: int,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Batches of pairs that fit one row length, of about the same total within it.

  What does not fill a batch moves up to the next length, so only the last batch of all can be
  partial. Pairs are sorted by their costs give or take a twentieth: a small file is one window in every
  epoch, and the same pairs should not always meet.
  """
  batches, carried, shortest = [], np.empty(0, np.int64), 0
  for size in sizes:
    own = indices[(costs[indices] > shortest) & (costs[indices] <= size)]
    carried, shortest = np.concatenate([carried, own]), size
    count = len(carried) // batch_size
    taken, carried = np.split(carried, [count * batch_size])
    falling = np.argsort(-costs[taken] * rng.uniform(0.95, 1.05, len(taken)), kind="stable")
    dealt = taken[falling].reshape(batch_size, count)
    dealt[1::2] = dealt[1::2, ::-1]  # dealt forth and back, so that the totals stay level
    batches += list(dealt.T)
  return batches + ([carried] if len(carried) else [])


def rounded(count: int, bits: int = 3) -> int:
  """Up to so many significant bits; of three: 1 to 8, 10, 12, 14, 16, 20, 24, ..."""
  unit = 1 << max(0, (count - 1).bit_length() - bits)
  return -(-count // unit) * unit


class RowBuilder:
  """Lays given pairs out in rows; each host gets its share of them. See `shared_batches`."""

  def __init__(
    self,
    pairs: Pairs,
    sizes: Sequence[int],
    *,
    row_multiple: int = 1,
    long_from: int | None = None,
    reference: Reference | None = None,
  ):
    self.long_from = long_from
    self.pairs, self.sizes, self.reference = pairs, sizes, reference
    self.slots = min(SLOTS, pairs.source.plan.batch_size)
    self.row_multiple = row_multiple * pairs.source.plan.shard_count
    self.columns = {n: pairs.source.column(n) for n in ("weight", "margin", "label_prob")}
    self.columns |= pairs.columns

  def __call__(self, group: np.ndarray) -> Batch:
    costs, plan = self.pairs.costs[group], self.pairs.source.plan
    length = next(size for size in self.sizes if size >= costs.max())
    if self.long_from is not None and length >= self.long_from:
      length = self._long(costs)
    rows = [group[row] for row in best_fit(costs, length, most=self.slots)]
    laid = [[self._lay(pair, slot) for slot, pair in enumerate(row)] for row in rows]
    count = rounded(-(-len(rows) // self.row_multiple)) * self.row_multiple
    batch = self._empty(count, length, laid[0][0])
    for r, row in enumerate(laid):
      self._write(batch, r, row)
      for name, column in self.columns.items():
        batch[name][r, : len(row)] = column[rows[r]]
    return {name: plan.share(x) for name, x in batch.items()}

  def _long(self, costs: np.ndarray) -> int:
    """The shortest row, tiles of six significant bits, that makes as few rows as there must be."""
    count = -(-len(costs) // (self.slots * self.row_multiple)) * self.row_multiple
    tiles = max(costs.max(), -(-costs.sum() // count)) / _TILE
    while True:
      tiles = rounded(math.ceil(tiles), bits=6)
      if len(best_fit(costs, tiles * _TILE, most=self.slots)) <= count:
        return tiles * _TILE
      tiles += 1

  def _lay(self, pair: int, slot: int) -> Batch:
    """One pair's arrays; `sources` and `last` count from its own first token."""
    corpus, trunk = self.pairs.corpus, int(self.pairs.shared[pair])
    starts = corpus.starts[2 * pair : 2 * pair + 2]
    sizes = corpus.lengths[2 * pair : 2 * pair + 2] - trunk
    answers = [np.arange(trunk, trunk + size) for size in sizes]
    positions = np.concatenate([np.arange(trunk), *answers])
    branches = np.repeat([0, 1, 2], [trunk, *sizes])
    flat = positions + starts[np.maximum(branches - 1, 0)]
    hits = np.flatnonzero(self.pairs.scored[flat])
    of_chosen = int((branches[hits] == 1).sum())
    ends = trunk + np.cumsum(sizes) - 1
    for branch in (0, 1):  # where a template writes more behind the answer, that is not its end
      of_branch = hits[branches[hits] == branch + 1]
      ends[branch] = of_branch[-1] if len(of_branch) else ends[branch]
    laid = {
      "tokens": corpus.tokens[flat],
      "positions": positions,
      "segment_ids": np.full(len(flat), slot + 1),
      "branch_ids": branches,
      # Both first tokens of an answer are predicted from the last one of the prompt.
      "sources": np.where(positions[hits] == trunk, trunk, hits) - 1,
      "targets": corpus.tokens[flat[hits]],
      "slots": 2 * slot + branches[hits] - 1,
      "places": np.concatenate([np.arange(of_chosen), np.arange(len(hits) - of_chosen)]),
      "last": ends,
    }
    if self.reference is not None:
      laid["ref_logprobs"] = np.concatenate(self.reference(np.array([2 * pair, 2 * pair + 1])))
    if self.pairs.steps is not None:
      laid["step_mask"] = self.pairs.steps[flat[hits]].astype(np.float32)
    return laid

  def _empty(self, rows: int, length: int, like: Batch) -> Batch:
    batch = {}
    for name in like:
      columns = 2 * self.slots if name == "last" else length
      kind = like[name].dtype if name in ("ref_logprobs", "step_mask") else np.int32
      fill = {"tokens": self.pairs.corpus.pad_id, "slots": -1}.get(name, 0)
      batch[name] = np.full((rows, columns), fill, kind)
    for name, column in self.columns.items():
      fill = 1 if name == "label_prob" else 0
      batch[name] = np.full((rows, self.slots, *column.shape[1:]), fill, column.dtype)
    return batch

  def _write(self, batch: Batch, row: int, laid: list[Batch]) -> None:
    offset = np.cumsum([0, *(len(pair["tokens"]) for pair in laid)])
    for name in laid[0]:
      shift = name in ("sources", "last")
      values = np.concatenate([p[name] + at if shift else p[name] for p, at in zip(laid, offset)])
      batch[name][row, : len(values)] = values
