"""Both ends of a vocabulary on a mesh: rows of a table looked up by token, and the table as a head.

The table [vocab, embed] is stored split by columns.  A device looks its columns up for every token of
its replica and sends each host of rows what belongs there: what travels is the activations once, and
nothing of the size of the table is ever held.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from align_jax import sharding

TABLE_AXES = ("vocab", "columns")
HEAD_AXES = ("embed", "classes")
_COLUMNS = PartitionSpec(None, ("tensor", "fsdp"))


def look_up(table: jax.Array, tokens: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
  """table[tokens], [B, T, D], of table [V, D] and tokens [B, T] int32."""
  if mesh is None or mesh.size == 1:
    return jnp.take(table, tokens, axis=0)
  split = sharding.partition_spec(TABLE_AXES, table.shape, mesh)
  rows = sharding.activation_spec(("batch", "length"), tokens.shape, mesh)
  if split != _COLUMNS or rows != PartitionSpec(sharding.BATCH_AXES, "context"):
    table = sharding.gathered(table, mesh, TABLE_AXES, used=(None, None))
    return jnp.take(table, tokens, axis=0)
  found = jax.shard_map(
    _look_up, mesh=mesh, in_specs=(split, rows), out_specs=PartitionSpec(*rows), check_vma=False
  )
  return found(table, tokens)


def _look_up(columns, tokens):
  """On one device: its columns [V, D / n] for the tokens of all, then all columns for its own."""
  everyone = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
  found = jnp.take(columns, everyone, axis=0)
  found = jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)
  return jax.lax.all_gather(found, "tensor", axis=2, tiled=True)


def by_classes(table: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
  """A tied table [V, D], stored by columns, split by rows: as a head wants it."""
  if mesh is None or mesh.size == 1:
    return table
  ways = sharding.ways(mesh, ("fsdp", "tensor"))
  split = sharding.partition_spec(TABLE_AXES, table.shape, mesh)
  if split != _COLUMNS or table.shape[0] % ways or mesh.shape["context"] > 1:
    return sharding.gathered(table, mesh, TABLE_AXES, used=("classes", None))
  turn = jax.shard_map(
    _by_classes,
    mesh=mesh,
    in_specs=split,
    out_specs=PartitionSpec(("fsdp", "tensor"), None),
    check_vma=False,
  )
  return turn(table)


def whole_rows(logits: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
  """Logits [B, V], split by classes, as whole rows where the rows of a batch are.

  In two steps, each of which is one collective: straight ahead, the compiler gathers everything.
  """
  if mesh is None:
    return logits
  if sharding.activation_spec(("classes",), logits.shape[1:], mesh)[0] is not None:
    logits = sharding.constrain(logits, mesh, ("replicas", "shards"))
  return sharding.constrain(logits, mesh, ("batch", None))


def _by_classes(columns):
  move = functools.partial(jax.lax.all_to_all, split_axis=0, concat_axis=1, tiled=True)
  return move(move(columns, "fsdp"), "tensor")
