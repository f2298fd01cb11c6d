"""Weights of mixtures (techniques A2) and the draws they give."""

import numpy as np
import pytest

from align_jax import data
from align_jax.data import mixture
from align_jax.errors import InputError


def prompts(name, count):
  return [data.Prompt(({"role": "user", "content": name},), {"i": i}) for i in range(count)]


def test_examples_proportional_weights_have_their_golden_values():
  weights = data.mixture_weights((100, 3000, 30000, 10**6), cap=3000)
  np.testing.assert_allclose(weights, (0.010989, 0.329670, 0.329670, 0.329670), atol=5e-7)


def test_temperature_goes_from_sizes_to_even():
  sizes = (1, 9, 90)
  np.testing.assert_allclose(data.mixture_weights(sizes), (0.01, 0.09, 0.9))
  np.testing.assert_allclose(
    data.mixture_weights(sizes, temperature=2.0), np.sqrt(sizes) / np.sum(np.sqrt(sizes))
  )
  np.testing.assert_allclose(data.mixture_weights(sizes, temperature=1e9), [1 / 3] * 3, atol=1e-8)
  np.testing.assert_allclose(data.mixture_weights(sizes, cap=1), [1 / 3] * 3)


def test_chi_square_of_a_hundred_thousand_draws():
  """Dealt out evenly, so far below the 16.27 (p = 0.001, 3 degrees of freedom) of random draws."""
  weights = data.mixture_weights((100, 3000, 30000, 10**6), cap=3000)
  component, _ = mixture.interleave(np.arange(100_000), weights)
  expected = 100_000 * np.array(weights)
  observed = np.bincount(component, minlength=4)
  assert ((observed - expected) ** 2 / expected).sum() < 0.01
  assert np.abs(observed - expected).max() <= 1


def test_every_stretch_has_its_shares_and_no_draw_is_lost():
  weights = (0.5, 0.3, 0.2)
  component, draw = mixture.interleave(np.arange(1000), weights)
  for c, weight in enumerate(weights):
    np.testing.assert_array_equal(draw[component == c], np.arange((component == c).sum()))
    counts = np.cumsum(component == c)
    assert np.abs(counts - weight * np.arange(1, 1001)).max() < 2


def test_a_position_is_a_position_however_far_and_alone():
  weights = (0.5, 0.3, 0.2)
  whole = mixture.interleave(np.arange(2000), weights)
  part = mixture.interleave(np.arange(1234, 1300), weights)
  for a, b in zip(whole, part):
    np.testing.assert_array_equal(a[1234:1300], b)
  far, _ = mixture.interleave(np.arange(10**12, 10**12 + 1000), weights)
  np.testing.assert_allclose(np.bincount(far) / 1000, weights, atol=0.002)


def test_the_batches_of_a_mixture_have_its_weights(tokenizer):
  """Checked from what is emitted: shares, and every record of a set before any comes again."""
  sets = {"x": prompts("a", 5), "y": prompts("b", 40)}
  mixed = data.mix(sets, weights={"x": 0.25, "y": 0.75})
  batches = data.prompt_batches(mixed, tokenizer, length=16, batch_size=20, seed=1)
  index = np.concatenate([next(batches)["index"] for _ in range(8)])
  assert (index < 5).sum() == 40
  assert sorted(index[index < 5][:5]) == [0, 1, 2, 3, 4]
  assert sorted(index[index >= 5][:40]) == list(range(5, 45))
  a = tokenizer.convert_tokens_to_ids("a")
  again = data.prompt_batches(mixed, tokenizer, length=16, batch_size=20, seed=1)
  batch = next(again)
  np.testing.assert_array_equal((batch["tokens"] == a).any(axis=1), batch["index"] < 5)


def test_an_epoch_of_a_mixture_is_as_many_draws_as_records(tokenizer):
  mixed = data.mix({"x": prompts("a", 5), "y": prompts("b", 35)})
  batches = list(data.prompt_batches(mixed, tokenizer, length=16, batch_size=10, epochs=1))
  assert sorted(np.concatenate([b["index"] for b in batches])) == list(range(40))


def test_a_set_left_empty_by_dropping_is_named(tokenizer):
  long = [data.Prompt(({"role": "user", "content": "a " * 50},))]
  mixed = data.mix({"short": prompts("a", 3), "long": long})
  with pytest.raises(InputError, match="all records of 'long' were dropped"):
    data.prompt_batches(mixed, tokenizer, length=16, batch_size=2)


@pytest.mark.parametrize(
  "options, complaint",
  [
    ({"weights": {"x": 1.0}}, r"weights name \['x'\], the sets are \['x', 'y'\]"),
    ({"weights": {"x": 1.0, "y": float("nan")}}, "weights must be finite and above 0"),
    ({"weights": {"x": 1.0, "y": 0.0}}, "weights must be finite and above 0"),
    ({"weights": {"x": 1.0, "y": 1.0}, "cap": 3}, "give weights, or cap and temperature, not both"),
    ({"temperature": 0.0}, "the temperature must be above 0"),
    ({"cap": 0}, "the cap at least 1"),
  ],
)
def test_a_bad_mixture_is_refused(options, complaint):
  with pytest.raises(InputError, match=complaint):
    data.mix({"x": prompts("a", 1), "y": prompts("b", 1)}, **options)


def test_an_empty_set_is_refused():
  with pytest.raises(InputError, match="mixture: 'x' is empty"):
    data.mix({"x": [], "y": prompts("b", 1)})
