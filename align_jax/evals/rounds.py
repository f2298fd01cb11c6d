"""What a round of iterated preference collection found, and how far policy and pairs have drifted.

Round r samples the policy of round r - 1 (round 0 is the start) and trains the policy of round r on
the pairs. So a `Collection` describes what the old policy said, and a `PolicyDrift` the new one.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax import config as config_lib
from align_jax.evals import results, reward_model, statistics
from align_jax.evals.results import PolicyEvaluation, RewardEvaluation
from align_jax.evals.statistics import Estimate

DROPS = ("identical", "cut", "tied")  # why a prompt gave no pair
_TOLERANCE = 1e-6  # of scores that count as equal


@dataclasses.dataclass(frozen=True)
class Collection:
  """One round's sampled responses, the labeller's choices, and reward models on the fresh pairs.

  Every share has its Wilson interval. A reward model was trained before these pairs were collected,
  so its accuracy here is that on the distribution it is used on.
  """

  round: int
  prompts: int
  samples_per_prompt: int
  pairs: int
  dropped: dict[str, Estimate]  # share of prompts without a pair, by reason
  distinct: Estimate  # of a prompt's responses, the share that differ
  chosen_length: Estimate  # tokens
  rejected_length: Estimate
  chosen_longer: Estimate  # share of pairs, equal lengths counting half
  families: dict[str, float]  # share of pairs
  gold: Estimate | None  # of all responses; None without a gold judge, as in the next three
  agreement: Estimate | None  # share of labels that go the gold judge's way; a gold tie counts half
  gold_ties: Estimate | None  # share of pairs between which the gold judge sees no difference
  gold_gap: Estimate | None  # |difference| of the two sides of a pair
  reward_scores: dict[str, Estimate]  # reward model -> mean over all responses
  reward_models: dict[str, RewardEvaluation]  # "first", "newest" -> on the fresh pairs


@dataclasses.dataclass(frozen=True)
class PairLogprobs:
  """Mean log-probs in nats that a policy gives to both sides of a round's pairs."""

  chosen: Estimate
  rejected: Estimate
  margin: Estimate  # chosen - rejected, paired


@dataclasses.dataclass(frozen=True)
class PolicyDrift:
  """A policy against the start and against the policy before it, on the same held-out prompts."""

  round: int
  evaluation: PolicyEvaluation  # its reference is the start
  kl_previous: Estimate  # k1 of whole responses, nats
  kl_previous_k3: Estimate
  distinct_responses: float | None  # share of its answers that differ from each other
  distinct_bigrams: float | None
  pairs: dict[str, PairLogprobs]  # round whose pairs they are -> under this policy
  pairs_before: PairLogprobs | None  # this round's pairs under the policy that said them


@dataclasses.dataclass(frozen=True)
class Report:
  """All rounds so far: policies 0..R and collections 1..R."""

  rounds: int  # that were asked for
  policies: tuple[PolicyDrift, ...]
  collections: tuple[Collection, ...]


@dataclasses.dataclass(frozen=True)
class Response:
  """A sampled response as the statistics see it; scores by judge, "gold" among them if there is one."""

  text: str
  length: int
  scores: Mapping[str, float]


def distinct(texts: Sequence[str]) -> tuple[float | None, float | None]:
  """(share of distinct texts, share of distinct word bigrams among all bigrams).

  1 where all differ, 1/n where n texts are one. None for nothing to count.
  """
  words = [text.split() for text in texts]
  bigrams = [pair for text in words for pair in zip(text, text[1:])]
  return (
    len(set(texts)) / len(texts) if texts else None,
    len(set(bigrams)) / len(bigrams) if bigrams else None,
  )


def collection(
  number: int,
  responses: Sequence[Sequence[Response]],
  choices: Sequence[tuple[int, int] | str],
  families: Sequence[str],
) -> Collection:
  """Describes round `number` from P prompts with G responses each.

  choices [P]: the (chosen, rejected) sample, or the reason of DROPS for having none; families [P].
  Scores other than "gold" are those of reward models.
  """
  kept = [(row, choice) for row, choice in enumerate(choices) if not isinstance(choice, str)]
  pairs = [(responses[row][chosen], responses[row][rejected]) for row, (chosen, rejected) in kept]
  lengths = np.array([[r.length for r in pair] for pair in pairs], float).reshape(-1, 2)
  everyone = [r for group in responses for r in group]
  judges = list(everyone[0].scores)
  gold = _margins(pairs, "gold") if "gold" in judges else None
  counts = Counter(families[row] for row, _ in kept)
  return Collection(
    round=number,
    prompts=len(responses),
    samples_per_prompt=len(responses[0]),
    pairs=len(pairs),
    dropped={why: statistics.proportion([c == why for c in choices]) for why in DROPS},
    distinct=statistics.proportion([len({r.text for r in g}) / len(g) for g in responses]),
    chosen_length=statistics.mean(lengths[:, 0]),
    rejected_length=statistics.mean(lengths[:, 1]),
    chosen_longer=statistics.proportion(_ahead(lengths[:, 0] - lengths[:, 1])),
    families={name: counts[name] / len(pairs) for name in sorted(counts)},
    gold=None if gold is None else statistics.mean([r.scores["gold"] for r in everyone]),
    agreement=None if gold is None else statistics.proportion(_ahead(gold)),
    gold_ties=None if gold is None else statistics.proportion(gold == 0),
    gold_gap=None if gold is None else statistics.mean(np.abs(gold)),
    reward_scores={
      name: statistics.mean([r.scores[name] for r in everyone]) for name in judges if name != "gold"
    },
    reward_models={
      name: _reward_model(pairs, name, lengths, gold) for name in judges if name != "gold" and pairs
    },
  )


def pair_logprobs(chosen: np.ndarray, rejected: np.ndarray) -> PairLogprobs:
  """Means over pairs of two [n] arrays of whole responses' log-probs."""
  return PairLogprobs(
    statistics.mean(chosen),
    statistics.mean(rejected),
    statistics.paired_difference(chosen, rejected),
  )


def _reward_model(pairs, name: str, lengths: np.ndarray, gold) -> RewardEvaluation:
  chosen, rejected = (np.array([pair[side].scores[name] for pair in pairs]) for side in (0, 1))
  return reward_model.evaluate_pairs(
    chosen, rejected, chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1],
    gold_margins=gold,
  )  # fmt: skip


def _margins(pairs, name: str) -> np.ndarray:
  margins = np.array([a.scores[name] - b.scores[name] for a, b in pairs], float)
  return np.where(np.abs(margins) <= _TOLERANCE, 0.0, margins)


def _ahead(margins: np.ndarray) -> np.ndarray:
  """1 where the chosen side is ahead, 0 where it is behind, 0.5 where the two are level."""
  return (np.sign(margins) + 1) / 2


def load_collection(file: pathlib.Path) -> Collection:
  return config_lib.build(Collection, results.read_json(file), str(file), finite=False)


def load_policy(file: pathlib.Path) -> PolicyDrift:
  return config_lib.build(PolicyDrift, results.read_json(file), str(file), finite=False)
