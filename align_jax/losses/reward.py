"""Reward-model losses on pairs of scalar rewards."""

import jax
import jax.numpy as jnp

from align_jax.losses import _check


def bradley_terry_loss(
  chosen_rewards: jax.Array,
  rejected_rewards: jax.Array,
  *,
  margin: jax.typing.ArrayLike = 0.0,
  label_smoothing: float = 0.0,
  label_prob: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """−q·log σ(r⁺ − r⁻ − m) − (1 − q)·log σ(r⁻ − r⁺ − m), with q = 1 for a certain label.

  Args:
    chosen_rewards: [B], r⁺.
    rejected_rewards: [B], r⁻.
    margin: scalar or [B], by how much the preferred reward must win before the loss relaxes.
    label_smoothing: ε, the share of labels believed to be flipped; q = 1 − ε.
    label_prob: [B], the probability p that `chosen` is the better one (a soft label from several
      raters or an AI judge). p = 1 is the hard label, p = 0 the pair swapped. Smoothing applies on
      top: q = p·(1 − ε) + (1 − p)·ε.

  Returns:
    [B], float32, in nats.

  Raises:
    ValueError: if the rewards are not both [B], or ε is outside [0, ½].

  References:
    Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; the margin is Llama 2's,
    https://arxiv.org/abs/2307.09288, eq. 2.
  """
  name = "bradley_terry_loss"
  chosen, rejected = _check.as_floats(
    name, 1, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
  )
  _check.probability(name, "label_smoothing", label_smoothing, below=0.5)
  margin = _per_example(name, "margin", margin, chosen)
  certain = _per_example(name, "label_prob", 1.0 if label_prob is None else label_prob, chosen)
  q = certain * (1.0 - label_smoothing) + (1.0 - certain) * label_smoothing
  difference = chosen - rejected
  return -(
    q * jax.nn.log_sigmoid(difference - margin)
    + (1.0 - q) * jax.nn.log_sigmoid(-difference - margin)
  )


def _per_example(
  function: str, name: str, value: jax.typing.ArrayLike, like: jax.Array
) -> jax.Array:
  value = jnp.asarray(value, jnp.float32)
  if value.shape not in ((), like.shape):
    raise ValueError(f"{function}: {name} must be a scalar or {like.shape}, got {value.shape}.")
  return value
