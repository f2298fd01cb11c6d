"""What is asked of `experiments.launch`, checked before anything is paid for."""

import dataclasses
import difflib
import pathlib
import re

from align_jax.errors import InputError
from align_jax.scale import tpus

CODE = (
  "setup.py",
  "README.md",
  "LICENSE",
  "align_jax",
  "experiments",
  "configs",
)  # what a host gets
TRAINING = ("sft", "reward", "preference", "ppo")  # what writes checkpoints of its own
TIERS = ("on_demand", "spot", "reserved")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")


@dataclasses.dataclass(frozen=True)
class Request:
  """One launch.  `name` is that of the queued resource: the same name takes the same slice up again."""

  slice: tpus.Slice
  zone: str
  command: tuple[str, ...]  # as it runs on every host
  name: str
  logs: str  # folder on this machine
  tier: str = "on_demand"
  project: str | None = None
  runtime_version: str = ""
  bucket: str | None = None
  mirror: tuple[str, str] | None = None  # (workdir on a host, where it lies in a bucket)
  keep: bool = False
  max_restarts: int = 20
  wait_minutes: int = 24 * 60  # for the slice
  copied: tuple[str, ...] = CODE

  @property
  def nodes(self) -> tuple[str, ...]:
    """gcloud's name of each slice."""
    if self.slice.slices == 1:
      return (self.name,)
    return tuple(f"{self.name}-{i}" for i in range(self.slice.slices))


def request(
  tpu: str,
  zone: str | None,
  command: list[str],
  *,
  slices: int | None = None,
  name: str | None = None,
  tier: str = "on_demand",
  project: str | None = None,
  runtime_version: str | None = None,
  bucket: str | None = None,
  copy: list[str] | None = None,
  logs: str | None = None,
  keep: bool = False,
  max_restarts: int = 20,
  wait_minutes: int = 24 * 60,
  root: str = ".",
) -> Request:
  """A `Request`; raises InputError on a slice, name or command that cannot work.

  copy: files and folders of `root` that the hosts get besides the code.
  """
  slice_ = _slice(tpu, slices)
  runtime = runtime_version or slice_.generation.runtime_version
  if not runtime:
    raise InputError(
      f"--tpu={tpu}: {slice_.generation.name} cannot be had as a queued resource, only through"
      " Google Kubernetes Engine; `experiments.compile` knows it"
    )
  if not zone or not _ZONE.fullmatch(zone):
    raise InputError(f"--zone must be a zone such as us-east5-a, not {zone!r}")
  if bucket is not None and not re.fullmatch(r"gs://[^/]+(/.*)?", bucket):
    raise InputError(f"--bucket must be a gs:// path, not {bucket!r}")
  if max_restarts < 0 or wait_minutes < 1:
    raise InputError("--max_restarts must be at least 0 and --wait_minutes at least 1")
  folder = pathlib.Path(root)
  copied = CODE + tuple(copy or ())
  for path in copied:
    if not (folder / path).exists():
      raise InputError(f"{path} is not in {folder.resolve()}: launch from the project's own folder")
  module = _module(command, folder)
  name = name or f"align-{module or 'job'}-{slice_.name}"
  if not _NAME.fullmatch(name):
    raise InputError(f"--name must be lower-case letters, digits and dashes, not {name!r}")
  _no_local_paths(command, folder, copied)
  mirror = None
  if module:
    command, mirror = _started_everywhere(module, command, bucket, name)
  return Request(
    slice_,
    zone,
    tuple(command),
    name,
    logs=logs or f"runs/launch/{name}",
    tier=tier,
    project=project,
    runtime_version=runtime,
    bucket=bucket and bucket.rstrip("/"),
    mirror=mirror,
    keep=keep,
    max_restarts=max_restarts,
    wait_minutes=wait_minutes,
    copied=copied,
  )


def tier(on_demand: bool, spot: bool, reserved: bool) -> str:
  """The one that was asked for; raises InputError if several were."""
  asked = [name for name, given in zip(TIERS, (on_demand, spot, reserved)) if given]
  if len(asked) > 1:
    raise InputError(f"--{' and --'.join(asked)} exclude each other")
  return asked[0] if asked else TIERS[0]


def _slice(tpu: str, slices: int | None) -> tpus.Slice:
  slice_ = tpus.parse(tpu)
  if slices is None or slices == slice_.slices:
    return slice_
  if slice_.slices > 1:
    raise InputError(f"--tpu={tpu} and --slices={slices} disagree")
  return tpus.parse(f"{slices}x{tpu}")


def _module(command: list[str], root: pathlib.Path) -> str | None:
  """`sft` of `python -m experiments.sft ...`; None of a command that is none of this project's."""
  if not command:
    raise InputError(
      "nothing to run: write the command after --, as in -- python -m experiments.sft"
    )
  if command[0].startswith("-"):
    raise InputError(f"the command after -- begins with {command[0]!r}, which is no program")
  if len(command) < 3 or command[1] != "-m" or not command[2].startswith("experiments."):
    return None
  module = command[2].removeprefix("experiments.")
  known = sorted(f.stem for f in (root / "experiments").glob("[a-z]*.py") if f.stem != "launch")
  if module not in known:
    near = difflib.get_close_matches(module, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    raise InputError(f"experiments.{module} is not a command that can be launched; {hint}")
  return module


def _started_everywhere(module: str, command: list[str], bucket: str | None, name: str):
  """(command, mirror): with --distributed, and a workdir that outlives the slice.

  A workdir is a folder of the file system: a host's is kept the same as that in the bucket, and
  checkpoints, which all hosts write together, go into the bucket at once.
  """
  workdir = _flag(command, "workdir")
  if workdir is None and bucket:
    workdir = f"{bucket.rstrip('/')}/{name}"
  elif workdir is None:
    raise InputError("the command needs --workdir=gs://..., or the launch --bucket=gs://...")
  elif not workdir.startswith("gs://"):
    raise InputError(
      f"--workdir={workdir}: a host's disk is lost with its slice, so it must be a gs:// path"
    )
  workdir = workdir.rstrip("/")
  local = f"work/{workdir.rpartition('/')[2]}"
  kept, taken = [], False
  for word in command:
    if not taken and not word.startswith("--workdir="):
      kept += [] if word == "--workdir" else [word]
    taken = word == "--workdir"
  kept.append(f"--workdir={local}")
  if module in TRAINING and _flag(command, "config.loop.checkpoints") is None:
    kept.append(f"--config.loop.checkpoints={workdir}/checkpoints")
  return [w for w in kept if w != "--distributed"] + ["--distributed"], (local, workdir)


def _flag(command: list[str], name: str) -> str | None:
  for word, following in zip(command, [*command[1:], None]):
    if word.startswith(f"--{name}="):
      return word.partition("=")[2]
    if word == f"--{name}":
      return following
  return None


def _no_local_paths(command: list[str], root: pathlib.Path, copied: tuple[str, ...]) -> None:
  """A path of this machine in a setting would be missed on the hosts, minutes later."""
  for word in command:
    value = word.partition("=")[2].split(":")[0]
    if not word.startswith("--") or not value or "\0" in value:
      continue
    path = pathlib.Path(value)
    there = any(path == pathlib.Path(c) or pathlib.Path(c) in path.parents for c in copied)
    if not there and len(value) < 1000 and (root / path).exists():
      raise InputError(
        f"{word}: {value} is on this machine only; put it in a bucket, or name it in --copy={value}"
      )
