"""The records that a reward model learns from, as batches, before any weight is loaded."""

import dataclasses
from typing import Any

import numpy as np

from align_jax import data
from align_jax.data import streams, votes
from align_jax.errors import InputError
from align_jax.phases import records, train, workspace
from align_jax.phases.reward_config import RewardConfig


@dataclasses.dataclass(frozen=True)
class RewardBatches:
  training: Any  # endless, checkpointable; of an ensemble {"0": batch, "1": batch, ...}
  eval: list[dict[str, np.ndarray]] | None
  records: Any
  labellers: tuple[str, ...] = ()  # whose heads there are, by name


def make(config: RewardConfig, mesh) -> RewardBatches:
  """Reads, checks and tokenises; raises InputError that names file, line and field."""
  kind = "preferences" if config.records == "pairs" else config.records
  found, held_out = records.read_split(config.data, kind)
  tokenizer = workspace.tokenizer_of(config.model)
  if config.records == "pairs":
    train.check_pairs(config, mesh)
    return _pairs(config, found, held_out, tokenizer, mesh)
  workspace.check_batch(config.data.batch_size, config.accumulate, mesh)

  def batches(items, seed: int, epochs: int | None = None):
    options = train.stream_options(config, mesh, epochs) | {"seed": seed}
    shape = {"length": options.pop("length"), "buckets": config.data.buckets}
    plan = data.Batching(**options)
    if config.records == "rankings":
      return data.ranking_batches(items, tokenizer, plan, **shape)
    return data.rating_batches(items, tokenizer, plan, config.aspects, **shape)

  return RewardBatches(
    training=_for_members(config, lambda seed: batches(found, seed)),
    eval=list(batches(held_out, config.seed, epochs=1)) if held_out else None,
    records=found,
  )


def _pairs(config: RewardConfig, found, held_out, tokenizer, mesh) -> RewardBatches:
  labellers: tuple[str, ...] = ()
  if config.votes == "heads":
    labellers = votes.labellers_of(records.all_records(found))
  found = _settled(config, found)
  pairs = _with_columns(config, train.tokenised_pairs(config, found, tokenizer, mesh), labellers)

  def training(seed: int):
    stream = dataclasses.replace(pairs.source.stream, seed=seed)
    source = dataclasses.replace(pairs.source, stream=stream)
    reordered = dataclasses.replace(pairs, source=source)
    return train.pair_batches(config, reordered, mesh, accumulate=config.accumulate)

  evaluation = None
  if held_out:
    kept = _settled(config, held_out)
    tokens = train.tokenised_pairs(config, kept, tokenizer, mesh, epochs=1)
    tokens = _with_columns(config, tokens, labellers)
    evaluation = list(train.pair_batches(config, tokens, mesh))
  return RewardBatches(_for_members(config, training), evaluation, found, labellers)


def _for_members(config: RewardConfig, batches):
  """One stream, or for members with arrays of their own one each, in an order of its own."""
  if config.ensemble is None or config.ensemble.share == "trunk":
    return batches(config.seed)
  members = range(config.ensemble.members)
  return streams.Zipped(**{str(i): batches(config.seed + i) for i in members})


def _settled(config: RewardConfig, found):
  """The pairs after their labellers' votes and their ties are settled, each source by itself."""
  voted = any(pair.labels for pair in records.all_records(found))
  if config.votes is None and voted:
    raise InputError(
      "records have a field 'labels' with several labellers' votes: config.votes must say what becomes "
      "of them"
    )
  if config.votes is not None and not voted:
    raise InputError(f"config.votes={config.votes!r} is not used: no record has a field 'labels'")
  if not isinstance(found, data.Mixture):
    return _settled_pairs(config, found)
  parts = (tuple(_settled_pairs(config, part)) for part in found.components)
  return dataclasses.replace(found, components=tuple(parts))


def _settled_pairs(config: RewardConfig, pairs):
  if config.votes in votes.SETTLED:
    pairs = votes.settle(pairs, config.votes)
  elif config.votes == "spread":
    pairs = votes.settle(pairs, "soft")
  if config.ties == "discard":
    pairs = [pair for pair in pairs if pair.label_prob != 0.5]
    if not pairs:
      raise InputError("config.ties='discard' leaves no pair")
  if config.ties == "rao_kupper":
    _refuse_shares(pairs)
  return pairs


def _refuse_shares(pairs) -> None:
  for pair in pairs:
    if pair.label_prob not in (0.0, 0.5, 1.0):
      raise InputError(
        f"{pair.source}: field 'label_prob' must be 1, 0 or 0.5 (a tie) with ties='rao_kupper', not "
        f"{pair.label_prob}"
      )


def _with_columns(config: RewardConfig, pairs: data.Pairs, labellers) -> data.Pairs:
  """The pairs with what their rule reads besides (see `reward_objectives`)."""
  columns = {}
  if labellers:
    kept = [pairs.source.records[i] for i in pairs.kept]
    columns["votes"] = votes.vote_table(kept, labellers)
  if config.debias:
    columns["lengths"] = pairs.response_lengths.astype(np.float32)
  if config.ensemble and config.ensemble.share == "trunk":
    columns["index"] = pairs.kept.astype(np.int32)
  return dataclasses.replace(pairs, columns=columns)
