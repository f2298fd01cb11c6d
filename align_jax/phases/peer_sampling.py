"""Our side of sampling next to `transformers`: requests with prompts and lengths of real responses."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from align_jax import models, sampling, sharding
from align_jax.phases import peer_flops
from align_jax.phases.peer_config import GREEDY, Place, compared
from align_jax.phases.peer_process import memory
from align_jax.training import workdir


class Sampling:
  """Model and requests of one task."""

  def __init__(self, place: Place, name: str, *, continuous: bool, devices):
    self.config, self.devices = place.config, devices
    self.requests = workdir.read_json(place.tokens(name))
    mesh = sharding.make_mesh(self.config.mesh, devices)
    self.mesh = mesh if len(devices) > 1 else None  # one device needs none: nothing is moved
    dtype = self.config.model.dtype
    self.model, self.params = models.load_pretrained(place.model, dtype=dtype, mesh=self.mesh)
    self.rows = {"slots" if continuous else "batch_size": self.config.tasks[name].data.batch_size}

  def ready(self) -> dict[str, Any]:
    """What is compared, and what is not timed."""
    check = self.requests["check"]
    greedy = self._generate(check, [GREEDY] * len(check), temperature=0.0)
    seconds: list[float] = []
    listen = lambda event, s, **_: seconds.append(s) if "/compile/" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      self.take_pass()
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
    return {
      "check": [compared(greedy.logprobs[greedy.response_mask].reshape(-1, GREEDY))],
      "compile_s": sum(seconds),
      "settings": {"rows": self.rows, "dtype": self.config.model.dtype},
      "reference_pass": None,
      "flops": peer_flops.sampling_flops(self.model, self.requests["pass"]),
    } | memory(self.devices)

  def take_pass(self) -> None:
    """One call for all requests, its responses on the host at its end."""
    requests = self.requests["pass"]
    samples = self._generate(requests, [r["new_tokens"] for r in requests], **self.rows)
    if samples.lengths.tolist() != [r["new_tokens"] for r in requests]:
      raise RuntimeError("responses are not as long as they were asked to be")

  def _generate(self, requests, new_tokens: Sequence[int], **options) -> sampling.Samples:
    prompts = [np.array(r["prompt_ids"], np.int32) for r in requests]
    none = [-1]  # no token ends a response before its time
    return sampling.generate(
      self.model, self.params, prompts, max_new_tokens=new_tokens, eos_ids=none, pad_id=0,
      rng=jax.random.key(0), mesh=self.mesh, **options,
    )  # fmt: skip
