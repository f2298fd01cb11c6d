"""Mixtures of record sets with weights (Wei et al. 2021, examples-proportional mixing)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax.data.records import Record
from align_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sets of records of one kind and the share of draws each gets; pass it for `records`."""

  names: tuple[str, ...]
  components: tuple[tuple[Record, ...], ...]
  weights: tuple[float, ...]

  @property
  def records(self) -> tuple[Record, ...]:
    """All records, set after set."""
    return sum(self.components, ())


def mix(
  components: Mapping[str, Sequence[Record]],
  *,
  weights: Mapping[str, float] | None = None,
  cap: int | None = None,
  temperature: float = 1.0,
) -> Mixture:
  """Mixes named record sets, by given `weights` or by `mixture_weights` of their sizes.

  Draws follow the weights evenly, not by chance: in any stretch each set has its share to within
  one.
  """
  for name, records in components.items():
    if not records:
      raise InputError(f"mixture: '{name}' is empty")
  names = tuple(components)
  if weights is None:
    shares = mixture_weights([len(components[n]) for n in names], cap=cap, temperature=temperature)
  else:
    if cap is not None or temperature != 1.0:
      raise InputError("mixture: give weights, or cap and temperature, not both")
    if set(weights) != set(names):
      raise InputError(f"mixture: weights name {sorted(weights)}, the sets are {sorted(names)}")
    shares = _normalised([weights[name] for name in names])
  return Mixture(names, tuple(tuple(components[n]) for n in names), tuple(shares))


def mixture_weights(
  sizes: Sequence[int], *, cap: int | None = None, temperature: float = 1.0
) -> tuple[float, ...]:
  """w_i ∝ min(n_i, K)^(1/T) for sizes n_i; the cap K is on the rate, not on what is seen."""
  if temperature <= 0 or (cap is not None and cap < 1):
    raise InputError("mixture: the temperature must be above 0 and the cap at least 1")
  capped = np.minimum(sizes, np.inf if cap is None else cap).astype(np.float64)
  return _normalised(capped ** (1.0 / temperature))


def interleave(positions: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  """Which set each position of an endless mixture draws from, and how many draws it had before.

  Of the first k positions set 1 gets ⌈k·w₁⌉; what is left is dealt among the others in the same
  way. Shares are exact to 1e-6.
  """
  shares = np.maximum(1, np.rint(np.asarray(weights) * 1_000_000)).astype(np.int64).tolist()
  component, draw = np.zeros_like(positions), np.zeros_like(positions)
  before, after, remaining = positions, positions + 1, sum(shares)
  for c, share in enumerate(shares):
    had, has = -(-before * share // remaining), -(-after * share // remaining)
    mine = has > had
    component[mine], draw[mine] = c, had[mine]
    before, after, remaining = before - had, after - has, remaining - share
  return component, draw


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
  values = np.asarray(weights, np.float64)
  if not (np.isfinite(values).all() and (values > 0).all()):
    raise InputError(f"mixture: weights must be finite and above 0, not {list(weights)}")
  return tuple(float(w) for w in values / values.sum())
