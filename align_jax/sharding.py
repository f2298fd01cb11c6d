"""Where arrays live: logical axis names to mesh axes, all in this file.

Arrays name their axes logically (`batch length embed mlp heads kv_heads head_dim vocab layers rank`);
`RULES` says which mesh axis each axis of a weight may use, `ACTIVATIONS` that of an activation.  Mesh
axes are `data` (replicas, across slices), `fsdp` (weights and batch split), `context` (the time of
long rows) and `tensor` (heads, hidden units).  Axes are of Auto type: the compiler propagates
shardings, so every jit that *creates* state must be given `out_shardings`.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from align_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
_AUTO = (AxisType.Auto,) * len(MESH_AXES)

# Read in order: a dimension takes the first mesh axes listed for its name that are all still free in
# this array and divide it.  The embedding table [vocab, columns] is split by columns, so that a lookup
# sends a token's row once (`models.embedding`); a head's table [embed, classes] by classes, so that
# logits are computed where their part of the table is.
RULES = (
  ("columns", ("tensor", "fsdp")),
  ("columns", ("fsdp",)),
  ("classes", ("fsdp", "context", "tensor")),
  ("classes", ("fsdp", "tensor")),
  ("classes", ("tensor",)),
  ("embed", ("fsdp", "context")),  # those that share a row need not all hold the same weights
  ("embed", ("fsdp",)),
  ("mlp", ("tensor",)),
  ("heads", ("tensor",)),
  ("kv_heads", ("tensor",)),
)
ACTIVATIONS = {
  "batch": BATCH_AXES,
  "replicas": ("data",),  # a batch whose parts have come together within each replica
  "length": ("context",),
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "classes": ("fsdp", "context", "tensor"),
  "shards": ("fsdp",),  # classes on their way to the rows of a batch
  "vocab": ("tensor",),
}
REPLICATED_NAMES = frozenset({"length", "vocab", "head_dim", "layers", "rank", None})


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
  used = set()
  for name in axes:
    if name not in REPLICATED_NAMES and name not in {rule for rule, _ in RULES}:
      raise ValueError(f"no sharding rule for the logical axis {name!r}")
  for name, mesh_axes in RULES:
    for dim, axis in enumerate(axes):
      fits = shape[dim] % ways(mesh, mesh_axes) == 0
      if axis == name and taken[dim] is None and not used & set(mesh_axes) and fits:
        taken[dim] = _spec_entry(mesh_axes)
        used |= set(mesh_axes)
  return PartitionSpec(*taken)


def _spec_entry(mesh_axes: tuple[str, ...]):
  return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def ways(mesh: Mesh, mesh_axes: tuple[str, ...]) -> int:
  """Into how many parts these mesh axes together split what they split."""
  return math.prod(mesh.shape[axis] for axis in mesh_axes)


def tree_shardings(axes_tree, abstract_tree, mesh: Mesh):
  """A tree of NamedSharding for arrays whose logical axes are `axes_tree` (tuples as leaves).

  Where one weight is several arrays (int8 and scales), each is split as far as its own shape allows.
  """

  def place(axes, arrays):
    split = lambda x: NamedSharding(mesh, partition_spec(axes, x.shape, mesh))  # noqa: E731
    return jax.tree.map(split, arrays)

  return jax.tree.map(place, axes_tree, abstract_tree, is_leaf=lambda x: isinstance(x, tuple))


def activation_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh):
  """The PartitionSpec of an activation; an axis that does not divide evenly is left whole."""
  spec = []
  for name, size in zip(axes, shape, strict=True):
    split = ACTIVATIONS.get(name, ())
    spec.append(_spec_entry(split) if split and size % ways(mesh, split) == 0 else None)
  return PartitionSpec(*spec)


def constrain(x, mesh: Mesh | None, axes: tuple[str | None, ...]):
  """x, held to where an activation with these logical axes belongs; as it is without a mesh."""
  if mesh is None or mesh.size == 1:
    return x
  placed = NamedSharding(mesh, activation_spec(axes, x.shape, mesh))
  return jax.lax.with_sharding_constraint(x, placed)


def gathered(
  weight,
  mesh: Mesh | None,
  axes: tuple[str | None, ...],
  *,
  used: tuple[str | None, ...] | None = None,
):
  """The weight with logical `axes` as it is used: whole but for what activations split as well.

  Its gradient goes back split as the weight is stored.  The transpose of a mere constraint would sum
  it whole on every device: twice the traffic, and memory that does not fall with more devices.
  used: the axes of an activation that it is split like, where those differ from its own.
  """
  if mesh is None or mesh.size == 1:
    return weight
  whole = activation_spec(used or axes, weight.shape, mesh)
  split = partition_spec(axes, weight.shape, mesh)
  return _gathered(weight, NamedSharding(mesh, whole), NamedSharding(mesh, split))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight, whole: NamedSharding, split: NamedSharding):
  del split
  return jax.lax.with_sharding_constraint(weight, whole)


def _gathered_forward(weight, whole, split):
  return _gathered(weight, whole, split), None


def _gathered_backward(whole, split, _, gradient):
  del whole
  return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def in_host_memory(tree):
  """The arrays (or shapes) of a tree where they are, but in their hosts' memory: see `on_device`."""

  def move(x):
    where = x.sharding.with_memory_kind("pinned_host")
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.device_put(x, where)

  return jax.tree.map(move, tree)


def on_device(x):
  """Inside jit: x, fetched where it rests in host memory; a layer's weights in a scan come one by one."""
  if getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host:
    return jax.device_put(x, jax.memory.Space.Device)
  return x


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 split over data and fsdp; every other axis whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
  """Into how many parts a batch is split: data x fsdp."""
  return ways(mesh, BATCH_AXES)


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
