"""What SFT, reward modelling and preference optimisation have in common: one state, one loop."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import optax

from align_jax import data, models, sharding
from align_jax.errors import InputError
from align_jax.phases import workspace
from align_jax.phases.reward_heads import RewardHead
from align_jax.phases.sections import ModelSection
from align_jax.training import integrity, loop, optimizer, state, step


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything a phase has decided before the first compile."""

  phase: str  # names the workdir's config and the progress bar
  kind: str  # "policy" or "reward": what the next phase finds in the checkpoint
  loaded: workspace.Loaded
  trainable: Any
  frozen: dict[str, Any]
  objective: step.Objective
  batches: Any  # endless, checkpointable
  fingerprint: str  # of the training records
  parents: tuple[dict, ...]
  eval_objective: step.Objective | None = None
  eval_batches: list[Any] | None = None
  prepare: Callable | None = None
  carried: dict[str, Any] = dataclasses.field(default_factory=dict)  # to begin with
  carry: step.Carry | None = None
  check_first: Callable[[dict[str, float]], None] | None = None
  start_loss: float | None = None  # of a model that has learned nothing, where it is known
  reference: Any = None  # parameters behind numbers that are read from a cache: frozen as well
  tx: optax.GradientTransformation | None = None  # None: the config's, over all that trains
  consume: bool = False  # nobody else uses `trainable`: the state takes it over
  head: RewardHead | None = None  # of a reward model
  # parameters -> the head on its final scale, where that needs the trained model
  scaled: Callable[[Any], RewardHead] | None = None


def run_plan(plan: Plan, config, folder: pathlib.Path, mesh):
  """Trains, writes checkpoints and metrics, and leaves a finished workdir."""
  tx = plan.tx or optimizer.make_optimizer(config.optimizer, config.loop.steps)
  train_state = state.create_state(
    plan.trainable, tx, config.seed, mesh, carried=plan.carried, consume=plan.consume
  )
  train = step.make_train_step(
    plan.objective, tx, accumulate=config.accumulate, prepare=plan.prepare, carry=plan.carry
  )

  def put(batch):
    return sharding.put_batch(batch, mesh)

  def describe(head):
    workspace.describe(folder, plan.loaded, config.model, plan.kind, head=head)

  describe(plan.head)
  lineage = workspace.Lineage(plan.phase, plan.parents, plan.fingerprint)
  fixed = plan.frozen | ({} if plan.reference is None else {"ref": plan.reference})
  final = loop.fit(
    train_state,
    name=plan.phase,
    step=loop.no_transfers(lambda s, batch: train(s, plan.frozen, batch)),
    batches=plan.batches,
    put=put,
    config=config.loop,
    workdir=folder,
    metadata=lineage.metadata(),
    identity={name: integrity.fingerprint(tree) for name, tree in fixed.items()},
    hooks=loop.Hooks(
      evaluate=_evaluator(plan, put), check_first=plan.check_first, start_loss=plan.start_loss
    ),
  )
  if plan.scaled:
    describe(plan.scaled(final.params))
  lineage.write(folder, int(final.step))


def _evaluator(plan: Plan, put):
  if plan.eval_batches is None:
    return None
  evaluate = step.make_eval_step(plan.eval_objective or plan.objective)

  def run(train_state):
    frozen = plan.frozen | train_state.carried
    return loop.evaluate_batches(
      lambda p, batch: evaluate(p, frozen, batch), train_state.params, plan.eval_batches, put
    )

  return run


def policy_trainable(loaded: workspace.Loaded, section: ModelSection, mesh, seed: int):
  """(trainable, frozen, model): the weights themselves, or fresh adapters on the frozen weights."""
  if not section.lora.rank:
    return loaded.params, {}, loaded.model
  adapter = workspace.new_lora(loaded.model, section.lora, mesh, seed)
  return adapter, {"base": loaded.params}, loaded.model.clone(lora_scale=section.lora.scale)


def stream_options(config, mesh, epochs: int | None = None) -> dict[str, Any]:
  """How every phase cuts its records into batches; a finite stream keeps the file's order."""
  index, count = sharding.host_share(mesh)
  return {
    "length": config.data.length,
    "batch_size": config.data.batch_size,
    "seed": config.seed,
    "epochs": epochs,
    "shuffle": epochs is None,
    "pad_last": epochs is not None,
    "shard_index": index,
    "shard_count": count,
  }


def tokenised_pairs(
  config, records, tokenizer, mesh, *, epochs: int | None = None, steps: bool = False
) -> data.Pairs:
  """Preference pairs as tokens; endless and shuffled, or with `epochs` in the file's order."""
  options = stream_options(config, mesh, epochs)
  length = options.pop("length")
  return data.tokenise_pairs(
    records, tokenizer, data.Batching(**options), length=length, steps=steps
  )


def pair_batches(config, pairs: data.Pairs, mesh, *, accumulate: int = 1, reference=None):
  """Batches of pairs in the layout of the config, each splitting into `accumulate` parts."""
  buckets, ways = config.data.buckets, sharding.batch_ways(mesh)
  if config.layout == "padded":
    return data.padded_batches(pairs, config.data.length, buckets=buckets, reference=reference)
  rows = accumulate * ways // pairs.source.plan.shard_count
  return data.shared_batches(
    pairs,
    buckets=buckets,
    row_multiple=rows,
    long_from=models.tiles_from(config.model.attention, mesh),
    reference=reference,
  )


def check_pairs(config, mesh) -> None:
  """Raises InputError where the layout is unknown, or padded batches do not split evenly."""
  if config.layout == "padded":
    workspace.check_batch(config.data.batch_size, config.accumulate, mesh)
  elif config.accumulate < 1:
    raise InputError(f"config.accumulate must be positive, not {config.accumulate}")


def feedback_batches(config, tokenizer, mesh) -> Callable:
  """`records -> iterator` of single responses with a thumb up or down; pairs become two each."""

  def make(source):
    if isinstance(source, data.Mixture):
      raise InputError("kto takes records of one source, not a mixture")
    feedback = source if isinstance(source[0], data.Feedback) else as_feedback(source)
    return data.feedback_batches(feedback, tokenizer, **stream_options(config, mesh))

  return make


def as_feedback(pairs) -> list[data.Feedback]:
  """Every pair as two unpaired records: thumb up for the chosen response, down for the rejected."""
  soft = next((pair for pair in pairs if pair.label_prob != 1.0), None)
  if soft is not None:
    raise InputError(
      f"{soft.source}: field 'label_prob' is {soft.label_prob}: a thumb is up or down"
    )
  return [
    data.Feedback(pair.prompt, text, up, pair.weight, pair.source)
    for pair in pairs
    for text, up in ((pair.chosen, True), (pair.rejected, False))
  ]
