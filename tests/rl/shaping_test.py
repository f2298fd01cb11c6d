"""Tests of what is done to scores before anything learns from them."""

import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.rl import shaping

SCORES, FINISHED = np.array([1.0, 2.0, 6.0], np.float32), np.array([True, False, True])
LENGTHS = np.array([4, 10, 8], np.float32)


def _shape(moments=None, **settings):
  moments = shaping.Moments.empty() if moments is None else moments
  scores, moments = shaping.shape_scores(
    SCORES, FINISHED, LENGTHS, moments, shaping.ShapingConfig(**settings), max_length=10
  )
  return np.asarray(scores), moments


def test_missing_eos_replaces_or_lowers():
  np.testing.assert_allclose(_shape()[0], SCORES)
  np.testing.assert_allclose(_shape(missing_eos_score=-1.0)[0], [1, -1, 6])
  np.testing.assert_allclose(_shape(missing_eos_penalty=5.0)[0], [1, -3, 6])


def test_a_response_near_the_limit_pays_for_its_length():
  np.testing.assert_allclose(_shape(overlong_cache=4)[0], [1, 2 - 1, 6 - 0.5])
  np.testing.assert_allclose(_shape(overlong_cache=4, missing_eos_score=-1.0)[0], [1, -2, 5.5])


def test_the_order_is_penalty_then_normalise_then_clip():
  penalised = np.array([1.0, -1.0, 6.0])
  normal = (penalised - penalised.mean()) / penalised.std()
  scores, moments = _shape(missing_eos_score=-1.0, normalise=True)
  np.testing.assert_allclose(scores, normal, rtol=1e-4)
  np.testing.assert_allclose(moments.mean, penalised.mean(), rtol=1e-6)
  clipped, _ = _shape(missing_eos_score=-1.0, normalise=True, clip=0.9)
  np.testing.assert_allclose(clipped, np.clip(normal, -0.9, 0.9), rtol=1e-4)


def test_running_moments_are_those_of_all_batches_together():
  rng = np.random.default_rng(0)
  batches = [rng.normal(3.0, 2.0, n).astype(np.float32) for n in (4, 7, 1, 16)]
  moments = shaping.Moments.empty()
  for batch in batches:
    moments = shaping.update_moments(moments, batch)
  everything = np.concatenate(batches)
  np.testing.assert_allclose(moments.count, everything.size)
  np.testing.assert_allclose(moments.mean, everything.mean(), rtol=1e-5)
  np.testing.assert_allclose(moments.std, everything.std(), rtol=1e-5)


def test_a_first_batch_of_equal_scores_normalises_to_zero():
  moments = shaping.Moments.empty()
  scores, _ = shaping.shape_scores(
    np.full(3, 7.0),
    np.ones(3, bool),
    LENGTHS,
    moments,
    shaping.ShapingConfig(normalise=True),
    max_length=10,
  )
  np.testing.assert_array_equal(scores, 0.0)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}, "replaces"),
    ({"missing_eos_penalty": -1.0}, "must not be negative"),
    ({"clip": 0.0}, "clip must be positive"),
    ({"overlong_cache": 0}, "at least 1"),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    shaping.ShapingConfig(**settings)
