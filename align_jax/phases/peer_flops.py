"""What a step has to compute, and what the machine could."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import models
from align_jax.scale import flops


def model_flops(model, phase: str, batches, *, recomputed: bool) -> float:
  """FLOPs that the step's mathematics needs on `batches`, summed; nothing for padding, for masked
  attention scores or for what the backward pass computes again.

    F = k (a · tokens + b · attended + c · scored)

  tokens: real ones, a pair's prompt once. attended: (query, key) pairs that the mask allows. scored:
  tokens that go through the LM head, none for rewards. k = 3 for forward and backward pass, 4 with the
  `recomputed` reference. a, b, c are traced from the model's forward pass. batches: those of
  `data.sft_batches` packed, of `data.shared_batches`, or of rollouts in shared rows.
  """
  a, b, c = _rates(model)
  tokens, attended, scored = (sum(x) for x in zip(*map(_counts, batches)))
  scored = 0 if phase == "reward" else scored
  return (4 if recomputed else 3) * (a * tokens + b * attended + c * scored)


def sampling_flops(model, requests: list[dict[str, Any]]) -> float:
  """FLOPs of the same kind for sampling {"prompt_ids", "new_tokens"}; the last token drawn is not read."""
  a, b, c = _rates(model)
  new = np.array([r["new_tokens"] for r in requests])
  read = np.array([len(r["prompt_ids"]) for r in requests]) + new - 1
  return float(a * read.sum() + b * (read * (read + 1) // 2).sum() + c * new.sum())


def _rates(model) -> tuple[float, float, float]:
  """FLOPs of the forward pass: (a token of the trunk, a pair of query and key, a token of the head)."""
  config = dataclasses.replace(model.config, remat="none", attention_impl="xla")
  model = models.Transformer(config)
  params = {"params": models.abstract_params(model)}

  def trunk(length: int) -> float:
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return flops.count(
      jax.make_jaxpr(lambda p, t: model.apply(p, t, method="hidden"))(params, tokens)
    )

  one, two = trunk(64), trunk(128)  # 64 a + 64² b and 128 a + 128² b
  b = (two - 2 * one) / (128**2 - 2 * 64**2)
  hidden = jax.ShapeDtypeStruct((1, 1, config.embed_dim), jnp.float32)
  head = jax.make_jaxpr(lambda p, h: model.apply(p, h, method="unembed"))(params, hidden)
  return one / 64 - 64 * b, b, flops.count(head)


def _counts(batch) -> tuple[int, int, int]:
  """(real tokens, allowed pairs of query and key, scored tokens) of a batch, of rollouts in shared rows."""
  batch = batch.get("layout", batch)
  real = np.asarray(batch["segment_ids"]) > 0
  # A token at position i attends to i + 1; positions go on from the prompt in both answers of a pair.
  positions = batch.get("positions", np.broadcast_to(np.arange(real.shape[1]), real.shape))
  attended = int((positions + 1)[real].sum())
  if "slots" in batch:
    scored = batch["slots"] >= 0
  else:
    scored = batch["scored" if "scored" in batch else "loss_mask"] > 0
  return int(real.sum()), attended, int(scored.sum())


def timed(take_pass: Callable[[], None], size: int, dtype: str) -> dict[str, Any]:
  """Seconds of a pass, and `matmul_rate` right before it and right behind it."""
  before = matmul_rate(size, dtype)
  start = time.perf_counter()
  take_pass()
  seconds = time.perf_counter() - start
  return {"seconds": seconds, "matmul_flops_per_s": [before, matmul_rate(size, dtype)]}


def matmul_rate(size: int, dtype: str, repeats: int = 5) -> float:
  """FLOPs per second of the best of `repeats` products of two matrices [size, size]."""
  x = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    best = min(best, time.perf_counter() - start)
  return 2.0 * size**3 / best
