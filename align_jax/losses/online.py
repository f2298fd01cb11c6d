"""Losses of methods that compare their own samples: XPO and Nash-MD; which samples are kept or paired.

Every `*_logps` is the log-probability of a whole response: the *sum* over its tokens. Scores of the
responses to one prompt are a row of [P, G], as in `advantages`. What is selected carries no gradient.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs
from align_jax.losses.policy import probability_ratio


def xpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  policy_explored_logps: jax.Array,
  *,
  beta: float,
  alpha: float,
) -> jax.Array:
  """−log σ(βΔ) + α·log π(ỹ|x): DPO on (y, ỹ), one from the policy and one, ỹ, from the reference.

  Over ỹ ~ π_ref, the second term is −α·KL(π_ref ‖ π) up to a constant: it pays the policy for saying
  what the reference does not, which DPO alone explores by chance only.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x) of the better of y and ỹ.
    policy_rejected_logps: [B], log π(y⁻|x) of the other.
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    policy_explored_logps: [B], log π(ỹ|x), of whichever of the two the reference sampled.
    beta: β > 0, the strength of the implied KL penalty.
    alpha: α ≥ 0, the weight of exploration; small, as a log-prob is tens of nats and log σ is not:
      the paper and TRL have 1e-5 and less.

  Returns:
    [B], float32; `dpo_loss` at α = 0. Without a lower bound where ỹ lost: both terms push it down.

  Raises:
    ValueError: if the log-probs are not all [B], or a hyper-parameter is out of range.

  References:
    Xie et al. 2024, https://arxiv.org/abs/2405.21046, algorithm 1, which lets the pairs of all
    iterations so far count; here, as in TRL, those of the present one.
  """
  _check.positive("xpo_loss", "beta", beta)
  _check.within("xpo_loss", "alpha", alpha, "[0, inf)")
  difference = _pairs.log_ratio_difference(
    "xpo_loss", policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  _, explored = _check.as_floats(
    "xpo_loss",
    1,
    policy_chosen_logps=policy_chosen_logps,
    policy_explored_logps=policy_explored_logps,
  )
  return _pairs.logistic(beta * difference) + alpha * explored


def nash_md_loss(
  policy_logps: jax.Array,
  ref_logps: jax.Array,
  preferences: jax.Array,
  old_logps: jax.Array | None = None,
  *,
  beta: float,
) -> jax.Array:
  """−(p − ½) + β·d in value, −(p − ½ − β·d)·∇log π in gradient; d = log π(y|x) − log π_ref(y|x).

  With y ~ π and y′ ~ π′, an opponent that is held fixed, the expected gradient is exactly that of
  −P(π ≻ π′) + β·KL(π ‖ π_ref), the KL of whole responses; ½ is a baseline. Nash-MD's opponent is the
  geometric mixture π′ ∝ π^(1−w)·π_ref^w of this very moment: halfway back, it keeps self-play from
  running in circles. At w = 0 the policies without a gradient are the Nash equilibria of the game
  P(π ≻ π′) − β·KL(π ‖ π_ref) + β·KL(π′ ‖ π_ref); at w > 0 they lie near them.

  Args:
    policy_logps: [B], log π(y|x) of responses the policy sampled; all that is differentiated.
    ref_logps: [B], log π_ref(y|x).
    preferences: [B], p = P(y ≻ y′|x) in [0, 1] of a judge; of scores, σ(difference), if they are
      those of a Bradley–Terry reward model.
    old_logps: [B], log π_old(y|x) of the policy that sampled, if π has moved on since: value and
      gradient are multiplied with sg[π/π_old]. The opponent stays the old one.
    beta: β ≥ 0, the strength of the KL penalty.

  Returns:
    [B], float32. Its derivative is not that of its value (see above).

  Raises:
    ValueError: if the arrays are not all [B], or β is negative.

  References:
    Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 7. TRL multiplies every token's
    log-ratio with its own log-prob only, which misses what a token does to the KL of later ones.
  """
  name = "nash_md_loss"
  _check.within(name, "beta", beta, "[0, inf)")
  policy, ref, preferences = _check.as_floats(
    name, 1, policy_logps=policy_logps, ref_logps=ref_logps, preferences=preferences
  )
  value = jax.lax.stop_gradient(beta * (policy - ref) - (preferences - 0.5))
  # Zero in value, ∇log π in gradient.
  loss = value + value * (policy - jax.lax.stop_gradient(policy))
  if old_logps is None:
    return loss
  _, old = _check.as_floats(name, 1, policy_logps=policy_logps, old_logps=old_logps)
  ratio = probability_ratio(policy[:, None], old[:, None])[:, 0]
  return jax.lax.stop_gradient(ratio) * loss


def best_of_group(scores: jax.Array, *, keep: int = 1) -> jax.Array:
  """1 on the `keep` best responses to every prompt, 0 on the others.

  Args:
    scores: [P, G], rewards of G responses to each of P prompts.
    keep: k in [1, G]. Exactly k are kept: of equal scores, the earlier.

  Returns:
    [P, G], float32, rows summing to k.

  Raises:
    ValueError: if the scores are not [P, G], or k is out of range.

  References:
    Dong et al. 2023 (RAFT), https://arxiv.org/abs/2304.06767, algorithm 1, with k = 1.
  """
  scores = _groups("best_of_group", scores)
  if not 1 <= keep <= scores.shape[1]:
    raise ValueError(f"best_of_group: keep must be in [1, {scores.shape[1]}], got {keep}.")
  return (_ranks(scores) < keep).astype(jnp.float32)


def above_threshold(scores: jax.Array, *, threshold: jax.typing.ArrayLike) -> jax.Array:
  """1 where r ≥ τ, else 0.

  Args:
    scores: [B] or any other shape, rewards of responses.
    threshold: [], τ, in units of reward. `jnp.quantile(scores, q)` keeps about a share 1 − q, and
      always the best; of scores that are equal at τ, all.

  Returns:
    of the shape of the scores, float32.

  Raises:
    ValueError: if τ is not a scalar.

  References:
    Gulcehre et al. 2023 (ReST), https://arxiv.org/abs/2308.08998, section 3, where τ rises from one
    improvement to the next.
  """
  threshold = _check.constant("above_threshold", "threshold", threshold)
  return (jnp.asarray(scores).astype(jnp.float32) >= threshold).astype(jnp.float32)


def best_and_worst(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The places of the best and the worst response to every prompt, and 1 where they differ in score.

  A pair of equal scores says nothing about a preference: with weight 0 it is left out.

  Args:
    scores: [P, G], rewards of G ≥ 2 responses to each of P prompts.

  Returns:
    (best, worst, weight): [P] int32 in [0, G), twice; [P] float32, 0 where all scores are equal.
    Of equal scores the earlier is the better, so that best and worst are never one response.

  Raises:
    ValueError: if the scores are not [P, G], or G < 2.

  References:
    Guo et al. 2024 (OAIF), https://arxiv.org/abs/2402.04792, with G = 2. TRL's online DPO takes a tie
    for a win of the first.
  """
  scores = _groups("best_and_worst", scores)
  groups, size = scores.shape
  if size < 2:
    raise ValueError(
      f"best_and_worst: scores must hold groups of 2 and more, got {(groups, size)}."
    )
  ranks = _ranks(scores)
  best, worst = jnp.argmin(ranks, axis=1), jnp.argmax(ranks, axis=1)
  differs = jnp.max(scores, axis=1) > jnp.min(scores, axis=1)
  return best.astype(jnp.int32), worst.astype(jnp.int32), differs.astype(jnp.float32)


def _ranks(scores: jax.Array) -> jax.Array:
  """[P, G], 0 for the best of its row; of equal scores the earlier ranks first."""
  return jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)


def _groups(function: str, scores: jax.Array) -> jax.Array:
  (scores,) = _check.as_floats(function, 2, scores=scores)
  return jax.lax.stop_gradient(scores)
