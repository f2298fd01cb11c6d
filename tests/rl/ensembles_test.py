"""Ensembles of reward models: their golden numbers, and what they do and do not protect from.

The toy (Coste et al. 2023 in small): 200 questions with 1,024 answers; a fiftieth are exploits of gold −2,
each of which fools any one of five reward models with probability 0.3, by 7.
"""

import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.evals import best_of_n, overoptimization
from align_jax.rl.rewards import combine_members

SIZES = (1, 4, 16, 64, 256, 1024)
QUESTIONS, ANSWERS, MEMBERS = 200, 1024, 5


def toy(seed=0, *, shared=False):
  """(members [5, Q, A], gold [Q, A], exploits [Q, A]); `shared`: one exploit fools all or none."""
  rng = np.random.default_rng(seed)
  shape = QUESTIONS, ANSWERS
  exploits = rng.random(shape) < 0.02
  gold = np.where(exploits, -2.0, rng.normal(size=shape))
  fooled = rng.random((MEMBERS, *shape)) < 0.3
  if shared:
    fooled[:] = fooled[0]
  members = gold + 0.5 * rng.normal(size=(MEMBERS, *shape)) + 7.0 * (fooled & exploits)
  return members, gold, exploits


def gold_of_best(proxy, gold):
  """Mean gold reward of the best of n by proxy, for every n of SIZES."""
  return np.array([best_of_n.best_of_n_scores(proxy, gold, n).mean() for n in SIZES])


def test_golden_numbers():
  r = np.array([1.0, 2.0, 3.0, 4.0, 10.0])[:, None]
  assert combine_members(r, "mean") == 4
  assert combine_members(r, "min") == 1
  assert combine_members(r, "uwo", 0.5) == pytest.approx(-1.0, abs=1e-12)  # ddof 0: variance 10
  assert r.var(ddof=1) == 12.5 and 4 - 0.5 * 12.5 == -2.25  # what it must not be


def test_a_coefficient_of_zero_is_the_mean_and_not_a_default():
  members = np.random.default_rng(0).normal(size=(4, 3, 7))
  np.testing.assert_array_equal(combine_members(members, "uwo", 0.0), members.mean(axis=0))
  with pytest.raises(InputError, match="needed there"):
    combine_members(members, "uwo")


@pytest.mark.parametrize("combine, coef", [("max", None), ("mean", 0.5), ("uwo", -0.1)])
def test_combinations_that_mean_nothing_are_refused(combine, coef):
  with pytest.raises(InputError):
    combine_members(np.zeros((2, 3)), combine, coef)


def test_a_single_model_and_the_mean_are_over_optimised():
  members, gold, _ = toy()
  single, mean = (gold_of_best(proxy, gold) for proxy in (members[0], members.mean(axis=0)))
  for found in (single, mean):
    assert 0 < found.argmax() < len(SIZES) - 1 and found[-1] < found.max() - 0.3
  assert single.argmax() < mean.argmax()
  assert mean.max() > single.max() + 0.3 and mean[-1] > single[-1] + 1


@pytest.mark.parametrize("combine, coef", [("min", None), ("uwo", 0.5)])
def test_the_worst_case_and_the_variance_are_not(combine, coef):
  members, gold, _ = toy()
  found = gold_of_best(combine_members(members, combine, coef), gold)
  assert (np.diff(found) > -0.1).all() and found[-1] > 2.5
  assert (found >= gold_of_best(members.mean(axis=0), gold) - 0.05).all()


def test_a_small_coefficient_is_between_the_mean_and_a_large_one():
  members, gold, _ = toy()
  last = [gold_of_best(combine_members(members, "uwo", c), gold)[-1] for c in (0.0, 0.1, 0.5)]
  assert last[0] < last[1] < last[2]


def test_members_that_are_fooled_together_fail_like_one():
  """The control: the same exploits work on all, and the worst case of five falls for them as one does."""
  members, gold, _ = toy(shared=True)
  single = gold_of_best(members[0], gold)
  for combine, coef in (("mean", None), ("min", None), ("uwo", 0.5)):
    found = gold_of_best(combine_members(members, combine, coef), gold)
    assert SIZES[found.argmax()] < 64 and found[-1] < -0.5, combine
  assert single[-1] < -0.5


@pytest.mark.parametrize("combine, coef", [("min", None), ("uwo", 0.5)])
def test_offsets_and_scales_of_members_must_be_taken_out(combine, coef):
  """A member shifted down is the minimum everywhere; one that is stretched is the variance."""
  members, gold, _ = toy()
  skewed = members * np.array([1, 1, 1, 1, 30.0])[:, None, None]
  skewed[0] -= 1000
  raw = gold_of_best(combine_members(skewed, combine, coef), gold)
  fair = gold_of_best(
    combine_members(overoptimization.standardise_members(skewed), combine, coef), gold
  )
  equal = gold_of_best(
    combine_members(overoptimization.standardise_members(members), combine, coef), gold
  )
  np.testing.assert_allclose(fair, equal, atol=1e-9)
  assert (np.diff(fair) > -0.1).all() and fair[-1] > 2.3
  assert raw[-1] < fair[-1] - 3
  if combine == "min":  # the member that was shifted decides alone
    np.testing.assert_allclose(raw, gold_of_best(members[0], gold), atol=1e-12)


def test_the_mean_does_not_care_about_offsets():
  members, gold, _ = toy()
  shifted = members + np.arange(MEMBERS)[:, None, None] * 50
  np.testing.assert_allclose(
    gold_of_best(shifted.mean(axis=0), gold), gold_of_best(members.mean(axis=0), gold), atol=1e-12
  )


def test_members_are_standardised_on_samples_of_the_initial_policy():
  rng = np.random.default_rng(1)
  reference = rng.normal(3.0, 2.0, size=(2, 400))
  found = overoptimization.standardise_members(np.array([[3.0], [5.0]]), reference)
  expected = (np.array([3.0, 5.0]) - reference.mean(axis=1)) / reference.std(axis=1)
  np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12)
  with pytest.raises(ValueError, match="cannot be standardised"):
    overoptimization.standardise_members(np.ones((2, 4)))


def test_disagreement_finds_the_prompts_with_exploits():
  members, _, exploits = toy()
  found = overoptimization.disagreement(members)
  expected = [np.mean([np.std(members[:, q, a]) for a in range(ANSWERS)]) for q in range(3)]
  np.testing.assert_allclose(found[:3], expected, rtol=1e-12)
  many = exploits.sum(axis=1)
  assert np.corrcoef(found, many)[0, 1] > 0.7
  np.testing.assert_allclose(overoptimization.disagreement(members[[0, 0, 0]]), 0, atol=1e-12)


def test_the_correlation_of_errors_tells_diverse_members_from_copies():
  members, gold, _ = toy()
  apart = ~np.eye(MEMBERS, dtype=bool)
  diverse = overoptimization.error_correlations(members, gold)
  copies = overoptimization.error_correlations(toy(shared=True)[0], gold)
  np.testing.assert_allclose(np.diag(diverse), 1, rtol=1e-12)
  assert diverse[apart].max() < 0.25 and copies[apart].min() > 0.45


@pytest.mark.parametrize("planted", [0.0, 0.5, 0.9])
def test_a_planted_correlation_of_errors_is_found(planted):
  """Errors √ρ · common + √(1−ρ) · own, on gold at any scale and offset of a member and of a prompt."""
  rng = np.random.default_rng(2)
  gold, common = rng.normal(size=(2, 100, 200))
  own = rng.normal(size=(3, 100, 200))
  errors = np.sqrt(planted) * common + np.sqrt(1 - planted) * own
  scales = np.array([1.0, 7.0, 0.1])[:, None, None]
  members = scales * (gold + errors) + 5 * rng.normal(size=(3, 100, 1))
  found = overoptimization.error_correlations(members, gold)
  np.testing.assert_allclose(found[~np.eye(3, dtype=bool)], planted, atol=0.03)


@pytest.mark.parametrize(
  "members, gold, message",
  [
    (np.zeros((2, 6)), np.zeros((2, 3)), "members must be"),
    (np.zeros((2, 2, 3)), np.zeros((3, 2)), "members must be"),
    (np.arange(12.0).reshape(2, 2, 3) ** 2, np.arange(6.0).reshape(2, 3) ** 2, "without errors"),
  ],
)
def test_bad_members_are_refused(members, gold, message):
  if message == "without errors":
    members = np.stack([gold, 2 * gold])
  with pytest.raises(ValueError, match=message):
    overoptimization.error_correlations(members, gold)
