"""The thin layer under every command: flags in, a sentence and an exit status out."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from align_jax import config as config_lib
from align_jax import distributed
from align_jax.errors import InputError

INPUT_ERROR_STATUS = 2
NOT_FINITE_STATUS = 1
INTERRUPTED_STATUS = 130  # as a shell says of Ctrl-C
RESUME_STATUS = 75  # EX_TEMPFAIL, as in `training.loop`


def define_config(config_file: str):
  """Defines --config, a Python file whose settings --config.x=y overrides."""
  with _sentences():
    return config_flags.DEFINE_config_file(
      "config", config_file, "Settings: a file with get_config(); --config.a.b=c overrides one."
    )


def define(config_file: str):
  """Defines --config and --workdir; returns both holders."""
  config = define_config(config_file)
  workdir = flags.DEFINE_string("workdir", None, "Folder of this run.", required=True)
  return config, workdir


def settings(holder, cls):
  """The parsed --config as the phase's dataclass; raises InputError on anything it does not know."""
  return config_lib.build(cls, values(holder))


def values(holder) -> dict:
  """The parsed --config as nested dictionaries; a file that cannot be read is said here."""
  with _sentences():
    return holder.value.to_dict()


def devices():
  """All devices of this run.  Called by mains only: no library code asks for devices."""
  import jax

  return jax.devices()


def run(main: Callable[[], int | None]) -> None:
  """Runs `main()` behind absl's flags, to an exit status as `status_of` says."""

  use_huge_pages()

  def guarded(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are given as --config.a.b=c")
    prepare()

    def joined():
      distributed.join()
      return main()

    return status_of(joined)

  app.run(distributed.ending_together(guarded), flags_parser=_parse_flags)


def status_of(main: Callable[[], int | None]) -> int | None:
  """Runs `main()`: what a person can act on becomes one sentence on stderr, and an exit status.

  2: an InputError.  1: numbers that are not finite.  75: SIGTERM, "resume me", from the start to the
  end.  130: a second Ctrl-C; the first is SIGTERM to a run that trains.
  """
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(RESUME_STATUS))  # the loop has its own
  try:
    return main()
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return INPUT_ERROR_STATUS
  except FloatingPointError as error:
    print(f"error: {error}", file=sys.stderr)
    return NOT_FINITE_STATUS
  except KeyboardInterrupt:
    print("interrupted: what was not saved is lost", file=sys.stderr)
    return INTERRUPTED_STATUS


def _parse_flags(argv):
  with _sentences():
    return flags.FLAGS(argv)


@contextlib.contextmanager
def _sentences():
  """A mistake in a flag or a config override is a sentence, not a traceback."""
  try:
    yield
  except flags.Error as error:
    # ml_collections puts a traceback into the message; its last line says what happened.
    print(f"error: {str(error).strip().splitlines()[-1].strip()}", file=sys.stderr)
    sys.exit(INPUT_ERROR_STATUS)
  except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
    text = error.args[0] if isinstance(error, KeyError) else error
    print(f"error: --config: {' '.join(str(text).split())}", file=sys.stderr)
    sys.exit(INPUT_ERROR_STATUS)


def prepare() -> None:
  """Quiets libraries and turns on the persistent compilation cache, which saves most of a start.

  Every process of a run does this first.
  """
  logging.set_verbosity(logging.WARNING)
  set_environment()
  cache = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/align_jax/compiled")
  )
  import jax

  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def set_environment() -> None:
  """Turns off what makes others' code slower here; what the environment says already holds.

  The tokenizer's threads: a record is a text or two at a time, and they take longer than it does.
  YNN's sums, which jaxlib 0.10.2 takes on CPU: with XLA's own a training step is 6 to 10 % shorter.
  Other versions may not know the flag, which would end the process.
  """
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  import jaxlib

  given, flag = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_experimental_ynn_fusion_type"
  if flag not in given and jaxlib.__version__ == "0.10.2":
    os.environ["XLA_FLAGS"] = f"{given} {flag}=-LIBRARY_FUSION_TYPE_REDUCE".strip()


def use_huge_pages() -> None:
  """Starts this command again, once, where that gets it memory in huge pages (Linux).

  A step on CPU allocates its temporaries anew, gigabytes of them; in pages of 4 KiB that is 4 to 8 % of
  the time of a step of SmolLM2-135M. glibc asks for huge ones only where the environment says so when
  a process begins. Whatever the environment says of glibc already holds.
  """
  pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if "GLIBC_TUNABLES" in os.environ or not pages.exists() or "[madvise]" not in pages.read_text():
    return
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def coordinate() -> None:
  """Keeps this process, which only hands out work, off the accelerators: they are its workers'."""
  import jax

  jax.config.update("jax_platforms", "cpu")


def worker_devices(index: int, count: int):
  """Readies worker `index` of `count` on this machine and returns its share of the devices.

  Every worker has cores of its own: two that share them spend their time waiting for each other.
  With fewer devices than workers all of them share all devices.
  """
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if len(cores) >= count:
    os.sched_setaffinity(0, cores[index::count])
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  prepare()
  found = devices()
  return found[index::count] or found
