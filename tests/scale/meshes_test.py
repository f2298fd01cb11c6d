"""The meshes that are proposed can be built, and the promising ones come first."""

import math

import pytest

from align_jax import models
from align_jax.phases import compile_jobs
from align_jax.scale import meshes, tpus
from configs import ppo, preference


def dpo(pairs: int, length: int):
  values = preference.get_config().to_dict()
  values["data"] |= {"batch_size": pairs, "length": length, "buckets": (length,)}
  return compile_jobs.settings("preference", values)


@pytest.mark.parametrize("name", ["v5e-8", "v5e-64", "v5p-128", "2xv5p-64"])
@pytest.mark.parametrize("pairs, length", [(128, 2048), (256, 4096), (64, 32_768)])
def test_every_mesh_covers_the_slice_and_splits_what_there_is(name, pairs, length):
  tpu, shape = tpus.parse(name), models.SHAPES["llama3-8b"]
  found = meshes.candidates("preference", dpo(pairs, length), shape, tpu, most=1000)
  assert len({(mesh, remat) for mesh, remat in found}) == len(found)
  for mesh, remat in found:
    assert math.prod((mesh.data, mesh.fsdp, mesh.context, mesh.tensor)) == tpu.devices
    assert mesh.data % tpu.slices == 0
    assert shape.num_kv_heads % mesh.tensor == 0
    assert pairs % (mesh.data * mesh.fsdp) == 0
    assert mesh.context == 1 or length // mesh.context >= 2048
    assert remat in ("dots", "full")


def test_a_batch_that_no_mesh_splits_has_no_candidates_but_those_along_heads_and_time():
  found = meshes.candidates(
    "preference", dpo(1, 8192), models.SHAPES["llama3-8b"], tpus.parse("v5e-8"), most=100
  )
  assert found and all(mesh.data * mesh.fsdp == 1 for mesh, _ in found)


def test_what_cannot_fit_comes_last():
  """16 bytes a weight of 8 B do not fit whole into a chip of 16 GB: weights must be split."""
  tpu, shape = tpus.parse("v5e-64"), models.SHAPES["llama3-8b"]
  found = meshes.candidates("preference", dpo(64, 2048), shape, tpu, most=1000)
  split = [mesh.fsdp * mesh.tensor for mesh, _ in found]
  needed = 16 * 8.03e9 / tpu.hbm_bytes_per_device
  assert split[0] > needed
  whole = [place for place, ways in enumerate(split) if ways < needed]
  assert not whole or min(whole) > max(p for p, ways in enumerate(split) if ways == 64)


def test_sampling_has_no_policy_of_recomputation():
  config = compile_jobs.settings("decode", ppo.get_config().to_dict())
  found = meshes.candidates(
    "decode", config, models.SHAPES["llama3-8b"], tpus.parse("v5e-8"), most=9
  )
  assert {remat for _, remat in found} == {config.model.remat}
