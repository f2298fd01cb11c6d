"""Reward-model losses on scalar rewards: of pairs, of pairs with ties, of ranked lists."""

import jax
import jax.numpy as jnp

from align_jax.losses import _check

_NEVER_DRAWN = -1e30  # exp gives 0, and unlike -∞ it has differences and gradients


def bradley_terry_loss(
  chosen_rewards: jax.Array,
  rejected_rewards: jax.Array,
  *,
  margin: jax.typing.ArrayLike = 0.0,
  label_smoothing: float = 0.0,
  label_prob: jax.typing.ArrayLike | None = None,
  centering: float = 0.0,
) -> jax.Array:
  """−q·log σ(r⁺ − r⁻ − m) − (1 − q)·log σ(r⁻ − r⁺ − m) + c·(r⁺ + r⁻)², q = 1 for a certain label.

  Args:
    chosen_rewards: [B], r⁺.
    rejected_rewards: [B], r⁻.
    margin: scalar or [B], by how much the preferred reward must win before the loss relaxes.
    label_smoothing: ε, the share of labels believed to be flipped; q = 1 − ε.
    label_prob: [B], the probability p that `chosen` is the better one (a soft label from several
      raters or an AI judge). p = 1 is the hard label, p = 0 the pair swapped. Smoothing applies on
      top: q = p·(1 − ε) + (1 − p)·ε.
    centering: c ≥ 0, for example 0.01, which fixes the rewards' free offset: their mean goes to 0.

  Returns:
    [B], float32, in nats.

  Raises:
    ValueError: if the rewards are not both [B], or a hyper-parameter is out of range.

  References:
    Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; the margin is Llama 2's,
    https://arxiv.org/abs/2307.09288, eq. 2; centering: Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244.
  """
  name = "bradley_terry_loss"
  chosen, rejected = _check.as_floats(
    name, 1, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
  )
  _check.probability(name, "label_smoothing", label_smoothing, below=0.5)
  _check.within(name, "centering", centering, "[0, inf)")
  margin = _per_example(name, "margin", margin, chosen)
  certain = _per_example(name, "label_prob", 1.0 if label_prob is None else label_prob, chosen)
  q = certain * (1.0 - label_smoothing) + (1.0 - certain) * label_smoothing
  difference = chosen - rejected
  preference = -(
    q * jax.nn.log_sigmoid(difference - margin)
    + (1.0 - q) * jax.nn.log_sigmoid(-difference - margin)
  )
  return preference + centering * jnp.square(chosen + rejected)


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


def rao_kupper_loss(
  first_rewards: jax.Array, second_rewards: jax.Array, outcome: jax.Array, *, theta: float
) -> jax.Array:
  """−log P(outcome): Bradley–Terry with ties, which come where the rewards are within ln θ.

  With d = r₁ − r₂: P(first wins) = σ(d − ln θ), P(second wins) = σ(−d − ln θ) and
  P(tie) = (θ² − 1)·P(first wins)·P(second wins); the three sum to 1.

  Args:
    first_rewards: [B], r₁.
    second_rewards: [B], r₂.
    outcome: [B], 1 if the first response wins, 0 if the second does, 0.5 for a tie.
    theta: θ ≥ 1; equal responses tie with probability (θ − 1)/(θ + 1).

  Returns:
    [B], float32, in nats. θ = 1 is `bradley_terry_loss`; a tie is impossible there and costs ∞.

  Raises:
    ValueError: if the arrays are not all [B], or θ is below 1.

  References:
    Rao and Kupper 1967, https://doi.org/10.1080/01621459.1967.10482901; for preferences of language
    models: Chen et al. 2024, https://arxiv.org/abs/2409.17431.
  """
  _check.within("rao_kupper_loss", "theta", theta, "[1, inf)")
  first, second, outcome = _check.as_floats(
    "rao_kupper_loss",
    1,
    first_rewards=first_rewards,
    second_rewards=second_rewards,
    outcome=outcome,
  )
  difference, threshold = first - second, jnp.log(theta)
  first_wins = -jax.nn.log_sigmoid(difference - threshold)
  second_wins = -jax.nn.log_sigmoid(-difference - threshold)
  tie = first_wins + second_wins - jnp.log(theta * theta - 1.0)
  return jnp.where(outcome > 0.75, first_wins, jnp.where(outcome < 0.25, second_wins, tie))


def _per_example(
  function: str, name: str, value: jax.typing.ArrayLike, like: jax.Array
) -> jax.Array:
  value = jnp.asarray(value, jnp.float32)
  if value.shape not in ((), like.shape):
    raise ValueError(f"{function}: {name} must be a scalar or {like.shape}, got {value.shape}.")
  return value
