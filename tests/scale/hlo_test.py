"""What a compiled module moves, against modules whose collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from align_jax import sharding
from align_jax.scale import hlo

LAYERS, WIDTH = 5, 64


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4), jax.devices())


def compiled(function, *args):
  return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def test_a_sum_in_a_loop_counts_as_often_as_it_runs(mesh):
  def body(x, _):
    return jax.lax.psum(jnp.tanh(x), "fsdp"), None

  def loop(x):
    return jax.lax.scan(body, x, None, length=LAYERS)[0]

  run = jax.shard_map(loop, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  module = compiled(run, jnp.zeros((WIDTH, WIDTH), jnp.float32))
  size = WIDTH * WIDTH * 4
  assert hlo.collective_bytes(module) == {"all-reduce": LAYERS * 2 * size * 3 / 4}
  [(instruction, times)] = module.collectives()
  assert times == LAYERS and hlo.payload(instruction) == size
  assert instruction.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_gather_sends_what_the_others_lack(mesh):
  split, whole = (NamedSharding(mesh, P(axis)) for axis in ("fsdp", None))
  x = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=split)
  module = compiled(lambda x: jax.lax.with_sharding_constraint(x, whole), x)
  [(instruction, _)] = module.collectives()
  assert hlo.kind(instruction.opcode) == "all-gather"
  assert hlo.collective_bytes(module)["all-gather"] == instruction.arrays[0].bytes * 3 / 4


@pytest.mark.parametrize(
  "text, expected",
  [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
  ],
)
def test_every_way_that_groups_are_written(text, expected):
  instruction = hlo.Instruction("x", "all-reduce", (), (), f"all-reduce(%y), channel_id=1, {text}")
  np.testing.assert_array_equal(instruction.groups, expected)


TPU_TEXT = """
HloModule step

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%get-tuple-element.1), kind=kCustom, calls=%fused.1
  %fusion.2 = f32[8,4]{1,0:T(8,128)} fusion(%get-tuple-element.1), kind=kCustom, calls=%fused.2
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%get-tuple-element.1, %fusion.1)
}

%fused.1 (q: f32[8,4]) -> f32[32,4] {
  %q = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = f32[32,4]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}
}

%fused.2 (q: f32[8,4]) -> f32[32,4] {
  %q.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[32,4]{1,0:T(8,128)} all-gather(%q.1), channel_id=7, replica_groups={{0,1,2,3}}
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(6)
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  ROOT %lt.1 = pred[]{:T(512)} compare(%p.1, %constant.3), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %while.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%x), condition=%condition, body=%body
  ROOT %get-tuple-element.9 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""
IN_PLACE_TEXT = """
HloModule write

%fused (a: f32[4096,64], b: s32[8], c: f32[8,64]) -> f32[4096,64] {
  %a = f32[4096,64]{1,0} parameter(0)
  %b = s32[8]{0} parameter(1)
  %c = f32[8,64]{1,0} parameter(2)
  ROOT %scatter.1 = f32[4096,64]{1,0} scatter(%a, %b, %c), to_apply=%second
}

ENTRY %main (x: f32[4096,64], y: s32[8], z: f32[8,64]) -> f32[4096,64] {
  %x = f32[4096,64]{1,0} parameter(0)
  %y = s32[8]{0} parameter(1)
  %z = f32[8,64]{1,0} parameter(2)
  ROOT %fusion.1 = f32[4096,64]{1,0} fusion(%x, %y, %z), kind=kCustom, calls=%fused
}
"""


def test_a_collective_whose_parts_lie_in_several_fusions_counts_once_and_the_condition_tells_the_trips():
  module = hlo.parse(TPU_TEXT)
  assert hlo.collective_bytes(module) == {"all-gather": 6 * 32 * 4 * 4 * 3 / 4}
  assert hlo.largest(module)[0] == hlo.Array("f32", (8, 4))


def test_a_trip_count_in_the_configuration_comes_first():
  text = TPU_TEXT.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
  )
  assert hlo.collective_bytes(hlo.parse(text)) == {"all-gather": 11 * 32 * 4 * 4 * 3 / 4}


def test_of_a_loop_that_ends_for_several_reasons_one_turn_is_counted():
  also = "%done = pred[] compare(%p.1, %p.1), direction=EQ\n  ROOT %lt.1"
  text = TPU_TEXT.replace("ROOT %lt.1", also)
  assert hlo.collective_bytes(hlo.parse(text)) == {"all-gather": 32 * 4 * 4 * 3 / 4}


def test_what_is_written_into_a_cache_is_the_new_part_of_it():
  """Not the whole of it: rows of [8, 64] float32 into a donated [4096, 64], and their places."""

  def write(cache, rows, places):
    return cache.at[places].set(rows)

  shapes = [((4096, 64), jnp.float32), ((8, 64), jnp.float32), ((8,), jnp.int32)]
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  text = jax.jit(write, donate_argnums=0).lower(*args).compile().as_text()
  assert hlo.memory_traffic(hlo.parse(IN_PLACE_TEXT)) == 2 * (8 * 64 * 4 + 8 * 4)
  assert (
    hlo.memory_traffic(hlo.parse(IN_PLACE_TEXT.replace("scatter(", "add("))) > 2 * 4096 * 64 * 4
  )
  assert hlo.memory_traffic(hlo.parse(text)) < 4096 * 64 * 4


def test_what_is_sent_to_other_slices_counts_as_often_as_it_runs():
  send = (
    "%send.1 = (f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%fusion.1, %after-all.1), "
    "channel_id=9, is_host_transfer=true\n  ROOT %tuple.1"
  )
  text = TPU_TEXT.replace("ROOT %tuple.1", send)
  assert hlo.bytes_between_slices(hlo.parse(text)) == 6 * 8 * 4 * 4
  assert hlo.bytes_between_slices(hlo.parse(TPU_TEXT)) == 0
