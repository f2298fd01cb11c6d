"""What the losses on pairs share: their four arrays, the logistic loss, a bounded exponential."""

import math

import jax
import jax.numpy as jnp

from align_jax.losses import _check

_MAX_EXPONENT = 20.0  # e²⁰ ≈ 5e8: no usable likelihood ratio is larger


def as_four(
  function: str, *arrays: jax.typing.ArrayLike, unit: str = "logps", rank: int = 1
) -> tuple[jax.Array, ...]:
  """Returns policy chosen, policy rejected, ref chosen, ref rejected as float32 of one shape.

  `unit` is how the caller's arguments end ("logps", say), so that a refusal names them.
  """
  sides = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
  return _check.as_floats(function, rank, **{f"{s}_{unit}": x for s, x in zip(sides, arrays)})


def log_ratios(
  function: str, *arrays: jax.typing.ArrayLike, unit: str = "logps"
) -> tuple[jax.Array, jax.Array]:
  """a = log π(y⁺) − log π_ref(y⁺) and b = log π(y⁻) − log π_ref(y⁻), both [B] (see `as_four`)."""
  chosen, rejected, ref_chosen, ref_rejected = as_four(function, *arrays, unit=unit)
  return chosen - ref_chosen, rejected - ref_rejected


def log_ratio_difference(
  function: str, *arrays: jax.typing.ArrayLike, unit: str = "logps"
) -> jax.Array:
  """Δ = a − b, [B] (see `log_ratios`)."""
  chosen, rejected = log_ratios(function, *arrays, unit=unit)
  return chosen - rejected


def logistic(x: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """−(1 − ε)·log σ(x) − ε·log σ(−x)."""
  # log(1 - σ(x)) = log σ(-x), which stays exact where σ(x) rounds to 1.
  return -(
    (1.0 - label_smoothing) * jax.nn.log_sigmoid(x) + label_smoothing * jax.nn.log_sigmoid(-x)
  )


def bounded_expm1(x: jax.Array) -> jax.Array:
  """eˣ − 1, continued from x = 20 along its tangent: finite, and with a gradient, everywhere."""
  tangent = math.exp(_MAX_EXPONENT) * jnp.maximum(x - _MAX_EXPONENT, 0.0)
  return jnp.expm1(jnp.minimum(x, _MAX_EXPONENT)) + tangent


def power_reward(log_ratio: jax.Array, alpha: float) -> jax.Array:
  """(1 − ρ^−α)/α at log ρ, which is log ρ at α = 0."""
  return log_ratio if alpha == 0.0 else -bounded_expm1(-alpha * log_ratio) / alpha
