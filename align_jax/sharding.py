"""Where arrays live: logical axis names to mesh axes, all in this file.

Arrays name their axes logically (`batch length embed mlp heads kv_heads head_dim vocab layers rank`);
`RULES` says which mesh axis each axis of a weight may use, `ACTIVATIONS` that of an activation.  Mesh
axes are `data` (replicas, across slices), `fsdp` (weights and batch split), `context` (the time of
long rows) and `tensor` (heads, hidden units).  Axes are of Auto type: the compiler propagates
shardings, so every jit that *creates* state must be given `out_shardings`.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from align_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
_AUTO = (AxisType.Auto,) * len(MESH_AXES)

# Read in order: a dimension takes the first mesh axis listed for its name that is still free in this
# array and divides it.  An embedding table [vocab, embed] thus becomes P(fsdp, tensor): the other
# way round costs 1.3x the bytes.
RULES = (
  ("vocab", "fsdp"),
  ("embed", "fsdp"),
  ("embed", "tensor"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
)
ACTIVATIONS = {
  "batch": BATCH_AXES,
  "length": "context",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "vocab": "tensor",
}
REPLICATED_NAMES = frozenset({"length", "head_dim", "layers", "rank", None})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1, meaning all the devices that are left."""

  data: int = 1  # a multiple of the slices where there are several
  fsdp: int = -1
  tensor: int = 1
  context: int = 1


def make_mesh(config: MeshConfig, devices) -> Mesh:
  """A mesh over `devices`; raises InputError when the sizes do not multiply to their number.

  Over several slices `data` goes across them and every other axis stays within one, where links are
  fast.
  """
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise InputError(f"mesh sizes must be positive, at most one of them -1, not {sizes}")
  known = math.prod(s for s in sizes if s != -1)
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  if math.prod(sizes) != len(devices):
    raise InputError(
      f"mesh {' x '.join(MESH_AXES)} = {sizes} does not cover the {len(devices)} devices at hand"
    )
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    return jax.make_mesh(sizes, MESH_AXES, axis_types=_AUTO, devices=devices)
  if sizes[0] % slices:
    raise InputError(f"mesh.data = {sizes[0]} must be a multiple of the {slices} slices")
  within, across = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
  grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
  return Mesh(grid, MESH_AXES, axis_types=_AUTO)


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh):
  """The PartitionSpec of one array with logical `axes`; a mesh axis is used at most once."""
  taken = [None] * len(shape)
  for name in axes:
    if name not in REPLICATED_NAMES and name not in {rule for rule, _ in RULES}:
      raise ValueError(f"no sharding rule for the logical axis {name!r}")
  for name, mesh_axis in RULES:
    for dim, axis in enumerate(axes):
      fits = shape[dim] % mesh.shape[mesh_axis] == 0
      if axis == name and taken[dim] is None and mesh_axis not in taken and fits:
        taken[dim] = mesh_axis
  return PartitionSpec(*taken)


def tree_shardings(axes_tree, abstract_tree, mesh: Mesh):
  """A tree of NamedSharding for arrays whose logical axes are `axes_tree` (tuples as leaves)."""
  return jax.tree.map(
    lambda x, axes: NamedSharding(mesh, partition_spec(axes, x.shape, mesh)),
    abstract_tree,
    axes_tree,
  )


def activation_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh):
  """The PartitionSpec of an activation; an axis that does not divide evenly is left whole."""
  spec = []
  for name, size in zip(axes, shape, strict=True):
    split = ACTIVATIONS.get(name)
    names = (split,) if isinstance(split, str) else split or ()
    spec.append(split if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
  return PartitionSpec(*spec)


def constrain(x, mesh: Mesh | None, axes: tuple[str | None, ...]):
  """x, held to where an activation with these logical axes belongs; as it is without a mesh."""
  if mesh is None or mesh.size == 1:
    return x
  placed = NamedSharding(mesh, activation_spec(axes, x.shape, mesh))
  return jax.lax.with_sharding_constraint(x, placed)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 split over data and fsdp; every other axis whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
  """Into how many parts a batch is split: data x fsdp."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def host_share(mesh: Mesh) -> tuple[int, int]:
  """(index, count): a batch is `count` equal runs of rows, and this host's devices hold the index-th.

  Hosts that part along other axes only (`context`, `tensor`) hold the same rows and read the same.
  Raises InputError where the rows of two hosts overlap only in part.
  """
  batch_axes = [MESH_AXES.index(axis) for axis in BATCH_AXES]
  parts = np.moveaxis(mesh.devices, batch_axes, range(len(batch_axes)))
  held: dict[int, set[int]] = {}
  for part, devices in enumerate(parts.reshape(batch_ways(mesh), -1)):
    for device in devices:
      held.setdefault(device.process_index, set()).add(part)
  shares = sorted({tuple(sorted(parts)) for parts in held.values()})
  sizes = {len(share) for share in shares}
  if len(sizes) > 1 or sum(map(len, shares)) != batch_ways(mesh):
    raise InputError(
      f"the mesh {dict(mesh.shape)} over {len(held)} hosts gives them rows of a batch that overlap only in "
      "part: choose sizes that multiply to whole hosts"
    )
  return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def put_batch(batch, mesh: Mesh, *, whole: bool = False):
  """NumPy rows of every host to one global array each, split along axis 0.

  A host gives its share of the rows, or with `whole` all of them, the same as every other host.
  """
  ways, count = batch_ways(mesh), 1 if whole else host_share(mesh)[1]
  sharding = batch_sharding(mesh)

  def put(x):
    x = np.asarray(x)
    rows = x.shape[0] * count
    if rows % ways:
      raise InputError(
        f"a batch of {x.shape[0]} rows a host cannot be split {ways} ways (data x fsdp)"
      )
    return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

  return jax.tree.map(put, batch)


def local_rows(x: jax.Array) -> np.ndarray:
  """The rows of a batch-sharded array that this host has put there, in its own order."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
