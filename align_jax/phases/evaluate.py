"""Evaluation: a policy against its reference on held-out prompts, or a reward model on held-out pairs."""

import dataclasses
import pathlib

import jax
import numpy as np

from align_jax import config as config_lib
from align_jax import data, hosts, rl, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import best_of_n, results, reward_model
from align_jax.evals import policy as policy_lib
from align_jax.phases import records, workspace
from align_jax.phases import rewards as rewards_phase
from align_jax.phases.rewards import RewardConfig
from align_jax.sharding import MeshConfig
from align_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Settings of `experiments.evaluate`."""

  data: str  # prompts to answer, or preference pairs for a reward model
  policy: str | None = None  # what is evaluated; None: the workdir itself
  reference: str | None = None  # what win rate and KL are measured against; needed for a policy
  # the microworld's judge, "reward:<workdir of a reward model>", or "rewards": those of the next line
  scorer: str = "gold"
  rewards: dict[str, RewardConfig] = dataclasses.field(default_factory=dict)  # their weighted sum
  columns: str | None = None
  chat: bool = True  # plain-text prompts are wrapped in the chat template
  limit: int | None = None
  max_new_tokens: int = 24
  max_prompt_length: int = 1024  # longer prompts lose their beginning
  length: int = 48  # tokens a row of preference pairs
  temperature: float = 1.0
  batch_size: int = 128
  seed: int = 0
  dtype: str = "float32"
  # Best-of-n as well: for these n, from best_of_samples to a prompt, chosen by the selector ("gold", or
  # "reward:<workdir>") and reported by the scorer.
  best_of: tuple[int, ...] = ()
  best_of_samples: int | None = None
  selector: str | None = None
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    for name in ("best_of_samples", "selector"):
      if (getattr(self, name) is not None) != bool(self.best_of):
        raise InputError(f"config.{name} and config.best_of go together: give both or neither")
    if self.best_of:
      best_of_n.check_sizes(self.best_of, self.best_of_samples)
      if self.best_of_samples > self.batch_size:
        raise InputError("config.batch_size must hold the config.best_of_samples of a prompt")
    if (self.scorer == "rewards") != bool(self.rewards):
      raise InputError("config.rewards is what scorer 'rewards' adds up: give both or neither")


@dataclasses.dataclass(frozen=True)
class Reference:
  """What policies are compared with, and its answers: loaded and sampled once for many policies."""

  loaded: workspace.Loaded
  responses: policy_lib.Responses


def sample_reference(config: EvaluateConfig, devices) -> Reference:
  """Loads `config.reference` and lets it answer the prompts, for `run(..., reference=...)`."""
  mesh = sharding.make_mesh(config.mesh, devices)
  loaded = workspace.load(config.reference, mesh, dtype=config.dtype)
  responses = policy_lib.respond(
    _policy(config.reference, loaded),
    read_prompts(config),
    loaded.tokenizer,
    sampling_settings(config),
    mesh,
  )
  return Reference(loaded, responses)


def run(config: EvaluateConfig, path: str, devices, *, reference: Reference | None = None) -> None:
  """Writes evaluation.json (and samples.jsonl for a policy, best_of_n.json and .png) into the workdir.

  reference: what `sample_reference` gave for the same settings, to do that once for many policies.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = pathlib.Path(path)
  init = config.policy or path
  if config.rewards:
    rewards_phase.check(
      config.rewards, read_prompts(config), prompts_source=config.data, reward_model=None
    )
  loaded = workspace.load(init, mesh, dtype=config.dtype)
  if loaded.head is not None and config.best_of:
    raise InputError(f"config.best_of: {init} is a reward model; a policy is needed")
  found = _evaluate_best_of(config, init, loaded, mesh) if config.best_of else None
  if loaded.head is not None:
    evaluation, samples = _evaluate_reward_model(config, loaded, mesh), ()
  else:
    evaluation, samples = _evaluate_policy(config, init, loaded, mesh, reference)
  if jax.process_index() == 0:
    if found:
      best_of_n.save(folder, found)
    results.save(folder, evaluation, samples)
  workdir.write_json(folder / "evaluation_config.json", config_lib.to_dict(config))
  hosts.wait("evaluation written")


def _evaluate_policy(config: EvaluateConfig, init: str, loaded, mesh, given: Reference | None):
  if config.reference is None:
    raise InputError("config.reference must name what the policy is compared with")
  prompts = read_prompts(config)
  scorer, judge = make_scorer(config, loaded, mesh)
  if config.reference == init:
    reference = loaded
  else:
    reference = (
      given.loaded if given else workspace.load(config.reference, mesh, dtype=config.dtype)
    )
  if reference.head is not None:
    raise InputError(f"config.reference: {config.reference} is a reward model; a policy is needed")
  workspace.same_vocabulary(loaded, reference, config.reference)
  return policy_lib.evaluate_policy(
    _policy(init, loaded),
    _policy(config.reference, reference),
    prompts,
    loaded.tokenizer,
    scorer,
    sampling_settings(config),
    scorer_name=config.scorer,
    judge=judge,
    reference_responses=given.responses if given else None,
    mesh=mesh,
  )


def _evaluate_best_of(config: EvaluateConfig, init: str, loaded, mesh) -> best_of_n.BestOfN:
  selector = dataclasses.replace(config, scorer=config.selector, rewards={})
  return best_of_n.evaluate_best_of_n(
    _policy(init, loaded),
    read_prompts(config),
    loaded.tokenizer,
    make_scorer(selector, loaded, mesh)[0],
    make_scorer(config, loaded, mesh)[0],
    sampling_settings(config),
    sizes=config.best_of,
    samples=config.best_of_samples,
    selector_name=config.selector,
    scorer_name=config.scorer,
    mesh=mesh,
  )


def _policy(init: str, loaded: workspace.Loaded) -> policy_lib.Policy:
  return policy_lib.Policy(pathlib.Path(init).name, loaded.model, loaded.params)


def read_prompts(config: EvaluateConfig) -> list[data.Prompt]:
  return records.read(
    config.data, "prompts", columns=config.columns, limit=config.limit, chat=config.chat
  )


def sampling_settings(config: EvaluateConfig) -> policy_lib.SamplingSettings:
  return policy_lib.SamplingSettings(
    max_new_tokens=config.max_new_tokens,
    temperature=config.temperature,
    seed=config.seed,
    batch_size=config.batch_size,
    max_prompt_length=config.max_prompt_length,
  )


def make_scorer(config: EvaluateConfig, loaded: workspace.Loaded, mesh):
  """(scorer, judge): the microworld's gold judge; or rewards or a reward model, without a judge."""
  if config.scorer == "gold":
    if not records.is_world(config.data):
      raise InputError(
        "scorer 'gold' judges microworld prompts only; use scorer='reward:<workdir>'"
      )
    world = worlds.Microworld(seed=records.parse_world(config.data).seed)
    return lambda prompts, r: world.gold_rewards(prompts, r.texts), world.judge
  if config.scorer == "rewards":
    return _sum_of_rewards(config, loaded, mesh), None
  kind, _, init = config.scorer.partition(":")
  if kind != "reward" or not init:
    raise InputError(
      f"config.scorer must be 'gold', 'rewards' or 'reward:<workdir>', not {config.scorer!r}"
    )
  scorer = workspace.load(init, mesh, dtype=config.dtype)
  workspace.same_vocabulary(loaded, scorer, init)
  return reward_scorer(scorer, config), None


def _sum_of_rewards(config: EvaluateConfig, loaded: workspace.Loaded, mesh):
  """`(prompts, responses) -> [n]` weighted sums of `config.rewards`, as online learning sees them."""
  terms, _ = rewards_phase.build(
    config.rewards,
    prompts_source=config.data,
    reward_model=None,
    policy=loaded,
    mesh=mesh,
    dtype=config.dtype,
  )

  def score(prompts, responses) -> np.ndarray:
    return rl.rewards.score(terms, rl.Rollout(prompts, responses.texts, responses.samples))[""]

  return score


def reward_scorer(loaded: workspace.Loaded, config: EvaluateConfig):
  """`(prompts, responses) -> [n]` scores of a reward model."""
  if loaded.head is None:
    raise InputError("the scorer's checkpoint is a policy, not a reward model")

  def score(prompts, responses) -> np.ndarray:
    del prompts  # they are part of the sampled rows
    return reward_model.response_rewards(
      loaded.model,
      {"params": loaded.params},
      loaded.head,
      responses.samples,
      batch_size=config.batch_size,
    )

  return score


def _evaluate_reward_model(config: EvaluateConfig, loaded: workspace.Loaded, mesh):
  pairs = records.read(
    config.data, "preferences", columns=config.columns, limit=config.limit, chat=config.chat
  )
  batches = data.preference_batches(
    pairs,
    loaded.tokenizer,
    length=config.length,
    batch_size=config.batch_size,
    epochs=1,
    shuffle=False,
    pad_last=True,
  )
  rewards, lengths = reward_model.pair_rewards(
    loaded.model, {"params": loaded.params}, loaded.head, batches
  )
  gold = None
  if records.is_world(config.data):
    world = worlds.Microworld(seed=records.parse_world(config.data).seed)
    gold = np.array([a.reward - b.reward for a, b in world.judge_pairs(pairs)])
  return reward_model.evaluate_pairs(
    rewards[:, 0],
    rewards[:, 1],
    chosen_lengths=lengths[:, 0],
    rejected_lengths=lengths[:, 1],
    gold_margins=gold,
  )
