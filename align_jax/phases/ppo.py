"""RLHF with PPO: rollouts scored by a reward model, KL to the SFT model, a value model started from
the reward model (Ouyang et al. 2022)."""

import dataclasses

from align_jax import config as config_lib
from align_jax import data, rl, sharding, worlds
from align_jax.errors import InputError
from align_jax.phases import records, train, workspace
from align_jax.phases.sections import ModelSection
from align_jax.sharding import MeshConfig
from align_jax.training import loop, optimizer, workdir
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PromptSection:
  """The prompts that are answered."""

  train: str  # a file, a folder, hf:org/name:split, or "microworld:seed=0,n=1000"
  batch_size: int  # rollouts an iteration
  max_length: int  # tokens; longer prompts are left out
  columns: str | None = None
  limit: int | None = None
  chat: bool = True  # plain-text prompts are wrapped in the chat template


@dataclasses.dataclass(frozen=True)
class PpoConfig:
  """Settings of `experiments.ppo`; one step of the loop is one iteration of sample, score, learn."""

  seed: int
  model: ModelSection
  reward_model: str  # workdir; its weights also start the value model
  prompts: PromptSection
  ppo: rl.PpoConfig
  optimizer: OptimizerConfig
  loop: LoopConfig
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if self.model.init == "scratch":
      raise InputError("PPO needs a trained model: model.init cannot be scratch")
    if self.model.logits_chunk is not None:
      raise InputError("model.logits_chunk is not used by PPO; set ppo.logits_chunk")
    if self.loop.eval_every:
      raise InputError("loop.eval_every is not used by PPO, which logs its scores at every step")


def run(config: PpoConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  workspace.single_process("PPO")
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = workdir.open_workdir(path, "ppo", config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  prompts, batches = _prompts(config, mesh)
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  judge = workspace.load(config.reward_model, mesh, dtype=config.model.dtype)
  if judge.head is None:
    raise InputError(f"{config.reward_model} is not a reward model")
  workspace.same_vocabulary(loaded, judge, config.reward_model)
  trainable, frozen, models = _weights(config, loaded, judge, mesh)
  tx = optimizer.make_optimizer(config.optimizer, config.loop.steps * config.ppo.updates)
  iterate = rl.make_iteration(
    *models,
    config=config.ppo,
    tx=tx,
    rewards=_rewards(config.prompts.train, judge, mesh),
    prompts=prompts,
    tokenizer=loaded.tokenizer,
    eos_ids=data.stop_ids(loaded.tokenizer),
    mesh=mesh,
    accumulate=config.accumulate,
  )
  workspace.describe(folder, loaded, config.model, "policy", inside="policy")
  lineage = workspace.Lineage("ppo", _parents(config, loaded, judge), data.fingerprint(prompts))
  loop.fit(
    rl.create_state(trainable, tx, config.ppo, config.seed, mesh),
    name="ppo",
    step=lambda state, batch: iterate(state, frozen, batch)[:2],
    batches=batches,
    put=lambda batch: batch,  # prompts go to the device inside the sampler
    config=config.loop,
    workdir=folder,
    metadata=lineage.metadata(),
    hooks=loop.Hooks(check_first=lambda v: rl.check_identity(v, dtype=config.model.dtype)),
  )
  lineage.write(folder, config.loop.steps)


def _prompts(config: PpoConfig, mesh):
  """(prompt records, their endless batches), checked before any weight is loaded."""
  section = config.prompts
  prompts = records.read(
    section.train, "prompts", columns=section.columns, limit=section.limit, chat=section.chat
  )
  workspace.check_batch(section.batch_size, config.accumulate * config.ppo.minibatches, mesh)
  batches = data.prompt_batches(
    prompts,
    workspace.tokenizer_of(config.model),
    length=section.max_length,
    batch_size=section.batch_size,
    seed=config.seed,
  )
  return prompts, batches


def _parents(config: PpoConfig, loaded, judge):
  policy, reward_model = (config.model.init, loaded), (config.reward_model, judge)
  return workspace.parents(policy=policy, ref=policy, reward_model=reward_model, value=reward_model)


def _weights(config: PpoConfig, loaded, judge, mesh):
  """({"policy", "value"}, frozen, (policy module, value module)); the value starts as the reward."""
  policy, frozen, model = train.policy_trainable(loaded, config.model, mesh, config.seed)
  frozen = frozen or {"ref": loaded.params}
  value_model = judge.model
  if config.model.lora.rank:
    adapter = workspace.new_lora(judge.model, config.model.lora, mesh, config.seed + 1)
    value = {"lora": adapter, "head": judge.head}
    frozen = frozen | {"value": judge.params}
    value_model = judge.model.clone(lora_scale=config.model.lora.scale)
  else:
    value = {"trunk": judge.params, "head": judge.head}
  return {"policy": policy, "value": value}, frozen, (model, value_model)


def _rewards(source: str, judge, mesh):
  """The reward model; on the microworld the gold judge is logged beside it, with weight 0."""
  weights = {"trunk": judge.params, "head": judge.head}
  rewards = [rl.model_reward("model", judge.model, weights, mesh=mesh)]
  if records.is_world(source):
    world = worlds.Microworld(seed=records.parse_world(source).seed)
    rewards.append(rl.text_reward("gold", world.gold_rewards, weight=0.0))
  return rewards
