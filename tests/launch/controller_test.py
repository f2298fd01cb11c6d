"""Scenarios played against a stand-in for gcloud: what is repeated, what is not, what is left behind."""

import pathlib

import pytest

from align_jax.errors import InputError
from align_jax.launch import commands, controller, request
from tests.launch.fake_gcloud import FakeGcloud

ROOT = str(pathlib.Path(__file__).resolve().parents[2])
COMMAND = ["python", "-m", "experiments.sft", "--workdir=gs://mine/sft"]
FINE = {(0, 0): 0, (0, 1): 0}


def launch(tmp_path, gcloud, tpu="v5p-16", **options):
  """Plays a launch; returns its status, what was said, and the stand-in."""
  wanted = request.request(
    tpu, "us-east5-a", COMMAND, logs=str(tmp_path / "logs"), root=ROOT, **options
  )
  said = []
  play = controller.Launch(wanted, gcloud, say=said.append, sleep=gcloud.sleep, clock=gcloud.clock)
  return play.start(), said, wanted


def ran(gcloud):
  return [w for w in gcloud.calls if any("launch.worker" in x for x in w)]


def test_a_run_that_ends_well_is_created_run_once_and_deleted(tmp_path):
  gcloud = FakeGcloud(2, [FINE])
  status, said, _ = launch(tmp_path, gcloud)
  assert status == 0 and gcloud.state is None and len(ran(gcloud)) == 1
  assert gcloud.verbs() == [
    "describe", "create", "describe", "tar", "scp", "ssh", "delete",
  ]  # fmt: skip
  assert "step 1 of host 0" in said and "step 1 of host 1" not in said
  logs = tmp_path / "logs"
  assert (logs / "slice_0_host_1.log").read_text() == "step 1 of host 1\nexit status 0\n"


def test_keep_leaves_the_slice_and_says_how_to_delete_it(tmp_path):
  gcloud = FakeGcloud(2, [FINE])
  status, said, wanted = launch(tmp_path, gcloud, keep=True)
  assert status == 0 and gcloud.state == "ACTIVE"
  assert " ".join(commands.delete(wanted)) in said[-1]


@pytest.mark.parametrize(
  "first",
  [
    {(0, 0): "preempted", (0, 1): "preempted"},
    {(0, 0): 75, (0, 1): "preempted"},  # one host had the time to save
    {(0, 0): 1, (0, 1): "preempted"},  # the other's crash is only the first's going
  ],
)
def test_a_preempted_slice_is_made_anew_and_the_same_command_runs(tmp_path, first):
  gcloud = FakeGcloud(2, [first, FINE])
  status, said, _ = launch(tmp_path, gcloud)
  assert status == 0
  assert gcloud.verbs().count("create") == 2 and gcloud.verbs().count("scp") == 2
  one, two = ran(gcloud)
  assert one == two
  assert any("on a new slice" in line for line in said)


def test_status_75_on_a_healthy_slice_runs_again_there(tmp_path):
  gcloud = FakeGcloud(2, [{(0, 0): 75, (0, 1): 75}, {(0, 0): 1, (0, 1): 75}, FINE])
  status, said, _ = launch(tmp_path, gcloud)
  assert status == 0 and len(ran(gcloud)) == 3
  assert gcloud.verbs().count("create") == 1 and gcloud.verbs().count("scp") == 1
  assert any("on the same slice" in line for line in said)


def test_a_lost_connection_is_taken_up_again(tmp_path):
  gcloud = FakeGcloud(2, [{(0, 0): "lost", (0, 1): "lost"}, FINE])
  assert launch(tmp_path, gcloud)[0] == 0
  assert gcloud.verbs().count("create") == 1
  assert gcloud.time >= controller.GRACE_SECONDS  # a preemption was waited for


@pytest.mark.parametrize(
  "statuses, worst", [((2, 1), 2), ((1, 2), 2), ((1, 1), 1), ((134, 1), 134)]
)
def test_a_command_that_fails_is_not_repeated_and_its_log_is_shown(tmp_path, statuses, worst):
  gcloud = FakeGcloud(2, [dict(zip(FINE, statuses)), FINE])
  status, said, _ = launch(tmp_path, gcloud)
  assert status == worst and len(ran(gcloud)) == 1 and gcloud.state is None
  host = statuses.index(worst)
  assert f"slice_0_host_{host}.log" in "".join(said)
  assert f"  step 1 of host {host}" in said


def test_restarts_are_bounded_and_ever_further_apart(tmp_path):
  gcloud = FakeGcloud(2, [{(0, 0): 75, (0, 1): 75}] * 9)
  status, said, _ = launch(tmp_path, gcloud, max_restarts=5)
  assert status == controller.RESUME and len(ran(gcloud)) == 6 and gcloud.state is None
  pauses = [line.rsplit(" in ", 1)[1] for line in said if "restart" in line and " in " in line]
  assert pauses == ["0 s", "30 s", "60 s", "120 s", "240 s"]


QUOTA = (
  1,
  "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit"
  " 'TPUV5P' has been exceeded. Limit: 0 in zone us-east5-a.\n",
)


@pytest.mark.parametrize(
  "answer, says",
  [
    (QUOTA, "no quota.*Limit: 0 in zone us-east5-a"),
    ((1, "ERROR: PERMISSION_DENIED: no role"), "not permitted.*no role"),
    ((1, "ERROR: Please run:\n\n  $ gcloud auth login\n"), "not logged in"),
    ((1, "PERMISSION_DENIED: Cloud TPU API has not been used in project 7"), "API is off"),
    ((1, "Traceback"), "gcloud compute tpus queued-resources create ended with status 1: Trace"),
  ],
)
def test_a_refusal_is_a_sentence_and_nothing_is_left(tmp_path, answer, says):
  gcloud = FakeGcloud(2, [FINE], answers=[answer])
  with pytest.raises(InputError, match=says) as error:
    launch(tmp_path, gcloud)
  assert "\n" not in str(error.value) and "delete" not in gcloud.verbs()


def test_a_refusal_after_a_preemption_is_tried_again(tmp_path):
  gone = {(0, 0): "preempted", (0, 1): "preempted"}
  gcloud = FakeGcloud(2, [gone, FINE], answers=[None, QUOTA, QUOTA])
  status, said, _ = launch(tmp_path, gcloud)
  assert status == 0 and sum("no quota" in line for line in said) == 2


def test_a_request_that_fails_in_the_queue_says_why_and_is_deleted(tmp_path):
  gcloud = FakeGcloud(2, [FINE], states=["WAITING_FOR_RESOURCES", "FAILED"])
  with pytest.raises(InputError, match="FAILED before it began: out of it"):
    launch(tmp_path, gcloud)
  assert gcloud.state is None


def test_waiting_for_the_slice_has_an_end(tmp_path):
  gcloud = FakeGcloud(2, [FINE], states=["WAITING_FOR_RESOURCES"] * 1000)
  with pytest.raises(InputError, match="no v5p-16 in us-east5-a within 60 minutes"):
    launch(tmp_path, gcloud, wait_minutes=60)
  assert gcloud.state is None and 3600 <= gcloud.time <= 3600 + 2 * controller.POLL_SECONDS


def test_a_slice_of_that_name_is_taken_up_if_it_is_the_same_kind(tmp_path):
  gcloud = FakeGcloud(2, [FINE])
  gcloud.state = "ACTIVE"
  assert launch(tmp_path, gcloud)[0] == 0
  assert "create" not in gcloud.verbs()


def test_a_slice_of_another_kind_is_left_alone(tmp_path):
  gcloud = FakeGcloud(2, [FINE])
  gcloud.state, gcloud.accelerator = "ACTIVE", "v5litepod-8"
  with pytest.raises(InputError, match="as v5litepod-8 and not v5p-16"):
    launch(tmp_path, gcloud)
  assert gcloud.state == "ACTIVE"


def test_several_slices_run_at_once_and_one_going_restarts_all(tmp_path):
  hosts = {(s, h): 0 for s in (0, 1) for h in (0, 1)}
  gcloud = FakeGcloud(2, [hosts | {(1, 0): "preempted", (0, 0): 1}, hosts])
  status, _, wanted = launch(tmp_path, gcloud, tpu="2xv5p-16")
  assert status == 0 and len(ran(gcloud)) == 4 and gcloud.verbs().count("create") == 2
  assert wanted.nodes == ("align-sft-2xv5p-16-0", "align-sft-2xv5p-16-1")
  assert (tmp_path / "logs" / "slice_1_host_1.log").exists()


def test_an_interruption_leaves_the_slice_and_says_how_to_delete_it(tmp_path):
  gcloud = FakeGcloud(2, [FINE])

  def interrupted(words, on_line=None):
    if any("launch.worker" in w for w in words):
      raise KeyboardInterrupt
    return gcloud(words, on_line)

  wanted = request.request("v5p-16", "us-east5-a", COMMAND, logs=str(tmp_path / "l"), root=ROOT)
  with pytest.raises(KeyboardInterrupt):
    controller.Launch(wanted, interrupted, say=str, sleep=gcloud.sleep).start()
  assert gcloud.state == "ACTIVE"
  assert controller.left_behind(wanted).endswith(" ".join(commands.delete(wanted)))
