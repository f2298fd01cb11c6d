"""Rotary positions and attention against their formulas, written out in NumPy."""

import math

import numpy as np
import pytest

from align_jax import models
from align_jax.models import attention


def normal(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


class TestRope:
  def test_frequencies_fall_geometrically(self):
    freqs = attention.rope_frequencies(8, 10_000.0, None)
    np.testing.assert_allclose(freqs, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)

  def test_linear_scaling_divides_all(self):
    scaled = attention.rope_frequencies(8, 10_000.0, models.RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)

  def test_llama3_scaling_keeps_high_divides_low_and_interpolates(self):
    """L = 8192: wavelengths over 8192 are divided, under 2048 kept, between them mixed."""
    scaling = models.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    freqs = attention.rope_frequencies(64, 500_000.0, None).astype(np.float64)
    scaled = attention.rope_frequencies(64, 500_000.0, scaling)
    kinds = set()
    for before, after in zip(freqs, scaled):
      wavelength = 2 * math.pi / before
      if wavelength > 8192:
        expected, kind = before / 8, "low"
      elif wavelength < 2048:
        expected, kind = before, "high"
      else:
        smooth = (8192 / wavelength - 1) / (4 - 1)
        expected, kind = (1 - smooth) * before / 8 + smooth * before, "mixed"
      kinds.add(kind)
      assert after == pytest.approx(expected, rel=1e-5)
    assert kinds == {"low", "high", "mixed"}

  def test_a_pair_turns_by_its_angle(self):
    freqs = np.array([0.5, 0.1], np.float32)
    table = attention.rope_table(np.array([[3]]), freqs)
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32).reshape(1, 1, 1, 4)
    first, second = (complex(1, 3) * np.exp(1.5j), complex(2, 4) * np.exp(0.3j))
    expected = [first.real, second.real, first.imag, second.imag]
    np.testing.assert_allclose(attention.rotate(x, table).ravel(), expected, rtol=1e-5)


class TestMasks:
  def test_sequence_mask_by_hand(self):
    mask = attention.sequence_mask(4, np.array([[1, 1, 2, 2]]), window=None)[0, 0, 0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(mask, expected)

  def test_a_window_counts_the_token_itself(self):
    mask = attention.sequence_mask(4, None, window=2)[0, 0, 0]
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])

  def test_cache_mask_is_by_position(self):
    mask = attention.cache_mask(np.array([[2], [0]]), slots=4, window=2)[:, 0, 0, 0]
    np.testing.assert_array_equal(mask, [[0, 1, 1, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_by_loops(softcap):
  batch, length, keys, groups, dim = 2, 5, 2, 3, 4
  q, k, v = normal(batch, length, keys, groups, dim), normal(batch, length, keys, dim), None
  v = normal(batch, length, keys, dim) + 1
  mask = np.tril(np.ones((length, length), bool))[None, None, None]
  probs = attention.attention_probs(q, k, mask, scale=0.5, softcap=softcap)
  out = attention.attend(probs, v)
  for b, t, h, g in np.ndindex(batch, length, keys, groups):
    scores = np.array([0.5 * q[b, t, h, g] @ k[b, s, h] for s in range(t + 1)])
    if softcap is not None:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores) / np.exp(scores).sum()
    expected = sum(w * v[b, s, h] for s, w in enumerate(weights))
    np.testing.assert_allclose(out[b, t, h, g], expected, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_is_finite():
  q, k = normal(1, 2, 1, 1, 4), normal(1, 2, 1, 4)
  mask = np.zeros((1, 1, 1, 2, 2), bool)
  assert np.isfinite(attention.attention_probs(q, k, mask, scale=1.0, softcap=None)).all()
