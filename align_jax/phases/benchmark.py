"""What a preference step costs in every layout, as ratios measured side by side in one run.

The same pairs, the same weights and one optimizer state go through every variant in turn, A B A B, so
that a noisy machine is noisy for all of them alike.
"""

import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax
import tqdm

from align_jax import data, sharding
from align_jax.errors import InputError
from align_jax.evals import benchmark_plots
from align_jax.phases import benchmark_data, reference, sections, train, workspace
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.training import optimizer, preference_objectives, preferences, state, step, workdir

REFERENCES = ("recomputed", "cached")
ROUNDED = 64  # a padded batch is as long as its longest sequence, rounded up to this


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Settings of `experiments.benchmark`."""

  model: ModelSection
  data: dict[str, DataSection]  # by name; `train` are preference pairs
  objective: preferences.PreferenceConfig
  variants: tuple[str, ...]  # "layout/reference"; ratios are to the first
  batches: int  # of each set, drawn evenly over its lengths
  repeats: int  # passes of every variant over them
  mesh: sharding.MeshConfig = sharding.MeshConfig()

  def __post_init__(self):
    known = [f"{layout}/{ref}" for layout in sections.LAYOUTS for ref in REFERENCES]
    for variant in self.variants:
      if variant not in known:
        raise InputError(f"config.variants must be among {', '.join(known)}, not {variant!r}")
    if self.batches < 1 or self.repeats < 1 or not self.data or not self.variants:
      raise InputError(
        "config.batches and config.repeats must be positive, data and variants given"
      )
    if not self.objective.needs_reference or self.objective.unpaired:
      raise InputError(f"config.objective: {self.objective.name} has no pairs or no reference")


@dataclasses.dataclass
class Variant:
  """One way to compute the step: its batches on the device and its compiled steps by shape."""

  name: str
  batches: list[Any]
  steps: list[Any]  # compiled, one for every batch
  frozen: dict
  compile_s: float
  temp_bytes: int  # of the largest shape
  padded_tokens: int
  useful_tokens: int
  seconds: list[float] = dataclasses.field(default_factory=list)


def run(config: BenchmarkConfig, path: str, devices) -> dict[str, Any]:
  """Measures, prints a table, and writes benchmark.json and benchmark.png."""
  workspace.single_process("the benchmark")
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  loaded = workspace.start(config.model, mesh, seed=0)
  trainable, frozen, model = train.policy_trainable(loaded, config.model, mesh, 0)
  loaded = dataclasses.replace(loaded, model=model)
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(1e-6, schedule="constant"), 1000)
  train_state = state.create_state(trainable, tx, 0, mesh)
  results = {"device": devices[0].device_kind, "devices": len(devices), "sets": {}}
  for name, section in config.data.items():
    pairs = benchmark_data.pairs(section, loaded.tokenizer, config.batches * section.batch_size)
    variants = [
      _variant(v, config, pairs, loaded, frozen, train_state, tx, mesh, folder)
      for v in config.variants
    ]
    turns = [variant for _ in range(config.repeats) for variant in variants]
    for variant in tqdm.tqdm(turns, name, unit=" passes", mininterval=1.0):
      train_state = _pass(variant, train_state)
    results["sets"][name] = _summary(config, section, variants)
    print(_table(name, results["sets"][name]), flush=True)
    workdir.write_json(folder / "benchmark.json", results)
  benchmark_plots.save(results, folder / "benchmark.png")
  return results


def _variant(name, config, pairs, loaded, frozen, train_state, tx, mesh, folder) -> Variant:
  layout, of_reference = name.split("/")
  cached = None
  if of_reference == "cached":
    scorer = reference.Scorer(
      loaded.model.clone(config=dataclasses.replace(loaded.model.config, remat="none")),
      {"params": loaded.params},
      mesh,
      pairs.source.plan.batch_size,
      config.model.logits_chunk,
    )
    cached = reference.cached_reference(folder / "reference", pairs, scorer, {})
  elif not frozen:
    frozen = {"ref": loaded.params}
  if layout == "shared":
    ways = sharding.batch_ways(mesh)
    batches = list(data.shared_batches(pairs, row_multiple=ways, reference=cached))
  else:
    batches = _longest_padding(pairs, cached)
  objective = preference_objectives.preference_objective(
    loaded.model, config.objective, chunk=config.model.logits_chunk
  )
  train_step = step.make_train_step(objective, tx)
  placed = [sharding.put_batch(batch, mesh) for batch in batches]
  start, compiled = time.perf_counter(), {}
  for batch in tqdm.tqdm(placed, f"{name}: compiling", unit=" batches", leave=False):
    shape = batch["tokens"].shape
    if shape not in compiled:
      compiled[shape] = train_step.lower(train_state, frozen, batch).compile()
  return Variant(
    name=name,
    batches=placed,
    steps=[compiled[batch["tokens"].shape] for batch in placed],
    frozen=frozen,
    compile_s=time.perf_counter() - start,
    temp_bytes=max(c.memory_analysis().temp_size_in_bytes for c in compiled.values()),
    padded_tokens=sum(batch["tokens"].size for batch in batches),
    useful_tokens=int(pairs.costs.sum()),
  )


def _longest_padding(pairs: data.Pairs, cached) -> list:
  """Padded batches, each cut to its longest sequence: what a collator without buckets makes."""
  longest = -(-int(pairs.corpus.lengths.max()) // ROUNDED) * ROUNDED
  batches = []
  for batch in data.padded_batches(pairs, longest, reference=cached):
    used = int(batch["segment_ids"].sum(axis=-1).max())
    length = -(-used // ROUNDED) * ROUNDED
    batches.append({k: v[..., :length] if v.ndim == 3 else v for k, v in batch.items()})
  return batches


def _pass(variant: Variant, train_state):
  start = time.perf_counter()
  for compiled, batch in zip(variant.steps, variant.batches):
    train_state, metrics = compiled(train_state, variant.frozen, batch)
  jax.block_until_ready((train_state, metrics))
  variant.seconds.append(time.perf_counter() - start)
  return train_state


def _summary(config, section: DataSection, variants: list[Variant]) -> dict[str, Any]:
  first = variants[0]
  examples = config.batches * section.batch_size
  rows = {}
  for v in variants:
    rows[v.name] = {
      "examples_per_s": examples / statistics.median(v.seconds),
      "seconds": v.seconds,
      **benchmark_data.speedup(first.seconds, v.seconds),
      "temp_bytes": v.temp_bytes,
      "memory_ratio": v.temp_bytes / first.temp_bytes,
      "padded_tokens": v.padded_tokens,
      "useful_tokens": v.useful_tokens,
      "compile_s": v.compile_s,
      "shapes": len({id(s) for s in v.steps}),
    }
  return {"batch_size": section.batch_size, "examples": examples, "variants": rows}


def _table(name: str, found: dict[str, Any]) -> str:
  lines = [f"{name}: {found['examples']} pairs, {found['batch_size']} a step"]
  lines.append(
    f"{'variant':20} {'pairs/s':>8} {'speed-up':>20} {'temp MiB':>9} {'tokens':>8} shapes"
  )
  for variant, row in found["variants"].items():
    low, high = row["speedup_range"]
    lines.append(
      f"{variant:20} {row['examples_per_s']:8.3f} {row['speedup']:7.2f} [{low:.2f}, {high:.2f}]"
      f" {row['temp_bytes'] / 2**20:9.0f} {row['padded_tokens']:8} {row['shapes']:6}"
    )
  return "\n".join(lines)
