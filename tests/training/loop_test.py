"""The loop: resumes bit-exactly wherever it was stopped, stops when told, and says where it broke."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import sharding
from align_jax.losses import Mean
from align_jax.training import checkpoints, loop, metrics, state, step, workdir
from align_jax.training.optimizer import OptimizerConfig, make_optimizer

ROWS, EPOCH = 4, 3  # 12 records, so an epoch ends at steps 3, 6, 9
TX = make_optimizer(OptimizerConfig(learning_rate=0.1), 9)


def objective(params, frozen, batch, rng):
  """Least squares with a random perturbation, so that a lost rng would show."""
  noise = 0.1 * jax.random.normal(rng, batch["y"].shape)
  loss = Mean.of(jnp.square(batch["x"] @ params["w"] - batch["y"] - noise))
  return loss.total, {"loss": loss, "tokens": jnp.asarray(ROWS)}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def compiled():
  return step.make_train_step(objective, TX)


def batches():
  rng = np.random.default_rng(0)
  rows = [{"x": rng.normal(size=3), "y": rng.normal()} for _ in range(ROWS * EPOCH)]
  rows = [{k: np.float32(v) for k, v in row.items()} for row in rows]
  return iter(
    grain.MapDataset.source(rows)
    .shuffle(seed=0)
    .repeat()
    .batch(ROWS)
    .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  )


def run(
  folder,
  steps,
  mesh,
  compiled,
  *,
  before_step=None,
  check_first=None,
  stop=None,
  report=None,
  **options,
):
  folder.mkdir(exist_ok=True)
  start = state.create_state(
    {"w": sharding_put(np.zeros(3, np.float32), mesh)}, TX, seed=7, mesh=mesh
  )

  def one(train_state, batch):
    if before_step:
      before_step(int(train_state.step))
    return compiled(train_state, {}, batch)

  return loop.fit(
    start,
    name="test",
    step=one,
    batches=batches(),
    put=functools.partial(sharding.put_batch, mesh=mesh),
    config=loop.LoopConfig(steps=steps, **options),
    workdir=folder,
    metadata={},
    hooks=loop.Hooks(check_first=check_first, stop=stop, report=report),
  )


def sharding_put(x, mesh):
  return jax.device_put(x, sharding.replicated(mesh))


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mesh, compiled):
  folder = tmp_path_factory.mktemp("whole")
  return folder, run(folder, 9, mesh, compiled)


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, mesh, compiled, whole, stop):
  """peers 3.32 and 3.33, also at the first and last step of an epoch: parameters and metrics."""

  def ask(at):
    if at == stop - 1:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(SystemExit) as stopped:
    run(tmp_path, 9, mesh, compiled, before_step=ask)
  assert stopped.value.code == loop.RESUME_STATUS
  assert len(lines(tmp_path)) == stop
  resumed = run(tmp_path, 9, mesh, compiled)
  for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole[1])):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(a, b)
  losses = [[line["loss"] for line in lines(f)] for f in (tmp_path, whole[0])]
  assert losses[0] == losses[1]
  assert [line["step"] for line in lines(tmp_path)] == list(range(9))


def test_another_seed_is_another_run(tmp_path, mesh, compiled, whole):
  """The control: the comparison above does see a changed random stream."""
  other = state.create_state({"w": sharding_put(np.zeros(3, np.float32), mesh)}, TX, 8, mesh)
  other, _ = compiled(other, {}, sharding.put_batch(next(batches()), mesh))
  first = lines(whole[0])[0]
  again = state.create_state({"w": sharding_put(np.zeros(3, np.float32), mesh)}, TX, 7, mesh)
  _, values = compiled(again, {}, sharding.put_batch(next(batches()), mesh))
  assert metrics.to_floats(values)["loss"] == first["loss"]
  assert not np.array_equal(other.params["w"], whole[1].params["w"])


def test_a_killed_run_repeats_no_line(tmp_path, mesh, compiled, whole):
  """Killed without a chance to save: it goes on from the last checkpoint and rewrites the rest."""

  class Killed(Exception):
    pass

  def die(at):
    if at == 7:
      raise Killed

  with pytest.raises(Killed):
    run(tmp_path, 9, mesh, compiled, before_step=die, checkpoint_every=2)
  torn = tmp_path / "metrics.jsonl"
  torn.write_text(torn.read_text() + '{"step": 7, "lo')
  run(tmp_path, 9, mesh, compiled, checkpoint_every=2)
  assert lines(tmp_path)[-1]["loss"] == lines(whole[0])[-1]["loss"]
  assert [line["step"] for line in lines(tmp_path)] == list(range(9))


def test_a_relative_workdir_is_as_good(tmp_path, monkeypatch, mesh, compiled):
  """The README's commands name one: Orbax itself would refuse it."""
  monkeypatch.chdir(tmp_path)
  run(pathlib.Path("runs"), 4, mesh, compiled, checkpoint_every=2)
  final = run(pathlib.Path("runs"), 9, mesh, compiled, checkpoint_every=2)
  assert int(final.step) == 9 and checkpoints.latest_step("runs") == 9
  loaded = checkpoints.load_params("runs", state.abstract_state(final.params))
  np.testing.assert_array_equal(loaded["w"], final.params["w"])


def test_old_checkpoints_go_and_the_newest_stay(tmp_path, mesh, compiled):
  run(tmp_path, 9, mesh, compiled, checkpoint_every=2, keep=2)
  kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  assert kept == {8, 9}


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path, mesh):
  def broken(params, frozen, batch, rng):
    loss_sum, values = objective(params, frozen, batch, rng)
    return loss_sum * jnp.nan, values | {"loss": Mean(values["loss"].total * jnp.nan, 1.0)}

  with pytest.raises(FloatingPointError, match="step 0"):
    run(tmp_path, 9, mesh, step.make_train_step(broken, TX))
  at, reason = workdir.read_stop(tmp_path)
  assert at == 0 and reason.startswith("the loss is nan at step 0, on the batch at ")
  assert reason.endswith("; there is no checkpoint yet")


def test_the_first_step_is_checked_and_no_other(tmp_path, mesh, compiled):
  """peers 3.11: an identity that does not hold at step 0 stops the run before step 2."""
  seen = []
  run(tmp_path / "good", 3, mesh, compiled, check_first=seen.append)
  assert [values["loss"] for values in seen] == [lines(tmp_path / "good")[0]["loss"]]

  def refuse(values):
    raise FloatingPointError("not ln 2")

  with pytest.raises(FloatingPointError, match="not ln 2"):
    run(tmp_path / "bad", 9, mesh, compiled, check_first=refuse)
  assert len(lines(tmp_path / "bad")) == 1


def after(count):
  """A stop that remembers: the third step that it sees, and no other number of calls, ends the run."""
  seen = []

  def stop(at, values):
    assert math.isfinite(values["loss"])
    seen.append(at)
    return f"seen {seen}" if len(seen) == count else None

  return stop


def test_a_reason_ends_the_run_one_step_after_the_metrics_that_gave_it(
  tmp_path, mesh, compiled, whole, capsys
):
  """The state is that of an uninterrupted run after so many steps, and it is the one saved."""
  final = run(tmp_path, 9, mesh, compiled, stop=after(3))
  assert int(final.step) == 4 == checkpoints.latest_step(tmp_path)
  assert workdir.read_stop(tmp_path) == (2, "seen [0, 1, 2]")
  assert "stopped after 4 steps: seen [0, 1, 2]" in capsys.readouterr().out
  assert [line["loss"] for line in lines(tmp_path)] == [
    line["loss"] for line in lines(whole[0])[:4]
  ]
  loaded = checkpoints.load_params(tmp_path, state.abstract_state(final.params))
  np.testing.assert_array_equal(loaded["w"], final.params["w"])
  workdir.write_lineage(tmp_path, phase="test", step=4, parents=(), data_fingerprint="")
  assert workdir.is_finished(tmp_path)
  assert workdir.read_json(tmp_path / "lineage.json")["stopped"] == "seen [0, 1, 2]"


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(
  tmp_path, mesh, compiled, interrupted
):
  """Interrupted before, at and after the step of the reason (2): a stop's memory survives."""

  def ask(at):
    if at == interrupted - 1:
      os.kill(os.getpid(), signal.SIGTERM)

  if interrupted < 4:  # at 4 the run is over anyway
    with pytest.raises(SystemExit):
      run(tmp_path, 9, mesh, compiled, before_step=ask, stop=after(3))
    assert workdir.read_stop(tmp_path) is None
  final = run(tmp_path, 9, mesh, compiled, before_step=ask, stop=after(3))
  assert int(final.step) == 4
  assert workdir.read_stop(tmp_path) == (2, "seen [0, 1, 2]")
  assert len(lines(tmp_path)) == 4


def test_a_run_killed_after_its_last_checkpoint_stops_again_without_a_step(
  tmp_path, mesh, compiled
):
  run(tmp_path, 9, mesh, compiled, stop=after(3))
  (tmp_path / "stopped.json").unlink()

  def never(at):
    raise AssertionError(f"step {at} was made again")

  final = run(tmp_path, 9, mesh, compiled, before_step=never, stop=after(3))
  assert int(final.step) == 4 and workdir.read_stop(tmp_path) == (2, "seen [0, 1, 2]")


def test_checkpoints_do_not_bring_a_stop_forward(tmp_path, mesh, compiled):
  """A checkpoint reads the newest metrics early: the run ends at the same step all the same."""
  final = run(tmp_path, 9, mesh, compiled, stop=after(3), checkpoint_every=1)
  assert int(final.step) == 4


@pytest.mark.parametrize("count", [8, 9, 10])
def test_a_reason_in_the_last_steps_stops_nothing(tmp_path, mesh, compiled, count):
  final = run(tmp_path, 9, mesh, compiled, stop=after(count))
  assert int(final.step) == 9 and workdir.read_stop(tmp_path) is None


def test_reports_are_made_at_checkpoints(tmp_path, mesh, compiled):
  """Each finds the metrics of all steps before it."""
  found = []
  report = lambda: found.append(len(lines(tmp_path)))  # noqa: E731
  run(tmp_path, 9, mesh, compiled, checkpoint_every=4, report=report)
  assert found == [4, 8]


class Recorder:
  """The step, which writes down when it is dispatched and when each of its metrics is fetched."""

  def __init__(self, compiled):
    self.compiled, self.seen, self.steps = compiled, [], 0

  def __call__(self, train_state, frozen, batch):
    self.seen.append(("dispatched", self.steps))
    train_state, _ = self.compiled(train_state, frozen, batch)
    found = {"loss": Fetched(self.seen, self.steps), "tokens": ROWS}
    self.steps += 1
    return train_state, found


class Fetched:
  """A metric that is known only when somebody asks for its value, which is written down."""

  def __init__(self, seen, step):
    self._seen, self._step = seen, step

  def __array__(self, dtype=None, copy=None):
    self._seen.append(("fetched", self._step))
    return np.float32(1.0)


def test_metrics_are_fetched_when_the_next_step_is_under_way(tmp_path, mesh, compiled):
  """The device never waits for the host: only the step before the one dispatched is waited for."""
  recorder = Recorder(compiled)
  run(tmp_path, 4, mesh, recorder)
  expected = [("dispatched", 0)]
  for n in range(1, 4):
    expected += [("dispatched", n), ("fetched", n - 1)]
  assert recorder.seen == [*expected, ("fetched", 3)]


def test_a_checkpoint_does_wait(tmp_path, mesh, compiled):
  """The control: a fetch that comes before the next dispatch is seen as such."""
  recorder = Recorder(compiled)
  run(tmp_path, 2, mesh, recorder, checkpoint_every=1)
  assert recorder.seen == [(w, n) for n in range(2) for w in ("dispatched", "fetched")]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_step_that_waits_for_its_own_end_is_timed_by_itself(tmp_path, mesh, monkeypatch, every):
  """Step t takes t + 1 s by this clock, and 12 tokens: also the last one, and those at checkpoints."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

  def slow(train_state, batch):
    now[0] += int(train_state.step) + 1
    values = {"loss": jnp.float32(0), "tokens": 12}
    return dataclasses.replace(train_state, step=train_state.step + 1), jax.block_until_ready(
      values
    )

  run(tmp_path, 4, mesh, lambda s, _, batch: slow(s, batch), checkpoint_every=every)
  assert [line["tokens_per_s"] for line in lines(tmp_path)] == [12.0, 6.0, 4.0, 3.0]


def test_workdir_of_another_config_is_refused(tmp_path):
  workdir.open_workdir(tmp_path / "run", "sft", {"seed": 0, "data": {"length": 8}})
  workdir.open_workdir(tmp_path / "run", "sft", {"seed": 0, "data": {"length": 8}})
  with pytest.raises(workdir.InputError, match="config.data.length: 8 there, 9 here"):
    workdir.open_workdir(tmp_path / "run", "sft", {"seed": 0, "data": {"length": 9}})
