"""Attention of whole rows by JAX's splash kernel for TPU: no [T, T] array, forward or backward.

Shared prompts take two passes, one over a token's own branch and one over its trunk: their
softmaxes join by their logsumexp, as the pieces of one row do (Dao et al. 2022, 2205.14135).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from align_jax.models.attention import SAVED_NAME, Rows

LANES = 128  # rows are padded to a multiple of it
LARGEST_BLOCK = 512


def padded_length(length: int) -> int:
  """The next multiple of 128, from 1,024 on of 512: small blocks waste a TPU's time."""
  step = LANES if length < 2 * LARGEST_BLOCK else LARGEST_BLOCK
  return -(-length // step) * step


def block_sizes(queries: int, keys: int) -> kernel_lib.BlockSizes:
  """The largest tiles up to 512 that divide a device's queries and the row's keys."""
  q, kv = (math.gcd(LARGEST_BLOCK, size) for size in (queries, keys))
  return kernel_lib.BlockSizes(
    block_q=q, block_kv=kv, block_kv_compute=kv,
    block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
    block_q_dq=q, block_kv_dq=kv,
  )  # fmt: skip


def make_kernel(
  length: int,
  heads: int,
  window: int | None,
  *,
  softcap: float | None,
  shards: int = 1,
  interpret: bool = False,
) -> kernel_lib.SplashAttentionKernel:
  """The kernel of `heads` causal query heads over `length` keys, a window of them if given.

  With `shards` the queries of a row are split over so many devices: the kernel's own arrays are
  then split too, by `manual_sharding_spec`.
  """
  if window is None:
    mask = mask_lib.CausalMask((length, length))
  else:
    mask = mask_lib.LocalMask((length, length), (window - 1, 0), offset=0)
  return kernel_lib.make_splash_mha(
    mask_lib.MultiHeadMask([mask] * heads),
    block_sizes=block_sizes(length // shards, length),
    head_shards=1,
    q_seq_shards=shards,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name=SAVED_NAME,
    interpret=interpret,
  )


class Pass(NamedTuple):
  """One run of a kernel over the rows: a query sees the keys of its own number."""

  kernel: kernel_lib.SplashAttentionKernel
  queries: jax.Array | None  # [B, T]; None: one segment
  keys: jax.Array | None
  lowest: jax.Array | None = None  # [B, T], the first key each query sees; None: as the kernel says


def passes(rows: Rows, window: int | None, make: Callable) -> list[Pass]:
  """The passes whose softmaxes join to attention as `sequence_mask` has it.

  `make(window)` is `make_kernel`.  Where rows fork, a segment must be one run of tokens, its trunk
  first, and every branch one run whose positions go on by ones; `data.shared_rows` lays them so.
  """
  segments = rows.segment_ids
  if rows.branch_ids is None:
    return [Pass(make(window), segments, segments)]
  segments = jnp.zeros_like(rows.branch_ids) if segments is None else segments
  # Wraps around, but no two pairs of numbers below 65,536 meet.
  own = segments * jnp.int32(1 << 16) + rows.branch_ids
  trunk = rows.branch_ids == 0
  lowest = None if window is None else _window_start(rows.positions, segments, window)
  to_trunk = Pass(
    make(None), jnp.where(trunk, -1, segments), jnp.where(trunk, segments, -2), lowest
  )
  return [Pass(make(window), own, own), to_trunk]


def _window_start(positions, segments, window):
  """The place, [B, T], of the first trunk token that is less than `window` positions back."""
  places = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
  return first + positions - jnp.take_along_axis(positions, first, axis=1) - (window - 1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, runs: list[Pass], scale: float) -> jax.Array:
  """softmax(scale q.k) v: q [B, T, K, G, H], k and v [B, S, K, H] -> [B, T, K, G, H]."""
  shape = q.shape
  q = (q * scale).reshape(*shape[:2], -1, shape[-1])
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  kernels = [run.kernel for run in runs]
  numbers = [(run.queries, run.keys, run.lowest) for run in runs]
  out = jax.vmap(lambda *row: _row(kernels, *row))(numbers, q, k, v)
  return out.swapaxes(1, 2).reshape(shape)


def _row(kernels, numbers, q, k, v):
  """One row: q [N, T, H], k and v [K, S, H] -> [N, T, H]."""
  segments = [None if ids is None else kernel_lib.SegmentIds(ids, keys) for ids, keys, _ in numbers]
  if len(kernels) == 1:
    return kernels[0](q, k, v, segments[0])
  kernels = [_from(kernel, lowest) for kernel, (*_, lowest) in zip(kernels, numbers)]
  return _joined(list(zip(kernels, segments)), q, k, v)


def _not_before(lowest, places):
  return places >= lowest


def _from(kernel, lowest):
  """The kernel with a query's `lowest` key in place of its own; causal by the segments alone."""
  if lowest is None:
    return kernel
  infos = [info._replace(q_sequence=lowest) for info in _infos(kernel)]
  return kernel_lib.SplashAttentionKernel(*infos, **{**kernel.kwargs, "mask_function": _not_before})


def _infos(kernel):
  return kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info


@jax.custom_vjp
def _joined(runs, q, k, v):
  return _joined_forward(runs, q, k, v)[0]


def _joined_forward(runs, q, k, v):
  outs, sums = [], []
  for kernel, segments in runs:
    saving = {**kernel.kwargs, "save_residuals": True}
    kernel = kernel_lib.SplashAttentionKernel(*_infos(kernel), **saving)
    out, (logsumexp,) = kernel(q, k, v, segments)
    outs.append(out)
    sums.append(logsumexp)
  # A query without keys in a pass has a logsumexp near the least float there, so a share of 0.
  total = jax.nn.logsumexp(jnp.stack(sums), axis=0)
  parts = [jnp.exp(s - total)[..., None] * out.astype(jnp.float32) for s, out in zip(sums, outs)]
  out = sum(parts).astype(q.dtype)
  out, total = (checkpoint_name(x, SAVED_NAME) for x in (out, total))
  return out, (runs, q, k, v, out, total)


def _joined_backward(saved, do):
  """Every pass by itself, given the whole row's output and logsumexp; the gradients add."""
  runs, q, k, v, out, total = saved
  grads = []
  for kernel, segments in runs:
    saved = (q, k, v, segments, None, out, total, kernel.dq_mask_info, kernel.dkv_mask_info)
    # The public kernel has no gradient that knows of the other passes: this is its own backward rule.
    grads.append(kernel_lib._splash_attention_bwd(**kernel.kwargs, res=saved, do=do)[3:6])
  return None, *(sum(parts) for parts in zip(*grads))


_joined.defvjp(_joined_forward, _joined_backward)
