"""Several labellers of one pair: what their votes become before a reward model sees them."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from align_jax.data.records import Preference
from align_jax.errors import InputError

# soft: the share of votes is the label.    majority: its side, certain; an even split is a tie.
# unanimous: only pairs on which all agree. agreement: the majority's side, weighted by |2 share − 1|.
SETTLED = ("soft", "majority", "unanimous", "agreement")


def settle(pairs: Sequence[Preference], how: str) -> list[Preference]:
  """The pairs with one label each, by one of `SETTLED`; what is left out is logged.

  share = mean of a pair's votes (a tie is half a vote for either side), the probability that
  `chosen` is the better in "soft".

  Raises:
    InputError: for an unknown way, or if no pair is left.
  """
  if how not in SETTLED:
    raise InputError(f"votes must be one of {', '.join(SETTLED)}, not {how!r}")
  settled = [_settled(pair, how) for pair in pairs]
  kept = [pair for pair in settled if pair is not None]
  if len(kept) < len(pairs):
    logging.warning("%d of %d pairs are left: labellers disagree", len(kept), len(pairs))
  if not kept:
    raise InputError(f"votes={how!r} leaves none of {len(pairs)} pairs")
  return kept


def _settled(pair: Preference, how: str) -> Preference | None:
  share = _share(pair)
  majority = 0.5 * (1.0 + np.sign(share - 0.5))
  if how == "unanimous" and share not in (0.0, 1.0):
    return None
  weight = pair.weight * abs(2.0 * share - 1.0) if how == "agreement" else pair.weight
  if weight == 0.0 and pair.weight:
    return None
  label = share if how == "soft" else float(majority)
  return dataclasses.replace(pair, label_prob=label, weight=weight, labels={})


def _share(pair: Preference) -> float:
  """A pair that was judged once is its own only vote."""
  if not pair.labels:
    return pair.label_prob
  return sum(pair.labels.values()) / len(pair.labels)


def labellers_of(pairs: Sequence[Preference]) -> tuple[str, ...]:
  """All that voted on any pair, by name; InputError where a pair has no labels."""
  for pair in pairs:
    if not pair.labels:
      raise InputError(f"{pair.source}: field 'labels' is missing: every labeller has a head")
  return tuple(sorted({name for pair in pairs for name in pair.labels}))


def vote_table(pairs: Sequence[Preference], labellers: Sequence[str]) -> np.ndarray:
  """[n, A] float32: each labeller's vote, −1 where there is none. InputError for an unknown one."""
  known = {name: i for i, name in enumerate(labellers)}
  table = np.full((len(pairs), len(labellers)), -1.0, np.float32)
  for row, pair in zip(table, pairs):
    for name, vote in pair.labels.items():
      if name not in known:
        raise InputError(
          f"{pair.source}: field 'labels': {name!r} is no labeller of the training set"
        )
      row[known[name]] = vote
  return table
