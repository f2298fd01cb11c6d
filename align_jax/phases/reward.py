"""Reward modelling: a Bradley–Terry head on the trunk of an SFT model, read at the last response token."""

import dataclasses

from align_jax import config as config_lib
from align_jax import data, sharding
from align_jax.errors import InputError
from align_jax.phases import records, sections, train, workspace
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.sharding import MeshConfig
from align_jax.training import objectives, workdir
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Settings of `experiments.reward`."""

  seed: int
  model: ModelSection
  data: DataSection
  optimizer: OptimizerConfig
  loop: LoopConfig
  centering: float = 0.01  # weight of (r+ + r-)^2; Eisenstein et al. 2023 advise 0.01
  label_smoothing: float = 0.0
  layout: str = (
    "shared"  # the prompt of a pair once, rows packed; or "padded": two whole rows a pair
  )
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if self.model.init == "scratch":
      raise InputError("a reward model needs a trained trunk: model.init cannot be scratch")
    sections.check_one_of("layout", self.layout, sections.LAYOUTS)
    if self.model.logits_chunk is not None:
      raise InputError("model.logits_chunk is not used by a reward model, which has no logits")


def run(config: RewardConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = workdir.open_workdir(path, "reward", config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  pairs, held_out = records.read_split(config.data, "preferences")
  train.check_pairs(config, mesh)
  tokenizer = workspace.tokenizer_of(config.model)
  tokens = train.tokenised_pairs(config, pairs, tokenizer)
  training = train.pair_batches(config, tokens, mesh, accumulate=config.accumulate)
  eval_batches = None
  if held_out:
    tokens = train.tokenised_pairs(config, held_out, tokenizer, epochs=1)
    eval_batches = list(train.pair_batches(config, tokens, mesh))
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  weights, frozen, model = train.policy_trainable(loaded, config.model, mesh, config.seed)
  plan = train.Plan(
    phase="reward",
    kind="reward",
    loaded=loaded,
    trainable={
      "lora" if frozen else "trunk": weights,
      "head": workspace.new_head(loaded.model, mesh, config.seed),
    },
    frozen=frozen,
    objective=objectives.reward_objective(
      model, centering=config.centering, label_smoothing=config.label_smoothing
    ),
    batches=training,
    eval_batches=eval_batches,
    fingerprint=data.fingerprint(records.all_records(pairs)),
    parents=workspace.parents(trunk=(config.model.init, loaded)),
  )
  train.run_plan(plan, config, folder, mesh)
