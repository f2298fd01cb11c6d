"""The scale of a reward: mean 0, and deviation 1 if asked for, over reference replies."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from align_jax import data
from align_jax.errors import InputError
from align_jax.phases import records, workspace
from align_jax.phases.reward_config import NormaliseSection, RewardConfig
from align_jax.phases.reward_heads import RewardHead
from align_jax.training import objectives


def read_reference(section: NormaliseSection | None) -> list[data.Rating]:
  """The last replies of the demonstrations, as answers to be scored; none without a section."""
  if section is None:
    return []
  found = records.read(section.source, "demonstrations", columns=section.columns, limit=section.n)
  return [
    data.Rating(record.messages[:-1], record.messages[-1]["content"], {"": 0.0}, 1.0, record.source)
    for record in found
  ]


def scaled(
  trained: Any,
  *,
  config: RewardConfig,
  loaded: workspace.Loaded,
  head: RewardHead,
  reference: list[data.Rating],
) -> RewardHead:
  """The head with the shift and scale (population) that its rewards of the reference have."""
  rows = min(config.data.batch_size, len(reference))
  plan = data.Batching(rows, epochs=1, shuffle=False, pad_last=True)
  batches = list(
    data.rating_batches(reference, loaded.tokenizer, plan, ("",), length=config.data.length)
  )
  shift, scale = [], []
  for params, reward in workspace.reward_models(loaded.params, trained, config.model.lora, head):
    values = _scores(loaded.model, params, reward, batches)
    shift.append(float(values.mean()))
    scale.append(float(values.std()) if config.normalise.std else 1.0)
  if not min(scale) > 1e-6:
    raise InputError("normalise: a reward is the same for all reference replies")
  return dataclasses.replace(head, shift=tuple(shift), scale=tuple(scale))


def _scores(model, params, head, batches) -> np.ndarray:
  names = ("tokens", "segment_ids", "response_mask")
  score = jax.jit(functools.partial(objectives.response_scores, model))
  values = [
    np.asarray(score({"params": params}, head, *(batch[k] for k in names)))[batch["weight"] > 0]
    for batch in batches
  ]
  return np.concatenate(values).astype(np.float64)
