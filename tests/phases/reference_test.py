"""The reference's log-probs on disk: what they are, what is computed again, and what is refused."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from align_jax import data, models, sharding, worlds
from align_jax.errors import InputError
from align_jax.phases import reference
from align_jax.training import pair_scores, preference_objectives, preferences

LENGTH, COUNT = 46, 40


class Bigram:
  """Hidden states that know the token only: a model as cheap as one can be."""

  def __init__(self, **changes):
    self.config = models.ModelConfig(
      vocab_size=8, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
      **changes,
    )  # fmt: skip

  def apply(self, variables, *args, method):
    params = variables["params"]
    return args[0] @ params["head"] if method == "unembed" else params["tokens"][args[0]]


def bigram_params(seed, size):
  rng = np.random.default_rng(seed)
  shapes = {"tokens": (size, 8), "head": (8, size)}
  return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def tokenizer():
  return worlds.Microworld(seed=0).tokenizer()


@pytest.fixture(scope="module")
def records():
  return worlds.Microworld(seed=0).preferences(COUNT)


@pytest.fixture(scope="module")
def params(tokenizer):
  return bigram_params(0, len(tokenizer))


def mesh_of(**axes):
  count = int(np.prod(list(axes.values()) or [1]))
  return sharding.make_mesh(sharding.MeshConfig(**({"fsdp": 1} | axes)), jax.devices()[:count])


def tokenised(records, tokenizer, length=LENGTH):
  return data.tokenise_pairs(
    records, tokenizer, data.Batching(8, epochs=1, shuffle=False, pad_last=True), length=length
  )


class Starts:
  """Starts of a run against one folder; `computed` are the pairs each of them scored."""

  def __init__(self, folder, records, tokenizer, params, monkeypatch):
    self.folder, self.records, self.tokenizer, self.params = folder, records, tokenizer, params
    self.computed, self.fail_at = [], None
    score = reference._Pass.__call__

    def counted(run, group):
      if self.fail_at is not None and len(self.computed) == self.fail_at:
        raise KeyboardInterrupt
      self.computed.append(group.tolist())
      return score(run, group)

    monkeypatch.setattr(reference._Pass, "__call__", counted)

  def __call__(
    self, *, records=None, tokenizer=None, params=None, length=LENGTH, model=None, fail_at=None
  ):
    """The reference's values of every sequence."""
    self.computed, self.fail_at = [], fail_at
    records, tokenizer = records or self.records, tokenizer or self.tokenizer
    params = self.params if params is None else params
    pairs = tokenised(records, tokenizer, length)
    scorer = reference.Scorer(
      model or Bigram(), {"params": params}, mesh_of(), batch_size=4, chunk=16
    )
    identity = reference.identity_of(records, tokenizer, length)
    read = reference.cached_reference(self.folder, pairs, scorer, identity)
    return read(np.arange(2 * len(records)))

  @property
  def pairs(self):
    return sorted(sum(self.computed, []))

  @property
  def caches(self):
    return sorted(path.name for path in self.folder.iterdir())

  def store(self):
    (name,) = self.caches
    path = str(self.folder / name / "logprobs")
    return ts.open(
      {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}, open=True
    ).result()


@pytest.fixture
def start(tmp_path, records, tokenizer, params, monkeypatch):
  return Starts(tmp_path, records, tokenizer, params, monkeypatch)


def written_out(params, pairs):
  """log-probs of all scored tokens of every sequence, in float64 NumPy."""
  logits = np.asarray(params["tokens"], np.float64) @ np.asarray(params["head"], np.float64)
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  corpus, found = pairs.corpus, []
  for a, n in zip(corpus.starts, corpus.lengths):
    at = a + np.flatnonzero(pairs.scored[a : a + n])
    found.append(logprobs[corpus.tokens[at - 1], corpus.tokens[at]])
  return found


def assert_equal(found, expected):
  assert [len(values) for values in found] == [len(values) for values in expected]
  np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-5)


def test_the_values_are_the_log_probs_of_the_scored_tokens(start, records, tokenizer, params):
  assert_equal(start(), written_out(params, tokenised(records, tokenizer)))
  assert start.pairs == list(range(COUNT)) and len(start.computed) == COUNT // 4


def test_a_second_start_computes_a_sample_only(start):
  first = start()
  second = start()
  assert len(start.computed) == 1 and len(start.pairs) == 8
  for a, b in zip(first, second):
    np.testing.assert_array_equal(a, b)
  assert len(start.caches) == 1


def test_an_interrupted_pass_goes_on_where_it_stopped(start, records, tokenizer, params):
  with pytest.raises(KeyboardInterrupt):
    start(fail_at=8)
  scored = set(start.pairs)
  values, edges = start.store().read().result(), tokenised(records, tokenizer).scored_edges
  known = {
    pair
    for pair in range(COUNT)
    if not np.isnan(values[edges[2 * pair] : edges[2 * pair + 2]]).any()
  }
  assert len(scored) == 32 and known <= scored
  assert len(known) >= 12  # all but the last few were waited for
  found = start()
  sample, rest = start.computed[0], sum(start.computed[1:], [])
  everything = set(range(COUNT))
  assert len(rest) == len(set(rest)) and everything - scored <= set(rest) <= everything - known
  assert not set(sample) & set(rest)
  assert_equal(found, written_out(params, tokenised(records, tokenizer)))


def test_half_of_a_pair_is_not_a_pair(start, tokenizer, records):
  start()
  edges = tokenised(records, tokenizer).scored_edges
  start.store()[int(edges[2 * 17 + 1])].write(np.nan).result()
  start()
  assert start.computed[1:] == [[17]]


CHANGES = {
  "weights": lambda s: {"params": s.params | {"head": s.params["head"].at[3, 4].add(1e-6)}},
  "length": lambda s: {"length": LENGTH + 1},
  "an answer": lambda s: {
    "records": [dataclasses.replace(s.records[0], chosen=s.records[1].chosen), *s.records[1:]]
  },
  "order": lambda s: {"records": s.records[::-1]},
  "model": lambda s: {"model": Bigram(rope_theta=1e5)},
  "dtype": lambda s: {"model": Bigram(dtype="bfloat16")},
  "tokenizer": lambda s: {"tokenizer": other_template(s.tokenizer)},
}


def other_template(tokenizer):
  """The same vocabulary under another chat template, which here writes the same text."""
  other = copy.deepcopy(tokenizer)
  other.chat_template = tokenizer.chat_template + "{# another #}"
  return other


def test_what_the_numbers_could_depend_on_names_the_folder(start):
  """Each of the changes alone is a cache of its own, computed whole, beside those that are there."""
  start()
  for number, (name, change) in enumerate(CHANGES.items(), start=2):
    before = start.caches
    start(**change(start))
    assert len(start.pairs) == COUNT and len(start.caches) == number, name
    assert set(before) < set(start.caches)
  start()  # and the first is still as it was
  assert len(start.pairs) == 8 and len(start.caches) == len(CHANGES) + 1


@pytest.mark.parametrize(
  "change",
  [
    lambda s: {"records": [dataclasses.replace(r, source="elsewhere:1") for r in s.records]},
    lambda s: {"model": Bigram(remat="full")},
  ],
  ids=["source", "remat"],
)
def test_what_they_cannot_depend_on_does_not(start, change):
  start()
  start(**change(start))
  assert len(start.caches) == 1 and len(start.pairs) == 8


def test_a_changed_value_in_the_sample_is_refused(start, records):
  few = records[:8]  # of which all are the sample
  start(records=few)
  start.store()[5].write(start.store()[5].read().result() + 0.01).result()
  (name,) = start.caches
  with pytest.raises(InputError, match=f"{name}: the cached .* differ by 0.01 nats.*remove this"):
    start(records=few)
  start.store()[5].write(start.store()[5].read().result() - 0.01).result()
  start(records=few)


def test_values_of_other_weights_are_refused(start, tokenizer, monkeypatch):
  """Had the fingerprint missed a change of the weights, the sample would still tell."""
  monkeypatch.setattr(reference, "weights_fingerprint", lambda variables: "the same")
  start()
  with pytest.raises(InputError, match="computed now: remove this folder"):
    start(params=bigram_params(1, len(tokenizer)))
  start()


def test_a_fingerprint_is_the_same_on_any_mesh_and_another_for_one_bit():
  config = models.ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32
  )
  model = models.Transformer(config)
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), models.abstract_params(model)
  )
  one = reference.weights_fingerprint({"params": weights})
  for axes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    where = sharding.tree_shardings(
      models.logical_axes(model), models.abstract_params(model), mesh_of(**axes)
    )
    assert reference.weights_fingerprint({"params": jax.device_put(weights, where)}) == one

  def changed(change):
    other = jax.tree.map(np.copy, weights)
    change(other)
    return reference.weights_fingerprint({"params": other})

  def flip(tree):
    tree["embedding"].view(np.uint32)[7, 3] ^= 1

  def swap_rows(tree):
    tree["embedding"][[3, 9]] = tree["embedding"][[9, 3]]

  def swap_arrays(tree):
    layers = tree["layers"]
    layers["gate"], layers["up"] = layers["up"], layers["gate"]

  found = [changed(change) for change in (flip, swap_rows, swap_arrays)]
  assert len({one, *found}) == 4
  assert changed(lambda tree: None) == one  # the control


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_fingerprints_of_other_types(dtype):
  x = jnp.arange(24).reshape(4, 6).astype(dtype)
  marks = {reference.weights_fingerprint({"w": y}) for y in (x, x.at[0, 0].add(1), x[::-1])}
  assert len(marks) == 3


@pytest.fixture(scope="module")
def transformer(tokenizer):
  """(model, policy, reference): the real one, with the vocabulary padded to a multiple of 8."""
  config = models.ModelConfig(
    vocab_size=-(-len(tokenizer) // 8) * 8, embed_dim=16, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, mlp_dim=32,
  )  # fmt: skip
  model = models.Transformer(config)
  rng = np.random.default_rng(0)
  policy, ref = (
    jax.tree.map(
      lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), models.abstract_params(model)
    )
    for _ in range(2)
  )
  return model, policy, ref


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_loss_from_the_cache_is_the_recomputed_one(
  tmp_path, transformer, records, tokenizer, axes
):
  """In both layouts, whatever the devices that the cache was computed on."""
  model, policy, ref = transformer
  mesh = mesh_of(**axes)
  where = sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)
  placed = {"params": jax.device_put(ref, where)}
  pairs = tokenised(records[:16], tokenizer)
  scorer = reference.Scorer(model, placed, mesh, batch_size=16, chunk=16)
  identity = reference.identity_of(records[:16], tokenizer, LENGTH)
  read = reference.cached_reference(tmp_path, pairs, scorer, identity)
  objective = preference_objectives.preference_objective(model, preferences.PreferenceConfig("ipo"))
  run = jax.jit(objective)
  losses = []
  for cached, frozen in ((read, {}), (None, {"ref": ref})):
    for make in (
      lambda cached: data.padded_batches(pairs, LENGTH, reference=cached),
      lambda cached: data.shared_batches(pairs, reference=cached),
    ):
      batch = next(make(cached))
      losses.append(float(run(policy, frozen, batch, jax.random.key(0))[0]))
  np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
  scores = pair_scores.score_pairs(
    model, {"params": ref}, next(data.padded_batches(pairs, LENGTH)), chunk=None
  )
  expected = np.asarray(scores.logprobs)[np.asarray(scores.mask) > 0]
  flat = np.concatenate([np.concatenate(read(np.array([2 * p, 2 * p + 1]))) for p in range(8)])
  np.testing.assert_allclose(flat, expected[: len(flat)], atol=2e-5)


def test_half_precision_is_verified_within_its_rounding(tmp_path, transformer, records, tokenizer):
  model, _, ref = transformer
  half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
  pairs = tokenised(records[:8], tokenizer)
  identity = reference.identity_of(records[:8], tokenizer, LENGTH)
  scorer = reference.Scorer(half, {"params": ref}, mesh_of(), batch_size=8, chunk=None)
  for _ in range(2):
    values = reference.cached_reference(tmp_path, pairs, scorer, identity)(np.arange(16))
  assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in values)
  assert set(reference._TOLERANCE) == {"float32", "bfloat16", "float16"}
