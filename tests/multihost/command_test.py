"""The command itself on two hosts: joined by flags, stopped by a notice, ended by a failure of one."""

import json
import pathlib
import signal
import sys
import time

import pytest

from align_jax import distributed
from align_jax.errors import InputError
from align_jax.training import checkpoints, loop
from tests.multihost import host

TINY = {"layers": 1, "embed_dim": 16, "heads": 2, "kv_heads": 2, "mlp_dim": 32}
STEPS = 300  # more than are made before the notice comes
SETTINGS = [
  *(f"--config.model.scratch.{name}={size}" for name, size in TINY.items()),
  "--config.model.remat=none",
  "--config.data.train=microworld:n=64",
  "--config.data.eval=microworld:n=8,split=heldout,draw=1",
  "--config.data.batch_size=8",
  f"--config.loop.steps={STEPS}",
  "--config.loop.eval_every=0",
]


def command(workdir, *flags):
  words = ["-m", "experiments.sft", "--config=configs/sft.py", f"--workdir={workdir}"]
  return [sys.executable, *words, *SETTINGS, *flags]


def both(first, second):
  """Starts the command on two hosts, with another workdir for each if they differ."""
  port = host.free_port()
  flags = [f"--coordinator=localhost:{port}", "--processes=2"]
  return [
    host.open_process(command(folder, *flags, f"--process_id={i}"), JAX_NUM_CPU_DEVICES="2")
    for i, folder in enumerate((first, second))
  ]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """(workdir, the processes when they have ended): one of two hosts was sent SIGTERM at work."""
  folder = tmp_path_factory.mktemp("stopped") / "run"
  processes = both(folder, folder)
  try:
    while not _steps(folder) and all(p.poll() is None for p in processes):
      time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    return folder, host.ended(processes)
  finally:
    for process in processes:
      process.kill()


def _steps(folder: pathlib.Path) -> list[int]:
  file = folder / "metrics.jsonl"
  if not file.exists():
    return []
  lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
  return [line["step"] for line in lines if "loss" in line]  # evaluations have lines of their own


def test_a_notice_to_one_ends_both_with_resume_me(stopped):
  folder, ended = stopped
  assert [status for status, _, _ in ended] == [loop.RESUME_STATUS] * 2, ended[0][2][-2000:]
  saved = checkpoints.latest_step(folder)
  assert 0 < saved < STEPS and _steps(folder) == list(range(saved))
  assert not (folder / "lineage.json").exists()


def test_the_hosts_say_whom_they_join(stopped):
  for index, (_, _, errors) in enumerate(stopped[1]):
    assert f"as process {index} of 2; giving up after 300 s" in errors


def test_one_host_goes_on_from_what_two_have_saved(stopped):
  """And so each step is in the file once."""
  folder, _ = stopped
  process = host.open_process(command(folder), JAX_NUM_CPU_DEVICES="1")
  ((status, _, errors),) = host.ended([process])
  assert status == 0, errors[-2000:]
  assert _steps(folder) == list(range(STEPS)) and checkpoints.latest_step(folder) == STEPS


def test_a_first_host_that_fails_ends_the_other(tmp_path):
  """It has the bad workdir for itself: the other would wait for it in the first step."""
  (tmp_path / "file").write_text("")
  first, second = host.ended(both(tmp_path / "file", tmp_path / "run"))
  assert first[0] == 2 and "error: cannot create the workdir" in first[2]
  assert second[0] not in (0, 2) and "another task died" in second[2]


def test_a_mistake_of_all_hosts_is_a_sentence_on_each(tmp_path):
  (tmp_path / "file").write_text("")
  for status, _, errors in host.ended(both(tmp_path / "file", tmp_path / "file")):
    assert status == 2 and "error: cannot create the workdir" in errors


@pytest.mark.parametrize(
  "flags, message",
  [
    (("host:1", None, None), "give --process_id and --processes too"),
    ((None, 0, 2), "give --coordinator too"),
    ((None, None, 2), "give --coordinator and --process_id too"),
    (("host", 0, 2), "must be host:port"),
    (("host:port", 0, 2), "must be host:port"),
    (("host:70000", 0, 2), "must be host:port"),
    ((":1234", 0, 2), "must be host:port"),
    (("host:1", 2, 2), "must lie between 0 and 1"),
    (("host:1", -1, 2), "must lie between 0 and 1"),
    (("host:1", 0, 0), "--processes must be at least 1"),
  ],
)
def test_half_given_flags_are_refused(flags, message):
  with pytest.raises(InputError, match=message):
    distributed.explicit(*flags)


def test_whole_flags_are_what_jax_is_given():
  assert distributed.explicit(None, None, None) == {}
  assert distributed.explicit("[::1]:80", 1, 2) == {
    "coordinator_address": "[::1]:80",
    "process_id": 1,
    "num_processes": 2,
  }


def test_alone_on_a_machine_there_is_no_one_to_join(tmp_path):
  process = host.open_process(command(tmp_path / "run", "--distributed"))
  ((status, _, errors),) = host.ended([process])
  assert status == 2 and "error: --distributed: there is no Cloud TPU slice" in errors
