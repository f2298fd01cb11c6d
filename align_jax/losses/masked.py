"""Masked reductions, and the (total, weight) pair in which every average travels."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean that is not divided yet: Σ wᵢ xᵢ and Σ wᵢ.

  Adding two of them is exact whatever the sizes of their batches, so gradient accumulation, padding
  and data sharding never change a number.
  """

  total: jax.typing.ArrayLike  # [] (or any shape)
  weight: jax.typing.ArrayLike  # same shape

  @classmethod
  def of(cls, x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None) -> "Mean":
    """The mean of all entries of `x`, weighted by `mask` (any shape that broadcasts to `x`)."""
    x = jnp.asarray(x).astype(jnp.float32)
    mask = jnp.ones_like(x) if mask is None else _weights(x, mask)
    return cls(masked_sum(x, mask), jnp.sum(mask))

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.weight + other.weight)

  def compute(self) -> jax.Array:
    """total / weight, and 0 where nothing was weighed."""
    return _ratio(self.total, self.weight)


def masked_sum(
  x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, axis: int | None = None
) -> jax.Array:
  """Σ mask·x, where an entry of zero mask counts as 0 even if `x` is NaN or infinite there.

  Args:
    x: any shape.
    mask: weights (or booleans) that broadcast to the shape of `x`.
    axis: the axis to reduce; all of them by default.

  Returns:
    The float32 sum, of the shape of `x` without `axis`.
  """
  x = jnp.asarray(x).astype(jnp.float32)
  mask = _weights(x, mask)
  return jnp.sum(jnp.where(mask == 0, 0.0, x) * mask, axis=axis)


def masked_mean(
  x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, axis: int | None = None
) -> jax.Array:
  """Σ mask·x / Σ mask, and 0 where the mask is empty.

  Args:
    x: any shape.
    mask: weights (or booleans) that broadcast to the shape of `x`.
    axis: the axis to reduce; all of them by default.

  Returns:
    The float32 mean, of the shape of `x` without `axis`.
  """
  return _ratio(masked_sum(x, mask, axis=axis), jnp.sum(_weights(x, mask), axis=axis))


def masked_whiten(
  x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, shift_mean: bool = True
) -> jax.Array:
  """(x − μ)/σ over the masked entries, with μ and σ² (population variance) of those entries alone.

  Args:
    x: any shape.
    mask: weights (or booleans) that broadcast to the shape of `x`.
    shift_mean: if False, μ is added back, so that only the scale changes (used for rewards).

  Returns:
    The float32 whitened array, 0 off the mask. Equal entries give 0, never NaN.

  References:
    Huang et al. 2024, https://arxiv.org/abs/2403.17031, details 24 and 25 (with the unbiased
    variance).
  """
  x = jnp.asarray(x).astype(jnp.float32)
  mask = _weights(x, mask)
  x = jnp.where(mask == 0, 0.0, x)
  mean = masked_mean(x, mask)
  whitened = (x - mean) * jax.lax.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
  return jnp.where(mask == 0, 0.0, whitened if shift_mean else whitened + mean)


def _weights(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> jax.Array:
  mask = jnp.asarray(mask).astype(jnp.float32)
  try:
    return jnp.broadcast_to(mask, jnp.shape(x))
  except ValueError:
    shapes = f"{mask.shape} does not broadcast to x of shape {jnp.shape(x)}"
    raise ValueError(f"mask of shape {shapes}.") from None


def _ratio(total: jax.typing.ArrayLike, weight: jax.typing.ArrayLike) -> jax.Array:
  empty = jnp.asarray(weight) == 0
  return jnp.where(empty, 0.0, total / jnp.where(empty, 1.0, weight))
