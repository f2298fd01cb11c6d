"""One compiled step on one slice: bytes, operations, and the time that neither can be beaten by."""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from align_jax.scale import flops, hlo
from align_jax.scale.tpus import Slice


@dataclasses.dataclass(frozen=True)
class Report:
  """Bytes and seconds are those of one device (a chip, but half a tpu7x)."""

  topology: str
  mesh: dict[str, int]
  hbm_bytes: int
  argument_bytes: int  # parameters, moments, batch
  temp_bytes: int
  output_bytes: int  # that do not take the place of arguments
  flops: float  # of all devices together
  collective_bytes: dict[str, float]
  dcn_bytes: float  # besides them, between slices
  traffic_bytes: float
  largest: tuple[str, ...]  # arrays
  seconds: dict[str, float]  # the least time for compute, memory, ici, dcn
  rematerialised: int = (
    0  # arrays gathered whole because no better way between two splits was known
  )
  error: str | None = None  # the compiler's word where it does not fit

  @property
  def peak_bytes(self) -> int:
    return self.argument_bytes + self.temp_bytes + self.output_bytes

  @property
  def fits(self) -> bool:
    return self.error is None and self.peak_bytes <= self.hbm_bytes

  @property
  def bound(self) -> str:
    """What takes longest."""
    return max(self.seconds, key=self.seconds.get)

  @property
  def estimate(self) -> float:
    """Seconds a step if all else hides behind what takes longest: a roofline, never a promise."""
    return max(self.seconds.values())


def compile_step(
  step: Callable, args: tuple[Any, ...], tpu: Slice, mesh: jax.sharding.Mesh
) -> Report:
  """Lowers and compiles the jitted `step` for the mesh, and reads what it takes.

  args: ShapeDtypeStructs with their places on the mesh.
  """
  traced = step.trace(*args)
  operations = flops.count(traced.jaxpr)
  with _said() as said:
    try:
      compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return _too_large(str(error), operations, args, tpu, mesh)
  module, memory = hlo.parse(compiled.as_text()), compiled.memory_analysis()
  traffic, sent = hlo.memory_traffic(module), hlo.collective_bytes(module)
  between = hlo.bytes_between_slices(module)
  return Report(
    topology=tpu.name,
    mesh=_axes(mesh),
    hbm_bytes=tpu.hbm_bytes_per_device,
    argument_bytes=memory.argument_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    flops=operations,
    collective_bytes=sent,
    dcn_bytes=between,
    traffic_bytes=traffic,
    largest=tuple(f"{a.dtype}{list(a.shape)}" for a in hlo.largest(module)),
    seconds=_seconds(operations, traffic, sum(sent.values()), between, tpu, mesh.size),
    rematerialised=said[0].count("Involuntary full rematerialization"),
  )


@contextlib.contextmanager
def _said():
  """What the compiler writes to standard error meanwhile, in a list of one text when it is over.

  The compiler is C++ and knows no other way to say it; TF_CPP_MIN_LOG_LEVEL must let warnings pass.
  """
  said: list[str] = []
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield said
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      said.append(file.read().decode(errors="replace"))


def _seconds(operations, traffic, within, between, tpu: Slice, devices: int) -> dict[str, float]:
  g = tpu.generation
  share = 1 / g.devices_per_chip
  return {
    "compute": operations / devices / (g.peak_flops * share),
    "memory": traffic / (g.hbm_bandwidth * share),
    "ici": within / (g.ici_bandwidth * share),
    "dcn": between / (g.dcn_bandwidth * share),
  }


def _axes(mesh) -> dict[str, int]:
  return {axis: size for axis, size in mesh.shape.items() if size > 1}


def _too_large(message: str, operations, args, tpu: Slice, mesh) -> Report:
  """What the compiler says of a step that does not fit."""
  used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  total = int(float(used[1]) * unit[used[2]]) if used else 0
  arguments = argument_bytes(args)
  line = next((l for l in message.splitlines() if "exceed" in l.lower()), message.splitlines()[0])
  return Report(
    topology=tpu.name,
    mesh=_axes(mesh),
    hbm_bytes=tpu.hbm_bytes_per_device,
    argument_bytes=arguments,
    temp_bytes=max(0, total - arguments),
    output_bytes=0,
    flops=operations,
    collective_bytes={},
    dcn_bytes=0.0,
    traffic_bytes=0.0,
    largest=(),
    seconds=_seconds(operations, 0.0, 0.0, 0.0, tpu, mesh.size),
    error=line.strip()[:300],
  )


def argument_bytes(args) -> int:
  """What shapes with places take on one device, before anything is compiled."""
  return sum(_own_bytes(x) for x in jax.tree.leaves(args))


def _own_bytes(x) -> int:
  """Bytes of an abstract array on one device."""
  shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
  size = 1
  for n in shape:
    size *= n
  return size * (4 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize)
