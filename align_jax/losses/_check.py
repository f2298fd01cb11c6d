"""Shape checks shared by the losses: a wrong rank broadcasts silently, so it is refused by name."""

import jax
import jax.numpy as jnp


def as_floats(function: str, rank: int, **arrays: jax.typing.ArrayLike) -> tuple[jax.Array, ...]:
  """Returns `arrays` as float32, all of one shape and of `rank`, or raises a ValueError."""
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  for name, shape in shapes.items():
    if len(shape) != rank:
      raise ValueError(f"{function}: {name} must have rank {rank}, got shape {shape}.")
  if len(set(shapes.values())) > 1:
    raise ValueError(f"{function}: all arguments must have one shape, got {shapes}.")
  return tuple(jnp.asarray(array).astype(jnp.float32) for array in arrays.values())


def positive(function: str, name: str, value: jax.typing.ArrayLike) -> None:
  """Raises a ValueError unless the (concrete) hyper-parameter `value` is above zero."""
  if isinstance(value, (int, float)) and not value > 0:
    raise ValueError(f"{function}: {name} must be positive, got {value}.")


def probability(function: str, name: str, value: jax.typing.ArrayLike, below: float = 1.0) -> None:
  """Raises a ValueError unless the (concrete) hyper-parameter `value` is in [0, below]."""
  if isinstance(value, (int, float)) and not 0.0 <= value <= below:
    raise ValueError(f"{function}: {name} must be in [0, {below:g}], got {value}.")


def within(function: str, name: str, value: jax.typing.ArrayLike, interval: str) -> None:
  """Raises a ValueError unless the (concrete) `value` is in `interval`, such as "[0, 0.5)"."""
  low, high = (float(end) for end in interval[1:-1].split(","))
  if not isinstance(value, (int, float)):
    return
  above = value > low if interval[0] == "(" else value >= low
  below = value < high if interval[-1] == ")" else value <= high
  if not (above and below):
    raise ValueError(f"{function}: {name} must be in {interval}, got {value}.")


def constant(function: str, name: str, value: jax.typing.ArrayLike) -> jax.Array:
  """Returns the scalar `value` as float32 without a gradient, or raises a ValueError."""
  if jnp.ndim(value):
    raise ValueError(f"{function}: {name} must be a scalar, got shape {jnp.shape(value)}.")
  return jax.lax.stop_gradient(jnp.asarray(value).astype(jnp.float32))
