"""Tests of the masked reductions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import masked

X = np.array([[1.0, 5.0, 2.0], [4.0, -3.0, 9.0]], np.float32)
HOLES = np.array([[1, 0, 1], [0, 1, 1]], np.float32)
ON = np.array([1.0, 2.0, -3.0, 9.0], np.float32)


def test_reductions_equal_slicing():
  np.testing.assert_allclose(masked.masked_sum(X, HOLES), ON.sum())
  np.testing.assert_allclose(masked.masked_mean(X, HOLES), ON.mean())
  np.testing.assert_allclose(masked.masked_mean(X, HOLES.astype(bool)), ON.mean())
  np.testing.assert_allclose(masked.masked_mean(X, HOLES, axis=1), [1.5, 3.0])
  np.testing.assert_allclose(masked.masked_mean(X, np.ones(3)), X.mean(), rtol=1e-6)


def test_weights_are_weights():
  weights = np.array([[0.5, 0.0, 2.0], [0.0, 1.0, 0.25]], np.float32)
  np.testing.assert_allclose(
    masked.masked_mean(X, weights), np.average(X, weights=weights), rtol=1e-6
  )


def test_masked_out_values_never_leak():
  poisoned = np.where(HOLES > 0, X, np.nan)
  np.testing.assert_allclose(masked.masked_mean(poisoned, HOLES), ON.mean())
  np.testing.assert_allclose(masked.masked_whiten(poisoned, HOLES), masked.masked_whiten(X, HOLES))
  gradient = jax.grad(lambda x: masked.masked_mean(x, HOLES))(jnp.asarray(poisoned))
  np.testing.assert_allclose(gradient, HOLES / 4.0)


def test_empty_mask_is_zero():
  nothing = np.zeros_like(X)
  assert masked.masked_mean(X, nothing) == 0.0
  np.testing.assert_array_equal(masked.masked_mean(X, nothing, axis=1), [0.0, 0.0])
  np.testing.assert_array_equal(masked.masked_whiten(X, nothing), nothing)
  gradient = jax.grad(lambda x: masked.masked_mean(x, nothing))(X)
  np.testing.assert_array_equal(gradient, nothing)


def test_whiten():
  whitened = np.asarray(masked.masked_whiten(X, HOLES))
  np.testing.assert_allclose(whitened[HOLES > 0], (ON - ON.mean()) / ON.std(), rtol=1e-5)
  np.testing.assert_array_equal(whitened[HOLES == 0], 0.0)
  kept = np.asarray(masked.masked_whiten(X, HOLES, shift_mean=False))
  np.testing.assert_allclose(kept[HOLES > 0], (ON - ON.mean()) / ON.std() + ON.mean(), rtol=1e-5)


def test_whiten_of_equal_entries_is_zero():
  np.testing.assert_array_equal(masked.masked_whiten(np.full((2, 3), 7.0), HOLES), 0.0)
  np.testing.assert_array_equal(masked.masked_whiten(np.full((1, 1), 7.0), np.ones((1, 1))), 0.0)


def test_mean_is_exact_under_uneven_accumulation():
  whole = masked.Mean.of(X, HOLES)
  parts = masked.Mean.of(X[:, :1], HOLES[:, :1]) + masked.Mean.of(X[:, 1:], HOLES[:, 1:])
  np.testing.assert_allclose(parts.compute(), whole.compute(), rtol=1e-6)
  np.testing.assert_allclose(whole.compute(), ON.mean())
  assert masked.Mean.of(X, HOLES * 0).compute() == 0.0
  np.testing.assert_allclose(masked.Mean.of(X).compute(), X.mean(), rtol=1e-6)


def test_mean_is_a_pytree_that_jit_and_scan_accept():
  mean = jax.jit(lambda x: masked.Mean.of(x, HOLES))(X)
  assert isinstance(mean, masked.Mean)
  total, _ = jax.lax.scan(
    lambda mean, row: (mean + masked.Mean.of(row), None), masked.Mean(0.0, 0.0), X
  )
  np.testing.assert_allclose(total.compute(), X.mean(), rtol=1e-6)


def test_a_mask_of_another_shape_is_refused():
  with pytest.raises(ValueError, match="does not broadcast"):
    masked.masked_mean(X, np.ones(2))
  with pytest.raises(ValueError, match="does not broadcast"):
    masked.masked_mean(X[:1], np.ones((2, 3)))
