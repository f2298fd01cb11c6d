"""Preference optimisation: any objective of the family against the model that the phase starts from."""

import dataclasses
from collections.abc import Callable
from typing import Any

from align_jax import config as config_lib
from align_jax import data, sharding
from align_jax.errors import InputError
from align_jax.phases import records, reference, sections, train, workspace
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.sharding import MeshConfig
from align_jax.training import preference_objectives, preferences, workdir
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig

RECORDS = ("pairs", "feedback")
REFERENCES = ("auto", "cached", "recomputed")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """Settings of `experiments.preference`."""

  seed: int
  model: ModelSection
  data: DataSection
  objective: preferences.PreferenceConfig
  optimizer: OptimizerConfig
  loop: LoopConfig
  records: str = "pairs"  # or "feedback", for kto: {"prompt", "completion", "label"}
  layout: str = (
    "shared"  # the prompt of a pair once, rows packed; or "padded": two whole rows a pair
  )
  reference: str = (
    "auto"  # log-probs "cached" on disk or "recomputed" every step; auto: cached if it can
  )
  reference_cache: str | None = None  # folder that runs may share; None: inside the workdir
  reference_model: str | None = None  # a policy of the same shape; None: what the phase starts from
  reference_memory: str = "device"  # or "host": a recomputed reference is fetched layer by layer
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if self.model.init == "scratch":
      raise InputError(
        "preference optimisation needs a trained model: model.init cannot be scratch"
      )
    sections.check_one_of("layout", self.layout, sections.LAYOUTS)
    sections.check_one_of("reference", self.reference, REFERENCES)
    sections.check_one_of("reference_memory", self.reference_memory, sections.MEMORIES)
    sections.check_one_of("records", self.records, RECORDS)
    if self.records == "feedback" and not self.objective.unpaired:
      raise InputError(
        f"{self.objective.name} learns from pairs; config.records='feedback' is for kto"
      )
    if self.objective.unpaired:
      self._check_unpaired()
    if self.objective.batchwise and self.accumulate > 1:
      raise InputError(
        f"{self.objective.name} sorts the pairs of a whole batch: config.accumulate must be 1"
      )
    self._check_reference()

  def _check_unpaired(self):
    name = self.objective.name
    if "kl_baseline" in self.objective.arrays and self.data.batch_size < 2:
      raise InputError(
        f"{name} compares mismatched examples of a batch: data.batch_size must be over 1"
      )
    if self.data.buckets:
      raise InputError(f"data.buckets is not used by the objective {name!r}")

  def _check_reference(self):
    name, objective = self.objective.name, self.objective
    if self.reference != "auto" and not objective.needs_reference:
      raise InputError(f"config.reference is not used by {name}, which has none: leave it at auto")
    if self.reference == "cached" and not self.can_cache:
      raise InputError(f"config.reference='cached' is not possible: {self._no_cache}")
    if self.reference_cache and not self.caches:
      raise InputError(
        f"config.reference_cache is not used: {self._no_cache or 'it is recomputed'}"
      )
    if self.reference_model and (objective.sync_every or not objective.needs_reference):
      reason = "objective.sync_every moves it" if objective.sync_every else f"{name} has none"
      raise InputError(f"config.reference_model is not used as the reference: {reason}")
    if self.reference_memory == "host" and not self.copies:
      raise InputError(
        "config.reference_memory='host' is not used: there is no second copy of the weights, as the "
        "reference is cached, moves, or is the base of an adapter"
      )
    if objective.sync_every and self.model.lora.rank and objective.sync_alpha != 1.0:
      raise InputError("objective.sync_alpha must be 1 with LoRA: two adapters have no average")

  @property
  def _no_cache(self) -> str:
    objective = self.objective
    if not objective.needs_reference:
      return f"{objective.name} has no reference"
    if objective.unpaired:
      return f"{objective.name} draws mismatched answers anew"
    if objective.needs_distributions:
      return f"{objective.name} reads the reference's whole distributions"
    return "objective.sync_every moves the reference" if objective.sync_every else ""

  @property
  def can_cache(self) -> bool:
    return not self._no_cache

  @property
  def copies(self) -> bool:
    """Whether the reference is a second, frozen set of weights."""
    objective = self.objective
    fixed = objective.needs_reference and not (self.caches or objective.sync_every)
    return fixed and not (self.model.lora.rank and self.reference_model is None)

  @property
  def caches(self) -> bool:
    """Whether the reference's log-probs are read from disk."""
    return self.can_cache and self.reference != "recomputed"


def run(config: PreferenceConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  mesh = sharding.make_mesh(config.mesh, devices)
  objective = config.objective
  folder = workdir.open_workdir(path, objective.name, config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  _check_batches(config, mesh)
  source = _Records.read(config, mesh)
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  trainable, frozen, model = train.policy_trainable(loaded, config.model, mesh, config.seed)
  chunk, rests = config.model.logits_chunk, config.reference_memory == "host"
  roles = {"policy": (config.model.init, loaded)}
  if objective.needs_reference:
    roles["ref"] = _reference(config, loaded, mesh)
    ref = roles["ref"][1]
    if config.copies:
      frozen = frozen | {"ref": sharding.in_host_memory(ref.params) if rests else ref.params}
  read = _reference_reader(config, folder, ref, mesh) if config.caches else None
  plan = train.Plan(
    phase=objective.name,
    kind="policy",
    loaded=loaded,
    trainable=trainable,
    frozen=frozen,
    objective=preference_objectives.preference_objective(model, objective, chunk=chunk),
    prepare=preference_objectives.prepare(model, objective, chunk=chunk),
    batches=source.training_batches(config, mesh, read),
    eval_objective=preference_objectives.preference_evaluation(model, objective, chunk=chunk),
    eval_batches=source.eval_batches(config, mesh, read),
    fingerprint=data.fingerprint(source.records),
    parents=workspace.parents(**roles),
    check_first=None if config.reference_model else _identity_check(config),
    start_loss=None if config.reference_model else objective.identity_loss(),
    reference=ref.params if config.caches else None,
    carried=preference_objectives.carried(objective, trainable, frozen),
    carry=preference_objectives.carry(objective),
    consume=rests and not config.model.lora.rank,
  )
  train.run_plan(plan, config, folder, mesh)


def _check_batches(config: PreferenceConfig, mesh):
  if config.objective.unpaired:
    workspace.check_batch(config.data.batch_size, config.accumulate, mesh)
  else:
    train.check_pairs(config, mesh)


def _reference(config: PreferenceConfig, loaded: workspace.Loaded, mesh):
  """(name, policy) that the objective compares with."""
  name = config.reference_model
  if name is None:
    return config.model.init, loaded
  found = workspace.load(
    name,
    mesh,
    dtype=config.model.dtype,
    remat=config.model.remat,
    attention=config.model.attention,
  )
  if found.head is not None or found.model.config != loaded.model.config:
    raise InputError(f"config.reference_model: {name} is no policy of the shape of model.init")
  workspace.same_vocabulary(loaded, found, name)
  return name, found


def _identity_check(config: PreferenceConfig) -> Callable:
  return lambda values: check_identity(config.objective, values, nats=_rounding(config))


@dataclasses.dataclass(frozen=True)
class _Records:
  """What is trained on and what is held out, tokenised before any weight is loaded."""

  training: Any  # Pairs, or batches of single responses with a thumb up or down
  held_out: data.Pairs | None
  records: list
  eval_records: list
  tokenizer: Any

  @classmethod
  def read(cls, config: PreferenceConfig, mesh) -> "_Records":
    kind = "preferences" if config.records == "pairs" else "feedback"
    examples, held_out = records.read_split(config.data, kind, eval_kind="preferences")
    everything = records.all_records(examples)
    check_records([*everything, *(held_out or [])], config.objective)
    tokenizer = workspace.tokenizer_of(config.model)
    steps = "chosen_step_mask" in config.objective.arrays
    pairs = None
    if config.objective.unpaired:
      training = train.feedback_batches(config, tokenizer, mesh)(examples)
    else:
      training = train.tokenised_pairs(config, examples, tokenizer, mesh, steps=steps)
    if held_out:
      pairs = train.tokenised_pairs(config, held_out, tokenizer, mesh, epochs=1, steps=steps)
    return cls(training, pairs, everything, held_out or [], tokenizer)

  def training_batches(self, config: PreferenceConfig, mesh, read: Callable | None):
    if config.objective.unpaired:
      return self.training
    cached = read and read(self.training, self.records, self.tokenizer)
    return train.pair_batches(
      config, self.training, mesh, accumulate=config.accumulate, reference=cached
    )

  def eval_batches(self, config: PreferenceConfig, mesh, read: Callable | None):
    if self.held_out is None:
      return None
    cached = read and read(self.held_out, self.eval_records, self.tokenizer)
    return list(train.pair_batches(config, self.held_out, mesh, reference=cached))


def _reference_reader(config: PreferenceConfig, folder, loaded: workspace.Loaded, mesh):
  """`(pairs, records, tokenizer) -> Reference`: from the cache, which is made where it is missing."""
  scorer = reference.Scorer(
    loaded.model,
    {"params": loaded.params},
    mesh,
    batch_size=config.data.batch_size,
    chunk=config.model.logits_chunk,
  )

  def read(pairs, records, tokenizer):
    identity = reference.identity_of(records, tokenizer, config.data.length)
    place = config.reference_cache or folder / "reference"
    return reference.cached_reference(place, pairs, scorer, identity)

  return read


def check_records(examples, objective: preferences.PreferenceConfig) -> None:
  """Raises InputError where a record asks for what the objective has no place for."""
  for example in examples:
    if not isinstance(example, data.Preference):
      continue
    if example.margin:
      raise InputError(
        f"{example.source}: field 'margin' is not used by {objective.name}, only by reward models"
      )
    if objective.batchwise and (example.label_prob != 1.0 or example.weight != 1.0):
      raise InputError(
        f"{example.source}: {objective.name} sorts whole batches: fields 'label_prob' and 'weight' "
        "must be 1"
      )


def _rounding(config: PreferenceConfig) -> float:
  """How far policy and reference may seem apart at step 0, in nats a response.

  Computed side by side they round alike; a cache was computed in batches of other shapes.
  """
  if not config.caches:
    return 1e-3
  return 0.02 if config.model.dtype == "float32" else 1.0


def check_identity(
  objective: preferences.PreferenceConfig, values: dict[str, float], *, nats: float = 1e-3
) -> None:
  """Stops a run whose policy is not its reference at step 0, which most pipeline bugs cause."""
  expected = objective.identity_loss()
  tolerance = max(1e-4, 0.1 * nats)
  if expected is not None and not abs(values["loss"] - expected) <= tolerance * max(1.0, expected):
    raise FloatingPointError(
      f"at step 0 policy and reference must agree, so the {objective.name} loss must be "
      f"{expected:.6f}; it is {values['loss']:.6f}"
    )
  if objective.needs_reference:
    for name in ("rewards/chosen", "rewards/rejected"):
      if not abs(values[name]) <= nats * objective.reward_scale:
        raise FloatingPointError(
          f"at step 0 policy and reference must agree, so {name} must be 0; it is {values[name]:.6f}"
        )
