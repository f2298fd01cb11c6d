"""What a trained reward head means: which of its outputs are the reward, and on what scale.

Whatever a head was trained with, the reward that the rest of the house reads is one linear function of
the hidden state, so all of this folds into one kernel and one bias.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

SHARES = ("nothing", "base", "trunk")  # what the members of an ensemble have in common


@dataclasses.dataclass(frozen=True)
class RewardHead:
  """In model.json as "head": reward = (Σ weights · outputs − shift) / scale, one of both a member."""

  outputs: tuple[str, ...] = ("reward",)
  weights: tuple[float, ...] = (1.0,)
  shift: tuple[float, ...] = (0.0,)
  scale: tuple[float, ...] = (1.0,)
  members: int = 0  # of an ensemble; 0 for one model
  share: str = "nothing"

  @property
  def width(self) -> int | None:
    """Outputs side by side in the kernel; None for a kernel that is a vector."""
    if self.members and self.share == "trunk":
      return self.members
    return len(self.outputs) if len(self.outputs) > 1 else None

  @property
  def stacked(self) -> int:
    """Members whose trunk or adapter is an array of its own; 0 for one model or a shared trunk."""
    return 0 if self.share == "trunk" else self.members


def one_reward(head: Any, found: RewardHead, member: int = 0) -> dict[str, jax.Array]:
  """The kernel [D] and bias [] that give the reward, for one member of an ensemble."""
  kernel, bias = head["kernel"], head["bias"]
  if found.members and found.share == "trunk":
    kernel, bias = kernel[:, member], bias[member]
  elif found.members:
    kernel, bias = kernel[member], bias[member]
  if len(found.outputs) > 1:
    weights = jnp.asarray(found.weights, kernel.dtype)
    kernel, bias = kernel @ weights, bias @ weights
  shift, scale = found.shift[member], found.scale[member]
  return {"kernel": kernel / scale, "bias": (bias - shift) / scale}


def mean_of(heads: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """The head whose reward is the mean of theirs, on one trunk."""
  return jax.tree.map(lambda *parts: sum(parts) / len(parts), *heads)
