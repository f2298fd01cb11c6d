"""Both ends of the vocabulary on a mesh are what they are on one device, and move little."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models, sharding
from align_jax.models import embedding
from align_jax.phases import workspace
from align_jax.scale import hlo

VOCAB, WIDTH, ROWS, TIME = 64, 32, 8, 16
MESHES = [
  {"fsdp": 8},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
]


def mesh_of(axes):
  return sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices())


def placed(x, mesh, axes):
  spec = sharding.partition_spec(axes, x.shape, mesh)
  return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


@pytest.fixture
def table():
  return np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)


@pytest.fixture
def tokens():
  return np.random.default_rng(1).integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_rows_and_their_gradient(axes, table, tokens):
  mesh = mesh_of(axes)
  weight = np.random.default_rng(2).normal(size=(ROWS, TIME, WIDTH)).astype(np.float32)
  own = placed(table, mesh, embedding.TABLE_AXES)
  assert own.sharding.spec[1] == ("tensor", "fsdp")
  rows = sharding.put_batch(tokens, mesh)
  look = jax.jit(lambda t, at: embedding.look_up(t, at, mesh))
  np.testing.assert_array_equal(look(own, rows), table[tokens])
  gradient = jax.jit(jax.grad(lambda t, at: jnp.sum(weight * embedding.look_up(t, at, mesh))))
  expected = np.zeros_like(table)
  np.add.at(expected, tokens, weight)
  found = gradient(own, rows)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert found.sharding.is_equivalent_to(own.sharding, 2)


def test_a_lookup_moves_activations_and_never_the_table():
  mesh = mesh_of({"fsdp": 8})
  big = jax.ShapeDtypeStruct((4096, WIDTH), jnp.float32)
  where = jax.sharding.NamedSharding(mesh, embedding._COLUMNS)
  big = jax.ShapeDtypeStruct(big.shape, big.dtype, sharding=where)
  rows = jax.ShapeDtypeStruct((ROWS, TIME), jnp.int32, sharding=sharding.batch_sharding(mesh))

  def moved(look):
    step = jax.jit(jax.grad(lambda t, at: jnp.sum(look(t, at) ** 2)), out_shardings=where)
    module = hlo.parse(step.lower(big, rows).compile().as_text())
    return max(hlo.payload(instruction) for instruction, _ in module.collectives())

  activations = ROWS * TIME * WIDTH * 4
  assert moved(lambda t, at: embedding.look_up(t, at, mesh)) <= activations

  # The control: a table gathered for the lookup is moved whole.
  def by_gathering(t, at):
    t = sharding.gathered(t, mesh, embedding.TABLE_AXES, used=(None, None))
    return jnp.take(t, at, axis=0)

  assert moved(by_gathering) > activations


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_tied_table_turns_into_a_head(axes, table):
  mesh = mesh_of(axes)
  turned = jax.jit(functools.partial(embedding.by_classes, mesh=mesh))(
    placed(table, mesh, embedding.TABLE_AXES)
  )
  np.testing.assert_array_equal(turned, table)
  assert turned.sharding.shard_shape(turned.shape)[0] < VOCAB


def test_a_table_that_does_not_split_is_looked_up_all_the_same(tokens):
  mesh = mesh_of({"fsdp": 8})
  odd = np.arange(VOCAB * 6, dtype=np.float32).reshape(VOCAB, 6)
  found = jax.jit(lambda t, at: embedding.look_up(t, at, mesh))(odd, tokens)
  np.testing.assert_array_equal(found, odd[tokens])


@pytest.mark.parametrize("axes, tied", zip(MESHES, (True, False, True)), ids=str)
def test_log_probs_and_gradients_of_a_model_do_not_depend_on_the_mesh(axes, tied, tokens):
  config = models.ModelConfig(
    vocab_size=VOCAB, embed_dim=WIDTH, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=64, tie_embeddings=tied, logit_softcap=20.0,
  )  # fmt: skip
  alone = models.Transformer(config)
  params = models.init_params(alone, jax.random.key(0))
  segments = (np.arange(TIME) < np.arange(9, 9 + ROWS)[:, None]).astype(np.int32)

  def loss(params, tokens, segments, model):
    found = models.token_logprobs(model, {"params": params}, tokens, None, segments, chunk_size=4)
    return jnp.sum(jnp.sin(found) * segments[:, 1:]), found

  def run(model, params, *rows):
    step = functools.partial(loss, model=model)
    return jax.jit(jax.value_and_grad(step, has_aux=True))(params, *rows)

  mesh = mesh_of(axes)
  model = alone.clone(mesh=mesh)
  spread = jax.device_put(params, workspace.param_shardings(model, mesh))
  (one, scores), gradients = run(alone, params, tokens, segments)
  rows = sharding.put_batch((tokens, segments), mesh)
  (many, others), found = run(model, spread, *rows)
  np.testing.assert_allclose(one, many, rtol=1e-5)
  np.testing.assert_allclose(scores, others, atol=2e-5)
  for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(found)):
    np.testing.assert_allclose(x, y, atol=2e-4)
