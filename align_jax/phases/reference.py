"""The reference's log-probs of every scored token: computed once, kept on disk, checked at each start.

The folder of a cache is named by what its numbers depend on: weights, records, tokenizer, lengths and
type of computation. Inside is one TensorStore array, NaN where nothing has been computed yet, so an
interrupted pass goes on where it stopped. On several hosts each writes the rows that it computed.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import tensorstore as ts
import tqdm
from jax.experimental import multihost_utils

from align_jax import data, models, sharding
from align_jax.data.pairs import Pairs, Reference
from align_jax.data.shared_rows import RowBuilder, row_lengths
from align_jax.errors import InputError
from align_jax.phases import workers
from align_jax.training import integrity, pair_scores, workdir

_CHUNK = 1 << 16  # values a file
_SAMPLE = 8  # pairs recomputed at each start
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}  # nats a token


@dataclasses.dataclass(frozen=True)
class Scorer:
  """How a pass over the pairs is computed."""

  model: models.Transformer
  variables: dict
  mesh: jax.sharding.Mesh
  batch_size: int  # pairs at a time
  chunk: int | None  # scored tokens through the LM head at a time


def cached_reference(
  folder: str | pathlib.Path, pairs: Pairs, scorer: Scorer, identity: dict[str, str]
) -> Reference:
  """Opens or makes the cache of `pairs` under `folder`, and returns what batches read it by.

  identity: names of records and tokenizer, from `identity_of`. InputError where the numbers of an
  existing cache are not those of the model.
  """
  identity = identity | {
    "weights": weights_fingerprint(scorer.variables),
    "model": repr(dataclasses.replace(scorer.model.config, remat="none")),
    "tokens": _digest(pairs.corpus.tokens, pairs.corpus.lengths, pairs.scored),
  }
  name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
  place = pathlib.Path(folder).absolute() / name
  place.mkdir(parents=True, exist_ok=True)
  workdir.write_json(place / "identity.json", identity)
  # One process of this machine at a time: the second one finds the work done.
  alone = jax.process_count() == 1
  with workers.lock(place / "lock") if alone else contextlib.nullcontext():
    store = _open(place, int(pairs.scored_edges[-1]))
    values = store.read().result()
    known = _known(values, pairs.scored_edges)
    score = _Pass(pairs, scorer)
    if known.any():
      _verify(place, score, values, np.flatnonzero(known))
    if not known.all():
      _complete(score, pairs.costs, store, np.flatnonzero(~known))
      values = store.read().result()
  edges = pairs.scored_edges
  return lambda sequences: [values[edges[s] : edges[s + 1]] for s in sequences]


def identity_of(records, tokenizer, length: int) -> dict[str, str]:
  """What a cache is known by besides the weights."""
  backend = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
  return {
    "records": data.fingerprint(records),
    "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
    "length": str(length),
  }


def weights_fingerprint(variables) -> str:
  """A hash of every bit of the weights, the same on any mesh."""
  return integrity.fingerprint(variables)


def _digest(*arrays: np.ndarray) -> str:
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _open(place: pathlib.Path, size: int):
  return ts.open(
    {"driver": "zarr", "kvstore": {"driver": "file", "path": str(place / "logprobs")}},
    dtype=ts.float32,
    shape=[size],
    chunk_layout=ts.ChunkLayout(chunk_shape=[_CHUNK]),
    fill_value=np.float32(np.nan),
    create=True,
    open=True,
  ).result()


def _known(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """For every pair whether all its values are there, bool [K]."""
  missing = np.concatenate([[0], np.cumsum(np.isnan(values))])
  return missing[edges[2::2]] == missing[edges[:-2:2]]


def _complete(score: "_Pass", costs: np.ndarray, store, missing: np.ndarray) -> None:
  """Computes the pairs that are missing, those of like length together, and writes them."""
  order, size = missing[np.argsort(costs[missing], kind="stable")], score.scorer.batch_size
  bar = tqdm.tqdm(
    np.split(order, range(size, len(order), size)),
    "reference",
    unit=" batches",
    disable=jax.process_index() != 0,
    mininterval=0.5 if sys.stderr.isatty() else 10.0,
  )
  writes = []
  for group in bar:
    index, values = score(group)
    writes.append(store[index].write(values))
    while len(writes) > 4:
      writes.pop(0).result()
  for write in writes:
    write.result()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("reference log-probs written")


def _verify(place, score: "_Pass", values: np.ndarray, known: np.ndarray) -> None:
  """Recomputes a sample of what is known; InputError unless it is what the model says."""
  rng = np.random.default_rng(0)
  sample = np.sort(rng.choice(known, min(_SAMPLE, len(known)), replace=False))
  index, again = score(sample)
  worst = float(np.max(np.abs(values[index] - again), initial=0.0))
  if jax.process_count() > 1:  # a host may have none of the rows, and all must stop together
    worst = float(np.max(multihost_utils.process_allgather(np.float32(worst))))
  if not worst <= _TOLERANCE[score.scorer.model.config.dtype]:
    raise InputError(
      f"{place}: the cached log-probs of the reference differ by {worst:.3g} nats from those "
      "computed now: remove this folder"
    )


class _Pass:
  """Scores groups of pairs: `(index [n], values [n])` of this host's part of the flat array."""

  def __init__(self, pairs: Pairs, scorer: Scorer):
    edges, ways = pairs.scored_edges, sharding.batch_ways(scorer.mesh)
    index, count = sharding.host_share(scorer.mesh)
    plan = dataclasses.replace(
      pairs.source.plan,
      batch_size=scorer.batch_size,
      shard_index=index,
      shard_count=count,
    )
    pairs = dataclasses.replace(pairs, source=dataclasses.replace(pairs.source, plan=plan))
    self.build = RowBuilder(
      pairs,
      row_lengths(pairs.costs),
      row_multiple=ways // count,
      reference=lambda sequences: [np.arange(edges[s], edges[s + 1]) for s in sequences],
    )
    self.scorer = scorer

    def score(variables, batch):
      # One value for every scored token in its place, so that rows stay on their devices.
      scores = pair_scores.score_tokens(scorer.model, variables, batch, chunk=scorer.chunk)
      return scores["logprobs"]

    self.score = jax.jit(score, out_shardings=sharding.batch_sharding(scorer.mesh))

  def __call__(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    batch = self.build(group)
    index, real = batch.pop("ref_logprobs"), batch["slots"] >= 0
    values = self.score(self.scorer.variables, sharding.put_batch(batch, self.scorer.mesh))
    return index[real], sharding.local_rows(values)[real]
