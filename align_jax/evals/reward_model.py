"""How good a reward model is, and how good any could be on labels as noisy as these."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from align_jax import hosts, sampling
from align_jax.evals import statistics
from align_jax.evals.results import RewardEvaluation
from align_jax.evals.statistics import Estimate
from align_jax.training import objectives


def evaluate_pairs(
  chosen_rewards: np.ndarray,
  rejected_rewards: np.ndarray,
  *,
  chosen_lengths: np.ndarray,
  rejected_lengths: np.ndarray,
  gold_margins: np.ndarray | None = None,
) -> RewardEvaluation:
  """Accuracy on held-out pairs, its ceiling, its dependence on length, and its calibration.

  The ceiling is the accuracy of the gold judge itself on these labels: above it a model has learned
  the noise. Confidence is σ(|r⁺ - r⁻|), the probability that Bradley–Terry gives the preferred
  side.

  chosen_rewards, rejected_rewards [n]; lengths [n] in tokens; gold_margins [n], the gold reward of
  the
  chosen minus that of the rejected, None without a gold judge. ValueError for no pairs or NaN
  rewards.
  """
  margins = np.asarray(chosen_rewards, np.float64) - np.asarray(rejected_rewards, np.float64)
  extra = np.asarray(chosen_lengths, np.float64) - np.asarray(rejected_lengths, np.float64)
  if not margins.size or not np.isfinite(margins).all():
    raise ValueError("a reward model is evaluated on at least one pair of finite rewards.")
  correct = _preferred(margins)
  confidence = 1 / (1 + np.exp(-np.abs(margins)))
  return RewardEvaluation(
    n=margins.size,
    accuracy=statistics.proportion(correct),
    ceiling=None if gold_margins is None else statistics.proportion(_preferred(gold_margins)),
    gold_accuracy=None if gold_margins is None else _gold_accuracy(margins, gold_margins),
    accuracy_chosen_longer=statistics.proportion(correct[extra > 0]),
    accuracy_chosen_shorter=statistics.proportion(correct[extra < 0]),
    longer_wins=statistics.proportion(_preferred(extra)),
    length_correlation=_correlation(margins, extra),
    margin=statistics.mean(margins),
    calibration_error=statistics.expected_calibration_error(confidence, correct),
    brier=statistics.brier_score(confidence, correct),
    calibration=statistics.calibration_bins(confidence, correct),
  )


def response_rewards(
  model, variables: Mapping[str, Any], head: Any, samples: sampling.Samples, *, batch_size: int
) -> np.ndarray:
  """Rewards [n] of responses as they were sampled: one cut short is read where it was cut."""
  ends = samples.prompt_lengths + samples.lengths
  segment_ids = (np.arange(samples.tokens.shape[1]) < ends[:, None]).astype(np.int32)
  mask = np.asarray(samples.response_mask, np.float32)
  rewards = np.zeros(len(ends), np.float32)
  for start in range(0, len(ends), batch_size):
    # The last batch is filled with its last row: one shape, one program.
    rows = np.minimum(np.arange(start, start + batch_size), len(ends) - 1)
    arrays = (samples.tokens[rows], segment_ids[rows], mask[rows])
    rewards[rows] = hosts.fetch(_response_scores(model, variables, head, *arrays))
  return rewards


def pair_rewards(
  model, variables: Mapping[str, Any], head: Any, batches: Iterable[Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
  """Rewards [n, 2] and response lengths [n, 2] of (chosen, rejected), without the padding rows.

  batches: preference batches in evaluation order; a row of weight 0 is padding.
  """
  rewards, lengths = [], []
  for batch in batches:
    real = np.asarray(batch["weight"]) > 0
    flat = [
      np.asarray(batch[name]).reshape(-1, batch[name].shape[-1])
      for name in ("tokens", "segment_ids", "response_mask")
    ]
    scores = hosts.fetch(_response_scores(model, variables, head, *flat))
    rewards.append(scores.reshape(-1, 2)[real])
    lengths.append((np.asarray(batch["response_mask"]) > 0).sum(axis=-1)[real])
  if not rewards:
    raise ValueError("a reward model is evaluated on at least one batch of pairs.")
  return np.concatenate(rewards), np.concatenate(lengths)


@functools.partial(jax.jit, static_argnames="model")
def _response_scores(model, variables, head, tokens, segment_ids, response_mask) -> jax.Array:
  return objectives.response_scores(model, variables, head, tokens, segment_ids, response_mask)


def _preferred(margins: np.ndarray) -> np.ndarray:
  """1 where the chosen side is ahead, 0.5 where the two are level, 0 where it is behind."""
  return (np.sign(margins) + 1) / 2


def _gold_accuracy(margins: np.ndarray, gold_margins: np.ndarray) -> Estimate:
  gold = np.sign(np.asarray(gold_margins, np.float64))
  return statistics.proportion(_preferred(margins * gold)[gold != 0])


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
  """Pearson's r; None where either side does not vary."""
  if len(x) < 2 or x.std() == 0 or y.std() == 0:
    return None
  return float(np.corrcoef(x, y)[0, 1])
