"""Direct preference optimisation: DPO, IPO or KTO against the frozen model that the phase starts from."""

import dataclasses
import math

from align_jax import config as config_lib
from align_jax import data, sharding
from align_jax.errors import InputError
from align_jax.phases import records, train, workspace
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.sharding import MeshConfig
from align_jax.training import objectives, workdir
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """Settings of `experiments.preference`."""

  seed: int
  model: ModelSection
  data: DataSection
  objective: objectives.PreferenceConfig
  optimizer: OptimizerConfig
  loop: LoopConfig
  records: str = "pairs"  # or "feedback", for kto: {"prompt", "completion", "label"}
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if self.model.init == "scratch":
      raise InputError(
        "preference optimisation needs a trained model: model.init cannot be scratch"
      )
    if self.objective.name == "kto" and self.data.batch_size < 2:
      raise InputError(
        "kto compares mismatched examples of a batch: data.batch_size must be over 1"
      )
    if self.records not in ("pairs", "feedback"):
      raise InputError(f"config.records must be 'pairs' or 'feedback', not {self.records!r}")
    if self.records == "feedback" and self.objective.name != "kto":
      raise InputError(
        f"{self.objective.name} learns from pairs; config.records='feedback' is for kto"
      )
    if self.objective.name == "kto" and self.data.buckets:
      raise InputError("data.buckets is not used by the objective 'kto'")


def run(config: PreferenceConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  mesh = sharding.make_mesh(config.mesh, devices)
  name = config.objective.name
  folder = workdir.open_workdir(path, name, config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  kind = "preferences" if config.records == "pairs" else "feedback"
  examples, held_out = records.read_split(config.data, kind, eval_kind="preferences")
  check_margins(records.all_records(examples), name)
  workspace.check_batch(config.data.batch_size, config.accumulate, mesh)
  kto = name == "kto"
  tokenizer = workspace.tokenizer_of(config.model)
  batches = train.pair_batches(config, tokenizer)
  training = train.feedback_batches(config, tokenizer)(examples) if kto else batches(examples)
  eval_batches = list(batches(held_out, epochs=1)) if held_out else None
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  trainable, frozen, model = train.policy_trainable(loaded, config.model, mesh, config.seed)
  chunk = config.model.logits_chunk
  plan = train.Plan(
    phase=name,
    kind="policy",
    loaded=loaded,
    trainable=trainable,
    frozen=frozen or {"ref": loaded.params},
    objective=objectives.preference_objective(model, config.objective, chunk=chunk),
    prepare=objectives.kto_prepare(model, chunk=chunk) if kto else None,
    batches=training,
    eval_objective=objectives.preference_evaluation(model, config.objective, chunk=chunk),
    eval_batches=eval_batches,
    fingerprint=data.fingerprint(records.all_records(examples)),
    parents=workspace.parents(policy=(config.model.init, loaded), ref=(config.model.init, loaded)),
    check_first=lambda values: check_identity(config.objective, values),
  )
  train.run_plan(plan, config, folder, mesh)


def check_margins(examples, name: str) -> None:
  """Raises InputError where a record asks for a margin, which these objectives have no place for."""
  for example in examples:
    if isinstance(example, data.Preference) and example.margin:
      raise InputError(
        f"{example.source}: field 'margin' is not used by {name}, only by reward models"
      )


def identity_loss(objective: objectives.PreferenceConfig) -> float:
  """The loss where the policy is its own reference: ln 2 (DPO), 1/(4 tau^2) (IPO), weight/2 (KTO)."""
  settings = objective.settings()
  if objective.name == "dpo":
    return math.log(2.0)
  if objective.name == "ipo":
    return 1.0 / (4.0 * settings["tau"] ** 2)
  return 0.5 * settings["desirable_weight"]


def check_identity(objective: objectives.PreferenceConfig, values: dict[str, float]) -> None:
  """Stops a run whose policy is not its reference at step 0, which most pipeline bugs cause."""
  if objective.name == "kto":
    settings = objective.settings()
    if settings["desirable_weight"] != settings["undesirable_weight"]:
      return  # the loss then depends on how many of each the batch holds
  expected = identity_loss(objective)
  if not abs(values["loss"] - expected) <= 1e-4 * max(1.0, expected):
    raise FloatingPointError(
      f"at step 0 policy and reference must agree, so the {objective.name} loss must be "
      f"{expected:.6f}; it is {values['loss']:.6f}"
    )
