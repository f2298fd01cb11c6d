"""When gcloud is asked what: from a request to a run that has ended, through preemptions.

    create → wait until ACTIVE → copy and install → run on every host
      status 0 → done          status 2, or any other with the slice healthy → failed, not repeated
      status 75, or a lost connection → run again, on a new slice if this one is gone

The job's command is the same every time: its workdir holds what it resumes from.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import shlex
import threading
import time
from collections.abc import Callable, Sequence

from align_jax.errors import InputError
from align_jax.launch import commands, worker
from align_jax.launch.request import Request
from align_jax.launch.runner import Result, Runner, run

BAD_INPUT, RESUME = 2, 75
WAITING = {"CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"}
POLL_SECONDS = 30
GRACE_SECONDS = 180  # until a preemption that the job has noticed is known to gcloud
LONG_RUN = 600  # seconds: trouble after that long is new trouble
_LINE = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_REASONS = (  # in gcloud's words -> in ours
  (r"has not been used|is disabled", "the Cloud TPU API is off: enable tpu.googleapis.com"),
  (r"quota|resource_?exhausted", "no quota: ask for it, or try another --zone or --spot"),
  (r"permission|forbidden|\b403\b", "not permitted: check the project and your roles in it"),
  (r"auth login|credential|unauthenticated|\b401\b", "not logged in: run `gcloud auth login`"),
  (r"stockout|capacity", "no capacity there: try another --zone"),
)


@dataclasses.dataclass(frozen=True)
class Attempt:
  """How one run of the command ended: gcloud's statuses, and those of the hosts that could say."""

  connections: tuple[int, ...]
  hosts: dict[tuple[int, int], int]
  seconds: float

  def outcome(self, hosts: int) -> str:
    """done, bad input, resume, failed (every host said so), or lost."""
    if not any(self.connections):
      return "done"
    statuses = set(self.hosts.values())
    if BAD_INPUT in statuses:
      return "bad input"
    if RESUME in statuses:
      return "resume"
    return "failed" if len(self.hosts) >= hosts and any(statuses) else "lost"


class Launch:
  """One launch; `run_command`, `say`, `sleep` and `clock` are all it knows of the world."""

  def __init__(
    self,
    request: Request,
    run_command: Runner = run,
    *,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.request, self._run, self._say = request, run_command, say
    self._sleep, self._clock = sleep, clock
    self._logs, self._lock = pathlib.Path(request.logs), threading.Lock()
    self._there = False  # there may be something to delete

  def start(self) -> int:
    """The job's status, 0 or what it failed with; RESUME if it was cut off too often.

    InputError if gcloud refuses the slice.  Ctrl-C leaves the slice and the job; everything else
    deletes the slice, unless the request keeps it.
    """
    self._logs.mkdir(parents=True, exist_ok=True)
    try:
      status = self._until_done()
    except InputError:
      if self._there:
        self._end()
      raise
    self._end()
    return status

  def _until_done(self) -> int:
    restarts = quick = 0
    ready = False  # the code is on the hosts
    while True:
      ready = ready or self._provided(again=restarts > 0)
      attempt = self._attempt() if ready else Attempt((255,), {}, 0.0)
      outcome = attempt.outcome(self.request.slice.slices * self.request.slice.hosts)
      if outcome == "done":
        return 0
      if outcome == "bad input" or (outcome == "failed" and self._healthy(GRACE_SECONDS)):
        return self._failed(attempt)
      ready = ready and self._healthy(0 if outcome == "resume" else GRACE_SECONDS)
      if restarts >= self.request.max_restarts:
        self._say(f"given up after {restarts} restarts; the run can be resumed")
        return RESUME
      quick = 0 if attempt.seconds > LONG_RUN else quick + 1
      restarts += 1
      pause = 0 if quick < 2 else min(30 * 2 ** (quick - 2), 600)
      where = "on the same slice" if ready else "on a new slice"
      self._say(f"cut off ({outcome}); restart {restarts} {where} in {pause} s")
      self._sleep(pause)

  def _provided(self, again: bool) -> bool:
    """Whether the slice is there with the code; what would refuse a launch only delays one that ran."""
    try:
      self._provide(again)
      return self._prepare()
    except InputError as error:
      if not again:
        raise
      self._say(str(error))
      return False

  def _provide(self, again: bool) -> None:
    """Waits until the slice is there, asking for it if it is not; raises InputError if refused."""
    state, about = self._state()
    if state in WAITING | {"ACTIVE"} and not (again and state == "ACTIVE" and not self._healthy()):
      self._same_slice(about)
      self._say(f"{self.request.name} is there already ({state})")
      self._there = True
    else:
      if state is not None:
        self._must(commands.delete(self.request))
      self._must(commands.create(self.request))
      self._there = True
    deadline = self._clock() + 60 * self.request.wait_minutes
    said = None
    while True:
      state, about = self._state()
      if state == "ACTIVE":
        return
      if state not in WAITING:
        raise InputError(f"{self.request.name}: {state or 'gone'} before it began: {_why(about)}")
      if self._clock() > deadline:
        what = f"no {self.request.slice.name} in {self.request.zone}"
        raise InputError(f"{what} within {self.request.wait_minutes} minutes ({state})")
      if state != said:
        self._say(f"{self.request.name}: {state}")
        said = state
      self._sleep(POLL_SECONDS)

  def _same_slice(self, about: dict) -> None:
    nodes = about.get("tpu", {}).get("nodeSpec", [])
    types = {n.get("node", {}).get("acceleratorType") for n in nodes} - {None}
    wanted = self.request.slice.accelerator_type
    if types - {wanted}:
      raise InputError(
        f"{self.request.name} is there already, as {', '.join(sorted(types))} and not {wanted};"
        f" choose another --name, or delete it: {shlex.join(commands.delete(self.request))}"
      )

  def _prepare(self) -> bool:
    """Code on every host; False if the slice cannot be reached, InputError if it does not install."""
    self._must(commands.pack(self.request))
    for make in (commands.copy, commands.setup):
      results = self._everywhere(make)
      bad = next((r for r in results if r.status), None)
      if bad is not None and not self._healthy(GRACE_SECONDS):
        return False
      if bad is not None:
        raise InputError(f"the hosts could not be prepared: {_last_line(bad.output)}")
    return True

  def _attempt(self) -> Attempt:
    began, hosts = self._clock(), {}
    results = self._everywhere(commands.job, lambda line: self._heard(line, hosts))
    return Attempt(tuple(r.status for r in results), hosts, self._clock() - began)

  def _heard(self, line: str, hosts: dict[tuple[int, int], int]) -> None:
    """Into the log of the host that spoke; the first host's is also shown."""
    found = _LINE.fullmatch(line)
    name = f"slice_{found[1]}_host_{found[2]}.log" if found else "gcloud.log"
    text = found[3] if found else line
    with self._lock:
      with (self._logs / name).open("a") as log:
        log.write(text + "\n")
      if found and text.startswith(worker.STATUS):
        hosts[int(found[1]), int(found[2])] = int(text.removeprefix(worker.STATUS))
      elif found and found[1] == found[2] == "0":
        self._say(text)

  def _failed(self, attempt: Attempt) -> int:
    (slice_, host), status = min((k, s) for k, s in attempt.hosts.items() if s)
    worst = BAD_INPUT if BAD_INPUT in attempt.hosts.values() else status
    slice_, host = next(k for k, s in sorted(attempt.hosts.items()) if s == worst)
    log = self._logs / f"slice_{slice_}_host_{host}.log"
    self._say(f"the command failed with status {worst} and is not repeated; the end of {log}:")
    for line in log.read_text().splitlines()[-20:]:
      self._say(f"  {line}")
    return worst

  def _healthy(self, patience: float = 0) -> bool:
    """Whether every slice still works; `patience` seconds must pass before that is believed."""
    deadline = self._clock() + patience
    while True:
      if self._state()[0] != "ACTIVE":
        return False
      nodes = range(len(self.request.nodes))
      states = [self._run(commands.describe_node(self.request, n), None) for n in nodes]
      if any(r.status or not r.output.strip().endswith("READY") for r in states):
        return False
      if self._clock() >= deadline:
        return True
      self._sleep(POLL_SECONDS)

  def _state(self) -> tuple[str | None, dict]:
    """The queued resource's state and all that is known of it; None if there is none."""
    result = self._run(commands.describe(self.request), None)
    if result.status:
      if re.search(r"not.?found|404", result.output, re.IGNORECASE):
        return None, {}
      raise _refusal(commands.describe(self.request), result)
    begin = result.output.find("{")
    try:
      about = json.loads(result.output[max(begin, 0) :])
      return about["state"]["state"], about
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(f"gcloud's answer is not understood: {_last_line(result.output)}") from error

  def _everywhere(self, make, on_line=None) -> list[Result]:
    """The same of every slice, at once: their hosts wait for each other."""
    nodes = range(len(self.request.nodes))
    with concurrent.futures.ThreadPoolExecutor(len(nodes)) as pool:
      listen = on_line or (lambda line: self._heard(line, {}))
      return list(pool.map(lambda n: self._run(make(self.request, n), listen), nodes))

  def _must(self, words: Sequence[str]) -> None:
    result = self._run(words, None)
    if result.status:
      raise _refusal(words, result)

  def _end(self) -> None:
    if self.request.keep:
      self._say(f"kept; to delete it: {shlex.join(commands.delete(self.request))}")
    elif self._run(commands.delete(self.request), None).status:
      self._say(f"could not be deleted; do it: {shlex.join(commands.delete(self.request))}")


def left_behind(request: Request) -> str:
  """What an interrupted launch leaves, and how to be rid of it."""
  return (
    f"interrupted: {request.name} is still there and is paid for, and the job on it goes on.\n"
    "The same launch takes both up again.  To delete both:\n"
    f"  {shlex.join(commands.delete(request))}"
  )


def _refusal(words: Sequence[str], result: Result) -> InputError:
  last = _last_line(result.output)
  for pattern, meaning in _REASONS:
    if words[0] == "gcloud" and re.search(pattern, result.output, re.IGNORECASE):
      return InputError(f"{meaning} (gcloud: {last})")
  return InputError(f"{shlex.join(words[:5])} ended with status {result.status}: {last}")


def _last_line(output: str) -> str:
  lines = [line.strip() for line in output.splitlines() if line.strip()]
  return lines[-1] if lines else "no output"


def _why(about: dict) -> str:
  state = about.get("state", {})
  errors = [d["error"] for d in state.values() if isinstance(d, dict) and "error" in d]
  return errors[0].get("message", str(errors[0])) if errors else "no reason given"
