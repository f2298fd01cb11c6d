"""Reward-model losses on pairs: of rewards, of rewards with ties, of distributions of rewards."""

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


def thurstone_loss(
  chosen_means: jax.Array,
  rejected_means: jax.Array,
  chosen_log_stds: jax.Array,
  rejected_log_stds: jax.Array,
  *,
  label_prob: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
  """−q·log Φ(z) − (1 − q)·log Φ(−z), z = (μ⁺ − μ⁻) / √(σ⁺² + σ⁻²): rewards that raters disagree on.

  A response's reward is normal over raters, N(μ, σ²), so Φ(z) is the share of raters who prefer the
  first response: trained on all their votes, the model learns how divided they are.

  Args:
    chosen_means: [B], μ⁺.
    rejected_means: [B], μ⁻.
    chosen_log_stds: [B], log σ⁺; bounded here to [−5, 5], without a gradient beyond.
    rejected_log_stds: [B], log σ⁻.
    label_prob: scalar or [B], q, the share of raters who prefer `chosen`.

  Returns:
    [B], float32, in nats. ln 2 where the means are equal.

  Raises:
    ValueError: if the arrays are not all [B].

  References:
    Thurstone 1927, https://doi.org/10.1037/h0070288 (case III); Siththaranjan et al. 2023 (the
    mean-and-variance model), https://arxiv.org/abs/2312.08358.
  """
  name = "thurstone_loss"
  chosen, rejected, chosen_log, rejected_log = _check.as_floats(
    name,
    1,
    chosen_means=chosen_means,
    rejected_means=rejected_means,
    chosen_log_stds=chosen_log_stds,
    rejected_log_stds=rejected_log_stds,
  )
  q = _per_example(name, "label_prob", label_prob, chosen)
  variance = sum(jnp.exp(2.0 * jnp.clip(x, -5.0, 5.0)) for x in (chosen_log, rejected_log))
  z = (chosen - rejected) * jax.lax.rsqrt(variance)
  return -(q * jax.scipy.stats.norm.logcdf(z) + (1.0 - q) * jax.scipy.stats.norm.logcdf(-z))


def decorrelation_loss(
  quality: jax.Array, length: jax.Array, lengths: jax.Array, *, weight: jax.Array | None = None
) -> jax.Array:
  """|ρ(r_Q, L)| − ρ(r_L, L): one head is to know nothing of the length, the other all of it.

  ρ is Pearson's correlation over the batch, so this is a property of the whole batch and not a sum.

  Args:
    quality: [N], r_Q, the head that is kept.
    length: [N], r_L, the head that is thrown away.
    lengths: [N], L in tokens; a constant.
    weight: [N] ≥ 0, by default ones; 0 for padding.

  Returns:
    [], float32, in [−1, 2]; 0 for a head or lengths that do not vary.

  Raises:
    ValueError: if the arrays are not all [N].

  References:
    Chen et al. 2024 (ODIN), https://arxiv.org/abs/2402.07319, eq. 4; its orthogonality of the heads'
    weights is `training.reward_objectives`' part.
  """
  weight = jnp.ones(jnp.shape(quality)) if weight is None else weight
  quality, length, lengths, weight = _check.as_floats(
    "decorrelation_loss", 1, quality=quality, length=length, lengths=lengths, weight=weight
  )
  lengths = jax.lax.stop_gradient(lengths)
  return jnp.abs(_correlation(quality, lengths, weight)) - _correlation(length, lengths, weight)


def _correlation(x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
  share = weight / jnp.maximum(jnp.sum(weight), 1e-8)
  x, y = x - jnp.sum(share * x), y - jnp.sum(share * y)
  spread = jnp.sum(share * x * x) * jnp.sum(share * y * y)
  varies = spread > 1e-12
  root = jnp.sqrt(jnp.where(varies, spread, 1.0))  # so that neither branch has a NaN gradient
  return jnp.where(varies, jnp.sum(share * x * y) / root, 0.0)


def _per_example(
  function: str, name: str, value: jax.typing.ArrayLike, like: jax.Array
) -> jax.Array:
  value = jnp.asarray(value, jnp.float32)
  if value.shape not in ((), like.shape):
    raise ValueError(f"{function}: {name} must be a scalar or {like.shape}, got {value.shape}.")
  return value
