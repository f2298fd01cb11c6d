"""A model small enough to run uncompiled, and one set of pairs in both layouts of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import data, worlds
from align_jax.models import attention
from align_jax.training import pair_scores

WIDTH = 8


class Toy:
  """One head of attention between an embedding and an unembedding, behind the model's interface."""

  def apply(self, variables, *args, method=None, **named):
    if method == "unembed":
      return args[0] @ variables["params"]["head"]
    hidden = self._hidden(variables, *args, **named)
    return hidden if method == "hidden" else hidden @ variables["params"]["head"]

  def _hidden(self, variables, tokens, positions=None, segment_ids=None, branch_ids=None):
    p, length = variables["params"], tokens.shape[1]
    if positions is None:
      positions = jnp.arange(length)[None]
    x = p["tokens"][tokens] + p["places"][positions]
    mask = attention.sequence_mask(
      length, segment_ids, None, positions=positions, branch_ids=branch_ids
    )
    scores = jnp.einsum("btd,bsd->bts", x @ p["query"], x)
    seen = jax.nn.softmax(jnp.where(mask[:, 0, 0], scores, attention.MASKED), axis=-1) @ x
    if "lora" in variables:
      seen = seen + seen @ variables["lora"]["a"] @ variables["lora"]["b"]
    return x + jnp.tanh(seen @ p["out"])


def toy_params(seed, size):
  rng = np.random.default_rng(seed)
  shapes = {
    "tokens": (size, WIDTH),
    "places": (64, WIDTH),
    "query": (WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "head": (WIDTH, size),
  }
  return {k: jnp.asarray(rng.normal(size=shape) * 0.7, jnp.float32) for k, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Layouts:
  """The same pairs three times: padded, shared, and both with the reference's log-probs in them."""

  padded: dict
  shared: dict
  padded_cached: dict
  shared_cached: dict


@pytest.fixture(scope="session")
def tokenizer():
  return worlds.Microworld(seed=0).tokenizer()


@pytest.fixture(scope="session")
def toy(tokenizer):
  """(model, policy, reference): two policies some nats of a response apart."""
  policy, other = (toy_params(seed, len(tokenizer)) for seed in (0, 1))
  return Toy(), policy, jax.tree.map(lambda a, b: a + 0.15 * b, policy, other)


def layouts_of(tokenizer, reference, weights, labels):
  """Both layouts of as many pairs as there are weights, in one batch each."""
  records = worlds.Microworld(seed=0).preferences(len(weights))
  records = [
    dataclasses.replace(r, weight=float(w), label_prob=float(p))
    for r, w, p in zip(records, weights, labels)
  ]
  plan = data.Batching(len(weights), epochs=1, shuffle=False)
  pairs = data.tokenise_pairs(records, tokenizer, plan, length=46)
  # Answers here are of one line, so that their steps would be the whole of them.
  marks = np.random.default_rng(0).random(pairs.scored.shape) < 0.4
  pairs = dataclasses.replace(pairs, steps=pairs.scored & marks)

  def batches(cache=None):
    padded = next(data.padded_batches(pairs, 46, reference=cache))
    return padded, next(data.shared_batches(pairs, reference=cache, row_multiple=4))

  padded, shared = batches()
  scores = pair_scores.score_pairs(Toy(), {"params": reference}, padded, chunk=None)
  flat, mask = (np.asarray(x).reshape(-1, 45) for x in (scores.logprobs, scores.mask))
  known = [row[on > 0] for row, on in zip(flat, mask)]
  return Layouts(padded, shared, *batches(lambda sequences: [known[s] for s in sequences]))


@pytest.fixture(scope="session")
def hard(toy, tokenizer):
  """Eight pairs that all count 1 and whose labels are sure."""
  return layouts_of(tokenizer, toy[2], np.ones(8), np.ones(8))


@pytest.fixture(scope="session")
def soft(toy, tokenizer):
  """Eight pairs of many weights, one of them 0, and labels from 0 to 1."""
  weights = [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.0]
  return layouts_of(tokenizer, toy[2], weights, [1.0, 0.5, 0.0, 0.3, 0.9, 1.0, 0.7, 0.2])
