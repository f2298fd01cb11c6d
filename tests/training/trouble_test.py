"""Runs that go wrong: what they say, what they leave behind, and what a later run makes of it."""

import errno
import functools
import json
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import data, sharding, worlds
from align_jax.data import streams
from align_jax.errors import InputError
from align_jax.losses import Mean
from align_jax.training import checkpoints, loop, metrics, state, step, workdir
from align_jax.training.optimizer import OptimizerConfig, make_optimizer

TX = make_optimizer(OptimizerConfig(learning_rate=0.1), 9)


def objective(params, frozen, batch, rng):
  loss = Mean.of(jnp.square(params["w"] * batch["x"] - 1.0))
  return loss.total, {"loss": loss, "tokens": jnp.asarray(4)}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def compiled():
  return step.make_train_step(objective, TX)


def batches(values):
  """Batches of four, in order; the name of a record is its number."""
  rows = grain.MapDataset.source(list(range(len(values)))).repeat().batch(4)
  indices = rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  return streams.Traced(
    indices,
    lambda i: {"x": np.asarray(values, np.float32)[i]},
    lambda i: [f"a.jsonl:{n}" for n in i],
  )


def run(
  folder, mesh, compiled, *, values=(1.0,) * 36, steps=9, hooks=None, identity=None, **options
):
  folder.mkdir(exist_ok=True)
  w = jax.device_put(jnp.zeros(()), sharding.replicated(mesh))
  return loop.fit(
    state.create_state({"w": w}, TX, seed=7, mesh=mesh),
    name="test",
    step=loop.no_transfers(lambda s, batch: compiled(s, {}, batch)),
    batches=batches(values),
    put=functools.partial(sharding.put_batch, mesh=mesh),
    config=loop.LoopConfig(**{"steps": steps, "checkpoint_every": 2} | options),
    workdir=folder,
    metadata={},
    hooks=hooks or loop.Hooks(),
    identity=identity,
  )


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_the_first_loss_that_is_not_finite_names_its_records_and_where_to_go_back_to(
  tmp_path, mesh, compiled
):
  values = np.ones(36)
  values[22] = np.nan  # in the batch of step 5
  with pytest.raises(FloatingPointError) as caught:
    run(tmp_path, mesh, compiled, values=values)
  place = tmp_path / "checkpoints" / "4"
  assert str(caught.value) == (
    "the loss is nan at step 5, on the batch of a.jsonl:20, a.jsonl:21, a.jsonl:22, a.jsonl:23; "
    f"the last good checkpoint is {place}"
  )
  assert workdir.read_stop(tmp_path) == (5, str(caught.value))
  assert steps_of(tmp_path) == [2, 4]
  assert np.isnan(lines(tmp_path)[5]["loss"]) and len(lines(tmp_path)) == 6


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, mesh):
  """The loss of that step is finite still; the parameters behind it are not."""

  def steep(params, frozen, batch, rng):
    loss_sum, values = objective(params, frozen, batch, rng)
    return loss_sum + jnp.sqrt(jnp.abs(params["w"] * 0)) * batch["x"][0], values

  with pytest.raises(FloatingPointError, match="the norm of the gradient is nan at step 0, on the"):
    run(tmp_path, mesh, step.make_train_step(steep, TX), checkpoint_every=1)
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["packed", "padded", "shared", "mixed"])
def test_a_batch_knows_its_records(kind):
  """Of every layout: exactly those whose tokens are in it, also when it is looked for later."""
  world = worlds.Microworld(seed=0)
  tokenizer, plan = world.tokenizer(), data.Batching(4, seed=1)
  if kind in ("shared", "mixed"):
    records = world.preferences(40)
    pairs = data.tokenise_pairs(records, tokenizer, plan, length=64)
    stream = data.shared_batches(pairs)
    count = lambda batch: int((batch["weight"] > 0).sum())  # noqa: E731
  else:
    records = world.demonstrations(40)
    stream = data.sft_batches(records, tokenizer, length=64, batch_size=4, pack=kind == "packed")
    count = lambda batch: int(batch["segment_ids"].max(axis=1).sum())  # noqa: E731
  if kind == "mixed":
    stream = streams.Zipped(pairs=stream)
    inner, count = count, lambda batch: inner(batch["pairs"])
  for _ in range(5):
    place = stream.get_state()
    batch = next(stream)
    names = stream.names(place)
    assert len(names) == count(batch) and stream.names(place) == names
    assert set(names) <= {record.source for record in records} | {
      f"record {i}" for i in range(len(records))
    }
  assert streams.describe(stream, place).startswith(f"the batch of {names[0]}")


def test_a_leap_is_told_or_ends_the_run(tmp_path, mesh, compiled, capsys):
  values = np.ones(160)
  values[100] = 1e3  # in the batch of step 25
  long = {"steps": 30, "checkpoint_every": 0}
  run(tmp_path / "warn", mesh, compiled, values=values, **long)
  assert "== test: at step 25 the loss leapt to" in capsys.readouterr().err
  final = run(tmp_path / "stop", mesh, compiled, values=values, spike="stop", **long)
  assert int(final.step) == 27 and workdir.read_stop(tmp_path / "stop")[0] == 25
  run(tmp_path / "off", mesh, compiled, values=values, spike="off", **long)
  assert "leapt" not in capsys.readouterr().err


def test_a_run_that_learns_nothing_is_told(tmp_path, mesh, compiled, capsys):
  """x = 0 everywhere, so that the loss stays at 1."""
  hooks, long = loop.Hooks(start_loss=1.0), {"steps": 60, "checkpoint_every": 0}
  run(tmp_path / "stuck", mesh, compiled, values=[0.0] * 36, hooks=hooks, **long)
  assert "at step 49 the loss has not left 1, where it began" in capsys.readouterr().err
  run(tmp_path / "moves", mesh, compiled, hooks=hooks, **long)
  assert "where it began" not in capsys.readouterr().err


def test_a_changed_reference_is_refused(tmp_path, mesh, compiled):
  run(tmp_path, mesh, compiled, steps=4, identity={"ref": "a", "base": "b"})
  with pytest.raises(
    InputError, match="cannot go on: ref is not what it was when the run was begun"
  ):
    run(tmp_path, mesh, compiled, identity={"ref": "c", "base": "b"})
  assert int(run(tmp_path, mesh, compiled, identity={"ref": "a", "base": "b"}).step) == 9


def test_checkpoints_of_every_so_many_steps_stay(tmp_path, mesh, compiled):
  run(tmp_path, mesh, compiled, steps=9, checkpoint_every=1, keep=1, keep_every=3)
  assert steps_of(tmp_path) == [3, 6, 9]


def test_checkpoints_may_lie_elsewhere(tmp_path, mesh, compiled):
  """Those of runs with the same setting do not meet, and who reads a workdir finds them."""
  settings = {"loop": {"checkpoints": str(tmp_path / "bucket")}}
  for name, steps in (("a", 4), ("b", 9)):
    folder = workdir.open_workdir(tmp_path / name, "test", settings)
    run(folder, mesh, compiled, steps=steps, **settings["loop"])
    assert not (folder / "checkpoints").exists()
    assert checkpoints.latest_step(folder) == steps
  assert len(list((tmp_path / "bucket").rglob("_CHECKPOINT_METADATA"))) == 4
  assert int(run(tmp_path / "a", mesh, compiled, **settings["loop"]).step) == 9


def test_a_bucket_as_workdir_is_refused():
  with pytest.raises(
    InputError, match="gs://b/run must be a folder .* set config.loop.checkpoints"
  ):
    workdir.open_workdir("gs://b/run", "sft", {})


def test_a_path_in_a_bucket_is_kept_as_it_is():
  """Not made absolute, nor its slashes joined."""
  folder = checkpoints._folder("/home/me/runs/sft", "gs://bucket/runs")
  assert str(folder) == "gs://bucket/runs/home/me/runs/sft/checkpoints"


def test_lost_lines_of_metrics_are_told(tmp_path, mesh, compiled, capsys):
  run(tmp_path, mesh, compiled, steps=4)
  kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]
  (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
  run(tmp_path, mesh, compiled)
  assert "metrics.jsonl holds 3 of the 4 lines before step 4" in capsys.readouterr().err
  assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 4, 5, 6, 7, 8]


def test_a_step_may_not_move_arrays_unasked(tmp_path, mesh, compiled):
  def careless(train_state, frozen, batch):
    return compiled(train_state, frozen, {"x": np.asarray(batch["x"])})

  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    run(tmp_path, mesh, careless)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoints_stay(
  tmp_path, mesh, compiled, monkeypatch, keep
):
  """A write in the background fails: it is noticed, and what was written before is whole."""
  whole = run(tmp_path / "whole", mesh, compiled)
  write, count = pathlib.Path.write_text, []
  handler = checkpoints.ocp.handlers.JsonHandler
  original = handler._background_save

  async def full(self, directory, checkpointable, **named):
    count.append(1)
    if len(count) == 3:
      raise FULL
    return await original(self, directory, checkpointable, **named)

  monkeypatch.setattr(handler, "_background_save", full)
  with pytest.raises(InputError) as caught:
    run(tmp_path / "run", mesh, compiled, keep=keep)
  assert "could not be written (" in str(caught.value) and "No space left" in str(caught.value)
  assert str(caught.value).endswith(f"the last good checkpoint is {tmp_path}/run/checkpoints/4")
  assert steps_of(tmp_path / "run") == [2, 4][-keep:]
  monkeypatch.undo()
  assert write is pathlib.Path.write_text
  resumed = run(tmp_path / "run", mesh, compiled, keep=keep)
  np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])
  assert [line["step"] for line in lines(tmp_path / "run")] == list(range(9))


def test_metrics_that_cannot_be_written_are_a_sentence(tmp_path, mesh, compiled, monkeypatch):
  write = metrics.MetricsWriter.write

  def full(self, at, values):
    if at == 3:
      monkeypatch.setattr(self, "_file", open("/dev/full", "a"))
    write(self, at, values)

  monkeypatch.setattr(metrics.MetricsWriter, "write", full)
  with pytest.raises(InputError, match="metrics.jsonl cannot be written: No space left on device"):
    run(tmp_path, mesh, compiled)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  file = tmp_path / "config.json"
  workdir.write_json(file, {"a": 1})

  def fail(_):
    raise FULL

  with monkeypatch.context() as patch:
    patch.setattr(workdir.os, "fsync", fail)
    with pytest.raises(InputError, match="config.json cannot be written: No space left on device"):
      workdir.write_json(file, {"a": 2})
  assert workdir.read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_a_damaged_json_file_is_a_sentence(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 0')
  with pytest.raises(InputError, match="config.json is not valid JSON"):
    workdir.open_workdir(tmp_path, "sft", {"seed": 0})
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss"\n{"step": 1}\n')
  with pytest.raises(InputError, match="metrics.jsonl:1: invalid JSON"):
    metrics.MetricsWriter(tmp_path, 3)
