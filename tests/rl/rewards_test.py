"""Tests of the reward functions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from align_jax import models, sampling
from align_jax.errors import InputError
from align_jax.rl import rewards
from align_jax.rl.rollouts import Rollout

LENGTHS, NEW = (3, 5, 2), (4, 2, 3)


def _rollout(pad=0, width=12, seed=0):
  """Three rows of prompt, response and padding; token 1 is the EOS."""
  rng = np.random.default_rng(seed)
  tokens = np.full((3, width), pad, np.int32)
  mask = np.zeros((3, width), bool)
  for row, (prompt, new) in enumerate(zip(LENGTHS, NEW)):
    tokens[row, : prompt + new] = rng.integers(2, 64, prompt + new)
    tokens[row, prompt + new - 1] = 1
    mask[row, prompt : prompt + new] = True
  samples = sampling.Samples(
    tokens, np.array(LENGTHS), mask, np.zeros_like(tokens, float), np.ones(3, bool)
  )
  return Rollout(["p"] * 3, ["a b", "b", "a a a"], samples)


@pytest.fixture(scope="module")
def reward_model(tiny_model):
  model, params = tiny_model
  head = models.init_scalar_head(jax.random.key(1), model.config.embed_dim)
  return model, {"trunk": params, "head": head}


def _count(letter, prompts, texts):
  return np.array([text.count(letter) for text in texts])


def test_terms_are_weighted_and_kept_by_name():
  terms = [
    rewards.text_reward("a", functools.partial(_count, "a"), weight=2.0),
    rewards.text_reward("b", functools.partial(_count, "b"), weight=-0.5),
  ]
  scores = rewards.score(terms, _rollout())
  np.testing.assert_allclose(scores["a"], [1, 0, 3])
  np.testing.assert_allclose(scores["b"], [1, 1, 0])
  np.testing.assert_allclose(scores[""], [1.5, -0.5, 6.0])


def test_a_reward_model_is_read_at_the_last_response_token(reward_model):
  model, weights = reward_model
  scores = rewards.model_reward("rm", model, weights).function(_rollout())
  forward = jax.jit(
    lambda tokens: model.apply({"params": weights["trunk"]}, tokens, method="hidden")
  )
  hidden = np.asarray(forward(_rollout().tokens))
  for row in range(3):
    last = hidden[row, LENGTHS[row] + NEW[row] - 1]
    expected = last @ np.asarray(weights["head"]["kernel"]) + weights["head"]["bias"]
    np.testing.assert_allclose(scores[row], expected, rtol=1e-4, atol=1e-5)


def test_padding_that_is_the_eos_does_not_move_the_reading(reward_model):
  score = rewards.model_reward("rm", *reward_model).function
  plain = score(_rollout(pad=0))
  np.testing.assert_allclose(score(_rollout(pad=1)), plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(score(_rollout(pad=9)), plain, rtol=1e-5, atol=1e-6)


def test_a_score_depends_neither_on_its_batch_nor_on_noise_in_the_padding(reward_model):
  """peers 3.29, 3.30: alone, in another order, and with padding shuffled over the vocabulary."""
  score = rewards.model_reward("rm", *reward_model).function
  rollout = _rollout()
  expected = score(rollout)

  def taken(rows, samples=rollout.samples):
    fields = {f.name: getattr(samples, f.name)[rows] for f in dataclasses.fields(samples)}
    return dataclasses.replace(rollout, samples=dataclasses.replace(samples, **fields))

  for rows in ([0], [1], [2], [2, 0, 1], [1, 1, 1]):
    np.testing.assert_allclose(score(taken(rows)), expected[rows], rtol=1e-5, atol=1e-6)
  noise = np.random.default_rng(1).integers(0, 64, rollout.tokens.shape)
  tokens = np.where(rollout.segment_ids > 0, rollout.tokens, noise).astype(np.int32)
  noisy = dataclasses.replace(rollout.samples, tokens=tokens)
  np.testing.assert_allclose(score(taken([0, 1, 2], noisy)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "terms, message",
  [
    ([], "at least one"),
    ([rewards.text_reward("x", lambda p, t: np.zeros(3))] * 2, "each differently"),
    ([rewards.text_reward("x", lambda p, t: np.zeros(2))], "'x' must return one number for each"),
    ([rewards.text_reward("x", lambda p, t: [0, np.nan, 0])], "'x' is nan for response 'b'"),
  ],
)
def test_bad_rewards_are_named(terms, message):
  with pytest.raises(InputError, match=message):
    rewards.score(terms, _rollout())
