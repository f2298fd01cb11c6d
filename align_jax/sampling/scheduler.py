"""Continuous batching: who decodes in which row, decided on the host between compiled calls.

Of several hosts each is given all prompts and reads all tokens, so all decide alike and in step.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from align_jax import hosts, models, sharding
from align_jax.sampling import decode, stops
from align_jax.sampling.distribution import Decoding
from align_jax.sampling.requests import PROMPT_BUCKET, Prompts

SMALLEST_CACHE = 64  # slots; a cache that need not be larger is not split into sizes
STOP_EVERY = 16  # tokens between two looks for stop strings
SLACK = 16  # a cache is resized for this many tokens more than it needs


@dataclasses.dataclass(frozen=True)
class Plan:
  """The shapes of a run and when it pauses."""

  rows: int  # in flight
  prompts: int  # prefilled at a time
  patience: int  # rows that may have ended before others take their place
  samples_per_prompt: int

  @property
  def newcomers(self) -> int:
    """Rows admitted at a time."""
    return min(self.patience, self.prompts * self.samples_per_prompt)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """What all rows share."""

  model: models.Transformer
  policy: decode.Policy
  decoding: Decoding
  rng: jax.Array
  eos_ids: np.ndarray
  stop: tuple[str, ...] = ()
  tokenizer: Any = None
  mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass
class Responses:
  """R = P * G responses as they come in."""

  tokens: np.ndarray  # [R, N] int32
  logprobs: np.ndarray  # [R, N] f32
  counts: np.ndarray  # [R]
  finished: np.ndarray  # [R] bool


def cache_sizes(size: int) -> list[int]:
  """The sizes a cache grows through, smallest first: `size` and its halves, but no tiny ones."""
  sizes = [size]
  while sizes[-1] >= 2 * SMALLEST_CACHE:
    sizes.append(-(-sizes[-1] // 2))
  return sizes[::-1]


def prompt_widths(width: int) -> list[int]:
  """The widths prompts are padded to, smallest first: 16, 32, 64..., and `width`."""
  count = max(math.ceil(math.log2(width / PROMPT_BUCKET)), 0)
  return [PROMPT_BUCKET << i for i in range(count)] + [width]


def run(sampler: Sampler, prompts: Prompts, plan: Plan) -> Responses:
  """All responses; row p * G + g is sample g of prompt p."""
  return _Run(sampler, prompts, plan).run()


class _Run:
  """One call: a queue of rows, those in flight, and what has come back."""

  def __init__(self, sampler: Sampler, prompts: Prompts, plan: Plan):
    self.sampler, self.prompts, self.plan = sampler, prompts, plan
    self.total = len(prompts) * plan.samples_per_prompt
    self.budget = int(prompts.budgets.max())
    self.sizes = cache_sizes(prompts.tokens.shape[1] + self.budget)
    self.size = 0  # slots of the caches now
    self.next_row = 0  # of the queue
    self.prefilled, self.first_prompt = None, -plan.prompts  # prompts first_prompt... are prefilled
    self.flight = None
    self.row_of = np.full(plan.rows, -1)  # which row of the result a slot works at; -1: none
    self.reach = np.zeros(plan.rows, int)  # of every slot, the cache slots its row has filled
    self.checked = np.zeros(plan.rows, int)  # of every slot, the tokens known to hold no stop
    self.out = Responses(
      np.zeros((self.total, self.budget), np.int32),
      np.zeros((self.total, self.budget), np.float32),
      np.zeros(self.total, int),
      np.zeros(self.total, bool),
    )

  def run(self) -> Responses:
    self._refill()
    while (self.row_of >= 0).any():
      self._decode()
      if self.next_row < self.total and (self.row_of < 0).sum() >= self.plan.patience:
        self._refill()
    return self.out

  def _refill(self):
    """Gives the free rows to the next of the queue."""
    free = np.flatnonzero(self.row_of < 0)
    while len(free) and self.next_row < self.total:
      if self.next_row // self.plan.samples_per_prompt >= self.first_prompt + self.plan.prompts:
        self._prefill()
      end = (self.first_prompt + self.plan.prompts) * self.plan.samples_per_prompt
      count = min(len(free), self.plan.newcomers, min(end, self.total) - self.next_row)
      self._admit(free[:count])
      free = free[count:]

  def _prefill(self):
    s = self.sampler
    self.first_prompt += self.plan.prompts
    part = self.prompts.part(self.first_prompt, self.plan.prompts)
    longest = part.lengths.max()
    width = next(w for w in prompt_widths(self.prompts.tokens.shape[1]) if w >= longest)
    batch = part.tokens[:, :width], part.lengths, part.ids, part.budgets
    if s.mesh is not None:
      batch = sharding.put_batch(batch, s.mesh, whole=True)
    self.prefilled = decode.prefill(s.model, s.policy, *batch, s.rng, s.decoding, mesh=s.mesh)
    self.width = width

  def _admit(self, slots: np.ndarray):
    s = self.sampler
    rows = np.arange(self.next_row, self.next_row + len(slots))
    prompts, indices = np.divmod(rows, self.plan.samples_per_prompt)
    self._fit(self.width)
    missing = (0, self.plan.newcomers - len(slots))
    self.flight = decode.admit(
      self.flight,
      self.prefilled,
      np.pad(slots, missing, constant_values=self.plan.rows).astype(np.int32),
      np.pad(prompts - self.first_prompt, missing).astype(np.int32),
      np.pad(indices, missing).astype(np.int32),
      s.eos_ids,
      s.decoding,
      mesh=s.mesh,
    )
    self.next_row += len(slots)
    self.row_of[slots], self.checked[slots] = rows, 0
    self.reach[slots] = self.prompts.lengths[prompts]

  def _fit(self, least: int = 0):
    """Caches no larger than the rows in flight need, with some slack, and of `least` slots."""
    need = max(least, self.reach[self.row_of >= 0].max(initial=0) + SLACK)
    size = next((size for size in self.sizes if size >= need), self.sizes[-1])
    if self.flight is None:
      self.flight = decode.empty_flight(
        self.sampler.model,
        self.prefilled,
        policies=len(self.sampler.policy.variables),
        rows=self.plan.rows,
        slots=size,
        budget=self.budget,
        mesh=self.sampler.mesh,
      )
    elif size != self.size:
      caches = decode.resize(self.flight.caches, size, mesh=self.sampler.mesh)
      self.flight = dataclasses.replace(self.flight, caches=caches)
    self.size = size

  def _decode(self):
    s, unused = self.sampler, self.row_of < 0
    self._fit()
    waiting = self.next_row < self.total
    (device, *_) = self.flight.rows.counts.devices()
    self.flight = decode.decode_on(device.platform)(
      s.model,
      s.policy,
      self.flight,
      unused,
      np.int32(STOP_EVERY if s.stop else self.budget),
      np.int32(self.plan.patience if waiting else self.plan.rows),
      s.eos_ids,
      s.decoding,
      mesh=s.mesh,
    )
    self._collect()

  def _collect(self):
    """Takes what has ended out of flight."""
    rows = self.flight.rows
    ended, finished, counts, lengths = hosts.fetch(
      (rows.ended, rows.finished, rows.counts, rows.lengths)
    )
    self.reach = lengths + counts
    ended = ended & (self.row_of >= 0)
    if not ended.any() and not self.sampler.stop:
      return
    tokens, logprobs = hosts.fetch((rows.tokens, rows.logprobs))
    for slot in np.flatnonzero(self.row_of >= 0):
      count, done = counts[slot], finished[slot]
      end = self._stop(slot, tokens[slot, :count])
      if end is None and not ended[slot]:
        continue
      count, done = (count, done) if end is None else (end, True)
      row = self.row_of[slot]
      self.out.tokens[row, :count] = tokens[slot, :count]
      self.out.logprobs[row, :count] = logprobs[slot, :count]
      self.out.counts[row], self.out.finished[row] = count, done
      self.row_of[slot] = -1

  def _stop(self, slot: int, tokens: np.ndarray) -> int | None:
    if not self.sampler.stop:
      return None
    end = stops.first_end(tokens, self.sampler.stop, self.sampler.tokenizer, self.checked[slot])
    self.checked[slot] = len(tokens)
    return end
