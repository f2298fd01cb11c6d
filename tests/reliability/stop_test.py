"""Runs that are asked to stop, and runs whose disk is full: nothing that was done is done twice."""

import pytest


def training_steps(runner, folder):
  return [line["step"] for line in runner.lines_of(folder) if "loss" in line]


def resumes_as_if_nothing_had_happened(runner, reference, folder):
  assert runner.run(reference.phase, reference.config, folder) == 0, runner.said(folder)
  assert runner.lines_of(folder) == runner.lines_of(reference.folder)
  ours, theirs = runner.state_of(folder), runner.state_of(reference.folder)
  assert all((ours[name] == x).all() for name, x in theirs.items()) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("site, count", [("step", 3), ("save", 1), ("data", 6)])
def test_a_run_that_is_asked_to_stop_loses_at_most_one_step(
  runner, whole, tmp_path, name, site, count
):
  """In a step, while a checkpoint is being written, between batches: status 75, and all is saved."""
  reference, folder = whole("sft"), tmp_path / "run"
  bomb = {"site": site, "count": count, "signals": [name]}
  assert runner.run("sft", reference.config, folder, bomb=bomb) == 75, runner.said(folder)
  done = {"step": 3, "save": 2, "data": 6}[site]
  saved = runner.steps_of(folder)[-1]
  assert done <= saved <= done + 1
  assert training_steps(runner, folder) == list(range(saved))
  if name == "SIGTERM":  # the rest is alike
    resumes_as_if_nothing_had_happened(runner, reference, folder)


def test_before_and_after_training_it_is_the_same_status(runner, whole, tmp_path):
  """While the state is being restored there is nothing to save, and nothing is lost."""
  reference, folder = whole("sft"), tmp_path / "run"
  for site in ("start", "end"):
    bomb = {"site": site, "count": 1, "signals": ["SIGTERM"]}
    assert runner.run("sft", reference.config, folder, bomb=bomb) == 75, runner.said(folder)
  assert runner.steps_of(folder)[-1] == runner.steps
  resumes_as_if_nothing_had_happened(runner, reference, folder)


def test_a_second_ctrl_c_stops_at_once_and_does_no_harm(runner, whole, tmp_path):
  reference, folder = whole("sft"), tmp_path / "run"
  bomb = {"site": "step", "count": 5, "signals": ["SIGINT", "SIGINT"]}
  assert runner.run("sft", reference.config, folder, bomb=bomb) == 130
  assert "interrupted" in runner.said(folder) and runner.steps_of(folder) == [2, 4]
  resumes_as_if_nothing_had_happened(runner, reference, folder)


@pytest.mark.parametrize("count", [1, 3])
def test_a_full_disk_never_destroys_the_last_good_checkpoint(runner, whole, tmp_path, count):
  """For real: no file may grow any more, from before the first or the third checkpoint on."""
  reference, folder = whole("sft"), tmp_path / "run"
  bomb = {"site": "before save", "count": count, "disk": 200_000}  # the arrays take more
  assert runner.run("sft", reference.config, folder, bomb=bomb) == 2, runner.said(folder)
  saved = runner.steps_of(folder)  # the second may still have been on its way
  assert saved in ([[]] if count == 1 else [[2], [2, 4]])
  last = f"the last good checkpoint is {folder}/checkpoints/{saved[-1]}" if saved else ""
  said = runner.said(folder)
  assert "error: a checkpoint could not be written" in said and "File too large" in said
  assert (last or "there is no checkpoint yet") in said
  resumes_as_if_nothing_had_happened(runner, reference, folder)
