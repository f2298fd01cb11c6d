"""Alignment via optimal transport (AOT): preferences between distributions instead of responses.

In one dimension optimal transport is sorting: quantile i of one distribution of log-ratios is held
against quantile i of the other. The batch is the sample, so a larger one estimates better, and a
batch accumulated from parts is sorted within each part.
"""

import jax
import jax.numpy as jnp

from align_jax.losses import _check, _pairs

_LAST = 1e30  # sorts an empty slot behind every pair, and is finite, so that its difference is 0


def aot_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  pair_mask: jax.Array | None = None,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """−(1 − ε)·log σ(βΔᵢ) − ε·log σ(−βΔᵢ), Δᵢ = u₍ᵢ₎ − v₍ᵢ₎ of the sorted margins u, v.

  u = log π(y⁺) − log π(y⁻) and v = log π_ref(y⁺) − log π_ref(y⁻); ₍ᵢ₎ is the i-th smallest of the
  batch. Every quantile of the policy's margins is to exceed that of the reference's.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    pair_mask: [B], 1 (or True) for a pair, 0 for an empty slot; ones by default.
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in [0, ½].

  Returns:
    [B], float32, in *sorted* order, not that of the rows: the first Σ pair_mask entries are real,
    the others 0 with no gradient. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the arrays are not all [B], or a hyper-parameter is out of range.

  References:
    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, paired, with the logistic loss.
  """
  name = "aot_loss"
  chosen, rejected, ref_chosen, ref_rejected = _pairs.as_four(
    name, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  upper, lower = chosen - rejected, ref_chosen - ref_rejected
  return _quantile_loss(name, upper, lower, pair_mask, beta, label_smoothing)


def aot_unpaired_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  pair_mask: jax.Array | None = None,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """−(1 − ε)·log σ(βΔᵢ) − ε·log σ(−βΔᵢ), Δᵢ = a₍ᵢ₎ − b₍ᵢ₎ of the sorted log-ratios a, b.

  a = log π(y⁺) − log π_ref(y⁺) and b = log π(y⁻) − log π_ref(y⁻), so chosen and rejected responses
  need not share their prompts. ₍ᵢ₎ is the i-th smallest of the batch.

  Args:
    policy_chosen_logps: [B], log π(y⁺|x), summed over the response.
    policy_rejected_logps: [B], log π(y⁻|x).
    ref_chosen_logps: [B], log π_ref(y⁺|x).
    ref_rejected_logps: [B], log π_ref(y⁻|x).
    pair_mask: [B], 1 (or True) for a slot that holds a chosen and a rejected response, 0 for an
      empty one; ones by default.
    beta: β > 0, the strength of the implied KL penalty.
    label_smoothing: ε in [0, ½].

  Returns:
    [B], float32, in *sorted* order, not that of the rows: the first Σ pair_mask entries are real,
    the others 0 with no gradient. ln 2 wherever policy and reference agree.

  Raises:
    ValueError: if the arrays are not all [B], or a hyper-parameter is out of range.

  References:
    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, unpaired, with the logistic loss.
  """
  name = "aot_unpaired_loss"
  upper, lower = _pairs.log_ratios(
    name, policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
  )
  return _quantile_loss(name, upper, lower, pair_mask, beta, label_smoothing)


def _quantile_loss(
  function: str,
  upper: jax.Array,
  lower: jax.Array,
  pair_mask: jax.Array | None,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  _check.positive(function, "beta", beta)
  _check.within(function, "label_smoothing", label_smoothing, "[0, 0.5]")
  pair_mask = jnp.ones(upper.shape) if pair_mask is None else pair_mask
  real, _ = _check.as_floats(function, 1, pair_mask=pair_mask, policy_chosen_logps=upper)
  upper, lower = (jnp.sort(jnp.where(real > 0, x, _LAST)) for x in (upper, lower))
  is_pair = jnp.arange(real.size) < jnp.sum(real > 0)
  difference = jnp.where(is_pair, upper - lower, 0.0)
  return jnp.where(is_pair, _pairs.logistic(beta * difference, label_smoothing), 0.0)
