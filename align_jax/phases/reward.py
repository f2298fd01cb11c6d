"""Reward modelling: a head on the trunk of an SFT model, read at the last response token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from align_jax import config as config_lib
from align_jax import data, sharding
from align_jax.errors import InputError
from align_jax.phases import records, reward_batches, reward_scale, train, workspace
from align_jax.phases.reward_config import RewardConfig as RewardConfig
from align_jax.phases.reward_heads import RewardHead
from align_jax.training import optimizer, reward_objectives, workdir
from align_jax.training.reward_objectives import PairLoss


def run(config: RewardConfig, path: str, devices) -> None:
  """Trains and leaves a finished workdir at `path`; resumes one that was interrupted."""
  mesh = sharding.make_mesh(config.mesh, devices)
  folder = workdir.open_workdir(path, "reward", config_lib.to_dict(config))
  if workdir.is_finished(folder):
    return
  batches = reward_batches.make(config, mesh)
  reference = reward_scale.read_reference(config.normalise)
  loaded = workspace.start(config.model, mesh, seed=config.seed)
  head = head_of(config, batches.labellers)
  trainable, frozen, model = _trainable(config, loaded, head, mesh)
  plan = train.Plan(
    phase="reward",
    kind="reward",
    loaded=loaded,
    trainable=trainable,
    frozen=frozen,
    objective=objective_of(config, model, head),
    batches=batches.training,
    eval_batches=batches.eval,
    fingerprint=data.fingerprint(records.all_records(batches.records)),
    parents=workspace.parents(trunk=(config.model.init, loaded)),
    tx=optimizer_of(config, head),
    head=head,
  )
  if reference:
    scaled = functools.partial(
      reward_scale.scaled, config=config, loaded=loaded, head=head, reference=reference
    )
    plan = dataclasses.replace(plan, scaled=scaled)
  train.run_plan(plan, config, folder, mesh)


def head_of(config: RewardConfig, labellers: tuple[str, ...]) -> RewardHead:
  """The outputs, and which of them are the reward."""
  members = config.ensemble.members if config.ensemble else 0
  outputs, weights = ("reward",), (1.0,)
  if config.votes == "heads":
    outputs, weights = labellers, (1.0 / len(labellers),) * len(labellers)
  elif config.votes == "spread":
    outputs, weights = ("mean", "log_std"), (1.0, 0.0)
  elif config.debias:
    outputs, weights = ("quality", "length"), (1.0, 0.0)
  elif config.aspects:
    outputs, weights = config.aspects, config.aspect_weights
  count = max(1, members)
  return RewardHead(
    outputs=outputs,
    weights=weights,
    shift=(0.0,) * count,
    scale=(1.0,) * count,
    members=members,
    share=config.ensemble.share if config.ensemble else "nothing",
  )


def objective_of(config: RewardConfig, model, head: RewardHead):
  if config.records == "rankings":
    objective = reward_objectives.ranking_objective(
      model, loss=config.ranking_loss, centering=config.centering
    )
  elif config.records == "ratings":
    objective = reward_objectives.rating_objective(model, config.aspects)
  else:
    objective = reward_objectives.pair_objective(model, _pair_loss(config, head))
  if not head.stacked:
    return objective
  return reward_objectives.ensemble_objective(objective, head.stacked)


def _pair_loss(config: RewardConfig, head: RewardHead) -> PairLoss:
  settings = PairLoss(
    centering=config.centering,
    label_smoothing=config.label_smoothing,
    tie_theta=config.tie_theta,
  )
  if config.votes in ("heads", "spread"):
    rule = "votes" if config.votes == "heads" else "spread"
    return dataclasses.replace(settings, rule=rule)
  if config.debias:
    weights = dataclasses.asdict(config.debias)
    return dataclasses.replace(settings, rule="two", **weights)
  if head.members and head.share == "trunk":
    seed = config.seed if config.ensemble.bootstrap else None
    return dataclasses.replace(settings, rule="members", bootstrap=seed)
  return settings


def _trainable(config: RewardConfig, loaded: workspace.Loaded, head: RewardHead, mesh):
  """({"trunk" or "lora", "head"}, frozen, model); of an ensemble every leaf is stacked."""

  def member(number: int) -> tuple[Any, dict[str, Any], Any]:
    start = _start_of(config, loaded, number, mesh)
    seed = config.seed + number
    weights, frozen, model = train.policy_trainable(start, config.model, mesh, seed)
    own = config.seed if config.ensemble and config.ensemble.same_head else seed
    name = "lora" if frozen else "trunk"
    new = workspace.new_head(loaded.model, mesh, own, head.width)
    return {name: weights, "head": new}, frozen, model

  first, frozen, model = member(0)
  if not head.stacked:
    return first, frozen, model
  members = [first, *(member(number)[0] for number in range(1, head.stacked))]
  placed = workspace.stacked(_abstract(first), head.stacked)
  stack = jax.jit(
    lambda *parts: jax.tree.map(lambda *x: jnp.stack(x), *parts),
    out_shardings=jax.tree.map(lambda x: x.sharding, placed),
  )
  return stack(*members), frozen, model


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _start_of(config: RewardConfig, loaded: workspace.Loaded, number: int, mesh):
  """What a member begins with: a trunk of its own where the config names one."""
  trunks = config.ensemble.trunks if config.ensemble else ()
  if not trunks or trunks[number] == config.model.init:
    return loaded
  name = trunks[number]
  found = workspace.load(
    name,
    mesh,
    dtype=config.model.dtype,
    remat=config.model.remat,
    attention=config.model.attention,
  )
  if found.head is not None or found.model.config != loaded.model.config:
    raise InputError(f"ensemble.trunks: {name} is no policy of the shape of model.init")
  workspace.same_vocabulary(loaded, found, name)
  return found


def optimizer_of(config: RewardConfig, head: RewardHead):
  """One for all that trains; or the trunk's waits while the head learns alone."""
  steps, wait = config.loop.steps, config.head_first
  make = functools.partial(optimizer.make_optimizer, config.optimizer, members=bool(head.stacked))
  if not wait:
    return make(steps)
  trunk = "lora" if config.model.lora.rank else "trunk"
  return optimizer.by_part(
    **{trunk: optimizer.delayed(make(steps - wait), wait), "head": make(steps)}
  )
