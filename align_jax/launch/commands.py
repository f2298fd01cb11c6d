"""What gcloud is asked, as lists of words; pure functions of the request."""

import shlex

from align_jax.launch.request import Request

_TPUS = ("gcloud", "compute", "tpus")
_FOLDER = "align_jax"  # on a host, in its home
ARCHIVE = "code.tar.gz"

# The hosts' own Python is older than ours; `uv` brings one.  Ubuntu 24.04 wants to be told that it may.
_SETUP = " && ".join(
  (
    f"mkdir -p {_FOLDER}",
    f"tar -xzf {ARCHIVE} -C {_FOLDER}",
    f"cd {_FOLDER}",
    "{ python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install -q --user uv"
    " || python3 -m pip install -q --user --break-system-packages uv; }",
    "{ test -x .venv/bin/python || python3 -m uv venv -q --python=3.12 .venv; }",
    "python3 -m uv pip install -q --python=.venv/bin/python --editable '.[tpu]'",
  )
)


def create(request: Request) -> list[str]:
  """Several slices of one queued resource find each other by themselves (MEGASCALE_*, set by it)."""
  words = [*_TPUS, "queued-resources", "create", request.name]
  if request.slice.slices == 1:
    words.append(f"--node-id={request.name}")
  else:
    words += [f"--node-count={request.slice.slices}", f"--node-prefix={request.name}"]
  if request.slice.shape == request.slice.generation.shape(request.slice.chips):
    words.append(f"--accelerator-type={request.slice.accelerator_type}")
  else:
    words += [f"--type={request.slice.generation.name}", f"--topology={request.slice.topology}"]
  words.append(f"--runtime-version={request.runtime_version}")
  if request.tier != "on_demand":
    words.append(f"--{request.tier}")
  return words + _where(request) + ["--quiet"]


def describe(request: Request) -> list[str]:
  return [
    *_TPUS, "queued-resources", "describe", request.name, *_where(request), "--format=json",
  ]  # fmt: skip


def describe_node(request: Request, node: int) -> list[str]:
  """Prints READY of a slice that works, PREEMPTED of one that was taken away."""
  return [
    *_TPUS, "tpu-vm", "describe", request.nodes[node], *_where(request), "--format=value(state)",
  ]  # fmt: skip


def delete(request: Request) -> list[str]:
  return [
    *_TPUS, "queued-resources", "delete", request.name, *_where(request), "--force", "--quiet",
  ]  # fmt: skip


def pack(request: Request) -> list[str]:
  return [
    "tar", "--exclude=__pycache__", "-czf", f"{request.logs}/{ARCHIVE}", *request.copied,
  ]  # fmt: skip


def copy(request: Request, node: int) -> list[str]:
  return [
    *_TPUS, "tpu-vm", "scp", f"{request.logs}/{ARCHIVE}", f"{request.nodes[node]}:{ARCHIVE}",
    "--worker=all", *_where(request),
  ]  # fmt: skip


def setup(request: Request, node: int) -> list[str]:
  return _ssh(request, node, _SETUP)


def job(request: Request, node: int) -> list[str]:
  """Runs the command under `align_jax.launch.worker` on every host of one slice."""
  words = [".venv/bin/python", "-m", "align_jax.launch.worker", f"--slice={node}"]
  if request.bucket:
    words.append(f"--env=JAX_COMPILATION_CACHE_DIR={request.bucket}/compiled")
  if request.mirror:
    words += ["--mirror", *request.mirror]
  remote = shlex.join([*words, "--", *request.command])
  return _ssh(request, node, f"cd {_FOLDER} && {remote}")


def plan(request: Request) -> list[tuple[str, list[str]]]:
  """What a launch that meets no trouble runs, each with why; the slices of a step run at once."""
  nodes = range(len(request.nodes))
  again = "again and again, until its state is ACTIVE"
  hosts = f"{request.slice.hosts} host{'s' if request.slice.hosts > 1 else ''}"
  return [
    ("is it there already?", describe(request)),
    ("if not:", create(request)),
    (again, describe(request)),
    ("a folder for the logs", ["mkdir", "-p", request.logs]),
    ("the working tree, once", pack(request)),
    *((f"to the {hosts} of {request.nodes[n]}", copy(request, n)) for n in nodes),
    *((f"installed on {request.nodes[n]}", setup(request, n)) for n in nodes),
    *(
      (f"the command on {request.nodes[n]}; after status 75 again", job(request, n)) for n in nodes
    ),
    ("if the command fails: is the slice still there?", describe(request)),
    *(("and healthy? if not: delete, create, go on", describe_node(request, n)) for n in nodes),
    *([] if request.keep else [("at the end", delete(request))]),
  ]


def _ssh(request: Request, node: int, command: str) -> list[str]:
  return [
    *_TPUS, "tpu-vm", "ssh", request.nodes[node], "--worker=all", *_where(request),
    f"--command={command}",
  ]  # fmt: skip


def _where(request: Request) -> list[str]:
  return [f"--zone={request.zone}", *([f"--project={request.project}"] if request.project else [])]
