"""Worlds made by code: a microworld with gold judges, writers and labellers; and an exact table."""

from align_jax.worlds.families import FAMILIES
from align_jax.worlds.judges import Judgement, RewardWeights
from align_jax.worlds.labellers import Labeller, agreement_rate, gold_agreement, label_ceiling
from align_jax.worlds.microworld import Microworld, Pair
from align_jax.worlds.tabular import TabularWorld
from align_jax.worlds.writers import WRITERS, Writer

__all__ = [
  "FAMILIES",
  "Judgement",
  "Labeller",
  "Microworld",
  "Pair",
  "RewardWeights",
  "TabularWorld",
  "WRITERS",
  "Writer",
  "agreement_rate",
  "gold_agreement",
  "label_ceiling",
]
