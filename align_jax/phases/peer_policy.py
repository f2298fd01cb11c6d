"""Our side of a policy update: responses that are there already, learned from as those of a rollout."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from align_jax import models, rl, sampling, sharding
from align_jax.phases.peer_config import ADVANTAGES, ANSWERS, CLIP
from align_jax.rl import layout, policy_gradient, rollouts


def settings(chunk: int | None = None) -> rl.PolicyGradientConfig:
  """What TRL's GRPO takes by default: PPO's clipped loss, averaged over the tokens of a step; no KL."""
  return rl.PolicyGradientConfig(
    "grpo", average="token", epochs=1, clip_eps=CLIP, logits_chunk=chunk
  )


def objective(model: models.Transformer, chunk: int | None):
  return policy_gradient.policy_gradient_objective(model, None, settings(chunk), temperature=1.0)


def prepare() -> Callable:
  """What weighs the tokens of a step; no average over a constant length is taken."""
  return functools.partial(policy_gradient.averaged, config=settings(), max_length=0)


def batches(
  sequences: list[dict[str, list[int]]], batch_size: int, *, row_length: int, ways: int
) -> list[dict[str, Any]]:
  """Responses [2 · batch_size, W] as an iteration hands them to its learner, laid out in shared rows.

  Rollouts are as wide as the longest prompt and the longest response of all `sequences` together.
  """
  prompts = max(len(s["prompt_ids"]) for s in sequences)
  width = prompts + max(len(s[name]) for s in sequences for name in ANSWERS)
  found = []
  for start in range(0, len(sequences), batch_size):
    samples = _samples(sequences[start : start + batch_size], width)
    whole = [[np.arange(len(samples.tokens))]]
    (laid,) = layout.lay_out(samples, whole, group=len(ANSWERS), length=row_length, ways=ways)
    found.append(_learned(samples) | {"layout": laid})
  return found


def _samples(sequences: list[dict[str, list[int]]], width: int) -> sampling.Samples:
  answers = [(s["prompt_ids"], s[name]) for s in sequences for name in ANSWERS]
  tokens = np.zeros((len(answers), width), np.int32)
  response = np.zeros(tokens.shape, bool)
  for row, mask, (prompt, answer) in zip(tokens, response, answers):
    end = len(prompt) + len(answer)
    row[:end] = prompt + answer
    mask[len(prompt) : end] = True
  lengths = np.array([len(prompt) for prompt, _ in answers], np.int32)
  zeros = np.zeros(tokens.shape, np.float32)
  return sampling.Samples(tokens, lengths, response, zeros, np.ones(len(answers), bool))


def _learned(samples: sampling.Samples) -> dict[str, np.ndarray]:
  rows = rl.Rollout((), (), samples).batch(whole=True)
  rows = {name: rows[name] for name in ("tokens", "segment_ids", "mask")}
  advantages = np.tile(np.array(ADVANTAGES, np.float32), len(samples.tokens) // len(ANSWERS))
  return rows | {"advantages": rows["mask"] * advantages[:, None]}


def with_old_logprobs(
  batches: list[dict[str, Any]],
  model: models.Transformer,
  params: Any,
  mesh,
  chunk: int | None,
) -> Callable[[], Iterator]:
  """A function that begins the batches anew, with the log-probs of `params`: the policy that "sampled"."""
  score = jax.jit(
    lambda params, rows: rollouts.policy_logprobs(
      model, {"params": params}, rows, temperature=1.0, chunk=chunk
    )[0]
  )
  found = []
  for rows in batches:
    old = score(params, sharding.put_batch(rows, mesh))
    found.append(rows | {"old_logprobs": np.asarray(old) * rows["mask"]})
  return lambda: iter(found)
