"""Tests of the distribution tokens are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.errors import InputError
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


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"temperature": -1.0}, "temperature must not be negative"),
    ({"temperature": float("nan")}, "temperature must not be negative"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_p": 0.0}, "top_p must be in"),
    ({"min_p": 1.5}, "min_p must be in"),
    ({"temperature": 0, "top_p": 0.9}, "would be ignored"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    make_decoding(**settings)
