"""Weights and records of the peer benchmark, written once so that all sides read the same."""

import random
from typing import Any

import jax
import numpy as np

from align_jax import data, models, sharding
from align_jax.phases import benchmark_data, workspace
from align_jax.phases.peer_config import SAMPLE, PeerBenchmarkConfig, PeerTask, Place
from align_jax.training import workdir


def prepare(place: Place, devices) -> dict[str, Any]:
  """Writes the model folder, the score head and the records of every task; returns where from."""
  config = place.config
  mesh = sharding.make_mesh(config.mesh, devices)
  loaded = _start(config, mesh)
  models.save_pretrained(place.model, loaded.model, loaded.params, tokenizer=loaded.tokenizer)
  head = workspace.new_head(loaded.model, mesh, seed=0)
  np.save(place.head, np.asarray(head["kernel"], np.float32))
  (place.folder / "records").mkdir(exist_ok=True)
  for name, task in config.tasks.items():
    _write(place, name, task, config.batches * task.data.batch_size, loaded.tokenizer)
  return {
    "device": devices[0].device_kind,
    "devices": len(devices),
    "platform": devices[0].platform,
    "parameters": sum(x.size for x in jax.tree.leaves(loaded.params)),
  }


def _start(config: PeerBenchmarkConfig, mesh) -> workspace.Loaded:
  if config.shape is None:
    return workspace.start(config.model, mesh, seed=0)
  model = models.Transformer(models.named_shape(config.shape), mesh=mesh)
  params = workspace.new_params(model, mesh, seed=0)
  return workspace.Loaded(model, params, workspace.tokenizer_of(config.model))


def _write(place: Place, name: str, task: PeerTask, count: int, tokenizer) -> None:
  """The records of a pass; of the check, as many as a step takes, evenly over the pass."""
  if task.phase in ("sft", SAMPLE):
    records = benchmark_data.demonstrations(task.data, tokenizer, count)
    make = request if task.phase == SAMPLE else _demonstration
    sequences = [make(r, tokenizer, task.data.length) for r in records]
    costs = np.array([s.get("new_tokens") or len(s["input_ids"]) for s in sequences])
  else:
    pairs = benchmark_data.pairs(task.data, tokenizer, count)
    records = [benchmark_data.plainly(pairs.source.records[i]) for i in pairs.kept]
    sequences = [_pair(pairs, i, task.phase) for i in range(len(records))]
    costs = pairs.costs
  checked = benchmark_data.evenly(costs, task.data.batch_size)
  data.write(place.records(name, "pass"), records)
  data.write(place.records(name, "check"), [records[i] for i in checked])
  # As a sampler without buckets draws them; ours groups its batches by itself.
  order = random.Random(0).sample(range(count), count)
  tokens = {
    "check": [sequences[i] for i in checked],
    "pass": [sequences[i] for i in order],
    "pad_id": _unused_id(sequences, tokenizer, task.phase),
    "useful_tokens": int(costs.sum()),
  }
  workdir.write_json(place.tokens(name), tokens)


def _demonstration(record, tokenizer, length: int) -> dict[str, list[int]]:
  """The record with labels as our loss mask has them: -100 where nothing is learned."""
  encoded = data.encode_demonstration(record, tokenizer, length)
  labels = np.where(encoded.response_mask, encoded.tokens, -100)
  return {"input_ids": encoded.tokens.tolist(), "labels": labels.tolist()}


def request(record: data.Demonstration, tokenizer, length: int) -> dict[str, Any]:
  """What stands before the record's last response, and how many tokens that has: to be sampled."""
  encoded = data.encode_demonstration(record, tokenizer, length)
  end = int(np.flatnonzero(encoded.response_mask)[-1]) + 1
  start = int(np.flatnonzero(~encoded.response_mask[:end])[-1]) + 1
  return {"prompt_ids": encoded.tokens[:start].tolist(), "new_tokens": end - start}


def _pair(pairs: data.Pairs, number: int, phase: str) -> dict[str, list[int]]:
  """The pair as TRL tokenises one: of DPO prompt and answers apart, of rewards whole sequences.

  A reward is read at a sequence's last token, so what a template writes behind an answer is cut.
  """
  corpus, found = pairs.corpus, []
  for s in (2 * number, 2 * number + 1):
    span = slice(corpus.starts[s], corpus.starts[s] + corpus.lengths[s])
    end = int(np.flatnonzero(corpus.mask[span])[-1]) + 1
    found.append(corpus.tokens[span][:end].tolist())
  if phase == "reward":
    return {"chosen_ids": found[0], "rejected_ids": found[1]}
  prompt = int(corpus.prompt_lengths[2 * number])
  return {
    "prompt_ids": found[0][:prompt],
    "chosen_ids": found[0][prompt:],
    "rejected_ids": found[1][prompt:],
  }


def _unused_id(sequences, tokenizer, phase: str) -> int | None:
  """Of rewards: a padding id that no sequence holds, because TRL finds its last token by that id."""
  if phase != "reward":
    return None
  used = {t for s in sequences for ids in s.values() for t in ids}
  return next(i for i in range(len(tokenizer)) if i not in used)
