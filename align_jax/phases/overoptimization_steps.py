"""The steps of the over-optimisation laboratory, each with a folder of its own that says it is done."""

import dataclasses
import pathlib
import traceback
from typing import Any

import jax
import numpy as np

from align_jax import config as config_lib
from align_jax import data, sampling, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import reward_model
from align_jax.phases import online, records, reward, sft, workers, workspace
from align_jax.phases.overoptimization_config import OveroptimizationConfig, Proxy, Trunk
from align_jax.training import workdir

_WIDTH = 8  # row lengths that are scored are multiples of it: few programs
_ROWS = 256  # scored at a time


@dataclasses.dataclass(frozen=True)
class Task:
  """One step, with all that a worker needs for it."""

  kind: str  # of _WORK
  folder: pathlib.Path  # whose log.txt it writes
  config: OveroptimizationConfig
  root: pathlib.Path
  what: Any = None  # a Trunk, a part of the pool, a Proxy, the name of a run

  @property
  def title(self) -> str:
    return f"{self.kind} {self.folder.name}"


@dataclasses.dataclass(frozen=True)
class Pool:
  """The different responses [U] to P prompts, and which of them every sample is."""

  tokens: np.ndarray  # [U, S], prompt and response
  prompt_lengths: np.ndarray  # [U]
  lengths: np.ndarray  # [U], of the response
  texts: np.ndarray  # [U]
  gold: np.ndarray  # [U]
  index: np.ndarray  # [P, N] into them

  @classmethod
  def read(cls, files: list[pathlib.Path]) -> "Pool":
    """All parts as one."""
    parts = []
    for file in files:
      with np.load(file) as found:
        parts.append({name: found[name] for name in found.files})
    first = np.cumsum([0, *(len(part["gold"]) for part in parts)])
    for part, start in zip(parts, first):
      part["index"] = part["index"] + start
    width = max(part["tokens"].shape[1] for part in parts)
    for part in parts:
      missing = width - part["tokens"].shape[1]
      part["tokens"] = np.pad(part["tokens"], ((0, 0), (0, missing)))
    return cls(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

  def by_prompt(self, values: np.ndarray) -> np.ndarray:
    """[P, N] of [U]."""
    return np.asarray(values, np.float64)[self.index]


def parts(config: OveroptimizationConfig, root: pathlib.Path) -> list[pathlib.Path]:
  """The files of the pool."""
  count = -(-records.parse_world(config.pool.prompts).n // config.pool.part)
  return [root / "pool" / f"{number:03d}" / "samples.npz" for number in range(count)]


def is_done(task: Task) -> bool:
  """Whether nothing is left to do."""
  return all(file.exists() for file in _LEAVES[task.kind](task))


def work(task: Task, devices, stopping) -> str | None:
  """In a worker: does the step; returns what was wrong, whose traceback is in the folder's log.txt."""
  if stopping():
    raise SystemExit(workers.RESUME_STATUS)
  task.folder.mkdir(parents=True, exist_ok=True)
  with workers.lock(task.folder / "lock"), workers.output_to(task.folder / "log.txt"):
    try:
      if not is_done(task):
        print(f"== {task.title}", flush=True)
        _WORK[task.kind](task, devices)
    except InputError as error:
      return str(error)
    except Exception as error:
      traceback.print_exc()
      return f"{type(error).__name__}: {error} (see {task.folder / 'log.txt'})"
  return None


def _train_size(task: Task, devices) -> None:
  sft.run(task.config.sft_config(task.what), str(task.folder), devices)


def _sample_part(task: Task, devices) -> None:
  config, section = task.config, task.config.pool
  mesh = sharding.make_mesh(config.reward.mesh, devices)
  policy = workspace.load(str(task.root / "sft" / config.policy), mesh)
  prompts = records.read(section.prompts, "prompts")
  rows = range(task.what * section.part, min(len(prompts), (task.what + 1) * section.part))
  found = _draw(
    policy,
    [prompts[row] for row in rows],
    np.array(rows) * (section.samples // section.batch_size),
    section,
    config.seed,
    mesh,
  )
  save(parts(config, task.root)[task.what], found | {"gold": _gold(config, prompts, found, rows)})


def _draw(policy, prompts, ids, section, seed: int, mesh) -> dict[str, np.ndarray]:
  """The different responses to every prompt, with `prompt` [U], and `index` [P, N] into them.

  A prompt is entered once for every batch of its samples, under an id of its own.
  """
  times = section.samples // section.batch_size
  tokens = [data.encode_prompt(p, policy.tokenizer, section.max_prompt_length) for p in prompts]
  samples = sampling.generate(
    policy.model,
    policy.params,
    [row for row in tokens for _ in range(times)],
    max_new_tokens=section.max_new_tokens,
    samples_per_prompt=section.batch_size,
    temperature=section.temperature,
    rng=jax.random.key(seed),
    eos_ids=data.stop_ids(policy.tokenizer),
    pad_id=data.pad_id(policy.tokenizer),
    prompt_ids=[first + time for first in ids for time in range(times)],
    batch_size=section.batch_size,
    mesh=mesh,
  )
  return _without_repeats(samples, len(prompts), policy.tokenizer)


def _without_repeats(samples: sampling.Samples, prompts: int, tokenizer) -> dict[str, np.ndarray]:
  """Rows that differ, prompt by prompt; a response cut at the limit differs from the one that ended."""
  lengths = samples.lengths
  keys = np.concatenate([samples.tokens, samples.prompt_lengths[:, None], lengths[:, None]], axis=1)
  chosen, index, owners = [], [], []
  for prompt, rows in enumerate(np.split(np.arange(len(keys)), prompts)):
    _, first, inverse = np.unique(keys[rows], axis=0, return_index=True, return_inverse=True)
    index.append(inverse.reshape(-1) + sum(map(len, chosen)))
    chosen.append(rows[first])
    owners.append(np.full(len(first), prompt))
  kept = np.concatenate(chosen)
  differing = jax.tree.map(lambda x: x[kept], samples)
  return {
    "tokens": differing.tokens,
    "prompt_lengths": differing.prompt_lengths,
    "lengths": lengths[kept],
    "texts": np.array(sampling.decode_texts(differing, tokenizer)),
    "index": np.stack(index),
    "prompt": np.concatenate(owners),
  }


def _gold(config: OveroptimizationConfig, prompts, found: dict, rows) -> np.ndarray:
  """[U] gold rewards; takes `prompt` out of what was found."""
  asked = [prompts[rows[owner]] for owner in found.pop("prompt")]
  return worlds.Microworld(seed=config.world_seed).gold_rewards(asked, found["texts"].tolist())


def _make_proxy(task: Task, devices) -> None:
  """Trains a reward model, and scores held-out pairs and the pool with it."""
  config, proxy = task.config, task.what
  reward.run(config.reward_config(proxy, task.root), str(task.folder), devices)
  mesh = sharding.make_mesh(config.reward.mesh, devices)
  loaded = workspace.load(str(task.folder), mesh)
  save(task.folder / "pairs.npz", {"rewards": _pair_rewards(config, loaded)})
  pool = Pool.read(parts(config, task.root))
  save(task.folder / "scores.npz", {"scores": _scores(loaded, pool)})


def held_out_pairs(config: OveroptimizationConfig) -> list[worlds.Pair]:
  """Without labels: their probabilities are known."""
  source = records.parse_world(config.held_out)
  return worlds.Microworld(seed=source.seed).pairs(source.n, source.split, source.draw)


def _pair_rewards(config: OveroptimizationConfig, loaded: workspace.Loaded) -> np.ndarray:
  """[n, 2] rewards of both replies of the held-out pairs."""
  pairs = [
    data.Preference(pair.prompt.prompt, *pair.replies, source=pair.prompt.source)
    for pair in held_out_pairs(config)
  ]
  batches = data.preference_batches(
    pairs,
    loaded.tokenizer,
    length=config.reward.data.length,
    batch_size=_ROWS // 2,
    epochs=1,
    shuffle=False,
    pad_last=True,
  )
  variables = {"params": loaded.params}
  return reward_model.pair_rewards(loaded.model, variables, loaded.head, batches)[0]


def _scores(loaded: workspace.Loaded, pool: Pool) -> np.ndarray:
  """[U] rewards, as sampled; rows of like length together, so that little padding is computed."""
  ends = pool.prompt_lengths + pool.lengths
  widths = -(-ends // _WIDTH) * _WIDTH
  scores = np.zeros(len(ends), np.float32)
  for width in np.unique(widths):
    rows = np.flatnonzero(widths == width)
    padded = np.pad(pool.tokens[rows], ((0, 0), (0, max(0, width - pool.tokens.shape[1]))))
    at = np.arange(width)
    starts, stops = pool.prompt_lengths[rows, None], ends[rows, None]
    samples = sampling.Samples(
      padded[:, :width],
      pool.prompt_lengths[rows],
      (at >= starts) & (at < stops),
      np.zeros((len(rows), width), np.float32),
      np.ones(len(rows), bool),
    )
    scores[rows] = reward_model.response_rewards(
      loaded.model, {"params": loaded.params}, loaded.head, samples, batch_size=_ROWS
    )
  return scores


def _measure_start(task: Task, devices) -> None:
  """Gold reward of the policy on the prompts of online learning, where its curves start."""
  config = task.config
  mesh = sharding.make_mesh(config.rl.mesh, devices)
  policy = workspace.load(str(task.root / "sft" / config.policy), mesh)
  prompts = records.read(config.rl.prompts.train, "prompts", limit=config.start_samples)
  longest, tokenizer = config.rl.prompts.max_length, policy.tokenizer
  tokens = [data.encode_prompt(prompt, tokenizer, longest, "drop") for prompt in prompts]
  asked = [prompt for prompt, row in zip(prompts, tokens) if row is not None]
  samples = sampling.generate(
    policy.model,
    policy.params,
    [row for row in tokens if row is not None],
    max_new_tokens=config.rl.sampling.max_new_tokens,
    temperature=config.rl.sampling.temperature,
    rng=jax.random.key(config.seed),
    eos_ids=data.stop_ids(tokenizer),
    pad_id=data.pad_id(tokenizer),
    batch_size=_ROWS,
    mesh=mesh,
  )
  texts = sampling.decode_texts(samples, tokenizer)
  world = worlds.Microworld(seed=config.world_seed)
  save(task.folder / "start.npz", {"gold": world.gold_rewards(asked, texts)})


def _learn_online(task: Task, devices) -> None:
  run = task.config.rl_runs[task.what]
  online.run(task.config.rl_config(run, task.root), str(task.folder), devices)


_WORK = {
  "sft": _train_size,
  "pool": _sample_part,
  "proxy": _make_proxy,
  "start": _measure_start,
  "rl": _learn_online,
}
_LEAVES = {
  "sft": lambda task: [task.folder / "lineage.json"],
  "pool": lambda task: [parts(task.config, task.root)[task.what]],
  "proxy": lambda task: [task.folder / "pairs.npz", task.folder / "scores.npz"],
  "start": lambda task: [task.folder / "start.npz"],
  "rl": lambda task: [task.folder / "lineage.json"],
}


def plan(config: OveroptimizationConfig, root: pathlib.Path) -> list[list[Task]]:
  """The stages; tasks of one stage do not need each other, and the longest come first."""

  def task(kind: str, folder: pathlib.Path, what: Any = None) -> Task:
    return Task(kind, folder, config, root, what)

  used = dict.fromkeys([Trunk(config.policy), *(proxy.trunk for proxy in config.proxies)])
  trunks = [task("sft", root / "sft" / trunk.name, trunk) for trunk in used]
  pool = [task("pool", file.parent, part) for part, file in enumerate(parts(config, root))]
  proxies = sorted(config.proxies, key=lambda p: -p.comparisons)
  online_runs = [task("rl", root / "rl" / name, name) for name in config.rl_runs]
  if online_runs:
    online_runs.append(task("start", root / "rl"))
  return [trunks, pool, [task("proxy", root / "proxies" / p.name, p) for p in proxies], online_runs]


def check_folders(config: OveroptimizationConfig, root: pathlib.Path) -> None:
  """Raises InputError where a folder was made with other settings; new sizes, arms and runs are fine."""
  policy = config_lib.to_dict(config.sft_config(Trunk(config.policy)))
  drawn = {"seed": config.seed, "policy": policy} | config_lib.to_dict(config.pool)
  workdir.open_workdir(root / "pool", "pool", drawn)
  workdir.open_workdir(root / "proxies", "proxies", {"held_out": config.held_out})


def save(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz in one move: a killed run leaves no half of it."""
  part = file.with_suffix(".part.npz")
  np.savez_compressed(part, **arrays)
  part.replace(file)


def load_scores(root: pathlib.Path, proxy: Proxy) -> np.ndarray:
  with np.load(root / "proxies" / proxy.name / "scores.npz") as found:
    return found["scores"]


def load_pairs(root: pathlib.Path, proxy: Proxy) -> np.ndarray:
  with np.load(root / "proxies" / proxy.name / "pairs.npz") as found:
    return found["rewards"]
