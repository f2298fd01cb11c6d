"""What cannot work is said before anything is paid for; what is asked of gcloud, to the letter."""

import pathlib
import shlex
import subprocess
import sys

import pytest

from align_jax.errors import InputError
from align_jax.launch import commands, request, runner

ROOT = pathlib.Path(__file__).resolve().parents[2]
SFT = ["python", "-m", "experiments.sft", "--workdir=gs://mine/sft"]


def asked(command=SFT, tpu="v5p-16", zone="us-east5-a", **options):
  return request.request(tpu, zone, list(command), root=str(ROOT), **options)


DRY_RUN = """\
# is it there already?
gcloud compute tpus queued-resources describe align-sft-v5p-16 --zone=us-east5-a --project=me --format=json
# if not:
gcloud compute tpus queued-resources create align-sft-v5p-16 --node-id=align-sft-v5p-16 \
--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot --zone=us-east5-a --project=me --quiet
# again and again, until its state is ACTIVE
gcloud compute tpus queued-resources describe align-sft-v5p-16 --zone=us-east5-a --project=me --format=json
# a folder for the logs
mkdir -p runs/launch/align-sft-v5p-16
# the working tree, once
tar --exclude=__pycache__ -czf runs/launch/align-sft-v5p-16/code.tar.gz setup.py README.md LICENSE \
align_jax experiments configs
# to the 2 hosts of align-sft-v5p-16
gcloud compute tpus tpu-vm scp runs/launch/align-sft-v5p-16/code.tar.gz align-sft-v5p-16:code.tar.gz \
--worker=all --zone=us-east5-a --project=me
# installed on align-sft-v5p-16
gcloud compute tpus tpu-vm ssh align-sft-v5p-16 --worker=all --zone=us-east5-a --project=me \
'--command=mkdir -p align_jax && tar -xzf code.tar.gz -C align_jax && cd align_jax && \
{ python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install -q --user uv || \
python3 -m pip install -q --user --break-system-packages uv; } && \
{ test -x .venv/bin/python || python3 -m uv venv -q --python=3.12 .venv; } && \
python3 -m uv pip install -q --python=.venv/bin/python --editable '"'"'.[tpu]'"'"''
# the command on align-sft-v5p-16; after status 75 again
gcloud compute tpus tpu-vm ssh align-sft-v5p-16 --worker=all --zone=us-east5-a --project=me \
'--command=cd align_jax && .venv/bin/python -m align_jax.launch.worker --slice=0 \
--mirror work/sft gs://mine/sft -- python -m experiments.sft \
'"'"'--config.data.train=microworld:n=8 + a.jsonl'"'"' --workdir=work/sft \
--config.loop.checkpoints=gs://mine/sft/checkpoints --distributed'
# if the command fails: is the slice still there?
gcloud compute tpus queued-resources describe align-sft-v5p-16 --zone=us-east5-a --project=me --format=json
# and healthy? if not: delete, create, go on
gcloud compute tpus tpu-vm describe align-sft-v5p-16 --zone=us-east5-a --project=me '--format=value(state)'
# at the end
gcloud compute tpus queued-resources delete align-sft-v5p-16 --zone=us-east5-a --project=me --force --quiet
"""


def main(*words):
  return subprocess.run(
    [sys.executable, "-m", "experiments.launch", *words], cwd=ROOT, capture_output=True, text=True
  )


def test_dry_run_prints_every_command_as_it_can_be_pasted():
  setting = "--config.data.train=microworld:n=8 + a.jsonl"
  out = main(
    "--tpu=v5p-16", "--zone=us-east5-a", "--project=me", "--spot", "--dry_run", "--", *SFT, setting
  )  # fmt: skip
  assert (out.returncode, out.stderr, out.stdout) == (0, "", DRY_RUN)


def test_what_is_printed_is_what_is_run():
  """A shell reads back the words, and the hosts' shell those of the command inside."""
  odd = [*SFT, '--config.prompt=it\'s $HOME & "more" `x`']
  words = commands.job(asked(odd), 0)
  assert shlex.split(shlex.join(words)) == words
  remote = shlex.split(words[-1].removeprefix("--command="))
  setting = odd[-1]
  assert remote[remote.index("python") :] == [
    *SFT[:3], setting, "--workdir=work/sft", "--config.loop.checkpoints=gs://mine/sft/checkpoints",
    "--distributed",
  ]  # fmt: skip
  assert remote[remote.index("--mirror") :][:3] == ["--mirror", "work/sft", "gs://mine/sft"]


def test_mistakes_are_one_sentence_and_status_2():
  for words, says in (
    (["--tpu=v5p128", "--zone=us-east5-a", "--", *SFT], "did you mean v5p-128"),
    (["--tpu=v5p-16", "--zone=us-east5-a", "--spots", "--", *SFT], "Unknown command line flag 'spots'"),
    (["--tpu=v5p-16", "--zone=us-east5-a", "--spot", "--reserved", "--", *SFT], "exclude each other"),
  ):  # fmt: skip
    out = main(*words)
    assert out.returncode == 2 and says in out.stderr and "Traceback" not in out.stderr
    assert out.stderr.startswith("error: ")


@pytest.mark.parametrize(
  "options, says",
  [
    (dict(command=[]), "nothing to run"),
    (dict(command=["--workdir=gs://a"]), "no program"),
    (dict(command=["python", "-m", "experiments.sfft"]), "did you mean sft"),
    (dict(command=["python", "-m", "experiments.launch"]), "not a command that can be launched"),
    (dict(command=SFT[:3]), "needs --workdir=gs://"),
    (dict(command=[*SFT[:3], "--workdir=runs/sft"]), "runs/sft: a host's disk is lost"),
    (dict(command=[*SFT[:3], "--workdir", "runs/sft"]), "runs/sft: a host's disk is lost"),
    (dict(command=[*SFT, "--config.data.train=tests/conftest.py"]), "is on this machine only"),
    (dict(zone="us-east5"), "--zone must be"),
    (dict(zone=None), "--zone must be"),
    (dict(tpu="tpu7x-16"), "only through Google Kubernetes Engine"),
    (dict(tpu="2xv5p-16", slices=3), "disagree"),
    (dict(name="My_Run"), "--name must be"),
    (dict(bucket="mine"), "--bucket must be"),
    (dict(copy=["nowhere.jsonl"]), "nowhere.jsonl is not in"),
    (dict(max_restarts=-1), "at least 0"),
  ],
)
def test_what_cannot_work_is_refused(options, says):
  with pytest.raises(InputError, match=says):
    asked(**options)


def test_workdir_and_compiled_programs_go_to_the_bucket():
  wanted = asked(SFT[:3], bucket="gs://mine/runs/")
  assert wanted.mirror == ("work/align-sft-v5p-16", "gs://mine/runs/align-sft-v5p-16")
  assert wanted.command[3:] == (
    "--workdir=work/align-sft-v5p-16",
    "--config.loop.checkpoints=gs://mine/runs/align-sft-v5p-16/checkpoints",
    "--distributed",
  )
  two = asked([*SFT[:3], "--workdir", "gs://mine/a/", "--config.loop.checkpoints=gs://b/c"])
  assert two.command[3:] == (
    "--config.loop.checkpoints=gs://b/c",
    "--workdir=work/a",
    "--distributed",
  )
  assert "JAX_COMPILATION_CACHE_DIR=gs://mine/runs/compiled" in commands.job(wanted, 0)[-1]


def test_slices_and_shapes_reach_gcloud():
  two = commands.create(asked(tpu="v5p-16", slices=2))
  assert {"--node-count=2", "--node-prefix=align-sft-2xv5p-16"} < set(two)
  assert "--accelerator-type=v5p-16" in two and "--spot" not in two
  shaped = commands.create(asked(tpu="v5p:4x4x16"))
  assert {"--type=v5p", "--topology=4x4x16"} < set(shaped)
  lite = commands.create(asked(tpu="v5e-16", tier="reserved"))
  assert {"--accelerator-type=v5litepod-16", "--reserved"} < set(lite)


def test_a_command_of_another_project_runs_as_it_is_and_files_can_be_sent_along():
  wanted = asked(["bash", "tests/x.sh", "--data=tests/conftest.py"], copy=["tests"])
  assert wanted.command == ("bash", "tests/x.sh", "--data=tests/conftest.py")
  assert commands.pack(wanted)[-1] == "tests"


def test_the_runner_hears_lines_and_names_a_missing_program():
  heard = []
  result = runner.run(["sh", "-c", "echo a; echo b >&2; exit 3"], heard.append)
  assert result.status == 3 and heard == ["a", "b"]
  with pytest.raises(InputError, match="no-such-program is not on this machine"):
    runner.run(["no-such-program"])
