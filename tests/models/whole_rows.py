"""Rows that fork, and what attention over them must be: by definition, a [T, T] mask of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from align_jax.models import attention, context_attention

AXES = ("data", "fsdp", "context", "tensor")
SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
  """One attention: its rows, their window, and the mesh it is computed on."""

  length: int
  impl: str
  mesh: tuple[int, ...] | None = None
  branches: bool = True
  segments: bool = True
  window: int | None = None
  softcap: float | None = None
  kv_heads: int = 2
  group: int = 2
  batch: int = 2
  head_dim: int = 16

  def make_mesh(self):
    return self.mesh and jax.make_mesh(self.mesh, AXES, axis_types=(AxisType.Auto,) * 4)


def laid(case: Case, seed: int = 0) -> attention.Rows:
  """Three segments a row with trunks and two or three branches of uneven lengths, then padding."""
  rng = np.random.default_rng(seed)
  segment, branch, position = np.zeros((3, case.batch, case.length), np.int32)
  for row in range(case.batch):
    at = 0
    for number in (1, 2, 3):
      sizes = rng.integers(case.length // 32, case.length // 12, 3 + (number == 1))
      for which, size in enumerate(sizes):
        here = slice(at, at + size)
        segment[row, here], branch[row, here] = number, which
        position[row, here] = np.arange(size) + (sizes[0] if which else 0)
        at += size
    assert at < case.length
  position = position if case.branches else np.broadcast_to(np.arange(case.length), position.shape)
  return attention.Rows(
    jnp.arange(case.length)[None],
    jnp.asarray(position),
    jnp.asarray(segment) if case.segments else None,
    jnp.asarray(branch) if case.branches else None,
  )


def visible(rows: attention.Rows, window: int | None) -> np.ndarray:
  """[B, T, T]: earlier, of the same segment, on the trunk or the own branch, within the window."""
  batch, length = rows.positions.shape
  mask = np.zeros((batch, length, length), bool)
  segments, branches = (np.zeros((batch, length)) if x is None else np.asarray(x) for x in rows[2:])
  positions = np.asarray(rows.positions)
  for b in range(batch):
    for t in range(length):
      for s in range(t + 1):
        near = window is None or positions[b, t] - positions[b, s] < window
        own = branches[b, s] in (0, branches[b, t])
        mask[b, t, s] = near and own and segments[b, t] == segments[b, s]
  return mask


def by_definition(q, k, v, mask, softcap):
  scores = SCALE * jnp.einsum("btkgh,bskh->bkgts", q, k)
  scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum("bkgts,bskh->btkgh", weights, v)


def compare(case: Case, *, wrong_window: int | None = None) -> float:
  """The largest error of the output and the three gradients, relative to the largest number of each.

  With `wrong_window` the definition is given another window: the control.
  """
  rng = np.random.default_rng(1)
  lead = (case.batch, case.length, case.kv_heads)
  q = rng.normal(size=(*lead, case.group, case.head_dim)).astype(np.float32)
  k, v = rng.normal(size=(2, *lead, case.head_dim)).astype(np.float32)
  rows, mesh = laid(case), case.make_mesh()
  real = 1 if rows.segment_ids is None else (rows.segment_ids > 0)[:, :, None, None, None]
  weights = rng.normal(size=q.shape).astype(np.float32) * real

  def both(fn):
    def run(*args):
      out, back = jax.vjp(fn, *args)
      return (out * real, *back(weights))

    return jax.jit(run)

  ours = functools.partial(
    context_attention.attend, rows=rows, window=case.window, impl=case.impl,
    mesh=context_attention.ambient(mesh), scale=SCALE, softcap=case.softcap, interpret=True,
  )  # fmt: skip
  mask = jnp.asarray(visible(rows, wrong_window or case.window))
  expected = both(lambda *args: by_definition(*args, mask, case.softcap))(q, k, v)
  if mesh is not None:
    place = NamedSharding(mesh, PartitionSpec())
    q, k, v = (jax.device_put(x, place) for x in (q, k, v))
  found = both(ours)(q, k, v)
  errors = [np.abs(a - np.asarray(b)).max() / np.abs(a).max() for a, b in zip(expected, found)]
  return float(max(errors))
