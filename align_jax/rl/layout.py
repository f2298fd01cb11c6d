"""Rollouts in shared rows: a prompt once, its responses behind it, several prompts a row.

The responses to a prompt do not see each other, so every token has the log-prob that it has in a row of
its own. Losses and estimators go on seeing one response a row, [B, T]: only the model sees these rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import sampling as generation
from align_jax import sharding
from align_jax.data import shared_rows, streams
from align_jax.errors import InputError
from align_jax.rl import update
from align_jax.rl.config import PolicyGradientConfig, SamplingConfig
from align_jax.rl.state import OnlineState
from align_jax.training import step

Layout = dict[str, Any]


def by_response(layout: Layout, values: jax.Array) -> jax.Array:
  """One value for every scored token, [R, L], in the places of responses [B, T]; 0 elsewhere."""
  back = layout["back"]
  return jnp.where(back >= 0, values.reshape(-1)[back], 0.0)


def make_layouts(
  config: PolicyGradientConfig,
  sampling: SamplingConfig,
  *,
  accumulate: int = 1,
  mesh: jax.sharding.Mesh,
) -> Callable[[OnlineState, generation.Samples], Layout] | None:
  """`(state, samples) -> layouts` of an iteration's scoring and updates; None without `row_length`.

  {"order": the rows of every update; "scoring": the layout of all rows in minibatches · accumulate parts;
  "updates": those of all updates, [updates, ...]}. Of rows in `parts` a layout is

    tokens, positions, segment_ids, branch_ids  int32 [R, L]: prompts (branch 0) and responses (1, 2...)
    sources, targets, scored  int32 [R, L]: for every response token, the real ones first, the place of the
      token that predicts it, its id, and 1
    back  int32 [B, W-1]: where in the [R / parts, L] values of its part a token's is; -1 off the responses

  with L = `config.row_length` and rows interleaved by part (row r is of part r % parts). R is the same for
  all parts: as few rows as hold them, a multiple of the mesh's batch ways, and rounded up to three
  significant bits, so that few shapes are compiled. A prompt whose responses do not fit a row together is
  repeated. The function raises InputError where a prompt and a response are longer than a row.
  """
  if config.row_length is None:
    return None
  group, ways = sampling.samples_per_prompt, sharding.batch_ways(mesh)
  steps = {"epochs": config.epochs, "minibatches": config.minibatches}

  def make(state: OnlineState, samples: generation.Samples) -> Layout:
    count = len(samples.tokens)
    order = np.asarray(jax.device_get(update.row_order(state, count, **steps)))
    # The scoring first, then every update: each a list of parts.
    every = [step.interleaved_parts(np.arange(count), config.minibatches * accumulate)]
    every += [step.interleaved_parts(numbers, accumulate) for numbers in order]
    scoring, *updates = lay_out(samples, every, group=group, length=config.row_length, ways=ways)
    together = {name: np.stack([x[name] for x in updates]) for name in scoring}
    laid = {"order": order, "scoring": scoring, "updates": together}
    return jax.device_put(laid, sharding.replicated(mesh))

  return make


def lay_out(
  samples: generation.Samples,
  every: Sequence[Sequence[np.ndarray]],
  *,
  group: int,
  length: int,
  ways: int = 1,
) -> list[Layout]:
  """A layout of every list of parts, each part the numbers of its samples; see `make_layouts`.

  `group` samples after each other have a prompt in common.
  """
  rows = _Rows(samples, group, length)
  packed = [[rows.pack(part) for part in parts] for parts in every]
  most = max(len(bins) for parts in packed for bins in parts)
  count = shared_rows.rounded(-(-most // ways)) * ways
  found = []
  for parts, bins in zip(every, packed):
    laid = [rows.lay(*both, count) for both in zip(parts, bins)]
    found.append(step.joined_parts({name: np.stack([x[name] for x in laid]) for name in laid[0]}))
  return found


class _Rows:
  """Responses, of which each G have a prompt in common, to be laid out in rows of `length` tokens."""

  def __init__(self, samples: generation.Samples, samples_per_prompt: int, length: int):
    self.tokens, self.prompts, self.sizes = samples.tokens, samples.prompt_lengths, samples.lengths
    self.group, self.length = samples_per_prompt, length
    longest = int((self.prompts + self.sizes).max())
    if longest > length:
      raise InputError(
        f"row_length {length}: the longest prompt and response together have {longest} tokens"
      )

  def pack(self, numbers: np.ndarray) -> list[list[list[int]]]:
    """For each row its pieces, each places in `numbers` of responses that share a prompt there."""
    pieces: list[list[int]] = []
    costs: list[int] = []
    newest: dict[int, int] = {}  # group -> its newest piece
    for place, number in enumerate(numbers.tolist()):
      group, size = number // self.group, int(self.sizes[number])
      if group not in newest or costs[newest[group]] + size > self.length:
        newest[group] = len(pieces)
        pieces.append([])
        costs.append(int(self.prompts[number]))
      pieces[newest[group]].append(place)
      costs[newest[group]] += size
    bins = streams.best_fit(np.array(costs), self.length)
    return [[pieces[piece] for piece in row] for row in bins]

  def lay(self, numbers: np.ndarray, rows: list[list[list[int]]], count: int) -> Layout:
    """The layout of one part in `count` rows."""
    ints = ("tokens", "positions", "segment_ids", "branch_ids", "sources", "targets", "scored")
    laid = {name: np.zeros((count, self.length), np.int32) for name in ints}
    laid["back"] = np.full((len(numbers), self.tokens.shape[1] - 1), -1, np.int32)
    for at, pieces in enumerate(rows):
      row = _Row({name: laid[name][at] for name in ints})
      for segment, places in enumerate(pieces, start=1):
        prompt = int(self.prompts[numbers[places[0]]])
        row.begin(segment, self.tokens[numbers[places[0]], :prompt])
        for branch, place in enumerate(places, start=1):
          size = int(self.sizes[numbers[place]])
          first = row.respond(branch, self.tokens[numbers[place], prompt : prompt + size])
          laid["back"][place, prompt - 1 : prompt + size - 1] = (
            at * self.length + first + np.arange(size)
          )
    return laid


class _Row:
  """One row, written from left to right."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.arrays, self.end, self.scored = arrays, 0, 0

  def begin(self, segment: int, prompt: np.ndarray) -> None:
    self.segment, self.trunk = segment, len(prompt)
    self._append(prompt, 0, 0)
    self.trunk_end = self.end

  def respond(self, branch: int, response: np.ndarray) -> int:
    """Writes a response; returns the place of its first token among the row's scored ones."""
    first, start, size = self.scored, self.end, len(response)
    self._append(response, branch, self.trunk)
    self.scored += size
    where = slice(first, self.scored)
    self.arrays["sources"][where] = np.arange(start - 1, self.end - 1)
    self.arrays["sources"][first] = self.trunk_end - 1
    self.arrays["targets"][where] = response
    self.arrays["scored"][where] = 1
    return first

  def _append(self, tokens: np.ndarray, branch: int, position: int) -> None:
    where = slice(self.end, self.end + len(tokens))
    values = {"tokens": tokens, "positions": position + np.arange(len(tokens))}
    for name, value in (values | {"segment_ids": self.segment, "branch_ids": branch}).items():
      self.arrays[name][where] = value
    self.end = where.stop
