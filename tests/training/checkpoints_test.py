"""Checkpoints: every file of one is damaged in turn, and the run never goes on from wrong numbers."""

import json
import pathlib
import random
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import sharding
from align_jax.errors import InputError
from align_jax.training import checkpoints, state
from align_jax.training.optimizer import OptimizerConfig, make_optimizer

TX = make_optimizer(OptimizerConfig(learning_rate=0.1), 9)
STEPS = (2, 4)


def mesh_of(**sizes):
  count = int(np.prod(list(sizes.values())))
  return sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:count])


def state_at(step, mesh):
  """A state whose every number depends on the step; float32, bfloat16 and integers in it."""
  rng = np.random.default_rng(step)
  params = {
    "w": rng.normal(size=(64, 64)).astype(np.float32),
    "b": jnp.ones(8, jnp.bfloat16) * step,
  }
  placed = jax.device_put(params, sharding.replicated(mesh))
  fresh = state.create_state(placed, TX, seed=7, mesh=mesh)
  moments = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), fresh.opt_state)
  return state.TrainState(fresh.step + step, fresh.params, moments, fresh.rng, {})


def data_at(step):
  rows = grain.MapDataset.source(list(range(12))).shuffle(seed=0).repeat().batch(4)
  data = iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
  for _ in range(step):
    next(data)
  return data


@pytest.fixture(scope="module")
def one():
  return mesh_of(fsdp=1)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, one):
  """A workdir with checkpoints 2 and 4."""
  folder = tmp_path_factory.mktemp("pristine")
  store = checkpoints.Checkpoints(folder, keep=2)
  assert store.restore(state_at(0, one), data_at(0)) is None
  for step in STEPS:
    store.save(step, state_at(step, one), data_at(step), metadata={"phase": "test"})
  store.close()
  return folder


def restored(folder, mesh):
  data = data_at(0)
  found, record = checkpoints.Checkpoints(folder, keep=2).restore(state_at(0, mesh), data)
  return found, record, data


def same(a, b):
  def plain(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(np.asarray(plain(x)), np.asarray(plain(y))) for x, y in pairs)


def test_what_is_saved_is_what_comes_back(pristine, one):
  found, record, data = restored(pristine, one)
  assert same(found, state_at(4, one)) and record["phase"] == "test"
  np.testing.assert_array_equal(next(data), next(data_at(4)))
  assert not same(found, state_at(2, one))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_checksums_do_not_depend_on_the_mesh(pristine, sizes):
  """Restored onto eight devices and checked there."""
  found, _, _ = restored(pristine, mesh_of(**sizes))
  assert same(found, state_at(4, mesh_of(fsdp=1)))


def files_of(step_folder):
  return sorted(str(p.relative_to(step_folder)) for p in step_folder.rglob("*") if p.is_file())


def flip(file, rng):
  content = bytearray(file.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  file.write_bytes(content)


DAMAGE = {
  "flip a bit": flip,
  "truncate": lambda file, rng: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
  "empty": lambda file, rng: file.write_bytes(b""),
  "remove": lambda file, rng: file.unlink(),
  "zeros": lambda file, rng: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
  pristine, one, tmp_path, capsys, how
):
  """Every file in turn: either the damage touches no number, or the state is the one of step 2."""
  rng, noticed = random.Random(how), 0
  for number, name in enumerate(files_of(pristine / "checkpoints" / "4")):
    folder = tmp_path / str(number)
    shutil.copytree(pristine, folder)
    DAMAGE[how](folder / "checkpoints" / "4" / name, rng)
    found, _, data = restored(folder, one)
    said = capsys.readouterr().err
    if int(found.step) == 4:
      assert same(found, state_at(4, one)) and not said, name
      continue
    noticed += 1
    assert same(found, state_at(2, one)), name
    np.testing.assert_array_equal(next(data), next(data_at(2)))
    assert f"{folder / 'checkpoints' / '4'} is damaged (" in said and "going on from 2" in said
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert kept == {"2", "4.damaged"}
  assert noticed >= 4


def numbers_of(checkpoint):
  """The file of the arrays themselves."""
  files = (checkpoint / "state").glob("ocdbt.process_*/d/*")
  return max(files, key=lambda p: p.stat().st_size)


def test_flipped_bits_of_the_arrays_are_noticed(pristine, one, tmp_path, capsys):
  """A few lie in bytes that are never read; where a number has changed, nobody gets it."""
  rng, folder, noticed = random.Random(0), tmp_path / "run", 0
  for _ in range(10):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    flip(numbers_of(folder / "checkpoints" / "4"), rng)
    found = restored(folder, one)[0]
    assert same(found, state_at(int(found.step), one))
    noticed += int(found.step) == 2
  assert noticed >= 7
  assert "are not those that were saved" in capsys.readouterr().err


def test_without_checksums_a_flipped_bit_would_pass(pristine, one, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints.integrity, "check", lambda tree, expected: None)
  shutil.copytree(pristine, tmp_path / "run")
  flip(numbers_of(tmp_path / "run" / "checkpoints" / "4"), random.Random(0))
  found, _, _ = restored(tmp_path / "run", one)
  assert int(found.step) == 4 and not same(found, state_at(4, one))


def test_if_none_is_whole_the_run_does_not_begin_anew(pristine, one, tmp_path):
  shutil.copytree(pristine, tmp_path / "run")
  for step in STEPS:
    flip(numbers_of(tmp_path / "run" / "checkpoints" / str(step)), random.Random(0))
  before = files_of(tmp_path / "run")
  with pytest.raises(InputError, match=r"no checkpoint in .* can be trusted \(4: .*; 2: "):
    restored(tmp_path / "run", one)
  assert files_of(tmp_path / "run") == before


def test_the_next_phase_does_not_load_damaged_numbers(pristine, one, tmp_path):
  shutil.copytree(pristine, tmp_path / "run")
  abstract = state.abstract_state(state_at(4, one).params)
  loaded = checkpoints.load_params(tmp_path / "run", abstract)
  assert same(loaded, state_at(4, one).params)
  file = tmp_path / "run" / "checkpoints" / "4" / "record" / "data.json"
  record = json.loads(file.read_text())
  record["checksums"]["params/w"] ^= 1
  file.write_text(json.dumps(record))
  with pytest.raises(InputError, match="4 is damaged: its record is not the one that was written"):
    checkpoints.load_params(tmp_path / "run", abstract)
  flip(numbers_of(tmp_path / "run" / "checkpoints" / "2"), random.Random(1))
  with pytest.raises(InputError, match="2 is damaged: the numbers of params"):
    checkpoints.load_params(tmp_path / "run", abstract, step=2)


def test_a_step_is_saved_again_after_its_damaged_one_was_set_aside(pristine, one, tmp_path):
  folder = pathlib.Path(shutil.copytree(pristine, tmp_path / "run"))
  for again in ("4.damaged", "4.damaged-2"):
    flip(numbers_of(folder / "checkpoints" / "4"), random.Random(0))
    store = checkpoints.Checkpoints(folder, keep=2)
    store.restore(state_at(0, one), data_at(0))
    store.save(4, state_at(4, one), data_at(4), metadata={})
    store.close()
    assert (folder / "checkpoints" / again).exists()
    assert same(restored(folder, one)[0], state_at(4, one))
