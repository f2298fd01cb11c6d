"""Whole sweeps of a tiny model in worker processes: shared by jobs, stopped, resumed, never repeated."""

import json
import os
import signal
import threading
import time

import pytest

from align_jax import app
from align_jax.errors import InputError
from align_jax.phases import sweep
from configs import sweep as sweep_config

WORLD, HELD_OUT = "microworld:n=64", "microworld:n=16,split=heldout,draw=1"


def tiny(**changes):
  """Two objectives and a learning rate that cannot end well."""
  config = sweep_config.get_config()
  config.sft.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  for phase in (config.sft, config.preference):
    phase.data.update(train=WORLD, eval=HELD_OUT, batch_size=8)
    phase.loop.update(steps=3, eval_every=0)
  config.evaluation.update(data=HELD_OUT, max_new_tokens=8, batch_size=16)
  config.seeds = (0, 1)
  values = config.to_dict()
  values["variants"] = {
    "dpo": {},
    "ipo": {"objective": {"name": "ipo"}},
    "wild": {"optimizer": {"learning_rate": 1e30}},
  }
  return values | changes


def never(index, count):
  raise AssertionError("a worker was started")


def states(table):
  return {run: run.state for row in table.rows for run in row.runs}


def files(root):
  """When the files of runs were written; the table's own are written at every call."""
  return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.parent != root and p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(root, the table after job 1 of 2, the table after job 0 of 2 with two processes)."""
  root = tmp_path_factory.mktemp("sweep")
  half = sweep.run(tiny(processes=1), str(root), app.worker_devices, job_index=1, job_count=2)
  whole = sweep.run(tiny(processes=2), str(root), app.worker_devices, job_index=0, job_count=2)
  return root, half, whole


def test_a_job_does_its_share_and_the_last_one_has_the_whole_table(finished):
  _, half, whole = finished
  assert half.summary == "2 of 6 runs finished, 1 failed, 3 still to run"
  assert whole.summary == "4 of 6 runs finished, 2 failed"
  assert [row.variant for row in whole.rows][-1] == "wild"


def test_a_run_that_diverges_is_in_the_table_with_its_reason(finished):
  root, _, whole = finished
  assert {(r.variant, r.seed, r.state) for r in whole.failed} == {
    ("wild", 0, "diverged"), ("wild", 1, "diverged"),
  }  # fmt: skip
  assert "the loss is nan at step" in whole.failed[0].reason
  assert "wild seed 0 diverged: the loss is" in (root / "sweep.md").read_text()
  assert "FloatingPointError" in (root / "wild" / "seed0" / "log.txt").read_text()


def test_every_run_is_trained_from_the_one_start_and_once(finished):
  root, _, _ = finished
  for folder in root.glob("*/seed*"):
    assert (folder / "log.txt").read_text().count(": training") == 1
  parents = json.loads((root / "ipo" / "seed1" / "lineage.json").read_text())["parents"]
  assert {p["path"] for p in parents} == {str(root / "sft")}


def test_all_are_compared_with_the_same_answers(finished):
  """Whichever worker sampled the reference, and though it did so once for all its runs."""
  _, _, whole = finished
  found = [run.evaluation for run in whole.finished]
  assert len({(e.reference, e.reference_score.value, e.reference_length.value) for e in found}) == 1
  assert len({tuple(json.dumps(s.prompt) for s in run.samples) for run in whole.finished}) == 1
  assert {run.evaluation.n for run in whole.finished} == {16}


def test_again_is_nothing_to_do_even_for_what_failed(finished):
  root, _, whole = finished
  before = files(root)
  again = sweep.run(tiny(), str(root), never)
  assert again == whole
  assert files(root) == before


def test_another_metric_sorts_without_running_anything(finished):
  root, _, _ = finished
  table = sweep.run(tiny(metric="kl"), str(root), never)
  values = [row.metrics["kl"].value for row in table.rows[:2]]
  assert table.metric == "kl" and values == sorted(values)


def test_a_folder_of_other_settings_is_refused(finished):
  root, _, _ = finished
  changed = tiny()
  changed["preference"]["optimizer"]["learning_rate"] = 1e-5
  with pytest.raises(InputError, match="variant 'dpo': .*optimizer.learning_rate: 0.0003 there"):
    sweep.run(changed, str(root), never)
  changed = tiny()
  changed["evaluation"]["seed"] = 1
  with pytest.raises(InputError, match="config.evaluation.seed: 0 there, 1 here"):
    sweep.run(changed, str(root), never)


def stop_when(file):
  """SIGTERM to this process as soon as a run's metrics have lines."""

  def watch():
    while not (file.exists() and file.read_text().count("\n") > 4):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()


def test_a_stopped_sweep_goes_on_where_it_stopped(finished, tmp_path):
  """Steps that were made are not made again: their lines, with their timings, stay as they are."""
  root, _, _ = finished
  (tmp_path / "sft").symlink_to(root / "sft")
  settings = tiny(processes=1, seeds=(0,), variants={"dpo": {}})
  settings["preference"]["loop"]["steps"] = 400
  file = tmp_path / "dpo" / "seed0" / "metrics.jsonl"
  stop_when(file)
  with pytest.raises(SystemExit) as stop:
    sweep.run(settings, str(tmp_path), app.worker_devices)
  assert stop.value.code == 75
  made = file.read_text()
  assert not (tmp_path / "dpo" / "seed0" / "lineage.json").exists()
  table = sweep.run(settings, str(tmp_path), app.worker_devices)
  assert table.summary == "1 of 1 runs finished"
  assert file.read_text().startswith(made)
  steps = [json.loads(line)["step"] for line in file.read_text().splitlines() if '"loss"' in line]
  assert steps == list(range(400))
