"""A segment that forks: every answer sees its prompt and itself, as it would in a row of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models

# Grouped heads, both kinds of window, two rope bases; the windows are shorter than an answer's row.
WINDOWED = models.ModelConfig(
  vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
  qk_norm=True, rope_local_theta=1e3, sliding_window=4, local_layers=(True, False),
)  # fmt: skip
PLAIN = models.ModelConfig(
  vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)
PROMPT, FIRST, SECOND = 6, 5, 7
LENGTH = 40


def random_params(model, seed=0):
  """Every number differs, norms too; made without compiling the model's own initialisation."""
  leaves, tree = jax.tree.flatten(models.abstract_params(model))
  rng = np.random.default_rng(seed)
  return tree.unflatten([0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


class Subject:
  def __init__(self, config):
    self.model = models.Transformer(config)
    params = self.params = random_params(self.model)
    self.apply = jax.jit(lambda *args: self.model.apply({"params": params}, *args))

  def __call__(self, row, branches=True):
    """Logits [LENGTH, V] of a row made by `laid`."""
    tokens, positions, segments, ids = (jnp.asarray(x)[None] for x in row)
    if not branches:
      ids = jnp.zeros_like(ids)  # one trunk: what comes behind sees everything before
    return np.asarray(self.apply(tokens, positions, segments, ids)[0])


@pytest.fixture(scope="module")
def windowed():
  return Subject(WINDOWED)


@pytest.fixture(scope="module")
def plain():
  return Subject(PLAIN)


@pytest.fixture(params=["windowed", "plain"])
def subject(request):
  return request.getfixturevalue(request.param)


def parts(seed, sizes=(PROMPT, FIRST, SECOND)):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 50, size) for size in sizes]


def laid(*segments):
  """tokens, positions, segment_ids and branch_ids [LENGTH] of segments (prompt, answer, ...)."""
  row = np.zeros((4, LENGTH), np.int32)
  at = 0
  for number, (prompt, *answers) in enumerate(segments, start=1):
    for branch, tokens in enumerate((prompt, *answers)):
      here = slice(at, at + len(tokens))
      start = 0 if branch == 0 else len(prompt)
      row[0, here], row[1, here] = tokens, np.arange(len(tokens)) + start
      row[2, here], row[3, here] = number, branch
      at += len(tokens)
  return row


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


def test_a_row_that_forks_equals_a_row_for_each_answer(subject):
  prompt, a, b = parts(0)
  forked = subject(laid((prompt, a, b)))
  with_a, with_b = (subject(laid((np.concatenate([prompt, x]),))) for x in (a, b))
  size = PROMPT + FIRST
  close(forked[:size], with_a[:size])
  close(forked[size : size + SECOND], with_b[PROMPT : PROMPT + SECOND])
  one_row = subject(laid((prompt, a, b)), branches=False)
  assert np.abs(one_row[size : size + SECOND] - with_b[PROMPT : PROMPT + SECOND]).max() > 0.1


def test_three_answers_and_several_segments_in_a_row(subject):
  """The second segment forks in two, the first in three, and one answer may be empty of tokens."""
  first, second = parts(1, (3, 4, 5, 2)), parts(2)
  row = subject(laid(first, second))
  at = 0
  for prompt, *answers in (first, second):
    start, at = at, at + len(prompt)
    for answer in answers:
      alone = subject(laid((np.concatenate([prompt, answer]),)))
      close(row[start : start + len(prompt)], alone[: len(prompt)])
      close(row[at : at + len(answer)], alone[len(prompt) : len(prompt) + len(answer)])
      at += len(answer)


def test_no_answer_moves_the_other_and_the_prompt_moves_both(subject):
  prompt, a, b = parts(0)
  base = subject(laid((prompt, a, b)))
  ends = np.cumsum([PROMPT, FIRST, SECOND])
  whose = [slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])]
  for changed, moved in ((0, {0, 1, 2}), (1, {1}), (2, {2})):
    tokens = [prompt, a, b]
    tokens[changed] = (tokens[changed] + 7) % 50
    other = subject(laid(tuple(tokens)))
    for part, at in enumerate(whose):
      if part in moved:
        assert np.abs(other[at] - base[at]).max() > 1e-2
      else:
        np.testing.assert_array_equal(other[at], base[at])
    without = [subject(laid(t), branches=False) for t in ((prompt, a, b), tuple(tokens))]
    assert np.abs(without[0][whose[2]] - without[1][whose[2]]).max() > 1e-2  # the control


def test_a_window_goes_by_positions_and_not_by_places():
  """One layer: what the second answer sees of the prompt is not pushed out by the first."""
  config = models.ModelConfig(
    vocab_size=50, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
    mlp_dim=32, sliding_window=4, tie_embeddings=False,
  )  # fmt: skip
  model = models.Transformer(config)
  params = jax.tree.map(jnp.asarray, random_params(model))
  tokens, positions, segments, branches = laid(
    (np.arange(PROMPT), np.arange(6, 6 + FIRST), np.arange(11, 18))
  )

  def logit(embed, place):
    table = params["embedding"].at[:18].set(embed)
    rows = (jnp.asarray(x)[None] for x in (tokens, positions, segments, branches))
    return model.apply({"params": {**params, "embedding": table}}, *rows)[0, place].sum()

  reach = jax.jit(jax.grad(logit))
  embed = jax.random.normal(jax.random.key(1), (18, 32))
  second = PROMPT + FIRST

  def seen(place):
    return np.flatnonzero(np.abs(reach(embed, place)).sum(-1)).tolist()

  assert seen(second) == [3, 4, 5, second]
  assert seen(second + 2) == [5, second, second + 1, second + 2]
  assert seen(second + 4) == list(range(second + 1, second + 5))
  assert seen(PROMPT) == [3, 4, 5, 6]


def test_gradients_are_those_of_both_rows(plain):
  """The prompt's part is the sum of what both answers ask of it."""
  model = plain.model
  params = plain.params
  prompt, a, b = parts(0)
  joined = [np.concatenate([prompt, x]) for x in (a, b)]
  targets = jax.random.normal(jax.random.key(4), (LENGTH, 50))
  ends = np.cumsum([PROMPT, FIRST, SECOND])

  @jax.jit
  def run(params, rows, weights):
    logits = model.apply({"params": params}, *rows)
    return jnp.sum(logits * weights)

  grad = jax.jit(jax.grad(run))
  weights = np.zeros((1, LENGTH, 50), np.float32)
  weights[0, ends[0] : ends[2]] = targets[ends[0] : ends[2]]
  forked = grad(params, [jnp.asarray(x)[None] for x in laid((prompt, a, b))], weights)
  apart = []
  for whole, (start, stop) in zip(joined, ((ends[0], ends[1]), (ends[1], ends[2]))):
    own = np.zeros((1, LENGTH, 50), np.float32)
    own[0, PROMPT : len(whole)] = targets[start:stop]
    apart.append(grad(params, [jnp.asarray(x)[None] for x in laid((whole,))], own))
  for found, *both in zip(*map(jax.tree.leaves, (forked, *apart))):
    close(np.asarray(found), np.asarray(sum(both)))


def test_branches_need_positions_and_no_cache(plain):
  params = plain.params
  tokens = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ValueError, match="branch_ids need positions"):
    plain.model.apply({"params": params}, tokens, branch_ids=tokens)
  cache = models.init_cache(plain.model, 1, 8)
  with pytest.raises(ValueError, match="branch_ids do not go with a cache"):
    plain.model.apply(
      {"params": params, "cache": cache}, tokens, tokens, None, tokens, mutable=["cache"]
    )
