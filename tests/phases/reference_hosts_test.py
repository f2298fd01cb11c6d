"""Two processes of two devices each fill one cache of reference log-probs: run as their script too."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = 24
DEVICES = 2


def work(folder: str, index: int, count: int, port: str) -> None:
  """One host of `count`: prints which places of the flat array it wrote, and the values it reads."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES)
  if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
  from align_jax import data, models, sharding, worlds
  from align_jax.phases import reference

  world = worlds.Microworld(seed=0)
  tokenizer, records = world.tokenizer(), world.preferences(COUNT)
  config = models.ModelConfig(
    vocab_size=-(-len(tokenizer) // 8) * 8, embed_dim=16, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, mlp_dim=32,
  )  # fmt: skip
  model = models.Transformer(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), models.abstract_params(model)
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices())
  where = sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)
  placed = jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at, x=x: x[at]), params, where
  )
  plan = data.Batching(8, epochs=1, shuffle=False, pad_last=True)
  pairs = data.tokenise_pairs(records, tokenizer, plan, length=46)
  written = []
  score = reference._Pass.__call__

  def watched(run, group):
    index, values = score(run, group)
    written.append(index.tolist())
    return index, values

  reference._Pass.__call__ = watched
  scorer = reference.Scorer(model, {"params": placed}, mesh, batch_size=8, chunk=16)
  identity = reference.identity_of(records, tokenizer, 46)
  try:
    read = reference.cached_reference(folder, pairs, scorer, identity)
  except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    os._exit(0)  # the other host has stopped too: there is no one left to say goodbye to
  values = np.concatenate(read(np.arange(2 * COUNT)))
  print(json.dumps({"written": written, "values": values.tolist()}))


def hosts(folder, count):
  """What each of `count` processes printed."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  processes = [
    subprocess.Popen(
      [sys.executable, __file__, str(folder), str(index), str(count), port],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for index in range(count)
  ]
  try:
    ended = [process.communicate(timeout=600) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, ended):
    assert process.returncode == 0, errors[-3000:]
  return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """(folder, what two hosts printed that filled it)."""
  folder = tmp_path_factory.mktemp("shared")
  return folder, hosts(folder, 2)


def test_two_hosts_write_their_own_rows_and_read_all(shared):
  parts = [sorted(sum(host["written"], [])) for host in shared[1]]
  values = shared[1][0]["values"]
  assert min(map(len, parts)) > 50 and not set(parts[0]) & set(parts[1])
  assert sorted(parts[0] + parts[1]) == list(range(len(values)))
  assert np.isfinite(values).all() and shared[1][1]["values"] == values


@pytest.fixture(scope="module")
def later(shared):
  """What a later start on one host printed."""
  return hosts(shared[0], 1)[0]


def test_the_cache_of_two_hosts_is_that_of_one(shared, later):
  """The fingerprints agree, so the later start computes the sample, finds it right, and no more."""
  folder, printed = shared
  assert len(list(folder.iterdir())) == 1 and len(later["written"]) == 1
  assert later["values"] == printed[0]["values"]


def test_both_hosts_stop_where_one_finds_a_wrong_value(shared, later):
  """The other, whose own rows are right, would wait for it for ever."""
  (cache,) = shared[0].iterdir()
  kvstore = {"driver": "file", "path": str(cache / "logprobs")}
  store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
  place = later["written"][0][0]  # of the sample
  store[place].write(store[place].read().result() + 0.1).result()
  for host in hosts(shared[0], 2):
    assert "InputError" in host["error"] and "differ by 0.1 nats" in host["error"]


if __name__ == "__main__":
  work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
