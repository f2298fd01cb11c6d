"""A process that has imported everything and started nothing: it forks one child for every run.

Reads tasks as JSON lines on stdin; answers {"pid"} when a child has begun and {"status"} when it is
dead.  So a run that is to be killed costs no start of Python, and ends as a real process does.
"""

import json
import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time
import traceback

os.environ.update(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="2")

import jax

from align_jax import app
from align_jax import config as config_lib
from align_jax.phases import online, preference, reward, rollout_log, sft
from align_jax.training import checkpoints, loop, metrics, workdir

PHASES = {
  "sft": (sft.run, sft.SftConfig),
  "reward": (reward.run, reward.RewardConfig),
  "dpo": (preference.run, preference.PreferenceConfig),
  "ppo": (online.run, online.OnlineConfig),
}
CRASHED = 70


class Bomb:
  """Sends this process signals at the `count`-th passage, `delay` seconds later; or fills its disk."""

  def __init__(self, count: int, delay: float = 0.0, signals=("SIGKILL",), disk: int = 0):
    self.count, self.delay, self.disk = count, delay, disk
    self.signals = [signal.Signals[name] for name in signals]

  def __call__(self):
    self.count -= 1
    if self.count == 0:
      if self.delay:
        threading.Timer(self.delay, self.explode).start()
      else:
        self.explode()

  def explode(self):
    if self.disk:  # no file may grow beyond so many bytes
      resource.setrlimit(resource.RLIMIT_FSIZE, (self.disk, resource.RLIM_INFINITY))
      return
    for number in self.signals:
      os.kill(os.getpid(), number)
    if signal.SIGKILL in self.signals:
      time.sleep(60)  # a signal is not always there at once, and nothing more may happen


def wrap(owner, name, *, before=None, after=None):
  original = getattr(owner, name)

  def wrapped(*args, **named):
    if before:
      before()
    result = original(*args, **named)
    if after:
      after()
    return result

  setattr(owner, name, wrapped)


class _Batches:
  """The batches of a run, with a bomb between them."""

  def __init__(self, batches, bomb):
    self._batches, self._bomb = batches, bomb
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __getattr__(self, name):
    return getattr(self._batches, name)

  def __next__(self):
    batch = next(self._batches)
    self._bomb()
    return batch


def torn_lines(owner, name, bomb):
  """Half a line reaches the disk."""

  def write(self, step, *args, **named):
    bomb.count -= 1
    if bomb.count == 0:
      file = pathlib.Path(getattr(self._file, "name", ""))
      file = file if file.is_absolute() else self._file
      with file.open("a") as handle:
        handle.write(f'{{"step": {step}, "lo')
      bomb.explode()
    return original(self, step, *args, **named)

  original = getattr(owner, name)
  setattr(owner, name, write)


def plant(site: str, **bomb):
  """Puts the bomb where it belongs."""
  bomb = Bomb(**bomb)
  if site == "start":
    wrap(checkpoints.Checkpoints, "restore", after=bomb)
  elif site == "before save":
    wrap(checkpoints.Checkpoints, "save", before=bomb)
  elif site == "save":
    wrap(checkpoints.Checkpoints, "save", after=bomb)
  elif site == "end":
    wrap(workdir, "write_lineage", before=bomb)
  elif site == "line":
    torn_lines(metrics.MetricsWriter, "write", bomb)
  elif site == "rollout":
    torn_lines(rollout_log.RolloutLog, "write", bomb)
  elif site in ("data", "step"):
    fit = loop.fit

    def planted(state, *, step, batches, **named):
      def one(*args):
        result = step(*args)
        bomb()
        return result

      if site == "data":
        return fit(state, step=step, batches=_Batches(batches, bomb), **named)
      return fit(state, step=one, batches=batches, **named)

    loop.fit = planted
  else:
    raise ValueError(site)


def run(task: dict) -> int:
  """One attempt in this process; returns its exit status."""
  jax.config.update("jax_compilation_cache_dir", task["cache"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if task.get("bomb"):
    plant(**task["bomb"])
  phase, cls = PHASES[task["phase"]]
  config = config_lib.build(cls, task["config"])
  return app.status_of(lambda: phase(config, task["workdir"], jax.devices()[:1])) or 0


def child(task: dict):
  with open(task["log"], "a") as log:
    for descriptor in (1, 2):
      os.dup2(log.fileno(), descriptor)
  random.seed(0)
  status = CRASHED
  try:
    status = run(task)
  except SystemExit as stop:
    status = stop.code
  except BaseException:
    traceback.print_exc()
  sys.stdout.flush(), sys.stderr.flush()
  os._exit(status)


def main():
  for line in sys.stdin:
    pid = os.fork()
    if not pid:
      child(json.loads(line))
    print(json.dumps({"pid": pid}), flush=True)
    status = os.waitpid(pid, 0)[1]
    print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
  main()
