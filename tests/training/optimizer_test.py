"""Schedules hit their corner values; weight decay touches matrices only; parts learn apart."""

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest

from align_jax import sharding
from align_jax.errors import InputError
from align_jax.training import optimizer
from align_jax.training import state as state_lib
from align_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule


def test_schedules_at_their_corners():
  config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.1)
  cosine = make_schedule(config, 100)
  np.testing.assert_allclose(
    [cosine(0), cosine(10), cosine(55), cosine(100)], [0.1, 1, 0.55, 0.1], rtol=1e-6
  )
  linear = make_schedule(OptimizerConfig(1.0, schedule="linear", warmup_fraction=0.0), 10)
  np.testing.assert_allclose([linear(0), linear(5), linear(10)], [1.0, 0.55, 0.1], rtol=1e-6)
  constant = make_schedule(OptimizerConfig(0.5, schedule="constant", warmup_fraction=0.0), 10)
  assert constant(9) == 0.5


def test_weight_decay_leaves_vectors_alone():
  params = {
    "layers": {"norm": jnp.ones((2, 3)), "up": jnp.ones((2, 3, 4))},
    "final_norm": jnp.ones(3),
    "embedding": jnp.ones((5, 3)),
  }
  config = OptimizerConfig(1.0, weight_decay=0.5, schedule="constant", warmup_fraction=0.0)
  tx = make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  moved = {
    jax.tree_util.keystr(k): bool(jnp.any(u != 0))
    for k, u in jax.tree_util.tree_leaves_with_path(updates)
  }
  assert moved == {
    "['embedding']": True,
    "['final_norm']": False,
    "['layers']['norm']": False,
    "['layers']['up']": True,
  }


def test_gradients_are_clipped_by_global_norm():
  tx = make_optimizer(
    OptimizerConfig(1.0, name="sgd", schedule="constant", warmup_fraction=0.0, grad_clip=1.0), 10
  )
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  updates, _ = tx.update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, tx.init(params), params)
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)


def test_the_norm_is_numpys_over_arrays_of_every_rank_and_type():
  rng = np.random.default_rng(0)
  tree = {"stack": rng.normal(size=(3, 40, 5)), "vector": rng.normal(size=7), "bias": np.array(2.0)}
  whole = np.concatenate([x.ravel() for x in tree.values()])
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  norm = jax.jit(optimizer.global_norm)(arrays)
  np.testing.assert_allclose(norm, np.linalg.norm(whole), rtol=1e-6)
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
  rounded = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(halves)])
  norm = optimizer.global_norm(halves)
  assert norm.dtype == jnp.float32
  np.testing.assert_allclose(norm, np.linalg.norm(rounded), rtol=1e-6)


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_optaxs(most):
  rng = np.random.default_rng(1)
  tree = {"a": jnp.asarray(rng.normal(size=(4, 6))), "b": jnp.asarray(rng.normal(size=3))}
  expected, _ = optax.clip_by_global_norm(most).update(tree, optax.EmptyState())
  found = optimizer.clip_by_global_norm(tree, most)
  for name in tree:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_the_norm_writes_no_squares_of_stacked_arrays():
  """XLA's own sums on CPU do, where one goes over all axes: optax's norm shows it."""
  tree = {name: jax.ShapeDtypeStruct((24, 256, 256), jnp.float32) for name in "abcd"}

  def share(norm) -> float:
    memory = jax.jit(norm).lower(tree).compile().memory_analysis()
    return memory.temp_size_in_bytes / memory.argument_size_in_bytes

  assert share(optimizer.global_norm) < 0.1
  if jaxlib.__version__ == "0.10.2":  # where `app.set_environment` keeps XLA's own
    assert share(optax.global_norm) > 0.2


@pytest.mark.parametrize(
  "change",
  [
    {"name": "adan"},
    {"schedule": "cosin"},
    {"learning_rate": 0.0},
    {"name": "sgd", "weight_decay": 0.1},
  ],
)
def test_unusable_settings_are_errors(change):
  with pytest.raises(InputError):
    OptimizerConfig(**{"learning_rate": 1.0} | change)


def test_parts_are_clipped_and_scheduled_apart_and_may_wait():
  """Of two parameters with gradients of 3 and 4, each meets its own clip; the second starts late."""
  tx = optimizer.by_part(
    a=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
    b=optimizer.delayed(optax.sgd(optax.piecewise_constant_schedule(1.0, {1: 0.1})), 2),
  )
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  state, path = tx.init(params), []
  for _ in range(4):
    updates, state = tx.update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, state, params)
    path.append((float(updates["a"][0]), float(updates["b"][0])))
  np.testing.assert_allclose(path, [(-1, 0), (-1, 0), (-1, -4), (-1, -0.4)], rtol=1e-6)


def test_moments_of_parts_are_placed_like_their_parameters():
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8, tensor=1), jax.devices())
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  params = {name: jax.device_put(jnp.zeros((16, 4)), placed) for name in ("a", "b")}
  tx = optimizer.by_part(a=optax.adam(1e-3), b=optimizer.delayed(optax.adam(1e-3), 2))
  state = state_lib.create_state(params, tx, 0, mesh)
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 4)]
  assert len(moments) == 4
  assert all(x.sharding.is_equivalent_to(placed, 2) for x in moments)
