"""What differs between the methods of online learning: what trains, how it draws, how it learns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from align_jax import data, rl
from align_jax.errors import InputError
from align_jax.phases import train, workspace
from align_jax.rl.engine import Draw
from align_jax.rl.update import Learner
from align_jax.training import optimizer

METHODS = ("policy_gradient", "online_preference", "rejection")  # sections of which one is given


@dataclasses.dataclass(frozen=True)
class Method:
  """Everything the loop needs of a method."""

  trainable: dict[str, Any]
  frozen: dict[str, Any]
  tx: optax.GradientTransformation
  draw: Draw
  learner: Learner
  layouts: Callable | None = None  # how the models see rollouts; None: a row for each response
  kl_coef: float = 0.0  # to begin with
  kept: str = "policy"  # the part of the parameters that is what the run made


def check(config) -> None:
  """Raises InputError where settings of the phase do not fit its method."""
  gradient, group = config.policy_gradient, config.sampling.samples_per_prompt
  critic = gradient is not None and gradient.value is not None
  if config.value_optimizer is not None and not critic:
    raise InputError("value_optimizer is not used: only the estimator gae has a value model")
  least = config.stops.distinct_min
  if group > 1 and least is not None and least <= 1 / group:
    raise InputError(
      f"stops.distinct_min = {least:g} is never passed: of {group} responses to a prompt at least one "
      "is distinct"
    )
  if (config.ptx is not None) != (gradient is not None and gradient.ptx_coef > 0):
    raise InputError("ptx and a positive policy_gradient.ptx_coef go together")
  if config.online_preference is not None:
    config.online_preference.pairs_per_prompt(config.sampling)
  if config.rejection is not None:
    config.rejection.check(config.sampling)
  if gradient is None:
    return
  if gradient.estimator in rl.GROUPED and group < 2:
    raise InputError(
      f"{gradient.estimator} compares the responses to a prompt: set sampling.samples_per_prompt to "
      "2 or more"
    )
  longest = config.prompts.max_length + config.sampling.max_new_tokens
  if gradient.row_length is not None and gradient.row_length < longest:
    raise InputError(
      f"policy_gradient.row_length must be at least {longest}: prompts.max_length + "
      f"sampling.max_new_tokens, not {gradient.row_length}"
    )
  if critic and gradient.value.warmup >= config.loop.steps:
    raise InputError("value.warmup must be less than loop.steps: the policy would never learn")


def given(config):
  """The section of the one method that is given."""
  return next(x for x in (getattr(config, name) for name in METHODS) if x is not None)


def units(config) -> int:
  """What an iteration learns from: responses, or pairs of them."""
  group = config.sampling.samples_per_prompt
  if config.online_preference is not None:
    group = config.online_preference.pairs_per_prompt(config.sampling)
  return config.prompts.batch_size * group


def splits(config) -> int:
  """Parts that the units of an iteration must split into."""
  return config.accumulate * given(config).minibatches


def opponents(config) -> int:
  return config.online_preference.opponents if config.online_preference else 0


def extra_draws(config) -> int:
  return config.policy_gradient.extra_draws if config.policy_gradient else 0


def build(
  config, loaded: workspace.Loaded, critic: workspace.Loaded | None, prompts, mesh
) -> Method:
  """The method of a phase's config around the loaded policy (and reward model, for a value model)."""
  policy, frozen, model = train.policy_trainable(loaded, config.model, mesh, config.seed)
  frozen = frozen or {"ref": loaded.params}
  trainable, value_model = {"policy": policy}, None
  gradient = config.policy_gradient
  if gradient is not None and gradient.value is not None:
    trainable["value"], of_value, value_model = _value(config, critic or loaded, mesh)
    frozen = frozen | of_value
  if config.ema_decay is not None:
    trainable["ema"] = policy
  tx = optimizer_of(config, tuple(trainable))
  return Method(
    trainable=trainable,
    frozen=frozen,
    tx=tx,
    draw=_draw(config, model, prompts, loaded.tokenizer, mesh),
    learner=learner_of(config, model, value_model, tx),
    layouts=gradient
    and rl.make_layouts(gradient, config.sampling, accumulate=config.accumulate, mesh=mesh),
    kl_coef=gradient.kl.coef if gradient else 0.0,
    kept="policy" if config.ema_decay is None else "ema",
  )


def _draw(config, model, prompts, tokenizer, mesh) -> Draw:
  settings = {"prompts": prompts, "tokenizer": tokenizer, "mesh": mesh}
  settings["eos_ids"] = data.stop_ids(tokenizer)
  if config.online_preference is not None:
    return rl.preference_draw(model, config.online_preference, config.sampling, **settings)
  return rl.policy_draw(model, config.sampling, **settings)


def learner_of(config, model, value_model, tx) -> Learner:
  settings = {"sampling": config.sampling, "tx": tx, "accumulate": config.accumulate}
  if config.online_preference is not None:
    return rl.preference_learner(model, config.online_preference, **settings)
  if config.rejection is not None:
    return rl.rejection_learner(model, config.rejection, **settings)
  return rl.policy_gradient_learner(
    model, config.policy_gradient, value_model=value_model, **settings
  )


def _value(config, start: workspace.Loaded, mesh):
  """(trainable, frozen, module) of a value model that starts as the reward model, or as the policy
  with a fresh head where there is none."""
  head = start.head
  if head is None:
    head = workspace.new_head(start.model, mesh, config.seed + 1)
  if not config.model.lora.rank:
    return {"trunk": start.params, "head": head}, {}, start.model
  adapter = workspace.new_lora(start.model, config.model.lora, mesh, config.seed + 1)
  model = start.model.clone(lora_scale=config.model.lora.scale)
  base = workspace.frozen_base(start, config.model.lora, mesh).params
  return {"lora": adapter, "head": head}, {"value": base}, model


def optimizer_of(config, parts: tuple[str, ...]) -> optax.GradientTransformation:
  """One for each part: the policy's waits for `value.warmup`, and an average is not differentiated."""
  steps, updates = config.loop.steps, given(config).updates
  gradient = config.policy_gradient
  waiting = gradient.value.warmup if gradient and gradient.value else 0
  policy = optimizer.make_optimizer(config.optimizer, (steps - waiting) * updates)
  value = optimizer.make_optimizer(config.value_optimizer or config.optimizer, steps * updates)
  of_part = {
    "policy": optimizer.delayed(policy, waiting * updates),
    "value": value,
    "ema": optax.set_to_zero(),
  }
  return optimizer.by_part(**{part: of_part[part] for part in parts})
