"""The splash kernel, interpreted, is attention by its definition; compiled for TPUs it needs no scores."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from align_jax.models import attention, context_attention, splash
from tests.models.whole_rows import AXES, Case, compare


@pytest.mark.parametrize(
  "case",
  [
    Case(384, "splash", branches=False, window=30, batch=1),
    Case(300, "splash", window=30, softcap=3.0, batch=1),  # padded to three tiles
    Case(256, "splash", mesh=(1, 1, 2, 4), window=30),  # four devices share two key heads
    Case(512, "splash", mesh=(1, 2, 2, 2), branches=False, softcap=3.0),
  ],
  ids=str,
)
def test_the_kernel_is_attention_by_its_definition(case):
  assert compare(case) < 3e-6


def test_a_window_longer_by_one_is_told_apart():
  case = Case(128, "splash", window=9, batch=1, kv_heads=1)
  assert compare(case, wrong_window=10) > 1e-2


@pytest.mark.parametrize(
  "length, padded, block", [(40, 128, 128), (300, 384, 128), (1000, 1024, 512), (8192, 8192, 512)]
)
def test_rows_are_padded_to_tiles(length, padded, block):
  assert splash.padded_length(length) == padded
  assert splash.block_sizes(padded, padded).block_q == block


# Compiled for TPUs that are not there.


@pytest.fixture(scope="module")
def chips():
  """The four chips of a v5e:2x2."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the package libtpu is not installed: nothing compiles for TPU")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


LENGTH, KV_HEADS, GROUP, HEAD_DIM = 8192, 2, 4, 64


def compiled(chips, impl, shape, *, length=LENGTH, branches=False, window=None):
  """Forward and backward of one attention, 8 query heads on 2 key heads, one row a device or two."""
  mesh = Mesh(np.array(chips).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4)

  def of(*shape, dtype=jnp.bfloat16, heads=None):
    spec = PartitionSpec("fsdp", "context", *[heads] * (heads is not None))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def loss(q, k, v, ids):
    rows = attention.Rows(jnp.arange(length)[None], ids, ids, ids if branches else None)
    if impl == "xla":
      mask = attention.seen(rows, rows, window)[:, None, None]
      out = attention.attend(attention.attention_probs(q, k, mask, scale=1.0, softcap=None), v)
    else:
      out = context_attention.attend(
        q, k, v, rows, window, impl=impl, mesh=mesh.abstract_mesh, scale=1.0, softcap=None
      )
    return jnp.sum(out.astype(jnp.float32) ** 2)

  q = of(2, length, KV_HEADS, GROUP, HEAD_DIM, heads="tensor")
  k = of(2, length, KV_HEADS, HEAD_DIM, heads="tensor")
  ids = of(2, length, dtype=jnp.int32)
  # The tests' own precision is for CPU: the kernel multiplies bfloat16.
  with jax.default_matmul_precision("default"):
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ids).compile()


def scores_held(program, length=LENGTH):
  shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
  return {s for s in shapes if s.split(",").count(str(length)) > 1}


def test_compiled_for_tpus_it_holds_no_scores(chips):
  """T = 8,192 with segments and grouped heads: one [T, T] array of float32 would be 256 MiB."""
  program = compiled(chips, "splash", (1, 2, 1, 2))
  assert (
    program.as_text().count('custom_call_target="tpu_custom_call"') == 3
  )  # forward, dq, dk and dv
  assert not scores_held(program)
  plain = compiled(chips, "xla", (1, 2, 1, 2), length=LENGTH // 4)
  assert scores_held(plain, LENGTH // 4)


def test_compiled_over_context_it_gathers_keys_and_forks(chips):
  """Half of the row on each device: its queries, all keys, both passes of a prompt that forks."""
  program = compiled(chips, "splash", (1, 1, 2, 2), branches=True, window=1024)
  text = program.as_text()
  assert not scores_held(program) and "all-gather" in text
  assert text.count('custom_call_target="tpu_custom_call"') == 6
