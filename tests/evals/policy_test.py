"""Policies are compared prompt by prompt, on tiny random models of the microworld's vocabulary."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from align_jax import models, worlds
from align_jax.errors import InputError
from align_jax.evals import policy, results

SETTINGS = policy.SamplingSettings(max_new_tokens=6, batch_size=8)


def gold(world):
  """The world's judge as a scorer."""
  return lambda prompts, responses: world.gold_rewards(prompts, responses.texts)


@pytest.fixture(scope="module")
def ground():
  world = worlds.Microworld()
  tokenizer = world.tokenizer()
  config = models.ModelConfig(
    vocab_size=len(tokenizer),
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_length=128,
    tie_embeddings=True,
  )
  model = models.Transformer(config)

  def make(name, seed):
    return policy.Policy(name, model, models.init_params(model, jax.random.key(seed)))

  return world, tokenizer, world.prompts(12, "heldout"), make("sft", 0), make("dpo", 1)


def run(ground, ours, theirs, **options):
  world, tokenizer, prompts, *_ = ground
  return policy.evaluate_policy(
    ours, theirs, prompts, tokenizer, gold(world), SETTINGS, judge=world.judge, **options
  )


@pytest.fixture(scope="module")
def moved(ground):
  *_, sft, dpo = ground
  return run(ground, dpo, sft)


def test_equal_policies_answer_alike_and_have_no_kl(ground):
  *_, sft, _ = ground
  found, _ = run(ground, dataclasses.replace(sft, name="its copy"), sft)
  assert not found.is_reference and run(ground, sft, sft)[0].is_reference
  assert found.kl.value == found.kl_k3.value == 0.0
  assert found.score_gain.value == 0.0 and found.score_gain.stderr == 0.0
  assert (found.win_rate.wins, found.win_rate.ties, found.win_rate.losses) == (0, 12, 0)
  assert found.win_rate.rate.value == 0.5
  assert found.length == found.reference_length


def test_a_policy_that_moved_is_measured(ground, moved):
  world, _, prompts, *_ = ground
  found, samples = moved
  texts = [sample.response for sample in samples]
  assert found.score.value == pytest.approx(world.gold_rewards(prompts, texts).mean(), abs=1e-6)
  difference = found.score.value - found.reference_score.value
  assert found.score_gain.value == pytest.approx(difference, abs=1e-9)
  assert found.kl_k3.value > 0 and found.n == len(samples) == 12
  assert (found.policy, found.reference, found.scorer) == ("dpo", "sft", "gold")
  assert 1 <= found.length.value <= 6
  assert set(policy.RATES) <= set(found.families["all"])
  assert sum(f["score"].n for name, f in found.families.items() if name != "all") == 12


def test_kl_is_that_of_the_sampled_tokens(ground, moved):
  _, tokenizer, prompts, sft, dpo = ground
  samples = policy.respond(dpo, prompts, tokenizer, SETTINGS).samples
  ours = policy.response_logprobs(dpo, samples, temperature=1.0, batch_size=5)
  theirs = policy.response_logprobs(sft, samples, temperature=1.0, batch_size=12)
  np.testing.assert_allclose(ours, samples.logprobs, atol=2e-5)  # trainer and sampler agree
  assert moved[0].kl.value == pytest.approx(np.sum(ours - theirs, axis=1).mean(), abs=1e-4)


def test_the_reference_need_not_be_sampled_twice(ground, moved):
  _, tokenizer, prompts, sft, dpo = ground
  answers = policy.respond(sft, prompts, tokenizer, SETTINGS)
  assert run(ground, dpo, sft, reference_responses=answers)[0] == moved[0]


def test_the_evaluation_goes_to_disk_and_back(moved, tmp_path):
  results.save(tmp_path, *moved)
  assert results.load(tmp_path) == moved[0]
  assert results.load_samples(tmp_path) == moved[1]


def test_an_unscored_response_is_counted_not_zeroed(ground):
  world, tokenizer, prompts, sft, dpo = ground

  def scorer(prompts, responses):
    return np.where(np.arange(len(prompts)) == 3, np.nan, 1.0)

  found, samples = policy.evaluate_policy(dpo, sft, prompts, tokenizer, scorer, SETTINGS)
  assert (found.score.value, found.score.n, found.score.unscored) == (1.0, 11, 1)
  assert math.isnan(samples[3].score)
  with pytest.raises(ValueError, match=r"shape \(2,\) for 12 responses"):
    policy.evaluate_policy(dpo, sft, prompts, tokenizer, lambda p, r: np.ones(2), SETTINGS)


def test_k1_and_k3_estimate_the_kl_of_a_known_pair():
  # Two tokens a response, each from p against q over three outcomes: twice the KL of one token.
  p, q = np.array([0.6, 0.3, 0.1]), np.array([0.3, 0.4, 0.3])
  draws = np.random.default_rng(0).choice(3, p=p, size=(100_000, 2))
  k1, k3 = policy.sequence_kl(np.log(p)[draws], np.log(q)[draws], np.ones(draws.shape, bool))
  exact = 2 * np.sum(p * np.log(p / q))
  assert k1.mean() == pytest.approx(exact, abs=0.01)
  assert k3.mean() == pytest.approx(exact, abs=0.01)
  assert k3.min() >= 0 and k3.std() < k1.std()


def test_sequence_kl_ignores_what_is_masked():
  logprobs = np.array([[-1.0, -2.0, np.nan]])
  k1, k3 = policy.sequence_kl(logprobs, np.array([[-3.0, -2.5, 0.0]]), np.array([[1, 1, 0]]))
  assert k1 == pytest.approx([2.5])
  assert k3 == pytest.approx([math.exp(-2) - 1 + 2 + math.exp(-0.5) - 1 + 0.5])


def test_rates_count_only_what_applies():
  @dataclasses.dataclass
  class Verdict:
    correct: bool | None
    harmful: bool = False
    refused: bool = False
    sycophantic: bool | None = None

  verdicts = [Verdict(True), Verdict(None), Verdict(False)]
  table = policy.by_family(["b", "a", "b"], np.array([1.0, 2, 3]), np.ones(3), verdicts)
  assert list(table) == ["all", "a", "b"]
  assert table["all"]["correct"].value == 0.5 and table["all"]["correct"].n == 2
  assert "correct" not in table["a"] and "sycophantic" not in table["all"]
  assert table["b"]["score"].value == 2.0


def test_settings_without_an_answer_are_refused(ground):
  world, tokenizer, _, sft, dpo = ground
  with pytest.raises(InputError, match="temperature must be positive"):
    policy.SamplingSettings(max_new_tokens=4, temperature=0.0)
  with pytest.raises(InputError, match="at least one prompt"):
    policy.evaluate_policy(dpo, sft, [], tokenizer, gold(world), SETTINGS)
