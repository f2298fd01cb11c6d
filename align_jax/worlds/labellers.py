"""Labellers: people who compare two replies, with noise and biases that are known exactly."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from align_jax.errors import InputError
from align_jax.worlds import judges

Pair = tuple[judges.Judgement, judges.Judgement]


@dataclasses.dataclass(frozen=True)
class Labeller:
  """Prefers the first of two replies with probability

      p = flip + (1 - 2 flip) sigmoid((u_a - u_b) / temperature),
      u = gold reward + length_bias * length + agreement_bias * agrees

  so a logistic regression of its choices on the differences of (gold, length, agrees) has the
  coefficients (1, length_bias, agreement_bias) / temperature when flip = 0.
  """

  temperature: float = 0.68  # two such labellers agree on 70 % of pairs
  length_bias: float = 0.0  # reward units per word
  agreement_bias: float = 0.0  # reward units for going along with the user's opinion
  flip: float = 0.0  # chance of a slip of the hand

  def __post_init__(self):
    if not self.temperature > 0:
      raise InputError(f"Labeller: temperature must be positive, got {self.temperature}.")
    if not 0 <= self.flip <= 0.5:
      raise InputError(f"Labeller: flip must be in [0, 0.5], got {self.flip}.")

  def utility(self, judgement: judges.Judgement) -> float:
    """What this labeller likes, in units of gold reward."""
    bias = self.length_bias * judgement.length + self.agreement_bias * judgement.agrees
    return judgement.reward + bias

  def probabilities(self, pairs: Sequence[Pair]) -> np.ndarray:
    """P(first is preferred) of every pair, [N]."""
    gap = np.array([self.utility(a) - self.utility(b) for a, b in pairs], np.float64)
    return self.flip + (1 - 2 * self.flip) * _sigmoid(gap / self.temperature)

  def calibrated(self, pairs: Sequence[Pair], agreement: float) -> "Labeller":
    """The same labeller at the temperature where two of its kind agree on `agreement` of `pairs`.

    Agreement falls with temperature, so it is found by bisection; raises InputError outside what
    this labeller's flips and these pairs allow.
    """
    low, high = -9.0, 14.0  # log temperature
    if not self._agreement(pairs, high) <= agreement <= self._agreement(pairs, low):
      span = f"[{self._agreement(pairs, high):.3f}, {self._agreement(pairs, low):.3f}]"
      raise InputError(f"Labeller: agreement must be in {span} on these pairs, got {agreement}.")
    for _ in range(60):
      middle = 0.5 * (low + high)
      if self._agreement(pairs, middle) > agreement:
        low = middle
      else:
        high = middle
    return dataclasses.replace(self, temperature=float(np.exp(middle)))

  def _agreement(self, pairs: Sequence[Pair], log_temperature: float) -> float:
    p = dataclasses.replace(self, temperature=np.exp(log_temperature)).probabilities(pairs)
    return agreement_rate(p, p)


DEFAULT = Labeller()


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 * (1 + np.tanh(0.5 * x))


def agreement_rate(first: np.ndarray, second: np.ndarray) -> float:
  """Share of pairs on which two labellers agree: mean pq + (1 - p)(1 - q) of their p, q [N]."""
  return float(np.mean(first * second + (1 - first) * (1 - second)))


def label_ceiling(probabilities: np.ndarray) -> float:
  """The best accuracy any model can have on these labels: mean max(p, 1 - p)."""
  return float(np.mean(np.maximum(probabilities, 1 - probabilities)))


def gold_agreement(probabilities: np.ndarray, pairs: Sequence[Pair]) -> float:
  """Share of labels that go the way of the gold reward; a tie counts one half.

  This is the accuracy on these labels of a reward model that equals the gold reward; without bias
  it is the ceiling.
  """
  gap = np.array([a.reward - b.reward for a, b in pairs], np.float64)
  return float(np.mean(np.where(gap > 0, probabilities, np.where(gap < 0, 1 - probabilities, 0.5))))
