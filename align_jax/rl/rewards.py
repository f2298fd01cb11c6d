"""Rewards as composable functions, each logged by its name."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.rl.rollouts import Rollout
from align_jax.training import objectives


@dataclasses.dataclass(frozen=True)
class Reward:
  """A named term of the score; it is logged as `score/<name>` before it is weighted."""

  name: str
  function: Callable[[Rollout], np.ndarray]  # -> [B]
  weight: float = 1.0


def text_reward(
  name: str,
  function: Callable[[Sequence[Any], Sequence[str]], np.ndarray],
  *,
  weight: float = 1.0,
) -> Reward:
  """A reward from any Python function (prompts, responses) -> [B], such as a gold judge."""
  return Reward(name, lambda rollout: function(rollout.prompts, rollout.texts), weight)


def model_reward(
  name: str,
  model: models.Transformer,
  weights: Any,
  *,
  weight: float = 1.0,
  mesh: jax.sharding.Mesh | None = None,
) -> Reward:
  """A reward model {"trunk", "head"}, read at the last response token (found by position).

  Rows are split over the `data` and `fsdp` axes of `mesh`, if there is one.
  """
  score = jax.jit(functools.partial(_model_scores, model))

  def function(rollout: Rollout) -> np.ndarray:
    rows = rollout.tokens, rollout.segment_ids, rollout.response_mask
    return np.asarray(score(weights, *(rows if mesh is None else sharding.put_batch(rows, mesh))))

  return Reward(name, function, weight)


def _model_scores(model, weights, tokens, segment_ids, response_mask):
  return objectives.response_scores(
    model, {"params": weights["trunk"]}, weights["head"], tokens, segment_ids, response_mask
  )


def score(rewards: Sequence[Reward], rollout: Rollout) -> dict[str, np.ndarray]:
  """Every reward by its name, and under "" their weighted sum; all [B] float32.

  Raises:
    InputError: if there is none, names repeat, or a function returns another shape or a NaN.
  """
  names = [reward.name for reward in rewards]
  if not names or len(set(names)) < len(names):
    raise InputError(f"rewards must be named, each differently, and at least one; got {names}")
  scores = {reward.name: _checked(reward, rollout) for reward in rewards}
  return scores | {"": sum(reward.weight * scores[reward.name] for reward in rewards)}


def _checked(reward: Reward, rollout: Rollout) -> np.ndarray:
  values = np.asarray(reward.function(rollout), np.float32)
  if values.shape != (len(rollout.texts),):
    raise InputError(
      f"reward '{reward.name}' must return one number for each of {len(rollout.texts)} responses, "
      f"got shape {values.shape}"
    )
  if not np.all(np.isfinite(values)):
    row = int(np.argmin(np.isfinite(values)))
    raise InputError(f"reward '{reward.name}' is {values[row]} for response {rollout.texts[row]!r}")
  return values
