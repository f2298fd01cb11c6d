"""Log-probs, entropies and scalar heads against softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models
from align_jax.models import heads


@pytest.fixture(scope="module")
def subject(tiny_model):
  model, params = tiny_model
  params = jax.tree.map(lambda x: 3 * x, params)  # distributions that are not almost flat
  tokens = jax.random.randint(jax.random.key(2), (2, 11), 0, 64)
  return model, {"params": params}, tokens


def reference(model, variables, tokens, temperature=1.0):
  """(log-probs, entropies) [B, T-1] in float64."""
  logits = np.asarray(model.apply(variables, tokens), np.float64)[:, :-1] / temperature
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logprobs, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
  return chosen, -(np.exp(logprobs) * logprobs).sum(-1)


@pytest.mark.parametrize("chunk_size", [None, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_and_entropy(subject, chunk_size, temperature):
  model, variables, tokens = subject
  logprobs, entropy = models.token_logprobs(
    model, variables, tokens, chunk_size=chunk_size, temperature=temperature, return_entropy=True
  )
  expected = reference(model, variables, tokens, temperature)
  np.testing.assert_allclose(logprobs, expected[0], atol=1e-5)
  np.testing.assert_allclose(entropy, expected[1], atol=1e-5)


def test_chunks_change_no_gradient(subject):
  model, variables, tokens = subject

  def loss(variables, chunk_size):
    return models.token_logprobs(model, variables, tokens, chunk_size=chunk_size).sum()

  whole, chunked = (jax.jit(jax.grad(loss), static_argnums=1)(variables, c) for c in (None, 3))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole, chunked)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_only_what_counts_is_scored(subject, chunk_size, monkeypatch):
  """The rest is 0 in value and gradient, and no more chunks meet the head than the fullest row needs."""
  model, variables, tokens = subject
  mask = jnp.asarray([[0, 1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 2, 0, 0, 0, 0, 0, 0, 0]])
  counts = []
  mapped = heads.map_positions

  def watched(*args, count=None, **options):
    counts.append(count)
    return mapped(*args, count=count, **options)

  monkeypatch.setattr(heads, "map_positions", watched)

  def loss(variables, where):
    found = models.token_logprobs(
      model, variables, tokens, chunk_size=chunk_size, where=where, return_entropy=True
    )
    return sum((x * mask * jnp.arange(1, 11)).sum() for x in found), found

  expected, of_all = jax.grad(loss, has_aux=True)(variables, None)
  gradient, found = jax.grad(loss, has_aux=True)(variables, mask)
  assert [None if c is None else int(c) for c in counts] == [None, chunk_size and 4]
  for ours, everywhere in zip(found, of_all):
    np.testing.assert_allclose(ours, np.where(mask, everywhere, 0.0), atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected)


def test_chunks_of_many_models_are_those_of_each(subject):
  """Under vmap, each with a count of its own."""
  model, variables, tokens = subject
  each = [jax.tree.map(lambda x, scale=scale: scale * x, variables) for scale in (1, 2)]

  def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)

  masks = jnp.asarray([[[1] * 9 + [0]] * 2, [[0, 1] + [0] * 8] * 2])

  def loss(variables, mask):
    return models.token_logprobs(model, variables, tokens, chunk_size=3, where=mask).sum()

  at_once = jax.vmap(jax.grad(loss))(stacked(each), masks)
  alone = stacked([jax.grad(loss)(one, mask) for one, mask in zip(each, masks)])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), at_once, alone)


def test_a_head_that_does_not_learn_has_no_gradient_computed():
  """Of a chunk, three products: logits again, the gradient of what it read, and that of the table."""
  table, hidden, targets = jnp.ones((64, 8)), jnp.ones((3, 13, 8)), jnp.ones((3, 13), jnp.int32)

  def products(argnums):
    def loss(table, hidden):
      def score(hidden, targets):
        return (models.target_logprobs(hidden @ table.T, targets),)

      arrays, count = (hidden, targets), jnp.asarray(9)
      return models.map_positions(score, arrays, chunk_size=4, count=count)[0].sum()

    gradient = jax.jit(jax.grad(loss, argnums)).lower(table, hidden).compile()
    return gradient.as_text().count(" dot(")

  assert [products(which) for which in (0, 1, (0, 1))] == [2, 2, 3]


def test_chunks_never_hold_all_logits(subject):
  model, variables, _ = subject
  tokens = jax.ShapeDtypeStruct((4, 257), jnp.int32)

  def largest(chunk_size):
    jaxpr = jax.make_jaxpr(
      jax.grad(lambda v, t: models.token_logprobs(model, v, t, chunk_size=chunk_size).sum())
    )(variables, tokens)
    return "f32[4,256,64]" in str(jaxpr) or "f32[16,4,16,64]" in str(jaxpr)

  assert largest(None) and not largest(16)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(subject, temperature):
  with pytest.raises(ValueError, match="temperature"):
    models.token_logprobs(*subject, temperature=temperature)


def test_scalar_head_starts_as_published():
  head = models.init_scalar_head(jax.random.key(0), 4096)
  assert float(head["bias"]) == 0.0 and head["kernel"].shape == (4096,)
  assert float(head["kernel"].std()) == pytest.approx(1 / np.sqrt(4097), rel=0.05)


def test_scalar_head_is_a_dot_product():
  head = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array(0.5)}
  hidden = jnp.array([[[1.0, 1.0], [0.0, -1.0]]], jnp.bfloat16)
  values = models.scalar_head(head, hidden)
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, [[3.5, -1.5]])


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
