"""One host of several on this machine: runs phases by their settings; and what starts all of them.

python host.py jobs.json <index> <count> <port> <devices of this host>
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 1800  # a machine that others work on too takes long; what hangs ends here


def job(phase: str, config: dict, folder, *, stop: int | None = None) -> dict:
  """A run of `sft`, `preference`, `reward` or `online`; SIGTERM reaches the last host at step `stop`."""
  return {"phase": phase, "config": config, "folder": str(folder), "stop": stop}


def run_job(work: dict, devices) -> int:
  """The run's exit status."""
  from align_jax import config as config_lib
  from align_jax.phases import online, preference, reward, sft

  module, cls = {
    "sft": (sft, sft.SftConfig),
    "preference": (preference, preference.PreferenceConfig),
    "reward": (reward, reward.RewardConfig),
    "online": (online, online.OnlineConfig),
  }[work["phase"]]
  with _notice(work["stop"]):
    try:
      module.run(config_lib.build(cls, work["config"]), work["folder"], devices)
    except SystemExit as end:
      return end.code
  return 0


@contextlib.contextmanager
def _notice(step: int | None):
  """Sends SIGTERM to this process, the last of all hosts, when it has read the metrics of `step`."""
  import jax

  from align_jax.training import metrics

  write = metrics.MetricsWriter.write

  def watched(writer, at, values):
    write(writer, at, values)
    if at == step and "loss" in values and jax.process_index() == jax.process_count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)

  metrics.MetricsWriter.write = watched
  try:
    yield
  finally:
    metrics.MetricsWriter.write = write


def run_hosts(jobs: list[dict], folder, *, count: int, devices: int) -> list[list[int]]:
  """The statuses of all jobs on every one of `count` hosts with as many devices each."""
  file = pathlib.Path(folder) / f"jobs-{count}x{devices}-{len(jobs)}.json"
  file.write_text(json.dumps(jobs))
  command = [sys.executable, __file__, str(file)]
  last = [str(count), str(free_port()), str(devices)]
  statuses = []
  for status, out, errors in ended([open_process([*command, str(i), *last]) for i in range(count)]):
    assert status == 0, f"status {status}: {errors[-4000:]}"
    statuses.append(json.loads(out.splitlines()[-1]))
  return statuses


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def open_process(command: list[str], **environment: str) -> subprocess.Popen:
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """(status, stdout, stderr) of processes that run side by side; none outlives this call."""
  try:
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as readers:
      texts = list(readers.map(lambda process: process.communicate(timeout=SECONDS), processes))
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *text) for process, text in zip(processes, texts)]


def main(file: str, index: int, count: int, port: str, devices: int) -> None:
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_default_matmul_precision", "highest")
  jax.config.update("jax_disable_most_optimizations", True)  # hosts on one machine compile in turn
  if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
  jobs = json.loads(pathlib.Path(file).read_text())
  print(json.dumps([run_job(work, jax.devices()) for work in jobs]), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5]))
