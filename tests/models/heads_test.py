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


def test_chunks_never_hold_all_logits(subject):
  model, variables, _ = subject
  tokens = jax.ShapeDtypeStruct((4, 257), jnp.int32)

  def largest(chunk_size):
    jaxpr = jax.make_jaxpr(
      jax.grad(lambda v, t: models.token_logprobs(model, v, t, chunk_size=chunk_size).sum())
    )(variables, tokens)
    return "f32[4,256,64]" in str(jaxpr) or "f32[16,4,16,64]" in str(jaxpr)

  assert largest(None) and not largest(16)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_weighted_sum_is_that_of_the_log_probs_and_so_is_its_gradient(subject, chunk_size):
  """Weights are not 0 or 1 alone, rows hold different numbers of them, and what comes back is scaled."""
  model, variables, tokens = subject
  weight = jnp.asarray([[0, 1, 0, 0, 0.5, 1, 0, 0, 0, 2], [0, 0, -1, 0, 0, 0, 0, 0, 0, 0]])

  def loss(variables, weight, sum_of):
    return jnp.tanh(sum_of(variables, weight) / 10)

  def plainly(variables, weight):
    return (weight * models.token_logprobs(model, variables, tokens)).sum()

  def at_once(variables, weight):
    return models.weighted_logprob(model, variables, tokens, weight=weight, chunk_size=chunk_size)

  expected, found = (
    jax.value_and_grad(lambda v, s=s: loss(v, weight, s))(variables) for s in (plainly, at_once)
  )
  by_hand = (np.asarray(weight) * reference(model, variables, tokens)[0]).sum()
  np.testing.assert_allclose(at_once(variables, weight), by_hand, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
  nothing = jax.grad(at_once)(variables, 0 * weight)
  assert all((x == 0).all() for x in jax.tree.leaves(nothing))


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
