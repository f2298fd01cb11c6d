"""Several processes of one run: flags that join them, and an end that leaves no one waiting.

Before a process joins it says so; it gives up after 5 minutes without the others (JAX ends it then,
status 134). A process that dies is missed after 100 seconds without a heartbeat, the first one, which
keeps the list of the others, at once: JAX then ends all that are left.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable

from absl import flags

from align_jax.errors import InputError

JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 100
GRACE_SECONDS = 5  # for which the first process outlives its own failure

DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other hosts of this Cloud TPU slice, Slurm or Open MPI job."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0: join the processes that name the same."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of --processes this one is, from 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes take part in this run.")


def join() -> None:
  """Joins the processes that the flags name, if any; nothing may have asked JAX for devices before.

  Raises InputError where the flags are incomplete, or the environment says nothing of other hosts.
  """
  where = explicit(COORDINATOR.value, PROCESS_ID.value, PROCESSES.value)
  if not (where or DISTRIBUTED.value):
    return
  import jax

  # By itself JAX would catch SIGTERM from here on, and a process that loads or compiles would not end.
  jax.config.update("jax_enable_preemption_service", False)
  if where:
    place = "joining {coordinator_address} as process {process_id} of {num_processes}"
    print(
      f"== {place.format(**where)}; giving up after {JOIN_SECONDS} s", file=sys.stderr, flush=True
    )
  try:
    jax.distributed.initialize(
      **where, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except ValueError as error:
    raise InputError(
      f"--distributed: there is no Cloud TPU slice, Slurm or Open MPI job here to join ({error}); name "
      "the processes by --coordinator=host:port --process_id=i --processes=n"
    ) from error


def explicit(coordinator: str | None, process_id: int | None, processes: int | None) -> dict:
  """The arguments of `jax.distributed.initialize`, none without flags; InputError on half of them."""
  given = {"coordinator": coordinator, "process_id": process_id, "processes": processes}
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return {}
  if missing:
    raise InputError(
      f"--coordinator, --process_id and --processes go together: give {' and '.join(missing)} too"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise InputError(f"--coordinator must be host:port of process 0, not {coordinator!r}")
  if processes < 1:
    raise InputError(f"--processes must be at least 1, not {processes}")
  if not 0 <= process_id < processes:
    raise InputError(
      f"--process_id must lie between 0 and {processes - 1} with --processes={processes}, not "
      f"{process_id}"
    )
  names = ("coordinator_address", "process_id", "num_processes")
  return dict(zip(names, (coordinator, process_id, processes)))


def ending_together(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int | None]:
  """`main(argv)`, which one of several processes leaves at once when it fails.

  By itself it would say goodbye to the others and wait up to five minutes for their answer, while they
  wait for its part of a step. One that ends well does say goodbye: the last may still write.
  """

  def run(argv: list[str]) -> int | None:
    try:
      status = main(argv)
    except SystemExit as end:
      if not _several():
        raise
      status = end.code
    except BaseException:
      if not _several():
        raise
      traceback.print_exc()
      status = 1
    if status and _several():
      _leave(status)
    return status

  return run


def _several() -> bool:
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def _leave(status: int | str) -> None:
  """Ends this process without a goodbye; the first one, if it is the first, ends all others."""
  if isinstance(status, str):
    print(status, file=sys.stderr)
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  if PROCESS_ID.value in (0, None):  # the others may fail too, and have more to say
    time.sleep(GRACE_SECONDS)
  os._exit(status)
