"""Tests of the reward functions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from align_jax import data, models, sampling
from align_jax.errors import InputError
from align_jax.rl import rewards, verifiers
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


def _fixed(name, values, **options):
  return rewards.text_reward(name, lambda p, t: np.asarray(values, float), **options)


def test_the_ways_of_an_ensemble_on_the_golden_numbers():
  """techniques E2: r = (1, 2, 3, 4, 10) has mean 4, min 1, variance 10, and UWO(0.5) = -1."""
  members = [_fixed(f"m{k}", [r, 0, -r]) for k, r in enumerate((1, 2, 3, 4, 10))]
  expected = {"mean": [4, 0, -4], "min": [1, 0, -10], "uwo": [-1, 0, -9]}
  for combine, values in expected.items():
    coef = 0.5 if combine == "uwo" else None
    terms = rewards.ensemble_reward("e", members, combine=combine, variance_coef=coef, weight=2.0)
    scores = rewards.score(terms, _rollout())
    np.testing.assert_allclose(scores["e"], values, atol=1e-6)
    np.testing.assert_allclose(scores["e/spread"], [np.sqrt(10), 0, np.sqrt(10)], rtol=1e-6)
    np.testing.assert_allclose(scores[""], 2 * np.array(values), atol=1e-6)


def test_a_coefficient_of_zero_is_the_mean_and_not_a_default():
  members = [_fixed("a", [1, 2, 3]), _fixed("b", [5, 5, 5])]
  term, _ = rewards.ensemble_reward("e", members, combine="uwo", variance_coef=0.0)
  np.testing.assert_allclose(term.function(_rollout()), [3, 3.5, 4])


def test_members_are_read_once_a_rollout():
  calls = []
  members = [
    rewards.text_reward(name, lambda p, t: calls.append(0) or np.zeros(3)) for name in ("a", "b")
  ]
  terms = rewards.ensemble_reward("e", members)
  rewards.score(terms, _rollout())
  assert len(calls) == 2
  rewards.score(terms, _rollout())
  assert len(calls) == 4


def test_a_standardised_reward_has_mean_0_and_variance_1_on_its_reference():
  reference = dataclasses.replace(_rollout(), texts=["a", "aaa", "aaaaaaaa"])
  plain = rewards.text_reward("a", functools.partial(_count, "a"), weight=3.0)
  reward = rewards.standardised(plain, reference)
  values = reward.function(reference)
  np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=1e-6)
  assert (reward.name, reward.weight) == ("a", 3.0)
  other = np.array([1, 0, 3])
  expected = (other - np.mean([1, 3, 8])) / np.std([1, 3, 8])
  np.testing.assert_allclose(reward.function(_rollout()), expected, rtol=1e-6)
  shifted = rewards.text_reward("b", lambda p, t: 5 * _count("a", p, t) - 100)
  np.testing.assert_allclose(
    rewards.standardised(shifted, reference).function(_rollout()), expected, rtol=1e-5
  )


def test_min_of_members_with_offsets_needs_them_standardised():
  """A member far below the others is the minimum everywhere, whatever the others say."""
  members = [_fixed("a", [0, 1, 2]), _fixed("b", [-98, -100, -99])]
  raw, _ = rewards.ensemble_reward("e", members, combine="min")
  np.testing.assert_allclose(raw.function(_rollout()), [-98, -100, -99])
  fair, _ = rewards.ensemble_reward(
    "e", [rewards.standardised(m, _rollout()) for m in members], combine="min"
  )
  root = np.sqrt(1.5)
  np.testing.assert_allclose(fair.function(_rollout()), [-root, -root, 0], atol=1e-6)


def test_lengths_count_the_tokens_that_were_sampled():
  rollout = _rollout()
  plain = rewards.length_reward("n", weight=-0.01)
  np.testing.assert_allclose(plain.function(rollout), NEW)
  np.testing.assert_allclose(rewards.score([plain], rollout)[""], -0.01 * np.array(NEW))
  np.testing.assert_allclose(
    rewards.length_reward("n", target=2).function(rollout), [0, 1, 0.5]
  )  # of 4, 2 and 3 tokens


def _record(**meta):
  return data.Prompt(({"role": "user", "content": "?"},), meta, "f.jsonl:7")


def test_verified_rewards_read_each_prompts_own_reference():
  prompts = [_record(answer="1"), _record(answer=2), _record(answer="#### 3")]
  rollout = Rollout(prompts, ["It is 1", "1", "3.0"], None)
  reward = rewards.verified_reward("n", verifiers.numeric, field="answer", weight=2.0)
  np.testing.assert_array_equal(rewards.score([reward], rollout)[""], [2, 0, 2])
  form = rewards.verified_reward("w", functools.partial(verifiers.words, at_least=2))
  np.testing.assert_array_equal(form.function(rollout), [1, 0, 0])


@pytest.mark.parametrize(
  "meta, message",
  [
    ({}, "f.jsonl:7: field 'answer' is missing"),
    ({"answer": None, "id": 1}, "f.jsonl:7: field 'answer' is missing .found: 'answer', 'id'"),
    ({"answer": True}, "f.jsonl:7: field 'answer' must be a text or a number, not True"),
    ({"answer": ["4"]}, "f.jsonl:7: field 'answer' must be a text or a number"),
    ({"answer": "four"}, "f.jsonl:7: field 'answer': no single number in"),
  ],
)
def test_a_reference_that_cannot_be_used_is_named(meta, message):
  reward = rewards.verified_reward("n", verifiers.numeric, field="answer")
  with pytest.raises(InputError, match=message):
    reward.function(Rollout([_record(**meta)], ["4"], None))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda m: rewards.ensemble_reward("e", m, combine="max"), "combine must be one of mean"),
    (lambda m: rewards.ensemble_reward("e", m[:1]), "two members or more"),
    (lambda m: rewards.ensemble_reward("e", [*m, _fixed("c", [0] * 3, weight=2.0)]), "of weight 1"),
    (lambda m: rewards.ensemble_reward("e", m, combine="uwo"), "variance_coef is for"),
    (lambda m: rewards.ensemble_reward("e", m, variance_coef=0.5), "variance_coef is for"),
    (
      lambda m: rewards.ensemble_reward("e", m, combine="uwo", variance_coef=-1.0),
      "never negative",
    ),
    (lambda m: rewards.length_reward("n", target=0), "at least 1 token"),
    (lambda m: rewards.standardised(_fixed("k", [7, 7, 7]), _rollout()), "'k' cannot be standard"),
  ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
  with pytest.raises(InputError, match=message):
    make([_fixed("a", [0, 1, 2]), _fixed("b", [1, 1, 1])])
