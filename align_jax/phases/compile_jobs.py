"""The real jitted step of every phase, on shapes instead of arrays: what `experiments.compile` compiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from align_jax import config as config_lib
from align_jax import models, rl, sampling, sharding
from align_jax.errors import InputError
from align_jax.phases import (
  compile_batches,
  online,
  online_methods,
  preference,
  reward,
  reward_config,
  sft,
  workspace,
)
from align_jax.sampling import decode
from align_jax.training import objectives, optimizer, preference_objectives, state, step

CONFIGS = {
  "sft": sft.SftConfig,
  "reward": reward_config.RewardConfig,
  "preference": preference.PreferenceConfig,
  "ppo": online.OnlineConfig,
  "prefill": online.OnlineConfig,
  "decode": online.OnlineConfig,
}
PHASES = tuple(CONFIGS)


@dataclasses.dataclass(frozen=True)
class Job:
  """A jitted function and the shapes it is called with, placed on the mesh."""

  step: Callable
  args: tuple[Any, ...]


def settings(phase: str, values) -> Any:
  """The phase's own config, as its command would read it."""
  if phase not in CONFIGS:
    raise InputError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
  return config_lib.build(CONFIGS[phase], values)


def make(phase: str, config, shape: models.ModelConfig, mesh) -> Job:
  """The job of a phase with a model of that shape; InputError where the config cannot be compiled so."""
  section = config.model
  model = workspace.compute_as(
    models.Transformer(shape), mesh, section.dtype, section.remat, section.attention
  )
  loaded = workspace.Loaded(model, workspace.abstract_params(model, mesh), None)
  loaded = workspace.frozen_base(loaded, section.lora, mesh)
  return _MAKERS[phase](config, loaded, mesh)


def _sft(config, loaded, mesh) -> Job:
  trainable, frozen, model = _policy(config.model, loaded, mesh)
  objective = objectives.sft_objective(model, chunk=config.model.logits_chunk)
  batch = compile_batches.demonstrations(config.data, mesh)
  return _training(config, objective, trainable, frozen, batch, mesh)


def _reward(config, loaded, mesh) -> Job:
  if config.records != "pairs" or config.votes == "heads" or config.ensemble:
    raise InputError("experiments.compile knows single reward models of pairs only")
  head = reward.head_of(config, ())
  policy, frozen, model = _policy(config.model, loaded, mesh)
  name = "lora" if frozen else "trunk"
  trainable = {name: policy, "head": workspace.abstract_head(model, mesh, head.width)}
  objective = reward.objective_of(config, model, head)
  batch = compile_batches.pairs(config.data, config.layout, mesh, reference=False)
  tx = reward.optimizer_of(config, head)
  return _training(config, objective, trainable, frozen, batch, mesh, tx=tx)


def _preference(config, loaded, mesh) -> Job:
  trainable, frozen, model = _policy(config.model, loaded, mesh)
  chosen, chunk = config.objective, config.model.logits_chunk
  if config.copies:
    resting = config.reference_memory == "host"
    frozen = frozen | {"ref": sharding.in_host_memory(loaded.params) if resting else loaded.params}
  if chosen.unpaired:
    batch = compile_batches.feedback(config.data, mesh)
  else:
    steps = "chosen_step_mask" in chosen.arrays
    batch = compile_batches.pairs(
      config.data, config.layout, mesh, reference=config.caches, steps=steps
    )
  return _training(
    config,
    preference_objectives.preference_objective(model, chosen, chunk=chunk),
    trainable,
    frozen,
    batch,
    mesh,
    prepare=preference_objectives.prepare(model, chosen, chunk=chunk),
    carried=_abstract_carried(chosen, trainable, frozen, mesh),
    carry=preference_objectives.carry(chosen),
  )


def _abstract_carried(chosen, trainable, frozen, mesh):
  made = jax.eval_shape(lambda t, f: preference_objectives.carried(chosen, t, f), trainable, frozen)
  everywhere = sharding.replicated(mesh)
  where = {"ref": jax.tree.map(lambda x: x.sharding, trainable)}
  return {
    name: jax.tree.map(_placed, tree, where.get(name, jax.tree.map(lambda _: everywhere, tree)))
    for name, tree in made.items()
  }


def _placed(x, where):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _policy(section, loaded, mesh):
  """`train.policy_trainable` on shapes."""
  if not section.lora.rank:
    return loaded.params, {}, loaded.model
  adapter = workspace.abstract_lora(loaded.model, section.lora, mesh)
  return adapter, {"base": loaded.params}, loaded.model.clone(lora_scale=section.lora.scale)


def _training(
  config,
  objective,
  trainable,
  frozen,
  batch,
  mesh,
  *,
  tx=None,
  prepare=None,
  carried=None,
  carry=None,
) -> Job:
  tx = tx or optimizer.make_optimizer(config.optimizer, config.loop.steps)
  fresh = state.abstract_fresh(trainable, tx, mesh, carried=carried)
  run = step.make_train_step(
    objective, tx, accumulate=config.accumulate, prepare=prepare, carry=carry
  )
  return Job(run, (fresh, frozen, batch))


def _ppo(config, loaded, mesh) -> Job:
  if config.policy_gradient is None:
    raise InputError("experiments.compile knows the update of policy gradients only")
  if config.policy_gradient.row_length is not None:
    raise InputError(
      "experiments.compile does not know how many rows responses of unknown lengths need: leave "
      "policy_gradient.row_length None"
    )
  policy, frozen, model = _policy(config.model, loaded, mesh)
  frozen = frozen or {"ref": loaded.params}
  trainable, value_model = {"policy": policy}, None
  if config.policy_gradient.value is not None:
    own, of_value, value_model = _policy(config.model, loaded, mesh)
    name = "lora" if of_value else "trunk"
    trainable["value"] = {name: own, "head": workspace.abstract_head(model, mesh)}
    frozen = frozen | ({"value": of_value["base"]} if of_value else {})
  if config.ema_decay is not None:
    trainable["ema"] = policy
  tx = online_methods.optimizer_of(config, tuple(trainable))
  learn = rl.compile_learner(
    online_methods.learner_of(config, model, value_model, tx),
    shaping=config.shaping,
    sampling=config.sampling,
    ema_decay=config.ema_decay,
  )
  rows = config.prompts.batch_size * config.sampling.samples_per_prompt
  length = config.prompts.max_length + config.sampling.max_new_tokens
  batch = compile_batches.rollouts(rows, length, mesh)
  return Job(learn, (rl.abstract_fresh(trainable, tx, mesh), frozen, batch))


def _sampler(config, loaded, mesh):
  """(policy, rows of prompts, the prefilled batch) of the first round of sampling."""
  variables, frozen, model = _policy(config.model, loaded, mesh)
  policy = {"params": loaded.params, "lora": variables} if frozen else {"params": loaded.params}
  rows = config.prompts.batch_size
  if rows % sharding.batch_ways(mesh):
    raise InputError(f"{rows} prompts cannot be split {sharding.batch_ways(mesh)} ways")

  def ints(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))

  key = jax.eval_shape(lambda: jax.random.key(0))
  decoding = sampling.make_decoding(config.sampling.temperature)
  args = (ints(rows, config.prompts.max_length), ints(rows), ints(rows), ints(rows), key, decoding)
  return model, decode.Policy((policy,)), args


def _prefill(config, loaded, mesh) -> Job:
  model, policy, args = _sampler(config, loaded, mesh)
  read = jax.jit(lambda policy, *rest: decode.prefill(model, policy, *rest, mesh=mesh))
  return Job(read, (policy, *args))


def _decode(config, loaded, mesh) -> Job:
  model, policy, args = _sampler(config, loaded, mesh)
  prefilled = jax.eval_shape(
    lambda policy, *rest: decode.prefill(model, policy, *rest, mesh=mesh), policy, *args
  )
  rows = config.sampling.slots or config.prompts.batch_size * config.sampling.samples_per_prompt
  slots = config.prompts.max_length + config.sampling.max_new_tokens
  budget = config.sampling.max_new_tokens
  make = jax.jit(
    lambda p: decode.empty_flight(
      model, p, policies=1, rows=rows, slots=slots, budget=budget, mesh=mesh
    )
  )
  flight = jax.eval_shape(make, prefilled)
  flight = decode.Flight(_split(flight.rows, mesh, 0), _split(flight.caches, mesh, 1))
  run = jax.jit(
    lambda policy, flight, *rest: decode.decode(model, policy, flight, *rest, mesh=mesh),
    donate_argnums=1,
  )
  number = jax.ShapeDtypeStruct((), jnp.int32)
  stopped = jax.ShapeDtypeStruct((rows,), jnp.bool_)
  eos = jax.ShapeDtypeStruct((1,), jnp.int32)
  return Job(run, (policy, flight, stopped, number, number, eos, args[-1]))


def _split(tree, mesh, axis: int):
  """Rows over data and fsdp, key heads over tensor: as the compiled programs leave them."""
  heads = [None, "tensor"] if axis == 1 else []

  def place(x):
    spec = [*[None] * axis, sharding.BATCH_AXES, *heads[1:]]
    if heads and x.shape[2] % mesh.shape["tensor"]:
      spec = spec[:-1]
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return _placed(x, where)

  return jax.tree.map(place, tree)


_MAKERS = {
  "sft": _sft,
  "reward": _reward,
  "preference": _preference,
  "ppo": _ppo,
  "prefill": _prefill,
  "decode": _decode,
}
