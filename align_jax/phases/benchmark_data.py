"""What benchmarks share: few records with the lengths of a whole file, and how passes are compared."""

import dataclasses
import statistics
from typing import Any

import numpy as np

from align_jax import data
from align_jax.errors import InputError
from align_jax.phases import records
from align_jax.phases.sections import DataSection


def evenly(costs: np.ndarray, count: int) -> np.ndarray:
  """Indices [count], ascending, of records spread evenly over the order of their `costs` [K].

  Record i is the middle of the i-th of `count` equal shares of the sorted records, so that no extreme
  stands for its neighbours. count must be at most K.
  """
  order = np.argsort(costs, kind="stable")
  return np.sort(order[((np.arange(count) + 0.5) / count * len(order)).astype(int)])


def pairs(section: DataSection, tokenizer, count: int) -> data.Pairs:
  """`count` tokenised preference pairs of `section.train`, evenly over their lengths.

  InputError where the file has fewer.
  """
  found = records.all_records(records.read_split(section, "preferences")[0])
  plan = data.Batching(section.batch_size, epochs=1, shuffle=True)
  everything = data.tokenise_pairs(found, tokenizer, plan, length=section.length)
  _enough(section, len(everything.costs), count, "pairs")
  kept = [found[everything.source.kept[i]] for i in evenly(everything.costs, count)]
  return data.tokenise_pairs(kept, tokenizer, plan, length=section.length)


def demonstrations(section: DataSection, tokenizer, count: int) -> list[data.Demonstration]:
  """`count` demonstrations of `section.train`, evenly over their lengths in tokens.

  InputError where the file has fewer.
  """
  found = records.all_records(records.read_split(section, "demonstrations")[0])
  _enough(section, len(found), count, "demonstrations")
  lengths = [len(data.encode_demonstration(r, tokenizer, section.length).tokens) for r in found]
  return [found[i] for i in evenly(np.array(lengths), count)]


def speedup(first: list[float], own: list[float]) -> dict[str, Any]:
  """{"speedup": median of first / own over passes, "speedup_range": [least, most]}; seconds of each pass.

  Ratios are of neighbours in time, so that what slows the machine down slows both.
  """
  ratios = [a / b for a, b in zip(first, own)]
  return {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}


def plainly(pair: data.Preference) -> data.Preference:
  """The pair with weight 1, no margin and a hard label, as every library means a pair."""
  return dataclasses.replace(pair, weight=1.0, margin=0.0, label_prob=1.0)


def _enough(section: DataSection, have: int, count: int, what: str) -> None:
  if have < count:
    raise InputError(f"{section.train} has {have} {what}; {count} are needed")
