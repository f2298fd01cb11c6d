"""Full rows of random tokens, as long and as many as a scaling benchmark asks for.

sizes: {"length": T, "batch": B, "vocab": V, ...}. Every place of a row is a real token.
"""

import numpy as np

from align_jax.data.batching import Batch


def sft(sizes: dict[str, int]) -> Batch:
  """B rows of one demonstration each, a quarter of it prompt: the arrays of `data.sft_batches`."""
  batch, length = sizes["batch"], sizes["length"]
  positions = np.arange(length, dtype=np.int32)
  learned = (positions >= length // 4).astype(np.float32)
  return {
    "tokens": _tokens(sizes),
    "segment_ids": np.ones((batch, length), np.int32),
    "positions": np.tile(positions, (batch, 1)),
    "loss_mask": np.tile(learned, (batch, 1)),
  }


def dpo(sizes: dict[str, int]) -> Batch:
  """B rows of one pair each, half of it prompt and a quarter each answer: `data.shared_batches`.

  The reference's log-probs are given, as from a cache.
  """
  batch, length = sizes["batch"], sizes["length"]
  answer = length // 4
  trunk = length - 2 * answer
  answers = np.arange(trunk, trunk + answer)
  places = np.arange(2 * answer)
  tokens = _tokens(sizes)
  sources = trunk - 1 + places
  sources[answer] = trunk - 1  # both answers begin behind the prompt
  scored = {
    "sources": sources,
    "slots": places // answer,
    "places": places % answer,
    "targets": np.zeros_like(places),
    "ref_logprobs": np.full(2 * answer, -np.log(sizes["vocab"]), np.float32),
  }
  rows = {name: np.zeros(length, x.dtype) for name, x in scored.items()}
  rows["slots"] -= 1  # where nothing is scored
  for name, x in scored.items():
    rows[name][: len(x)] = x
  rows |= {
    "positions": np.concatenate([np.arange(trunk), answers, answers]),
    "branch_ids": np.repeat([0, 1, 2], [trunk, answer, answer]),
    "segment_ids": np.ones(length, int),
    "last": np.array([trunk + answer - 1, length - 1]),
  }
  tiled = {name: np.tile(x, (batch, 1)) for name, x in rows.items()}
  tiled = {k: x if x.dtype == np.float32 else x.astype(np.int32) for k, x in tiled.items()}
  tiled["targets"][:, : 2 * answer] = tokens[:, trunk:]
  pair = {"weight": 1.0, "margin": 0.0, "label_prob": 1.0}
  return (
    tiled | {"tokens": tokens} | {k: np.full((batch, 1), x, np.float32) for k, x in pair.items()}
  )


MAKERS = {"sft": sft, "dpo": dpo}


def _tokens(sizes: dict[str, int]) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, sizes["vocab"], (sizes["batch"], sizes["length"])).astype(np.int32)
