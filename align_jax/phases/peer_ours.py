"""Our side of the peer benchmark: the step that a phase would take, on its own batches."""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import data, models, sharding
from align_jax.phases import peer_flops, peer_policy, peer_sampling, reference, workspace
from align_jax.phases.peer_config import BETA, CHECKS, CONTINUOUS, OURS, SAMPLE, Place
from align_jax.phases.peer_process import Channel, memory
from align_jax.training import (
  metrics,
  objectives,
  optimizer,
  preference_objectives,
  preferences,
  reward_objectives,
  state,
  step,
  workdir,
)

# What is compared with the peers, by phase.
COMPARED = {
  "sft": ("loss",),
  "reward": ("loss", "rewards/chosen", "rewards/rejected"),
  "dpo": ("loss", "logps/chosen", "logps/rejected"),
  "policy": ("loss",),
}
STEPS = 1_000_000  # of the optimizer's schedule, which is constant


def serve(place: Place, task: str, role: str, channel: Channel, devices) -> None:
  """Answers the parent until it says stop: first what is compared, then passes."""
  config = place.config
  if config.tasks[task].phase == SAMPLE:
    ours = peer_sampling.Sampling(place, task, continuous=role == CONTINUOUS, devices=devices)
  else:
    ours = Training(place, task, cached=role == OURS, devices=devices)
  channel.send(ours.ready())
  while channel.goes_on():
    found = peer_flops.timed(ours.take_pass, config.matmul, config.model.dtype)
    channel.send(found | memory(devices))


class Training:
  """Model, state and compiled steps of one task."""

  def __init__(self, place: Place, name: str, *, cached: bool, devices):
    self.config, self.place, self.name = place.config, place, name
    self.task = self.config.tasks[name]
    self.cached = cached and self.task.phase == "dpo"
    self.devices = devices
    self.mesh = sharding.make_mesh(self.config.mesh, devices)
    self.tokenizer = models.load_tokenizer(place.model)
    section = self.config.model
    model, params = models.load_pretrained(place.model, dtype="float32", mesh=self.mesh)
    self.model = workspace.compute_as(
      model, self.mesh, section.dtype, section.remat, section.attention
    )
    self.reference_pass, self.compiled, self.compile_s = None, {}, {}  # by shapes
    self.checked, self.timed = (self._batches(part, params) for part in ("check", "pass"))
    self.frozen = {"ref": params} if self.task.phase == "dpo" and not self.cached else {}
    self.tx = optimizer.make_optimizer(self.config.optimizer, STEPS)
    prepare = peer_policy.prepare() if self.task.phase == "policy" else None
    self.step = step.make_train_step(self._objective(), self.tx, prepare=prepare)
    self.state = state.create_state(
      self._trainable(params), self.tx, 0, self.mesh, consume=not self.frozen
    )

  def ready(self) -> dict[str, Any]:
    """Two updates on the same examples, with what is compared of each, and what is not timed."""
    checks = []
    for _ in range(CHECKS):
      (batch,) = self.checked()
      found = self._update(batch)
      checks.append({name: found[name] for name in COMPARED[self.task.phase]})
    batches = list(self.timed())
    for batch in batches:
      self._compiled(sharding.put_batch(batch, self.mesh))
    return {
      "check": checks,
      "compile_s": sum(self.compile_s[key] for key in set(map(_shapes, batches))),
      "padded_tokens": sum(_rows(batch).size for batch in batches),
      "steps": len(batches),
      "shapes": sorted({str(_rows(batch).shape) for batch in batches}),
      "settings": self.settings(),
      "reference_pass": self.reference_pass,
      "flops": self._flops(batches),
    } | memory(self.devices)

  def take_pass(self) -> None:
    """Every batch once, as a run takes it: made, moved, stepped on, its metrics read a step late."""
    pending = None
    for batch in self.timed():
      placed = sharding.put_batch(batch, self.mesh)
      self.state, found = self._compiled(placed)(self.state, self.frozen, placed)
      if pending is not None:
        metrics.to_floats(pending)
      pending = found
    jax.block_until_ready((self.state, pending))

  def settings(self) -> dict[str, Any]:
    """What was chosen for this side, in words of the configs."""
    found = {"remat": self.config.model.remat, "logits_chunk": self.config.model.logits_chunk}
    if self.task.phase == "sft":
      return found | {"pack": True, "rows": self.rows}
    if self.task.phase == "policy":
      return found | {"row_length": self.task.data.length}
    found["layout"] = "shared"
    return found | ({"reference": "cached"} if self.cached else {})

  def _update(self, batch) -> dict[str, float]:
    placed = sharding.put_batch(batch, self.mesh)
    self.state, found = self._compiled(placed)(self.state, self.frozen, placed)
    return metrics.to_floats(found)

  def _compiled(self, batch):
    key = _shapes(batch)
    if key not in self.compiled:
      start = time.perf_counter()
      self.compiled[key] = self.step.lower(self.state, self.frozen, batch).compile()
      self.compile_s[key] = time.perf_counter() - start
    return self.compiled[key]

  def _objective(self):
    chunk = self.config.model.logits_chunk
    if self.task.phase == "sft":
      return objectives.sft_objective(self.model, chunk=chunk)
    if self.task.phase == "reward":
      return reward_objectives.pair_objective(self.model)
    if self.task.phase == "policy":
      return peer_policy.objective(self.model, chunk)
    settings = preferences.PreferenceConfig("dpo", beta=BETA)
    return preference_objectives.preference_objective(self.model, settings, chunk=chunk)

  def _trainable(self, params):
    if self.task.phase == "policy":
      return {"policy": params}
    if self.task.phase != "reward":
      return params
    head = {"kernel": jnp.asarray(np.load(self.place.head)), "bias": jnp.zeros(())}
    return {"trunk": params, "head": jax.device_put(head, sharding.replicated(self.mesh))}

  def _batches(self, part: str, params) -> Callable[[], Iterator]:
    """A function that begins the batches of a part anew."""
    section, file = self.task.data, str(self.place.records(self.name, part))
    if self.task.phase == "policy":
      sequences = workdir.read_json(self.place.tokens(self.name))[part]
      batches = peer_policy.batches(
        sequences,
        section.batch_size,
        row_length=section.length,
        ways=sharding.batch_ways(self.mesh),
      )
      return peer_policy.with_old_logprobs(
        batches, self._scoring_model(), params, self.mesh, self.config.model.logits_chunk
      )
    if self.task.phase == "sft":
      return self._packed(data.read_demonstrations(file), part)
    plan = data.Batching(section.batch_size, epochs=1, shuffle=part == "pass")
    pairs = data.tokenise_pairs(
      data.read_preferences(file), self.tokenizer, plan, length=section.length
    )
    cached = self._reference(pairs, params) if self.cached else None
    ways = sharding.batch_ways(self.mesh)
    tiles = models.tiles_from(self.config.model.attention, self.mesh)
    return lambda: data.shared_batches(pairs, row_multiple=ways, long_from=tiles, reference=cached)

  def _packed(self, records, part: str) -> Callable[[], Iterator]:
    """Full rows; a step of a pass has as many as hold about `batch_size` records, the check's all."""
    section, ways = self.task.data, sharding.batch_ways(self.mesh)
    lengths = [
      len(data.encode_demonstration(r, self.tokenizer, section.length).tokens) for r in records
    ]
    make = functools.partial(
      data.sft_batches, records, self.tokenizer, length=section.length, epochs=1, pad_last=True
    )
    if part == "check":
      whole = sum((batch["segment_ids"].max(axis=1) > 0).sum() for batch in make(batch_size=ways))
      rows = -(-int(whole) // ways) * ways
    else:
      mean = section.batch_size * float(np.mean(lengths)) / section.length
      rows = self.rows = max(1, round(mean / ways)) * ways
    return lambda: make(batch_size=rows)

  def _reference(self, pairs: data.Pairs, params):
    """The cached log-probs; what filling the cache takes is measured where it is not there yet."""
    scorer = reference.Scorer(
      self._scoring_model(), {"params": params}, self.mesh, self.task.data.batch_size,
      self.config.model.logits_chunk,
    )  # fmt: skip
    folder = self.place.folder / "reference"
    if pairs.source.plan.shuffle and not (folder / f"{self.name}.timed").exists():
      seconds = []
      for _ in range(2):  # the second finds its programs compiled
        start = time.perf_counter()
        reference.cached_reference(folder / "again", pairs, scorer, {})
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(folder / "again")
      self.reference_pass = {"first_s": seconds[0], "s": seconds[1], "pairs": len(pairs.kept)}
      (folder / f"{self.name}.timed").touch()
    return reference.cached_reference(folder, pairs, scorer, {})

  def _scoring_model(self):
    return self.model.clone(config=dataclasses.replace(self.model.config, remat="none"))

  def _flops(self, batches) -> float:
    """What the mathematics of a pass needs."""
    recomputed = self.task.phase == "dpo" and not self.cached
    return peer_flops.model_flops(self.model, self.task.phase, batches, recomputed=recomputed)


def _rows(batch) -> Any:
  """The tokens that the model sees."""
  return batch.get("layout", batch)["tokens"]


def _shapes(batch) -> tuple:
  """What a step is compiled for."""
  return tuple(x.shape for x in jax.tree.leaves(batch))
