"""Operations counted from a trace, against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from align_jax import models, sharding
from align_jax.scale import flops

M, K, N = 6, 10, 14


def counted(function, *args):
  return flops.count(jax.jit(function).trace(*args).jaxpr)


def test_a_product():
  assert counted(jnp.dot, jnp.zeros((M, K)), jnp.zeros((K, N))) == 2 * M * K * N


def test_a_scan_counts_its_trips_and_a_branch_its_dearest_side():
  x, w = jnp.zeros((M, M)), jnp.zeros((7, M, M))
  assert counted(lambda x, w: jax.lax.scan(lambda c, a: (c @ a, None), x, w), x, w) == 7 * 2 * M**3

  def either(flag, x):
    return jax.lax.cond(flag, lambda: x @ x @ x, lambda: x)

  assert counted(either, True, x) == 2 * 2 * M**3


def test_a_loop_counts_as_often_as_its_condition_allows():
  def of(condition):
    def power(n, x):
      start = (jnp.zeros((), jnp.int32), x)
      return jax.lax.while_loop(lambda c: condition(c[0], n), lambda c: (c[0] + 1, c[1] @ x), start)

    return counted(power, jnp.zeros((), jnp.int32), jnp.zeros((M, M))) / (2 * M**3)

  assert of(lambda i, n: (i < 5) & (i < n)) == 5
  assert of(lambda i, n: i < n) == 1


@pytest.mark.parametrize("where", [None, jnp.ones((2, 32))])
def test_a_head_in_chunks_counts_as_a_whole_one_and_its_logits_once_more(where):
  config = models.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48
  )
  model = models.Transformer(config)
  tokens = jnp.zeros((2, 33), jnp.int32)

  def gradient(chunk):
    def loss(p):
      return models.token_logprobs(
        model, {"params": p}, tokens, chunk_size=chunk, where=where
      ).sum()

    return counted(jax.grad(loss), models.abstract_params(model))

  logits = 2 * 2 * 32 * config.embed_dim * config.vocab_size
  assert gradient(8) == gradient(None) + logits


def test_recomputation_is_counted():
  w, x = jnp.zeros((K, K)), jnp.zeros((M, K))

  def loss(w):
    return jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))

  plain = counted(jax.grad(loss), w)  # both sines need what they were taken of
  assert counted(jax.grad(jax.checkpoint(loss)), w) == plain + 2 * (2 * M * K * K)


def test_a_model_is_two_operations_a_weight_and_a_token_plus_attention():
  config = models.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
    tie_embeddings=False,
  )  # fmt: skip
  model = models.Transformer(config)
  rows, length = 2, 16
  tokens = jnp.zeros((rows, length), jnp.int32)
  params = models.abstract_params(model)
  found = counted(lambda p: model.apply({"params": p}, tokens), params)
  vectors = config.embed_dim * (2 * config.num_layers + 1)
  matrices = models.num_params(model) - vectors - config.vocab_size * config.embed_dim
  attention = 2 * 2 * rows * config.num_layers * config.num_heads * config.head_dim * length**2
  assert found == 2 * matrices * rows * length + attention


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_what_devices_do_apart_is_counted_for_all_of_them(axes):
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices())
  spec = jax.sharding.PartitionSpec(("data", "fsdp"))
  split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, None), out_specs=spec)
  ways = sharding.batch_ways(mesh)
  count = counted(split, jnp.zeros((8, K)), jnp.zeros((K, N)))
  assert count == 2 * 8 * K * N * (8 // ways)  # over `tensor` all do the same
