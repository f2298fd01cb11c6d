"""Small jobs compiled by the TPU compiler; run as their script, whose log level lets warnings pass."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = dict(
  vocab_size=4096, embed_dim=512, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=128,
  mlp_dim=1024, tie_embeddings=False,
)  # fmt: skip
LENGTH = 256


def work() -> None:
  """Prints one JSON line for each job."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  from align_jax import models, sharding
  from align_jax.phases import compile_jobs
  from align_jax.phases.compile import describe
  from align_jax.scale import hlo, report, topology, tpus

  collectives = []
  read = hlo.collective_bytes

  def watched(module):
    collectives.append([hlo.payload(instruction) for instruction, _ in module.collectives()])
    return read(module)

  hlo.collective_bytes = watched
  shape = models.ModelConfig(**SMALL)

  def compile_one(name, phase, values, slice_name, mesh_sizes):
    tpu = tpus.parse(slice_name)
    mesh = sharding.make_mesh(sharding.MeshConfig(**mesh_sizes), topology.devices(tpu))
    job = compile_jobs.make(phase, compile_jobs.settings(phase, values), shape, mesh)
    found = describe(report.compile_step(job.step, job.args, tpu, mesh))
    print(json.dumps({"name": name, "collectives": collectives[-1], **found}), flush=True)

  for name, phase, values, slice_name, mesh_sizes in jobs():
    compile_one(name, phase, values, slice_name, mesh_sizes)
  control()


def control() -> None:
  """A step that goes from rows to columns: the compiler must gather, and says so."""
  import jax
  import jax.numpy as jnp

  from align_jax import sharding
  from align_jax.scale import report, topology, tpus

  tpu = tpus.parse("v5e-8")
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2), topology.devices(tpu))

  def turn(x):
    for axes in (("fsdp", None), (None, "tensor")):
      where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
      x = jnp.cos(jax.lax.with_sharding_constraint(x, where))
    return x

  found = report.compile_step(jax.jit(turn), (jnp.zeros((512, 512)),), tpu, mesh)
  print(json.dumps({"name": "control", "rematerialised": found.rematerialised}), flush=True)


def settings(config, **changes):
  config.model.update(dtype="bfloat16", remat="full")
  for section, values in changes.items():
    config[section].update(values)
  return config.to_dict()


def dpo():
  from configs import preference

  return settings(
    preference.get_config(),
    data={"batch_size": 16, "length": LENGTH, "buckets": (LENGTH,)},
    model={"logits_chunk": 64},
  )


def jobs():
  from configs import ppo

  prompts = {"batch_size": 16, "max_length": LENGTH // 2}
  online = settings(ppo.get_config(), prompts=prompts, sampling={"max_new_tokens": LENGTH // 2})
  return [
    ("dpo", "preference", dpo(), "v5e-8", {"fsdp": 4, "tensor": 2}),
    ("two slices", "preference", dpo(), "2xv5e-4", {"data": 2, "fsdp": 4}),
    ("ppo", "ppo", online, "v5e-8", {"fsdp": 8}),
    ("decode", "decode", online, "v5e-8", {"fsdp": 2, "tensor": 4}),
  ]


@pytest.fixture(scope="module")
def rows():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler, package libtpu, is not installed: pip install -e '.[compile]'")
  env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "1", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, __file__], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  return {line["name"]: line for line in lines}


NAMES = ("dpo", "two slices", "ppo", "decode")


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_fits_and_gathers_nothing_by_accident(rows, name):
  row = rows[name]
  assert row["fits"] and row["argument_bytes"] > 0
  assert row["rematerialised"] == 0
  assert row["estimate"] == max(row["seconds"].values()) > 0


def test_the_compiler_does_say_so_where_it_must_gather(rows):
  assert rows["control"]["rematerialised"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_collective_is_larger_than_the_parameters_it_serves(rows, name):
  table = 4 * SMALL["vocab_size"] * SMALL["embed_dim"]
  assert max(rows[name]["collectives"]) <= table


def test_only_two_slices_talk_over_the_data_centre(rows):
  assert rows["two slices"]["dcn_bytes"] > 0
  assert all(rows[name]["dcn_bytes"] == 0 for name in NAMES if name != "two slices")


def test_operations_do_not_depend_on_the_slice(rows):
  assert rows["two slices"]["flops"] == pytest.approx(rows["dpo"]["flops"], rel=0.02)


def test_bytes_of_a_chip_fall_as_one_over_their_number(rows):
  """State and batch from 8 to 512 chips; of 8 the compiler says the same."""
  from align_jax import models, sharding
  from align_jax.phases import compile_jobs
  from align_jax.scale import report, topology, tpus

  shape = models.ModelConfig(**SMALL | {"vocab_size": 4096 * 8, "embed_dim": 1024})
  values = dpo()
  values["data"]["batch_size"] = 512

  def of_a_chip(name, sizes, shape, values):
    devices = topology.devices(tpus.parse(name))
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), devices)
    job = compile_jobs.make("preference", compile_jobs.settings("preference", values), shape, mesh)
    return report.argument_bytes(job.args)

  small = of_a_chip("v5e-8", {"fsdp": 4, "tensor": 2}, models.ModelConfig(**SMALL), dpo())
  assert small == pytest.approx(rows["dpo"]["argument_bytes"], rel=0.02)
  eight = of_a_chip("v5p-16", {"fsdp": 8}, shape, values)
  for chips in (32, 128, 512):
    many = of_a_chip(f"v5p-{2 * chips}", {"fsdp": chips}, shape, values)
    assert many * chips == pytest.approx(eight * 8, rel=0.15)


if __name__ == "__main__":
  work()
