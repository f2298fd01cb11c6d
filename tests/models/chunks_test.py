"""Chunks of positions against all positions at once, by value, gradient and what is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models
from align_jax.models import chunks

HIDDEN, TARGETS = jnp.ones((3, 13, 8)), jnp.ones((3, 13), jnp.int32)
TABLE = jnp.ones((64, 8))


def mapped(score, arrays, **options):
  return models.map_positions(lambda *x: (score(*x),), arrays, **options)[0].sum()


def added(score, arrays, **options):
  return chunks.add_positions(lambda *x: score(*x).sum(), arrays, **options)


def products(total, transform):
  """How many products the compiled `transform` of a head's loss has."""

  def loss(table, hidden):
    def score(hidden, targets):
      return models.target_logprobs(hidden @ table.T, targets)

    return total(score, (hidden, TARGETS), chunk_size=4, count=jnp.asarray(9))

  return jax.jit(transform(loss)).lower(TABLE, HIDDEN).compile().as_text().count(" dot(")


@pytest.mark.parametrize("total, expected", [(mapped, [2, 2, 3, 1]), (added, [2, 2, 3, 1])])
def test_a_head_that_does_not_learn_has_no_gradient_computed(total, expected):
  """Products of a chunk: the logits, the gradient of what they are read from, and that of the table.

  Where only the gradient is wanted, the first pass of what is computed again is gone.
  """
  gradients = [functools.partial(jax.grad, argnums=which) for which in (0, 1, (0, 1))]
  assert [products(total, t) for t in (*gradients, lambda loss: loss)] == expected


@pytest.mark.parametrize("total, expected", [(mapped, 4), (added, 3)])
def test_of_a_sum_no_logits_are_computed_again(total, expected):
  """Value and gradient, as a training step wants them."""
  assert products(total, functools.partial(jax.value_and_grad, argnums=(0, 1))) == expected


class Positions:
  """A score of two numbers a position that also depends on parameters, and its arrays."""

  def __init__(self, length, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    self.weights = jax.random.normal(keys[0], (5,))
    self.x = jax.random.normal(keys[1], (3, length, 5))
    self.y = jax.random.randint(keys[2], (3, length), 0, 9)

  def __call__(self, weights, x, **options):
    def score(x, y):
      found = jnp.tanh(x @ weights)
      return found * y, jnp.exp(found)

    return models.map_positions(score, (x, self.y), **options)

  def loss(self, options, until=None):
    def total(weights, x):
      first, second = (values[:, :until] for values in self(weights, x, **options))
      return jnp.sum(first * jnp.cos(second))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


@pytest.mark.parametrize("chunk_size", [1, 4, 12, 14])
def test_chunks_of_any_size_are_the_whole(chunk_size):
  subject = Positions(13)
  whole = subject.loss({"chunk_size": None})(subject.weights, subject.x)
  parts = subject.loss({"chunk_size": chunk_size})(subject.weights, subject.x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)
  for values in subject(subject.weights, subject.x, chunk_size=chunk_size):
    assert values.shape == (3, 13)


@pytest.mark.parametrize("count", [0, 5, 8, 13])
def test_a_count_leaves_values_and_gradients_of_what_it_counts_exact(count):
  subject = Positions(13)
  whole = subject.loss({"chunk_size": 4}, until=count)(subject.weights, subject.x)
  counted = {"chunk_size": 4, "count": jnp.asarray(count)}
  parts = subject.loss(counted, until=count)(subject.weights, subject.x)
  jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_chunks_behind_the_count_are_not_computed():
  """Their hidden states are NaN: computed, they would reach a gradient even through a zero."""
  subject = Positions(13)
  poisoned = subject.x.at[:, 8:].set(jnp.nan)
  for count in (5, 8):  # both in the second chunk of four
    counted = {"chunk_size": 4, "count": jnp.asarray(count)}
    for values in subject(subject.weights, poisoned, **counted):
      assert (values[:, 8:] == 0).all()
    found = subject.loss(counted)(subject.weights, poisoned)
    expected = subject.loss({"chunk_size": 4}, until=8)(subject.weights, subject.x)
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize("count", [9, None])
def test_chunks_that_hold_a_counted_position_are(count):
  """The control: the same NaN one chunk nearer shows in values and gradient."""
  subject = Positions(13)
  poisoned = subject.x.at[:, 8:].set(jnp.nan)
  options = {"chunk_size": 4} | ({} if count is None else {"count": jnp.asarray(count)})
  value, (weights, _) = subject.loss(options)(subject.weights, poisoned)
  assert np.isnan(value) and np.isnan(weights).all()


@pytest.mark.parametrize("chunk_size", [1, 4, 12, 14])
@pytest.mark.parametrize("count", [0, 5, 8, 13])
def test_sums_of_chunks_are_the_sum(chunk_size, count):
  """What is behind the count is NaN and never met, but for what shares a chunk with it."""
  subject = Positions(13)
  end = min(13, -(-count // chunk_size) * chunk_size)
  arrays = subject.x.at[:, end:].set(jnp.nan), subject.y

  def loss(weights, x, sum_of):
    def score(x, y):
      return jnp.sum(jnp.tanh(x @ weights) * y)

    return jnp.sin(sum_of(score, (x, *arrays[1:])))

  def in_chunks(score, arrays):
    return chunks.add_positions(score, arrays, chunk_size=chunk_size, count=jnp.asarray(count))

  def at_once(score, arrays):
    return score(*(x[:, :end] for x in arrays))

  if chunk_size >= 13:  # one piece knows no count
    arrays, end = (subject.x, subject.y), 13
  expected, found = (
    jax.value_and_grad(lambda *a, s=s: loss(*a, s), (0, 1))(subject.weights, arrays[0])
    for s in (at_once, in_chunks)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
