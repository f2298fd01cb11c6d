"""Tests of the distribution tokens are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.sampling import distribution
from align_jax.sampling.distribution import distribution_logprobs, draw, make_decoding

PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = jnp.log(jnp.asarray(PROBS))[None]


def _probs(**settings):
  return np.exp(np.asarray(distribution_logprobs(LOGITS, make_decoding(**settings)))[0])


def _kept(*tokens):
  kept = np.zeros(5)
  kept[list(tokens)] = PROBS[list(tokens)]
  return kept / kept.sum()


@pytest.mark.parametrize(
  "settings, expected",
  [
    ({}, PROBS),
    ({"temperature": 0.5}, PROBS**2 / np.sum(PROBS**2)),
    ({"top_k": 2}, _kept(1, 3)),
    ({"top_k": 9}, PROBS),
    ({"top_p": 0.6}, _kept(1, 3)),  # 0.4 is not enough, 0.65 is
    ({"top_p": 0.66}, _kept(1, 3, 4)),
    ({"top_p": 0.01}, _kept(1)),  # never empty
    ({"top_p": 1.0}, PROBS),
    ({"min_p": 0.45}, _kept(1, 3, 4)),  # at least 0.18
    ({"top_k": 3, "top_p": 0.5}, _kept(1, 3)),  # 0.4 of the 0.85 that are left is below 0.5
  ],
)
def test_by_hand(settings, expected):
  np.testing.assert_allclose(_probs(**settings), expected, rtol=1e-5, atol=1e-7)


def test_ties_are_kept_together():
  logits = jnp.zeros((1, 4))
  for settings in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}):
    np.testing.assert_allclose(
      distribution_logprobs(logits, make_decoding(**settings)), np.log(0.25), rtol=1e-6
    )


def test_frequencies_and_logprobs_of_draws():
  count = 20_000
  decoding = make_decoding(temperature=0.8, top_k=4)
  keys = jax.random.split(jax.random.key(0), count)
  tokens, logprobs = jax.jit(draw)(keys, jnp.broadcast_to(LOGITS, (count, 5)), decoding)
  expected = _probs(temperature=0.8, top_k=4)
  frequencies = np.bincount(tokens, minlength=5) / count
  np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / count))
  np.testing.assert_allclose(np.exp(logprobs), expected[np.asarray(tokens)], rtol=1e-5)


def test_greedy():
  tokens, logprobs = draw(None, LOGITS, make_decoding(temperature=0))
  assert tokens[0] == 1
  np.testing.assert_allclose(logprobs, np.log(0.4), rtol=1e-5)


@pytest.fixture(scope="module")
def wide():
  """Logits and seen tokens of a vocabulary that is no multiple of the lanes."""
  rng = np.random.default_rng(0)
  return rng.normal(0, 3, (6, 1001)).astype(np.float32), rng.random((6, 1001)) < 0.3


@pytest.mark.parametrize("top_k, top_p", [(7, None), (None, 0.8), (40, 0.6), (1, None)])
def test_truncations_equal_a_sort(wide, top_k, top_p):
  logits = wide[0].astype(np.float64)
  for row in logits:
    order = np.argsort(-row)
    if top_k:
      row[order[top_k:]] = -np.inf
    if top_p:
      probs = np.exp(row[order] - row.max())
      mass_before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
      row[order[mass_before >= top_p]] = -np.inf
  expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  found = distribution_logprobs(wide[0], make_decoding(1.0, top_k, top_p))
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_all_of_the_mass_is_every_token(wide):
  found = distribution_logprobs(wide[0], make_decoding(top_p=1.0))
  np.testing.assert_array_equal(found, distribution_logprobs(wide[0], make_decoding()))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_repetition_penalty_divides_or_multiplies_by_sign(wide, temperature):
  logits, seen = wide
  moved = np.where(seen, np.where(logits > 0, logits / 1.5, logits * 1.5), logits)
  plain, penalised = (
    make_decoding(temperature, repetition_penalty=penalty) for penalty in (None, 1.5)
  )
  keys = jax.random.split(jax.random.key(0), 6)
  expected, found = draw(keys, moved, plain), draw(keys, logits, penalised, seen)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
  assert not np.array_equal(found[0], draw(keys, logits, plain)[0])


def test_draws_have_the_logprob_of_their_distribution_and_are_possible(wide):
  decoding = make_decoding(0.9, top_k=50, top_p=0.9)
  logits = jnp.repeat(wide[0], 50, axis=0)
  tokens, logprobs = draw(jax.random.split(jax.random.key(0), 300), logits, decoding)
  every = np.asarray(distribution_logprobs(logits, decoding))
  np.testing.assert_allclose(logprobs, every[np.arange(300), tokens], atol=1e-5)
  assert np.isfinite(logprobs).all()
  np.testing.assert_allclose(np.exp(every).sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.999999, 1 - 2**-23])
def test_the_ends_of_the_unit_interval_hit_possible_tokens(uniform):
  weights = np.zeros((1, 300), np.float32)
  weights[0, [5, 133, 140, 299]] = 1, 2, 3, 1e-6
  blocks = distribution._blocks(jnp.asarray(weights))
  token = distribution._invert(blocks, blocks.sum(-2), jnp.array([uniform], jnp.float32))
  assert weights[0, int(token[0])] > 0


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"temperature": -1.0}, "temperature must not be negative"),
    ({"temperature": float("nan")}, "temperature must not be negative"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_p": 0.0}, "top_p must be in"),
    ({"min_p": 1.5}, "min_p must be in"),
    ({"temperature": 0, "top_p": 0.9}, "would be ignored"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    make_decoding(**settings)
