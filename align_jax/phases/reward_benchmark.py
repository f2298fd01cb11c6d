"""Benchmarks of reward models: any scorer on local files in the benchmarks' own formats."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from align_jax import config as config_lib
from align_jax import sharding
from align_jax.data import benchmarks
from align_jax.errors import InputError
from align_jax.evals import reward_benchmarks, reward_benchmarks_page
from align_jax.evals.reward_benchmarks import BenchmarkResult, RewardBenchmarks
from align_jax.phases import scorers, workspace
from align_jax.sharding import MeshConfig
from align_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class RewardBenchmarkConfig:
  """Settings of `experiments.reward_benchmark`."""

  model: str  # what scores: see `scorers.SOURCES`
  # name of a format -> its files: one, a folder, hf:org/name:split, or several joined by commas
  benchmarks: dict[str, str | None]
  limit: int | None = None  # at most so many items of each, drawn by the hash of their prompt
  length: int = 1024  # tokens of prompt and answer; longer ones are cut as in training
  batch_size: int = 8  # rows at a time
  dtype: str = "float32"
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    unknown = sorted(set(self.benchmarks) - set(benchmarks.FORMATS))
    if unknown:
      known = ", ".join(benchmarks.FORMATS)
      raise InputError(f"config.benchmarks.{unknown[0]} is no known benchmark; known are {known}")
    if not any(self.benchmarks.values()):
      known = ", ".join(benchmarks.FORMATS)
      raise InputError(f"config.benchmarks: give the files of one or more of {known}")
    if self.limit is not None and self.limit < 1:
      raise InputError("config.limit must be positive")


def run(config: RewardBenchmarkConfig, path: str, devices) -> RewardBenchmarks:
  """Scores every benchmark, writes reward_benchmarks.json, .html and .png, and prints the table."""
  workspace.single_process("a reward benchmark")
  paths = {name: files for name, files in config.benchmarks.items() if files}
  items = {name: benchmarks.read(name, files) for name, files in paths.items()}
  mesh = sharding.make_mesh(config.mesh, devices)
  scorer = scorers.open_scorer(
    config.model, mesh, dtype=config.dtype, length=config.length, batch_size=config.batch_size
  )
  found = RewardBenchmarks(
    scorer=scorer.name,
    source=config.model,
    length=config.length,
    limit=config.limit,
    unit="characters" if scorer.tokenizer is None else "tokens",
    chat_template=_template(scorer.tokenizer),
    benchmarks={},
  )
  folder = pathlib.Path(path)
  for name, own in items.items():
    result = measure(name, own, scorer, config.limit)
    found = dataclasses.replace(found, benchmarks=found.benchmarks | {name: result})
    reward_benchmarks_page.write(folder, found)  # at once: the next may take long
  workdir.write_json(folder / "reward_benchmark_config.json", config_lib.to_dict(config))
  print(reward_benchmarks_page.as_text(found), flush=True)
  return found


def measure(
  name: str, items: list[benchmarks.Item], scorer: scorers.Scorer, limit: int | None
) -> BenchmarkResult:
  """A benchmark's table for a scorer, every different text scored once."""
  used = reward_benchmarks.draw(items, limit)
  answers = [(*item.chosen, *item.rejected) for item in used]
  texts = [(item, text) for item, own in zip(used, answers) for text in own]
  scores = scorer(
    [item.prompt for item, _ in texts],
    [text for _, text in texts],
    [item.source for item, _ in texts],
  )
  edges = np.cumsum([0, *map(len, answers)])

  def by_item(values: np.ndarray) -> list[reward_benchmarks.Answers]:
    parts = [values[start:stop] for start, stop in zip(edges, edges[1:])]
    return [(part[: len(i.chosen)], part[len(i.chosen) :]) for i, part in zip(used, parts)]

  rewards, lengths = by_item(scores.rewards), by_item(scores.lengths)
  styles = name == "rm_bench"
  different = {json.dumps([item.prompt, text]): i for i, (item, text) in enumerate(texts)}
  wanted = reward_benchmarks.RULES[name].sections or {}
  return BenchmarkResult(
    files=benchmarks.fingerprints(items),
    items=len(items),
    used=len(used),
    duplicates=len(used) - len({item.key for item in used}),
    texts=len(different),
    truncated=int(scores.truncated[list(different.values())].sum()),
    missing=tuple(s for s in wanted if s not in {i.section for i in used} and s != "Prior Sets"),
    rows=reward_benchmarks.table(name, used, rewards, lengths),
    matrix=reward_benchmarks.matrix(rewards) if styles else None,
    longer_matrix=reward_benchmarks.matrix(lengths) if styles else None,
  )


def _template(tokenizer) -> str | None:
  """SHA-256 of the chat template that texts were put into."""
  text = getattr(tokenizer, "chat_template", None)
  return text and hashlib.sha256(text.encode()).hexdigest()
