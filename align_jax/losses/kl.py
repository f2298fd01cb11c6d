"""KL divergence to the reference: sampled estimators, the exact value, and Ziegler's controller."""

import jax
import jax.numpy as jnp

from align_jax.losses import _check

_MAX_LOG_RATIO = 20.0  # e²⁰ ≈ 5e8: far beyond any usable ratio, and still finite when squared


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, *, kind: str) -> jax.Array:
  """Per-token estimates of KL(π ‖ π_ref) from tokens that were sampled from π.

  With d = log π − log π_ref of the sampled token:
    k1 = d             unbiased, high variance, may be negative
    k2 = d²/2          biased, low variance; its *gradient* is that of the reverse KL
    k3 = e⁻ᵈ − 1 + d   unbiased and never negative; its *gradient* is that of the forward KL

  Used inside a loss, k1 has a gradient of zero mean and k3 that of the wrong direction: to penalise
  the reverse KL put k1 into the reward (`kl_shaped_rewards`) or k2 into the loss.

  Args:
    logprobs: [B, T], of the sampled tokens under the policy.
    ref_logprobs: [B, T], of the same tokens under the frozen reference.
    kind: "k1", "k2" or "k3".

  Returns:
    [B, T], float32. k3 holds its exponent to ±20 so that it stays finite.

  Raises:
    ValueError: if the arguments are not both [B, T], or the kind is unknown.

  References:
    Schulman 2020, http://joschu.net/blog/kl-approx.html.
  """
  logprobs, ref = _check.as_floats("kl_estimate", 2, logprobs=logprobs, ref_logprobs=ref_logprobs)
  difference = logprobs - ref
  if kind == "k1":
    return difference
  if kind == "k2":
    return 0.5 * jnp.square(difference)
  if kind == "k3":
    return jnp.expm1(jnp.clip(-difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)) + difference
  raise ValueError(f"kl_estimate: kind must be one of k1, k2, k3, got {kind!r}.")


def exact_kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
  """KL(softmax(logits) ‖ softmax(ref_logits)) = Σᵥ p(v)·(log p(v) − log q(v)), at every position.

  Args:
    logits: [..., V], of the policy.
    ref_logits: [..., V], of the reference.

  Returns:
    [...], float32. A token of probability 0 under the policy contributes 0.

  Raises:
    ValueError: if the shapes differ.
  """
  if jnp.shape(logits) != jnp.shape(ref_logits):
    raise ValueError(
      f"exact_kl: the logits must have one shape, got {jnp.shape(logits)} and "
      f"{jnp.shape(ref_logits)}."
    )
  logp = jax.nn.log_softmax(jnp.asarray(logits).astype(jnp.float32))
  logq = jax.nn.log_softmax(jnp.asarray(ref_logits).astype(jnp.float32))
  possible = logp > -jnp.inf
  # The inner `where` keeps -inf - -inf out of the gradient too.
  difference = jnp.where(possible, logp, 0.0) - jnp.where(possible, logq, 0.0)
  return jnp.sum(jnp.exp(logp) * difference, axis=-1)


def adaptive_kl_coef(
  kl_coef: jax.typing.ArrayLike,
  kl: jax.typing.ArrayLike,
  *,
  target: float,
  horizon: float,
  batch_size: int,
  max_error: float = 0.2,
) -> jax.Array:
  """One step of the proportional controller: β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon).

  Args:
    kl_coef: [], the coefficient β used for this batch.
    kl: [], the batch's mean over sequences of the summed k1.
    target: the KL per sequence, in nats, that is aimed for (Ziegler et al.: 6).
    horizon: episodes over which the coefficient may change by `max_error` (Ziegler et al.: 10,000).
    batch_size: n, the number of episodes in the batch.
    max_error: the bound of the proportional error.

  Returns:
    [], float32, the coefficient of the next batch. It stays positive.

  Raises:
    ValueError: if target or horizon is not positive.

  References:
    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.
  """
  _check.positive("adaptive_kl_coef", "target", target)
  _check.positive("adaptive_kl_coef", "horizon", horizon)
  error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -max_error, max_error)
  return jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * batch_size / horizon)
