"""Supervised fine-tuning on demonstrations (from scratch, this is pretraining too)."""

import dataclasses

from align_jax import config as config_lib
from align_jax import data, sharding
from align_jax.phases import records, train, workspace
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.sharding import MeshConfig
from align_jax.training import objectives, workdir
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """Settings of `experiments.sft`."""

  seed: int
  model: ModelSection
  data: DataSection
  optimizer: OptimizerConfig
  loop: LoopConfig
  pack: bool = True  # several records in one row, isolated by segment ids
  accumulate: int = 1  # parts a batch is split into
  mesh: MeshConfig = MeshConfig()


def run(config: SftConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = workdir.open_workdir(path, "sft", config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  section = config.data
  train_records, eval_records = records.read_split(section, "demonstrations")
  workspace.check_batch(section.batch_size, config.accumulate, mesh)
  tokenizer = workspace.tokenizer_of(config.model)
  batches = demonstration_batches(config, tokenizer, mesh)
  training = batches(train_records)
  held_out = list(batches(eval_records, epochs=1)) if eval_records else None
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  trainable, frozen, model = train.policy_trainable(loaded, config.model, mesh, config.seed)
  plan = train.Plan(
    phase="sft",
    kind="policy",
    loaded=loaded,
    trainable=trainable,
    frozen=frozen,
    objective=objectives.sft_objective(model, chunk=config.model.logits_chunk),
    batches=training,
    eval_batches=held_out,
    fingerprint=data.fingerprint(records.all_records(train_records)),
    parents=workspace.parents(init=(config.model.init, loaded)),
  )
  train.run_plan(plan, config, folder, mesh)


def demonstration_batches(config: SftConfig, tokenizer, mesh):
  """`(records, epochs=None) -> iterator` of rows."""

  def make(source, epochs: int | None = None):
    options = train.stream_options(config, mesh, epochs)
    return data.sft_batches(
      source, tokenizer, pack=config.pack, buckets=config.data.buckets, **options
    )

  return make
