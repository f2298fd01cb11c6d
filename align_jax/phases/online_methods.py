"""What differs between the methods of online learning: what trains, how it draws, how it learns."""

import dataclasses
from typing import Any

import optax

from align_jax import data, rl
from align_jax.errors import InputError
from align_jax.phases import train, workspace
from align_jax.rl.engine import Draw
from align_jax.rl.update import Learner
from align_jax.training import optimizer


@dataclasses.dataclass(frozen=True)
class Method:
  """Everything the loop needs of a method."""

  trainable: dict[str, Any]
  frozen: dict[str, Any]
  tx: optax.GradientTransformation
  draw: Draw
  learner: Learner
  kl_coef: float = 0.0  # to begin with
  kept: str = "policy"  # the part of the parameters that is what the run made


def check(config) -> None:
  """Raises InputError where settings of the phase do not fit its method."""
  gradient, group = config.policy_gradient, config.sampling.samples_per_prompt
  critic = gradient is not None and gradient.value is not None
  if config.value_optimizer is not None and not critic:
    raise InputError("value_optimizer is not used: only the estimator gae has a value model")
  if (config.ptx is not None) != (gradient is not None and gradient.ptx_coef > 0):
    raise InputError("ptx and a positive policy_gradient.ptx_coef go together")
  if gradient is None:
    return
  if gradient.estimator in rl.GROUPED and group < 2:
    raise InputError(
      f"{gradient.estimator} compares the responses to a prompt: set sampling.samples_per_prompt to "
      "2 or more"
    )
  if critic and gradient.value.warmup >= config.loop.steps:
    raise InputError("value.warmup must be less than loop.steps: the policy would never learn")


def splits(config) -> int:
  """Parts that the responses of an iteration must split into."""
  return config.accumulate * config.policy_gradient.minibatches


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
  if gradient.value is not None:
    trainable["value"], of_value, value_model = _value(config, critic or loaded, mesh)
    frozen = frozen | of_value
  if config.ema_decay is not None:
    trainable["ema"] = policy
  tx = _optimizer(config, gradient, tuple(trainable))
  return Method(
    trainable=trainable,
    frozen=frozen,
    tx=tx,
    draw=rl.policy_draw(
      model,
      config.sampling,
      prompts=prompts,
      tokenizer=loaded.tokenizer,
      eos_ids=data.stop_ids(loaded.tokenizer),
      mesh=mesh,
    ),
    learner=rl.policy_gradient_learner(
      model,
      gradient,
      sampling=config.sampling,
      tx=tx,
      value_model=value_model,
      accumulate=config.accumulate,
    ),
    kl_coef=gradient.kl.coef,
    kept="policy" if config.ema_decay is None else "ema",
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
  return {"lora": adapter, "head": head}, {"value": start.params}, model


def _optimizer(config, gradient, parts: tuple[str, ...]) -> optax.GradientTransformation:
  """One for each part: the policy's waits for `value.warmup`, and an average is not differentiated."""
  steps, updates = config.loop.steps, gradient.updates
  waiting = gradient.value.warmup if gradient.value else 0
  policy = optimizer.make_optimizer(config.optimizer, (steps - waiting) * updates)
  value = optimizer.make_optimizer(config.value_optimizer or config.optimizer, steps * updates)
  of_part = {
    "policy": optimizer.delayed(policy, waiting * updates),
    "value": value,
    "ema": optax.set_to_zero(),
  }
  return optimizer.by_part(**{part: of_part[part] for part in parts})
