"""Attention of whole rows without a [T, T] array, split over the mesh; and which way it is computed.

Rows go over `data` and `fsdp`, heads over `tensor`, time over `context`: there every device holds the
queries of its part of the row and gathers the keys and values of all parts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from align_jax.errors import InputError
from align_jax.models import attention, blockwise, splash
from align_jax.models.attention import Rows

BATCH_AXES, CONTEXT, TENSOR = ("data", "fsdp"), "context", "tensor"
SHORTEST = 256  # rows up to here hold few scores: "auto" computes them in one piece


def choose(impl: str, length: int, mesh) -> str:
  """How "auto" attends to rows of `length`: xla, splash, blockwise, or `by_platform`.

  splash for a mesh of TPUs, blockwise for CPUs and where time is split, xla elsewhere and for short rows.
  Without a mesh the platform is known no sooner than the program is lowered for it.  Raises InputError
  for splash on a mesh of other devices.
  """
  parts = mesh.shape.get(CONTEXT, 1)
  if impl == "splash" and platform(mesh) not in ("tpu", None):
    raise InputError(f"splash is a kernel for TPUs and the mesh is of {platform(mesh)} devices")
  if impl != "auto":
    return impl
  if length < SHORTEST or length % parts:
    return "xla"
  if mesh.empty:
    return "by_platform"
  if platform(mesh) == "tpu":
    return "splash"
  return "blockwise" if parts > 1 or platform(mesh) == "cpu" else "xla"


def tiles_from(impl: str, mesh) -> int | None:
  """From which length on rows on this mesh are attended to by tiles, so that only segments cost."""
  least = SHORTEST * mesh.shape.get(CONTEXT, 1)
  return least if choose(impl, least, ambient(mesh)) == "blockwise" else None


def on_one_core(impl: str, length: int, mesh) -> bool:
  """Whether attention keeps one core of the machine busy, and leaves the others to products."""
  return mesh.size == 1 and platform(mesh) == "cpu" and choose(impl, length, mesh) == "blockwise"


def ambient(mesh):
  """The abstract mesh a program is traced for: the given one, or that of `jax.set_mesh`."""
  return jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh


def platform(mesh) -> str | None:
  """What the devices of an abstract mesh are; None where it does not say."""
  return mesh.abstract_device.platform if mesh.abstract_device else None


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rows: Rows,
  window: int | None,
  *,
  impl: str,
  mesh,
  scale: float,
  softcap: float | None,
  interpret: bool = False,
) -> jax.Array:
  """softmax(scale q.k) v of q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H].

  `impl` is splash, blockwise or by_platform, `mesh` an abstract mesh; rows are padded to what the
  tiles divide.  Raises InputError where time does not split over `context`.
  """
  options = dict(scale=scale, softcap=softcap)
  if impl == "by_platform":
    on_tpu = functools.partial(
      attend, window=window, impl="splash", mesh=mesh, interpret=interpret, **options
    )
    # Checkpointed, or its scores would be among what the TPU's branch must save, as zeros.
    elsewhere = jax.checkpoint(functools.partial(_in_one_piece, window=window, **options))
    return jax.lax.platform_dependent(q, k, v, rows, tpu=on_tpu, default=elsewhere)
  length, parts = q.shape[1], mesh.shape.get(CONTEXT, 1)
  if length % parts:
    raise InputError(
      f"rows of {length} tokens do not split over {parts} parts of the mesh's context"
    )
  how = blockwise.Options(scale, softcap, window, serial=platform(mesh) == "cpu")
  tiles = splash.padded_length if impl == "splash" else how.padded_length
  padded = parts * tiles(length // parts)
  rows = jax.tree.map(lambda x: _pad(jnp.broadcast_to(x, q.shape[:2]), padded), rows)
  q, k, v = (_pad(x, padded) for x in (q, k, v))
  rows = rows._replace(places=jnp.broadcast_to(jnp.arange(padded), (q.shape[0], padded)))
  split = _Split(q.shape, mesh)
  if impl == "splash":
    return _splash(q, k, v, rows, window, split, interpret=interpret, **options)[:, :length]
  return _blockwise(q, k, v, rows, split, how)[:, :length]


def _in_one_piece(q, k, v, rows, *, window, scale, softcap):
  mask = attention.seen(rows, rows, window)[:, None, None]
  return attention.attend(attention.attention_probs(q, k, mask, scale=scale, softcap=softcap), v)


def _pad(x, length):
  return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


class _Split:
  """How q [B, T, K, G, H] and k [B, T, K, H] lie on the mesh: only axes that divide them are used."""

  def __init__(self, shape, mesh):
    self.mesh, self.shape = mesh, shape
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    free = {n: s for n, s in mesh.shape.items() if kinds[n] != AxisType.Manual and s > 1}
    self.used, self.axes = bool(free), {n for n in kinds if kinds[n] != AxisType.Manual}
    batch, _, kv_heads, group, _ = shape
    ways, self.batch = 1, ()
    for axis in BATCH_AXES:
      if axis in free and batch % (ways * free[axis]) == 0:
        ways, self.batch = ways * free[axis], (*self.batch, axis)
    self.time, self.parts = (CONTEXT, free[CONTEXT]) if CONTEXT in free else (None, 1)
    tensor = free.get(TENSOR, 1)
    whole = kv_heads % tensor == 0
    # Where keys are fewer than devices, every device takes some of the queries of one of them.
    self.sharing = (
      1 if whole or tensor % kv_heads or group % (tensor // kv_heads) else tensor // kv_heads
    )
    split = tensor > 1 and (whole or self.sharing > 1)
    self.heads = kv_heads * group // (tensor if split else 1)
    q_heads, kv_heads = TENSOR if split else None, TENSOR if split and whole else None
    self.q_spec = P(self.batch or None, self.time, q_heads, None, None)
    self.k_spec = P(self.batch or None, self.time, kv_heads, None)
    self.part, self.row = P(self.batch or None, self.time), P(self.batch or None, None)

  def call(self, body, q, k, v, *rest, specs):
    """body(q, k, v, *rest) on every device: its part of the queries, the keys that these may see."""
    if not self.used:
      return body(q, k, v, *rest)
    b, t, kv_heads, group, h = self.shape

    def local(q, k, v, *rest):
      return body(q, self._keys(k), self._keys(v), *rest)

    in_specs = (self.q_spec, self.k_spec, self.k_spec, *specs)
    mapped = jax.shard_map(
      local, mesh=self.mesh, in_specs=in_specs, out_specs=self.q_spec, axis_names=self.axes,
      check_vma=False,
    )  # fmt: skip
    q = q.reshape(b, t, kv_heads * self.sharing, group // self.sharing, h)
    return mapped(q, k, v, *rest).reshape(self.shape)

  def _keys(self, x):
    if self.sharing > 1:
      head = jax.lax.axis_index(TENSOR) // self.sharing
      x = jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)
    return x if self.time is None else jax.lax.all_gather(x, self.time, axis=1, tiled=True)


def _splash(q, k, v, rows, window, split, *, scale, softcap, interpret):
  def make(window):
    return splash.make_kernel(
      q.shape[1], split.heads, window, softcap=softcap, shards=split.parts, interpret=interpret
    )

  def spec(run):
    kernel = run.kernel
    if split.used:
      kernel = kernel.manual_sharding_spec(NamedSharding(split.mesh, P(None, split.time)))
    ids = (None, None) if run.queries is None else (split.part, split.row)
    return splash.Pass(kernel, *ids, None if run.lowest is None else split.part)

  def body(q, k, v, runs):
    return splash.attend(q, k, v, runs, scale)

  runs = splash.passes(rows, window, make)
  return split.call(body, q, k, v, runs, specs=([spec(run) for run in runs],))


def _blockwise(q, k, v, rows, split, how: blockwise.Options):
  def body(q, k, v, queries, keys):
    return blockwise.attend(q, k, v, queries, keys, how)

  queries = jax.tree.map(lambda _: split.part, rows)
  keys = jax.tree.map(lambda _: split.row, rows)
  return split.call(body, q, k, v, rows, rows, specs=(queries, keys))
