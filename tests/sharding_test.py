"""Logical axes become mesh axes once each, and only where they divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from align_jax import models, sharding
from align_jax.errors import InputError


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())


@pytest.mark.parametrize(
  "axes, shape, expected",
  [
    (("vocab", "columns"), (64, 32), P(None, ("tensor", "fsdp"))),
    (("embed", "classes"), (32, 64), P(None, ("fsdp", "context", "tensor"))),
    # 66 classes do not split in four.
    (("embed", "classes"), (32, 66), P(("fsdp", "context"), "tensor")),
    (
      ("layers", "embed", "heads", "head_dim"),
      (2, 32, 4, 8),
      P(None, ("fsdp", "context"), "tensor", None),
    ),
    (
      ("layers", "embed", "kv_heads", "head_dim"),
      (2, 32, 3, 8),
      P(None, ("fsdp", "context"), None, None),
    ),
    (("layers", "mlp", "embed"), (2, 64, 32), P(None, "tensor", ("fsdp", "context"))),
    (("layers", "embed"), (2, 33), P(None, None)),  # 33 is odd: whole on every device
  ],
)
def test_partition_specs(mesh, axes, shape, expected):
  assert sharding.partition_spec(axes, shape, mesh) == expected


def test_unknown_axis_is_an_error(mesh):
  with pytest.raises(ValueError, match="'width'"):
    sharding.partition_spec(("width",), (8,), mesh)


@pytest.mark.parametrize("config", [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (16, 1, -1)])
def test_mesh_must_cover_the_devices(config):
  with pytest.raises(InputError):
    sharding.make_mesh(sharding.MeshConfig(*config), jax.devices())


def test_every_parameter_has_a_rule(mesh, tiny_model):
  model, _ = tiny_model
  placed = sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)
  split = [s for s in jax.tree.leaves(placed) if any(s.spec)]
  assert len(split) >= 8  # the matrices; norms of 32 are split over fsdp as well


def test_put_batch_splits_rows_and_refuses_a_remainder(mesh):
  rows = sharding.put_batch({"x": np.arange(8.0)}, mesh)["x"]
  assert rows.sharding.spec == P(("data", "fsdp"))
  assert rows.addressable_shards[0].data.shape == (2,)
  np.testing.assert_array_equal(jnp.asarray(rows), np.arange(8.0))
  with pytest.raises(InputError, match="6 rows"):
    sharding.put_batch({"x": np.arange(6.0)}, mesh)


def test_what_rests_in_host_memory_is_fetched_where_it_is_used(mesh):
  placed = jax.sharding.NamedSharding(mesh, P("fsdp"))
  weights = jax.device_put(np.arange(16.0, dtype=np.float32).reshape(8, 2), placed)
  resting = sharding.in_host_memory({"w": weights})["w"]
  assert resting.sharding.memory_kind == "pinned_host" and resting.sharding.spec == P("fsdp")

  def layer(x, w):
    return x + sharding.on_device(w), None

  def run(w):
    return jax.lax.scan(layer, jnp.zeros(2), w)[0]

  used = jax.jit(run)(resting)
  np.testing.assert_array_equal(used, weights.sum(0))
  assert used.sharding.memory_kind == "device"
  shape = sharding.in_host_memory(jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=placed))
  assert shape.sharding.memory_kind == "pinned_host"
