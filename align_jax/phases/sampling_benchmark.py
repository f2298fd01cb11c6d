"""What sampling costs: with and without continuous batching, and next to `transformers`.

Every comparison runs its two sides in turn, A B A B, on the same weights, prompts and numbers of new
tokens, so that a noisy machine is noisy for both alike. What is compared are whole calls, prefill and
host work included, compilation not.
"""

import dataclasses
import importlib.util
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from align_jax import models, sampling, sharding
from align_jax.errors import InputError
from align_jax.evals import benchmark_plots
from align_jax.phases import benchmark_data, workspace
from align_jax.phases.peer_process import cores
from align_jax.phases.sections import ModelSection
from align_jax.training import workdir

MIXED, EQUAL = "mixed", "transformers"
TITLES = {MIXED: "mixed lengths", EQUAL: "equal lengths, next to transformers"}


@dataclasses.dataclass(frozen=True)
class SamplingSet:
  """One model and the requests put to it."""

  model: ModelSection
  requests: int  # of mixed lengths
  slots: int  # rows in flight, on all sides
  prompt_length: int  # the longest; lengths are uniform from a quarter of it
  new_tokens: tuple[int, int]  # of a request: log-uniform between these, as answers are
  equal_tokens: int = 0  # for every row of one batch next to `transformers`; 0: not compared

  def __post_init__(self):
    low, high = self.new_tokens
    sizes = self.requests, self.slots, self.prompt_length, low
    if min(sizes) < 1 or high < low or self.equal_tokens < 0:
      raise InputError("config.sets: sizes must be positive and new_tokens (least, most)")


@dataclasses.dataclass(frozen=True)
class SamplingBenchmarkConfig:
  """Settings of `experiments.benchmark` for sampling."""

  sets: dict[str, SamplingSet]  # by name
  repeats: int  # of both sides of every comparison
  mesh: sharding.MeshConfig = sharding.MeshConfig()

  def __post_init__(self):
    if not self.sets or self.repeats < 1:
      raise InputError("config.sets must be given and config.repeats positive")


@dataclasses.dataclass(frozen=True)
class Side:
  """One way to answer the requests: `run` returns how many tokens it has drawn."""

  name: str
  run: Callable[[], int]


def run(config: SamplingBenchmarkConfig, path: str, devices) -> dict[str, Any]:
  """Measures, prints a table, and writes benchmark.json and benchmark.png."""
  workspace.single_process("the benchmark")
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  results = {"device": devices[0].device_kind, "devices": len(devices), "cores": cores()}
  results |= {MIXED: {}, EQUAL: {}}
  for name, section in config.sets.items():
    loaded = workspace.start(section.model, mesh, seed=0)
    # One device needs no mesh, and without one nothing is moved.
    requests = _Requests(section, loaded, mesh if len(devices) > 1 else None)
    results[MIXED][name] = measure(requests.mixed(), config.repeats, name)
    if section.equal_tokens:
      missing = _missing()
      if missing:
        print(f"{name}: not compared with transformers: {missing} is not installed", flush=True)
      else:
        with tempfile.TemporaryDirectory() as export:
          results[EQUAL][name] = measure(requests.equal(export), config.repeats, name)
    workdir.write_json(folder / "benchmark.json", results)
  for comparison, title in TITLES.items():
    if results[comparison]:
      print(_table(title, results[comparison]), flush=True)
  _draw(results, folder / "benchmark.png")
  return results


def measure(sides: list[Side], repeats: int, name: str) -> dict[str, Any]:
  """Both sides `repeats` times in turn, after one run each that compiles; ratios to the first."""
  compile_s, seconds = {}, {side.name: [] for side in sides}
  for side in sides:
    start = time.perf_counter()
    side.run()
    compile_s[side.name] = time.perf_counter() - start
  tokens = {}
  turns = [side for _ in range(repeats) for side in sides]
  for side in tqdm.tqdm(turns, name, unit=" runs", mininterval=1.0):
    start = time.perf_counter()
    tokens[side.name] = side.run()
    seconds[side.name].append(time.perf_counter() - start)
  if len(set(tokens.values())) != 1:
    raise RuntimeError(f"the sides drew different numbers of tokens: {tokens}")
  rows = {}
  for side in sides:
    rows[side.name] = {
      "tokens": tokens[side.name],
      "tokens_per_s": tokens[side.name] / statistics.median(seconds[side.name]),
      "seconds": seconds[side.name],
      **benchmark_data.speedup(seconds[sides[0].name], seconds[side.name]),
      "first_run_s": compile_s[side.name],
    }
  return {"variants": rows}


class _Requests:
  """The requests of one set, and who answers them."""

  def __init__(self, section: SamplingSet, loaded: workspace.Loaded, mesh):
    self.section, self.loaded, self.mesh = section, loaded, mesh
    rng = np.random.default_rng(0)
    longest, (low, high) = section.prompt_length, section.new_tokens
    count = max(section.requests, section.slots)
    lengths = rng.integers(-(-longest // 4), longest + 1, count)
    vocab = loaded.model.config.vocab_size
    self.prompts = [rng.integers(vocab // 4, vocab, n).astype(np.int32) for n in lengths]
    budgets = np.exp(rng.uniform(np.log(low), np.log(high + 1), section.requests))
    self.budgets = np.clip(budgets.astype(int), low, high)

  def _generate(self, prompts, max_new_tokens, **options) -> int:
    samples = sampling.generate(
      self.loaded.model,
      self.loaded.params,
      prompts,
      max_new_tokens=max_new_tokens,
      eos_ids=[-1],  # nobody stops early: both sides draw the same number of tokens
      pad_id=0,
      rng=jax.random.key(0),
      mesh=self.mesh,
      **options,
    )
    return int(samples.lengths.sum())

  def mixed(self) -> list[Side]:
    """Batches of as many rows, each as long as its longest response; then continuous batching."""
    prompts, slots = self.prompts[: self.section.requests], self.section.slots
    return [
      Side("batches", lambda: self._generate(prompts, self.budgets, batch_size=slots)),
      Side("continuous", lambda: self._generate(prompts, self.budgets, slots=slots)),
    ]

  def equal(self, export: str) -> list[Side]:
    """`transformers` and this library on one batch of equal prompts and responses."""
    width, count = self.section.prompt_length, self.section.equal_tokens
    prompts = np.stack([np.resize(p, width) for p in self.prompts[: self.section.slots]])
    ours = lambda: self._generate(  # noqa: E731
      prompts, count, lengths=np.full(len(prompts), width)
    )
    models.save_pretrained(export, self.loaded.model, self.loaded.params)
    return [
      Side("transformers", _transformers_side(export, prompts, count)),
      Side("align_jax", ours),
    ]


def _transformers_side(export: str, prompts: np.ndarray, count: int) -> Callable[[], int]:
  """`generate` of our export in float32 on the CPU, on all cores, sampling at temperature 1."""
  import torch
  import transformers

  torch.set_num_threads(cores())
  theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
  ids = torch.tensor(prompts, dtype=torch.long)

  def run() -> int:
    with torch.inference_mode():
      out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
      )
    return int(out.numel() - ids.numel())

  return run


def _missing() -> str | None:
  return None if importlib.util.find_spec("torch") else "torch"


def _draw(results: dict[str, Any], file: pathlib.Path):
  drawn = {title: results[key] for key, title in TITLES.items() if results[key]}
  file.write_bytes(benchmark_plots.sampling_png(drawn))


def _table(title: str, sets: dict[str, Any]) -> str:
  lines = [f"{title:32} {'side':14} {'tokens':>7} {'tokens/s':>9} {'speed-up':>20}"]
  for name, found in sets.items():
    for side, row in found["variants"].items():
      low, high = row["speedup_range"]
      lines.append(
        f"{name:32} {side:14} {row['tokens']:7} {row['tokens_per_s']:9.1f}"
        f" {row['speedup']:7.2f} [{low:.2f}, {high:.2f}]"
      )
  return "\n".join(lines)
