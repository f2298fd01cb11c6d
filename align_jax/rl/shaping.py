"""What is done to a score before anything learns from it: missing EOS, normalisation, clipping."""

import dataclasses

import jax
import jax.numpy as jnp

from align_jax import losses
from align_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
  """What happens to a score, in this order: missing EOS, overlong penalty, normalise, clip."""

  missing_eos_score: float | None = None  # replaces the score of an unfinished response; N+: -1
  missing_eos_penalty: float = 0.0  # or is subtracted from it
  overlong_cache: int | None = None  # tokens before the limit in which DAPO's penalty sets in
  normalise: bool = False  # by the running mean and standard deviation of all scores so far
  clip: float | None = None  # bound of the absolute value; PPO-max after normalising: 5

  def __post_init__(self):
    if self.missing_eos_score is not None and self.missing_eos_penalty:
      raise InputError("shaping: missing_eos_score replaces what missing_eos_penalty would lower")
    if self.missing_eos_penalty < 0:
      raise InputError(f"shaping.missing_eos_penalty must not be negative: {self}")
    if self.overlong_cache is not None and self.overlong_cache < 1:
      raise InputError(f"shaping.overlong_cache must be at least 1, not {self.overlong_cache}")
    if self.clip is not None and self.clip <= 0:
      raise InputError(f"shaping.clip must be positive, not {self.clip}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and sum of squared deviations of everything seen so far; float32 scalars."""

  count: jax.Array
  mean: jax.Array
  squares: jax.Array

  @classmethod
  def empty(cls) -> "Moments":
    return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

  @property
  def std(self) -> jax.Array:
    return jnp.sqrt(self.squares / jnp.maximum(self.count, 1.0))


def update_moments(moments: Moments, x: jax.Array) -> Moments:
  """The moments of the old and the new numbers x [B] together (Chan et al. 1979)."""
  count, mean = x.size, jnp.mean(x)
  total, difference = moments.count + count, mean - moments.mean
  return Moments(
    total,
    moments.mean + difference * count / total,
    moments.squares + jnp.sum((x - mean) ** 2) + difference**2 * moments.count * count / total,
  )


def shape_scores(
  scores: jax.Array,
  finished: jax.Array,
  lengths: jax.Array,
  moments: Moments,
  config: ShapingConfig,
  *,
  max_length: int,
) -> tuple[jax.Array, Moments]:
  """Missing-EOS rule → overlong penalty → running normalisation → clip.

  The running statistics take in the penalised scores of this batch before they are used, as they
  must describe what is normalised.

  Args:
    scores: [B].
    finished: [B] bool; false where no EOS was drawn.
    lengths: [B], tokens of every response.
    moments: of all earlier scores.
    config: which of the four to do.
    max_length: the most tokens a response can have.

  Returns:
    ([B] float32, the new moments).

  References:
    Huang et al. 2024, https://arxiv.org/abs/2403.17031 (the EOS rule); Yu et al.
    2025, https://arxiv.org/abs/2503.14476, eq. 13 (overlong); Zheng et al. 2023,
    https://arxiv.org/abs/2307.04964, section 5.4 (normalise and clip).
  """
  if config.missing_eos_score is not None:
    scores = jnp.where(finished, scores, config.missing_eos_score)
  scores = jnp.where(finished, scores, scores - config.missing_eos_penalty)
  if config.overlong_cache is not None:
    scores += losses.overlong_penalty(lengths, max_length=max_length, cache=config.overlong_cache)
  moments = update_moments(moments, scores)
  if config.normalise:
    scores = (scores - moments.mean) / (moments.std + 1e-6)
  if config.clip is not None:
    scores = jnp.clip(scores, -config.clip, config.clip)
  return scores, moments
