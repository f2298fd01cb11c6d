"""A stand-in for gcloud: queued resources that live by a script, and hosts that end as they are told."""

import json
import shlex
import threading

from align_jax.launch.runner import Result


class FakeGcloud:
  """`jobs`: one entry a run of the command, {(slice, host): status}, "lost" or "preempted" inside it.

  `answers`: what the next `create` meets: None (it works), or (status, text of gcloud).
  `states`: what a slice goes through before it is ACTIVE.
  """

  def __init__(self, hosts, jobs, *, answers=(), states=("WAITING_FOR_RESOURCES", "PROVISIONING")):
    self.hosts, self.jobs, self.answers = hosts, list(jobs), list(answers)
    self.states, self.state, self.node_state = tuple(states), None, "READY"
    self.pending, self.calls, self.time = [], [], 0.0
    self.accelerator = "v5p-16"
    self.error = "out of it"
    self._lock, self._ran = threading.Lock(), 0

  def sleep(self, seconds):
    self.time += seconds

  def clock(self):
    return self.time

  def verbs(self):
    """create, wait..., in order and without repeats that follow each other."""
    names = []
    for words in self.calls:
      name = words[0] if words[0] != "gcloud" else words[4]
      names += [name] if not names or names[-1] != name else []
    return names

  def __call__(self, words, on_line=None):
    with self._lock:
      self.calls.append(list(words))
      if words[0] != "gcloud":
        return Result(0, "")
      return getattr(self, words[3].replace("-", "_"))(words[4], words, on_line)

  def queued_resources(self, verb, words, on_line):
    if verb == "create":
      answer = self.answers.pop(0) if self.answers else None
      if answer is not None:
        return Result(*answer)
      self.state, self.pending, self.node_state = "CREATING", list(self.states), "READY"
      return Result(0, "Create request issued\n")
    if self.state is None:
      return Result(1, "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/q' was not found\n")
    if verb == "delete":
      self.state = None
      return Result(0, "")
    nodes = [{"node": {"acceleratorType": self.accelerator}}]
    about = {"state": {"state": self.state}, "tpu": {"nodeSpec": nodes}}
    if self.state == "FAILED":
      about["state"]["failedData"] = {"error": {"message": self.error}}
    if self.state not in ("ACTIVE", "FAILED", "SUSPENDED"):
      self.state = self.pending.pop(0) if self.pending else "ACTIVE"
    return Result(0, "Using default project\n" + json.dumps(about))

  def tpu_vm(self, verb, words, on_line):
    if verb == "describe":
      return Result(0, self.node_state + "\n")
    command = next((w for w in words if w.startswith("--command=")), "")
    if "launch.worker" not in command:
      return Result(0, "SSH: Attempting to connect to worker 0...\n")
    number = int(next(w for w in shlex.split(command) if w.startswith("--slice="))[8:])
    return self._job(number, on_line)

  def _job(self, number, on_line):
    slices = len({s for job in self.jobs for s, _ in job})
    ends = self.jobs[self._ran // slices]
    self._ran += 1
    worst = 0
    for host in range(self.hosts):
      status = ends[number, host]
      on_line(f"[{number}/{host}] step 1 of host {host}")
      if status == "preempted":
        self.state, self.node_state = "SUSPENDED", "PREEMPTED"
      if isinstance(status, str):
        on_line("client_loop: send disconnect: Broken pipe")
        worst = worst or 255
      else:
        on_line(f"[{number}/{host}] exit status {status}")
        worst = worst or status
    return Result(worst, "")
