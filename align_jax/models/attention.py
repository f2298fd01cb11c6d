"""Rotary positions and grouped-query attention, as functions of arrays."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.models.config import RopeScaling

MASKED = -1e30  # finite: a row that sees nothing softmaxes to something, not to NaN
SAVED_NAME = "attention"  # what a remat policy may keep by name: outputs and logsumexps


class Rows(NamedTuple):
  """What decides who sees whom in whole rows, each [B, T] int32; see `sequence_mask`."""

  places: jax.Array  # 0, 1, 2...
  positions: jax.Array
  segment_ids: jax.Array | None
  branch_ids: jax.Array | None


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
  """Radians per position of each pair of dimensions, [head_dim / 2] float32.

  θ^(-2i/d), stretched by `scaling`.  Llama 3.1 divides by `factor` the frequencies whose wavelength
  exceeds L/low_freq_factor, keeps those below L/high_freq_factor and interpolates between.
  """
  freqs = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
  freqs = freqs.astype(np.float32)
  if scaling is None:
    return freqs
  if scaling.kind == "linear":
    return freqs / np.float32(scaling.factor)
  turns = scaling.original_max_length * freqs / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (keep * freqs + (1 - keep) * freqs / scaling.factor).astype(np.float32)


def rope_table(positions: jax.Array, freqs: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """cos and sin [B, T, 1, head_dim / 2] in float32 of `positions` [B, T]."""
  angles = positions[..., None, None].astype(jnp.float32) * freqs
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates x [B, T, heads, head_dim]; a pair is (i, i + head_dim / 2), as Hugging Face has it."""
  cos, sin = table
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sequence_mask(
  length: int,
  segment_ids: jax.Array | None,
  window: int | None,
  *,
  positions: jax.Array | None = None,
  branch_ids: jax.Array | None = None,
) -> jax.Array:
  """Who sees whom in whole rows, [B or 1, 1, 1, T, T] bool: the past, own segment, own window.

  With `branch_ids` [B, T] a segment is a trunk (0) that forks: a token sees the trunk and its own
  branch only, and the window goes by `positions` [B, T], which start again in every branch.
  """
  ahead = np.arange(length)[:, None] - np.arange(length)[None, :]
  seen = jnp.asarray(ahead >= 0)[None]
  if branch_ids is not None:
    own = branch_ids[:, :, None] == branch_ids[:, None, :]
    seen = seen & (own | (branch_ids == 0)[:, None, :])
    ahead = positions[:, :, None] - positions[:, None, :]
  if window is not None:
    seen = seen & (ahead < window)
  if segment_ids is not None:
    seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
  return seen[:, None, None]


def seen(queries: Rows, keys: Rows, window) -> jax.Array:
  """`sequence_mask` of any part of the rows, [B, T, S] bool; the window may be a traced number."""
  pairs = [(q[:, :, None], k[:, None]) for q, k in zip(queries, keys) if q is not None]
  (place, other), (position, reach) = pairs[:2]
  mask = place >= other
  ahead = place - other
  if queries.branch_ids is not None:
    branch, theirs = pairs[-1]
    mask = mask & ((branch == theirs) | (theirs == 0))
    ahead = position - reach
  if window is not None:
    mask = mask & (ahead < window)
  if queries.segment_ids is not None:
    segment, theirs = pairs[2]
    mask = mask & (segment == theirs)
  return mask


def cache_mask(positions: jax.Array, slots: int, window: int | None) -> jax.Array:
  """Which cache slots the tokens at `positions` [B, T] see, [B, 1, 1, T, slots] bool."""
  ahead = positions[:, :, None] - jnp.arange(slots)
  return ((ahead >= 0) & (ahead < (window or slots)))[:, None, None]


def attention_probs(
  q, k, mask, *, scale: float, softcap: float | None, heads_first: bool = False
) -> jax.Array:
  """softmax(scale q.k) in float32, [B, K, G, T, S]; q [B, T, K, G, H], k [B, S, K, H].

  K key heads each serve G query heads, so keys are never repeated. With `heads_first` k is
  [B, K, S, H], as a cache has it: then a product over the slots reads memory in order.
  """
  equation = "btkgh,bksh->bkgts" if heads_first else "btkgh,bskh->bkgts"
  scores = jnp.einsum(equation, q * scale, k, preferred_element_type=jnp.float32)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)


def attend(probs: jax.Array, v: jax.Array, *, heads_first: bool = False) -> jax.Array:
  """Values averaged by `probs` [B, K, G, T, S]; v [B, S, K, H] -> [B, T, K, G, H]."""
  probs = probs.astype(v.dtype)
  if heads_first and probs.shape[3] == 1:
    return _attend_one(probs[:, :, :, 0], v)[:, None]
  return jnp.einsum("bkgts,bksh->btkgh" if heads_first else "bkgts,bskh->btkgh", probs, v)


def _attend_one(probs: jax.Array, v: jax.Array) -> jax.Array:
  """`attend` of one query a row, probs [B, K, G, S] and v [B, K, S, H] -> [B, K, G, H].

  With at least eight rows, as XLA's products on CPU are four times faster.
  """
  group = probs.shape[2]
  probs = jnp.pad(probs, [(0, 0), (0, 0), (0, max(8 - group, 0)), (0, 0)])
  return jnp.einsum("bkgs,bksh->bkgh", probs, v)[:, :, :group]
