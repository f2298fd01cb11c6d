"""Any command on every host of a Cloud TPU slice, through preemptions, with its logs here.

python -m experiments.launch --tpu=v5p-128 --zone=us-east5-a --spot --bucket=gs://mine -- \
    python -m experiments.sft --config=configs/sft.py --workdir=gs://mine/sft
"""

import shlex
import sys

from absl import app, flags

from align_jax.errors import InputError

_TPU = flags.DEFINE_string("tpu", None, "v5p-128, v5e-256, 2xv6e-16...", required=True)
_ZONE = flags.DEFINE_string("zone", None, "Such as us-east5-a.", required=True)
_PROJECT = flags.DEFINE_string("project", None, "gcloud's own if not given.")
_NAME = flags.DEFINE_string("name", None, "Of the queued resource; from command and slice.")
_SLICES = flags.DEFINE_integer("slices", None, "How many such slices, joined over the network.")
_SPOT = flags.DEFINE_bool("spot", False, "Cheap, and taken away at any time.")
_RESERVED = flags.DEFINE_bool("reserved", False, "From a reservation of the project.")
_ON_DEMAND = flags.DEFINE_bool("on_demand", False, "Neither; the default.")
_RUNTIME = flags.DEFINE_string("runtime_version", None, "gcloud's; by default the slice's usual.")
_BUCKET = flags.DEFINE_string("bucket", None, "gs:// path for a workdir and compiled programs.")
_COPY = flags.DEFINE_list("copy", [], "Files and folders that the hosts get besides the code.")
_LOGS = flags.DEFINE_string("logs", None, "Folder for every host's log; runs/launch/NAME.")
_KEEP = flags.DEFINE_bool("keep", False, "Leave the slice there at the end.")
_RESTARTS = flags.DEFINE_integer("max_restarts", 20, "After preemptions and lost connections.")
_WAIT = flags.DEFINE_integer("wait_minutes", 24 * 60, "For the slice, before giving up.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the commands that it would run.")


def _request(command):
  from align_jax.launch import request

  return request.request(
    _TPU.value, _ZONE.value, command, slices=_SLICES.value, name=_NAME.value,
    tier=request.tier(_ON_DEMAND.value, _SPOT.value, _RESERVED.value), project=_PROJECT.value,
    runtime_version=_RUNTIME.value, bucket=_BUCKET.value, copy=_COPY.value, logs=_LOGS.value,
    keep=_KEEP.value, max_restarts=_RESTARTS.value, wait_minutes=_WAIT.value,
  )  # fmt: skip


def main(argv):
  from align_jax.launch import commands, controller, runner

  try:
    request = _request(argv[1:])
  except InputError as error:
    return _failed(error)
  try:
    if _DRY_RUN.value:
      for why, words in commands.plan(request):
        print(f"# {why}\n{shlex.join(words)}")
      return 0
    return controller.Launch(request).start()
  except InputError as error:
    return _failed(error)
  except KeyboardInterrupt:
    print(f"\n{controller.left_behind(request)}", file=sys.stderr)
    if sys.stdin.isatty() and input("Delete it now? [y/N] ").strip().lower() == "y":
      return runner.run(commands.delete(request), print).status
    return 130


def _failed(error):
  print(f"error: {error}", file=sys.stderr)
  return 2


def _parsed(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(_failed(error))


if __name__ == "__main__":
  app.run(main, flags_parser=_parsed)
