"""Reward-model losses on ranked lists: K responses to one prompt."""

import jax
import jax.numpy as jnp

from align_jax.losses import _check

_NEVER_DRAWN = -1e30  # exp gives 0, and unlike -∞ it has differences and gradients


def all_pairs_loss(
  rewards: jax.Array,
  ranks: jax.Array,
  *,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """−1/|P| Σ_{(i,j)∈P} log σ(rᵢ − rⱼ), P the pairs of one prompt's responses with i ranked above j.

  All pairs of a prompt are one example: taken as examples of their own, each response would be seen
  K − 1 times in an epoch, and the model overfits.

  Args:
    rewards: [B, K], of the K responses to one prompt, in any order.
    ranks: [B, K], 1 for the best; equal ranks are ties, which make no pair; 0 for an empty slot.
    label_smoothing: ε, the share of pairs believed to be the wrong way round.

  Returns:
    [B], float32, in nats a pair. ln 2 where all rewards are equal; 0 without a pair.

  Raises:
    ValueError: if the arrays are not all [B, K], or ε is out of range.

  References:
    Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1 and section 3.5.
  """
  name = "all_pairs_loss"
  _check.probability(name, "label_smoothing", label_smoothing, below=0.5)
  rewards, ranks = _check.as_floats(name, 2, rewards=rewards, ranks=ranks)
  pairs = ranked_pairs(ranks)
  rewards = jnp.where(ranks > 0, rewards, 0.0)
  difference = rewards[:, :, None] - rewards[:, None, :]
  right, wrong = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
  loss = -(1.0 - label_smoothing) * right - label_smoothing * wrong
  count = jnp.sum(pairs, axis=(1, 2))
  return jnp.sum(jnp.where(pairs, loss, 0.0), axis=(1, 2)) / jnp.maximum(count, 1)


def ranked_pairs(ranks: jax.Array) -> jax.Array:
  """[B, K, K] bool: response i is ranked above response j; ranks [B, K], 0 for an empty slot."""
  above = ranks[:, :, None] < ranks[:, None, :]
  return above & (ranks > 0)[:, :, None]


def plackett_luce_loss(rewards: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Σₖ [log Σ_{j≥k} exp(rⱼ) − rₖ]: −log of the probability of a whole ranking.

  Each place is drawn by softmax from the responses that are left.

  Args:
    rewards: [B, K], of the K responses to one prompt, the best first.
    mask: [B, K], 1 (or True) for a response, 0 for an empty slot, wherever it is; ones by default.

  Returns:
    [B], float32, in nats. ln K! where all K rewards are equal; `bradley_terry_loss` at K = 2. 0 with
    fewer than two responses.

  Raises:
    ValueError: if the arrays are not all [B, K].

  References:
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, appendix A.3: with `implicit_reward`s it
    is DPO on rankings. Here the rewards may be any.
  """
  mask = jnp.ones(jnp.shape(rewards)) if mask is None else mask
  rewards, mask = _check.as_floats("plackett_luce_loss", 2, rewards=rewards, mask=mask)
  real = mask > 0
  rewards = jnp.where(real, rewards, _NEVER_DRAWN)
  left = jax.lax.cumlogsumexp(rewards, axis=1, reverse=True)
  return jnp.sum(jnp.where(real, left - rewards, 0.0), axis=1)
