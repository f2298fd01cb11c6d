"""How the time of a step grows with row length, batch, LoRA rank and vocabulary; and the first step's.

Along each axis one size varies and the others stay as they are. All points of an axis take their steps
in turn, so that a noisy machine is noisy for all of them alike.
"""

import dataclasses
import itertools
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import tqdm

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.evals import benchmark_plots
from align_jax.phases import first_step, scaling_batches, sections, workspace
from align_jax.phases.first_step import FirstStepSection
from align_jax.phases.sections import ModelSection
from align_jax.training import (
  objectives,
  optimizer,
  preference_objectives,
  preferences,
  state,
  step,
  workdir,
)

STEPS = ("sft", "dpo")
# Of each size; as an axis, ranks are positive.
LEAST = {"length": 8, "batch": 1, "rank": 0, "vocab": 2}
_WARM_UP = 2  # steps of every point before any is timed


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
  """Settings of `experiments.benchmark` for cost as work grows."""

  model: ModelSection  # of random weights: model.scratch, whose tokenizer is not used
  steps: tuple[str, ...]  # sft, dpo
  base: dict[str, int]  # length, batch, rank (0: all weights train), vocab: where nothing varies
  axes: dict[str, tuple[int, ...]]  # by the same names
  repeats: int  # steps of every point
  first_step: FirstStepSection  # a command whose time to its first step is measured
  mesh: sharding.MeshConfig = sharding.MeshConfig()

  def __post_init__(self):
    if self.model.scratch is None or self.model.lora.rank:
      raise InputError(
        "config.model: init must be 'scratch' and lora.rank 0; base.rank is the rank"
      )
    for name in self.steps:
      sections.check_one_of("steps", name, STEPS)
    if not self.steps or self.repeats < 1 or set(self.base) != set(LEAST):
      raise InputError(
        f"config.steps must be given, repeats positive, and base have {', '.join(LEAST)}"
      )
    for name, value in self.base.items():
      if value < LEAST[name]:
        raise InputError(f"config.base.{name} must be at least {LEAST[name]}, not {value}")
    for name, values in self.axes.items():
      sections.check_one_of("axes", name, tuple(LEAST))
      least = max(1, LEAST[name])
      if len(set(values)) < 3 or min(values) < least:
        raise InputError(
          f"config.axes.{name} must have three sizes or more, none below {least}, for an exponent"
        )


@dataclasses.dataclass(frozen=True)
class Fit:
  """y = c · x^exponent by least squares on logarithms."""

  exponent: float
  standard_error: float  # of the exponent
  r2: float  # of the logarithms


@dataclasses.dataclass
class Point:
  """One size of one axis: its compiled step, and what that took."""

  size: int
  compiled: Any
  train_state: Any
  frozen: Any
  batch: Any
  compile_s: float
  seconds: list[float] = dataclasses.field(default_factory=list)

  def take(self) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    self.train_state, metrics = self.compiled(self.train_state, self.frozen, self.batch)
    jax.block_until_ready((self.train_state, metrics))
    return time.perf_counter() - start


def run(config: ScalingConfig, path: str, devices) -> dict[str, Any]:
  """Measures, prints tables, and writes benchmark.json and benchmark.png."""
  workspace.single_process("the benchmark")
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  results = {"device": devices[0].device_kind, "devices": len(devices), "base": config.base}
  results |= {"axes": {}, "first_step": None}
  if config.first_step.module:
    results["first_step"] = first_step.measure(config.first_step)
    print(first_step.sentence(results["first_step"]), flush=True)
  for axis, name in itertools.product(config.axes, config.steps):
    found = _axis(config, name, axis, mesh)
    results["axes"].setdefault(axis, {})[name] = found
    print(table(axis, name, found), flush=True)
    workdir.write_json(folder / "benchmark.json", results)
  if results["axes"]:
    (folder / "benchmark.png").write_bytes(benchmark_plots.scaling_png(results["axes"]))
  workdir.write_json(folder / "benchmark.json", results)
  return results


def _axis(config: ScalingConfig, name: str, axis: str, mesh) -> dict[str, Any]:
  sizes = sorted(set(config.axes[axis]))
  points = [_point(config, name, axis, size, mesh) for size in sizes]
  for point in points * _WARM_UP:
    point.take()
  for point in tqdm.tqdm(points * config.repeats, f"{name} by {axis}", unit=" steps", leave=False):
    point.seconds.append(point.take())
  medians = [statistics.median(point.seconds) for point in points]
  rows = [
    {"size": p.size, "s": s, "range": [min(p.seconds), max(p.seconds)], "compile_s": p.compile_s}
    for p, s in zip(points, medians)
  ]
  return {"rows": rows, "fit": dataclasses.asdict(fit(sizes, medians))}


def _point(config: ScalingConfig, name: str, axis: str, size: int, mesh) -> Point:
  sizes = config.base | {axis: size}
  model = _model(config.model, sizes, mesh)
  trainable, frozen = workspace.new_params(model, mesh, seed=0), {}
  if sizes["rank"]:
    lora = dataclasses.replace(config.model.lora, rank=sizes["rank"])
    adapter = workspace.new_lora(model, lora, mesh, 0)
    trainable, frozen, model = adapter, {"base": trainable}, model.clone(lora_scale=lora.scale)
  batch = sharding.put_batch(scaling_batches.MAKERS[name](sizes), mesh)
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(1e-5, schedule="constant"), 1000)
  train_state = state.create_state(trainable, tx, 0, mesh, consume=True)
  train_step = step.make_train_step(_objective(name, model, config.model.logits_chunk), tx)
  start = time.perf_counter()
  compiled = train_step.lower(train_state, frozen, batch).compile()
  return Point(size, compiled, train_state, frozen, batch, time.perf_counter() - start)


def _model(section: ModelSection, sizes: dict[str, int], mesh) -> models.Transformer:
  scratch = dataclasses.replace(section.scratch, max_length=sizes["length"])
  model = models.Transformer(workspace.scratch_config(scratch, sizes["vocab"]))
  return workspace.compute_as(model, mesh, section.dtype, section.remat, section.attention)


def _objective(name: str, model, chunk: int | None) -> step.Objective:
  if name == "sft":
    return objectives.sft_objective(model, chunk=chunk)
  settings = preferences.PreferenceConfig("dpo")
  return preference_objectives.preference_objective(model, settings, chunk=chunk)


def fit(sizes, values) -> Fit:
  """log y = log c + k log x by least squares: k, its standard error, and r2 of the logarithms.

    k = Σ (u - ū)(v - v̄) / Σ (u - ū)²    SE = √(Σ residual² / (n - 2) / Σ (u - ū)²)

  with u = log x and v = log y; sizes, values [n] positive, n at least 3.
  """
  u, v = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
  u, v = u - u.mean(), v - v.mean()
  spread = float(u @ u)
  exponent = float(u @ v) / spread
  rest = float(np.square(v - exponent * u).sum())
  total = float(v @ v)
  return Fit(exponent, (rest / (len(u) - 2) / spread) ** 0.5, 1.0 - rest / total if total else 1.0)


def table(axis: str, name: str, found: dict[str, Any]) -> str:
  """A line a size, and what was fitted."""
  of = found["fit"]
  lines = [
    f"{name}: a step takes {axis}^{of['exponent']:.2f} (standard error {of['standard_error']:.2f}, "
    f"r2 {of['r2']:.3f})",
    f"  {axis:>8} {'s a step':>10} {'range':>18} {'compiled in s':>14}",
  ]
  for row in found["rows"]:
    low, high = row["range"]
    spread = f"[{low:.4f}, {high:.4f}]"
    lines.append(f"  {row['size']:8} {row['s']:10.4f} {spread:>18} {row['compile_s']:14.1f}")
  return "\n".join(lines)
