"""Online learning: responses are sampled, scored and learned from, by policy gradients (PPO and the
critic-free ones), by preferences between them, or by keeping the best."""

import dataclasses

from align_jax import config as config_lib
from align_jax import data, rl, sharding
from align_jax.errors import InputError
from align_jax.evals import dashboard
from align_jax.phases import online_methods, records, workspace
from align_jax.phases import ptx as ptx_phase
from align_jax.phases import rewards as rewards_phase
from align_jax.phases.ptx import PtxSection
from align_jax.phases.rewards import RewardConfig
from align_jax.phases.rollout_log import RolloutLog, RolloutLogConfig
from align_jax.phases.sections import ModelSection
from align_jax.rl.stops import StopConfig, make_stop
from align_jax.sharding import MeshConfig
from align_jax.training import integrity, loop, workdir
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig

METHODS = online_methods.METHODS


@dataclasses.dataclass(frozen=True)
class PromptSection:
  """The prompts that are answered."""

  train: str  # a file, a folder, hf:org/name:split, or "microworld:seed=0,n=1000"
  batch_size: int  # prompts an iteration; each is answered sampling.samples_per_prompt times
  max_length: int  # tokens; longer prompts are left out
  columns: str | None = None
  limit: int | None = None
  chat: bool = True  # plain-text prompts are wrapped in the chat template


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """Settings of `experiments.ppo`; one step of the loop is one iteration of sample, score, learn."""

  seed: int
  model: ModelSection
  prompts: PromptSection
  sampling: rl.SamplingConfig
  rewards: dict[str, RewardConfig]  # terms of the score, by the name they are logged under
  optimizer: OptimizerConfig
  loop: LoopConfig
  reward_model: str | None = None  # workdir; starts the value model, and rewards of kind "model"
  shaping: rl.ShapingConfig = rl.ShapingConfig()
  policy_gradient: rl.PolicyGradientConfig | None = None  # one of METHODS must be given
  online_preference: rl.OnlinePreferenceConfig | None = None
  rejection: rl.RejectionConfig | None = None
  value_optimizer: OptimizerConfig | None = None  # of the value model; None: as the policy's
  ema_decay: float | None = (
    None  # the average over iterations that is kept instead; InstructGPT 0.992
  )
  ptx: PtxSection | None = None
  stops: StopConfig = StopConfig()
  rollouts: RolloutLogConfig = RolloutLogConfig()
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    given = [name for name in METHODS if getattr(self, name) is not None]
    if len(given) != 1:
      raise InputError(f"exactly one of {', '.join(METHODS)} must be given, not {given or 'none'}")
    if self.model.init == "scratch":
      raise InputError("online learning needs a trained model: model.init cannot be scratch")
    if self.model.logits_chunk is not None:
      raise InputError(f"model.logits_chunk is not used here; set {given[0]}.logits_chunk")
    if self.ema_decay is not None and not 0 < self.ema_decay < 1:
      raise InputError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")
    if self.loop.eval_every:
      raise InputError("loop.eval_every is not used here: scores are logged at every step")
    online_methods.check(self)


def run(config: OnlineConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = workdir.open_workdir(path, "ppo", config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  prompts, batches = _prompts(config, mesh)
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  rewards, judges = _rewards(config, loaded, prompts, mesh)
  method = online_methods.build(config, loaded, judges.get(config.reward_model), prompts, mesh)
  iterate = rl.make_iteration(
    method.draw,
    method.learner,
    rewards=rewards,
    shaping=config.shaping,
    sampling=config.sampling,
    mesh=mesh,
    opponents=online_methods.opponents(config),
    extra_draws=online_methods.extra_draws(config),
    ema_decay=config.ema_decay,
    layouts=method.layouts,
  )
  workspace.describe(folder, loaded, config.model, "policy", inside=method.kept)
  lineage = workspace.Lineage("ppo", _parents(config, loaded, judges), data.fingerprint(prompts))
  log = RolloutLog(folder, config.rollouts)

  def step(state, batch):
    at = int(state.step)
    state, metrics, rollout = iterate(state, method.frozen, batch)
    log.write(at, rollout, rollout.facts)
    return state, metrics

  with dashboard.Live(folder) as live:
    state = loop.fit(
      rl.create_state(
        method.trainable, method.tx, kl_coef=method.kl_coef, seed=config.seed, mesh=mesh
      ),
      name="ppo",
      step=step,
      batches=batches,
      put=lambda batch: ptx_phase.split(batch, config.ptx),
      config=config.loop,
      workdir=folder,
      metadata=lineage.metadata(),
      identity=_identity(method, judges),
      hooks=loop.Hooks(
        check_first=lambda v: rl.check_identity(v, dtype=config.model.dtype),
        stop=make_stop(config.stops),
        report=live,
      ),
    )
    lineage.write(folder, int(state.step))


def _prompts(config: OnlineConfig, mesh):
  """(prompt records, their endless batches), checked before any weight is loaded."""
  section = config.prompts
  prompts = records.read(
    section.train, "prompts", columns=section.columns, limit=section.limit, chat=section.chat
  )
  responses = section.batch_size * config.sampling.samples_per_prompt
  workspace.check_batch(online_methods.units(config), online_methods.splits(config), mesh)
  rewards_phase.check(
    config.rewards, prompts, prompts_source=section.train, reward_model=config.reward_model
  )
  tokenizer = workspace.tokenizer_of(config.model)
  batches = data.prompt_batches(
    prompts,
    tokenizer,
    length=section.max_length,
    batch_size=section.batch_size * (1 + online_methods.extra_draws(config)),
    seed=config.seed,
  )
  return prompts, ptx_phase.join(batches, config.ptx, tokenizer, responses, config.seed)


def _rewards(config: OnlineConfig, loaded: workspace.Loaded, prompts, mesh):
  """(terms of the score, the reward models they use by workdir)."""
  reference = rewards_phase.reference_rollouts(
    loaded,
    prompts,
    max_length=config.prompts.max_length,
    sampling=config.sampling,
    seed=config.seed,
    mesh=mesh,
  )
  return rewards_phase.build(
    config.rewards,
    prompts_source=config.prompts.train,
    reward_model=config.reward_model,
    policy=loaded,
    mesh=mesh,
    dtype=config.model.dtype,
    reference=reference,
  )


def _identity(method: online_methods.Method, judges) -> dict[str, str]:
  """Hashes of what must not change while a run lasts: the reference, and who gives the scores."""
  fixed = method.frozen | {
    f"reward model {path}": {"params": judge.params, "head": judge.head}
    for path, judge in judges.items()
  }
  return {name: integrity.fingerprint(tree) for name, tree in fixed.items()}


def _parents(config: OnlineConfig, loaded, judges):
  """The policy, its reference, every reward model, and what the value model was started from."""
  policy = config.model.init, loaded
  roles = {"policy": policy, "ref": policy}
  for index, (path, judge) in enumerate(judges.items()):
    roles["reward_model" if index == 0 else f"reward_model_{index}"] = path, judge
  if config.policy_gradient and config.policy_gradient.value:
    path = config.reward_model
    roles["value"] = policy if path is None else (path, judges[path])
  return workspace.parents(**roles)
