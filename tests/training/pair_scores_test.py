"""What is read at the scored tokens, against softmax written out, from either layout of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.training import pair_scores

FIELDS = ("logprobs", "collision", "kl", "ref_logprobs")


def softmax_of(model, params, tokens, temperature):
  """log π at every position of whole rows, [B, T, V] float64; what is behind a row's end is never seen."""
  logits = np.asarray(model.apply({"params": params}, tokens), np.float64) / temperature
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def written_out(toy, hard):
  return write_out(toy, hard, temperature=1.0)


def write_out(toy, hard, temperature):
  """{field: rows} of every response in the padded order, in float64 from full distributions."""
  model, params, ref = toy
  tokens, mask = (hard.padded[k].reshape(16, -1) for k in ("tokens", "response_mask"))
  all_policy, all_reference = (softmax_of(model, p, tokens, temperature) for p in (params, ref))
  found = {name: [] for name in FIELDS}
  for row in range(16):
    at = np.flatnonzero(mask[row])
    policy, reference = all_policy[row, at - 1], all_reference[row, at - 1]
    number = np.arange(len(at))
    found["logprobs"].append(policy[number, tokens[row, at]])
    found["ref_logprobs"].append(reference[number, tokens[row, at]])
    found["collision"].append(np.log((np.exp(policy) ** 2).sum(-1)))
    found["kl"].append((np.exp(reference) * (reference - policy)).sum(-1))
  return found


def scores_of(toy, batch, chunk=None, **settings):
  model, params, ref = toy
  reference = {"params": ref}
  return pair_scores.score_pairs(
    model, {"params": params}, batch, chunk=chunk, collision=True, reference=reference, **settings
  )


def by_pair(batch, values, mask):
  """The real entries of every response, in the order of the padded layout (tokens tell which)."""
  rows = [x[on > 0] for x, on in zip(np.asarray(values).reshape(-1, values.shape[-1]), mask)]
  return [rows[s] for s in np.argsort(order_of(batch), kind="stable")]


def order_of(batch):
  """Responses have no number: they are told by the weights of their pairs, one apart for each."""
  weight = batch["weight"].reshape(-1)
  empty = weight == 0
  return np.where(empty, 1e9, weight).repeat(2) + np.tile([0.0, 1e-3], len(weight))


@pytest.fixture(scope="module")
def numbered(hard):
  """The hard pairs with weights that say in which order they come in the padded layout."""
  padded, shared = dict(hard.padded), dict(hard.shared)
  padded["weight"] = np.arange(1.0, 9.0, dtype=np.float32)
  weight = np.zeros_like(shared["weight"])
  for row, slot in np.argwhere(shared["weight"] > 0):
    inside = shared["segment_ids"][row] == slot + 1
    trunk = shared["tokens"][row][inside & (shared["branch_ids"][row] == 0)]
    branch = shared["tokens"][row][inside & (shared["branch_ids"][row] == 1)]
    whole = np.concatenate([trunk, branch])
    same = [i for i in range(8) if (padded["tokens"][i, 0, : len(whole)] == whole).all()]
    weight[row, slot] = 1.0 + same[0]
  shared["weight"] = weight
  assert sorted(weight[weight > 0]) == list(range(1, 9))
  return {"padded": padded, "shared": shared}


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_every_field_is_that_of_the_full_distributions(toy, numbered, written_out, layout, chunk):
  batch = numbered[layout]
  scores = scores_of(toy, batch, chunk)
  mask = np.asarray(scores.mask).reshape(-1, scores.mask.shape[-1])
  for name in FIELDS:
    found = by_pair(batch, getattr(scores, name), mask)
    assert all(len(row) == 0 for row in found[16:])
    for row, values in zip(found, written_out[name]):
      np.testing.assert_allclose(row, values, rtol=2e-5, atol=2e-5, err_msg=name)
  assert min(len(x) and x.min() for x in written_out["kl"]) > 0


def test_every_distribution_is_at_the_temperature_asked_for(toy, hard, numbered):
  batch = numbered["padded"]
  scores = scores_of(toy, batch, temperature=0.6)
  mask = np.asarray(scores.mask).reshape(-1, scores.mask.shape[-1])
  for name, expected in write_out(toy, hard, temperature=0.6).items():
    for row, values in zip(by_pair(batch, getattr(scores, name), mask), expected):
      np.testing.assert_allclose(row, values, rtol=2e-5, atol=5e-5, err_msg=name)


def test_kl_is_that_of_the_reference_to_the_policy(toy, numbered):
  """The control: the other direction is another number."""
  model, params, ref = toy
  there = scores_of((model, params, ref), numbered["padded"]).kl
  back = scores_of((model, ref, params), numbered["padded"]).kl
  assert np.abs(np.asarray(there - back)).max() > 0.1
  same = scores_of((model, params, params), numbered["padded"]).kl
  np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_fields_not_asked_for_are_none(toy, hard):
  model, params, _ = toy
  scores = pair_scores.score_pairs(model, {"params": params}, hard.shared, chunk=None)
  assert scores.collision is scores.kl is scores.ref_logprobs is None


def test_chunks_behind_the_last_scored_token_are_skipped(toy, hard):
  """Rows hold prompts too, so the last chunks are empty: a head of NaN there is never met."""
  model, params, _ = toy
  batch = {k: jnp.asarray(v) for k, v in hard.shared.items()}
  scored = int((hard.shared["slots"] >= 0).sum(axis=1).max())
  width = batch["slots"].shape[1]
  chunk = 8
  first_empty = -(-scored // chunk) * chunk
  assert first_empty <= width - chunk  # there is a chunk to skip

  class Poisoned:
    """Hidden states are NaN where the empty chunks would read them: at a place of their own."""

    def apply(self, variables, *args, method=None):
      if method == "unembed":
        return model.apply(variables, *args, method=method)
      hidden = model.apply(variables, *args, method=method)
      return jnp.concatenate([hidden, jnp.full_like(hidden[:, :1], jnp.nan)], axis=1)

  def total(params, model, sources):
    found = pair_scores.score_tokens(
      model, {"params": params}, batch | {"sources": sources}, chunk=chunk
    )
    return jnp.sum(pair_scores.by_response(batch, found["logprobs"]))

  poisoned = batch["sources"].at[:, first_empty:].set(hard.shared["tokens"].shape[1])
  run = jax.jit(jax.value_and_grad(total), static_argnums=1)
  expected = run(params, model, batch["sources"])
  found = run(params, Poisoned(), poisoned)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  near = batch["sources"].at[:, scored - 1].set(hard.shared["tokens"].shape[1])
  assert np.isnan(run(params, Poisoned(), near)[0])  # the control


def test_values_go_to_their_place_in_their_response_and_no_others_are_kept():
  """Two rows of two slots; a token without a response is dropped, whatever it holds."""
  batch = {
    "sources": np.zeros((2, 5), np.int32),
    "slots": np.array([[0, 0, 1, 2, -1], [1, 0, -1, -1, -1]]),
    "places": np.array([[0, 1, 0, 0, 0], [0, 0, 0, 3, 0]]),
    "last": np.zeros((2, 4), np.int32),
  }
  values = np.array([[1.0, 2, 3, 4, np.nan], [6, 7, np.nan, np.inf, 9]], np.float32)
  found = pair_scores.by_response(batch, jnp.asarray(values))
  expected = np.zeros((4, 2, 5), np.float32)
  expected[0, 0, :2] = 1, 2
  expected[0, 1, 0], expected[1, 0, 0], expected[2, 1, 0], expected[2, 0, 0] = 3, 4, 6, 7
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(pair_scores.response_mask(batch), expected > 0)
  np.testing.assert_array_equal(pair_scores.aligned(batch | {"x": jnp.asarray(values)}, "x"), found)


def test_a_padded_batch_is_read_one_token_on():
  """What stands at t in the data is predicted at t - 1."""
  batch = {"tokens": np.zeros((3, 2, 4)), "x": np.arange(24.0).reshape(3, 2, 4)}
  np.testing.assert_array_equal(pair_scores.aligned(batch, "x"), batch["x"][:, :, 1:])
  np.testing.assert_array_equal(
    pair_scores.by_response(batch, jnp.arange(18.0).reshape(6, 3)), np.arange(18).reshape(3, 2, 3)
  )
