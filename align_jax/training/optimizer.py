"""Optimizers and schedules from a config section."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from align_jax.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "rmsprop", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """One optimizer: its rule, its schedule, its clipping."""

  learning_rate: float
  name: str = "adamw"
  schedule: str = "cosine"  # after warm-up; decays to `final_fraction` of the peak
  warmup_fraction: float = 0.05  # of all steps
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  grad_clip: float = 1.0  # global norm
  moment_dtype: str = "float32"  # of adamw's first moment; bfloat16 halves it

  def __post_init__(self):
    if self.name not in OPTIMIZERS:
      raise InputError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, not {self.name!r}")
    if self.schedule not in SCHEDULES:
      raise InputError(
        f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}"
      )
    if self.learning_rate <= 0 or self.grad_clip <= 0:
      raise InputError("optimizer.learning_rate and optimizer.grad_clip must be positive")
    if self.moment_dtype not in ("float32", "bfloat16"):
      raise InputError(
        f"optimizer.moment_dtype must be float32 or bfloat16, not {self.moment_dtype!r}"
      )
    if self.moment_dtype != "float32" and self.name != "adamw":
      raise InputError(f"optimizer.moment_dtype is not used by {self.name}; leave it at float32")
    if self.weight_decay and self.name != "adamw":
      raise InputError(f"optimizer.weight_decay is not used by {self.name}; set it to 0")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak, then constant, linear or cosine decay over the steps that remain."""
  warmup = round(config.warmup_fraction * steps)
  peak, final = config.learning_rate, config.learning_rate * config.final_fraction
  left = max(steps - warmup, 1)
  decay = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, final, left),
    "cosine": optax.cosine_decay_schedule(peak, left, config.final_fraction),
  }[config.schedule]
  if warmup == 0:
    return decay
  # Starts at peak / warmup, not at zero, so that the first step moves.
  return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), decay], [warmup])


def make_optimizer(
  config: OptimizerConfig, steps: int, *, members: bool = False
) -> optax.GradientTransformation:
  """Clip by global norm, then the rule; weight decay acts on matrices only.

  members: every parameter is stacked [K, ...] over models that learn side by side, each as if alone.
  """
  schedule = make_schedule(config, steps)
  rule = {
    "adamw": lambda: optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mu_dtype=config.moment_dtype,
      mask=functools.partial(_is_matrix, members=members),
    ),
    "rmsprop": lambda: optax.rmsprop(schedule, decay=config.b2, eps=config.eps),
    "sgd": lambda: optax.sgd(schedule, momentum=config.b1),
  }[config.name]()
  clip = functools.partial(clip_by_global_norm, most=config.grad_clip)
  clip = jax.vmap(clip) if members else clip
  return optax.chain(optax.stateless(lambda updates, _: clip(updates)), rule)


def clip_by_global_norm(tree, most: float):
  """tree, scaled down to a `global_norm` of `most` where it is longer."""
  norm = global_norm(tree)
  factor = jnp.where(norm > most, most / norm, 1.0)
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)


def global_norm(tree) -> jax.Array:
  """sqrt(sum of all squares), the first axis of each array first: float32 scalar.

  With both sums in one, XLA's compiler for CPU writes the squares of all gradients out, as much memory
  as the gradients themselves; the barrier keeps it from making one of them.
  """
  squares = [jnp.square(jnp.atleast_1d(x).astype(jnp.float32)) for x in jax.tree.leaves(tree)]
  first = [jnp.sum(x, axis=0) for x in squares]
  return jnp.sqrt(sum(jnp.sum(x) for x in jax.lax.optimization_barrier(first)))


def _is_matrix(params, members: bool):
  # A norm stacked over layers is [layers, d]; it is still a vector.
  def decays(path, x):
    names = [str(getattr(k, "key", k)) for k in path]
    return x.ndim - ("layers" in names) - members >= 2 and not names[-1].endswith("_bias")

  return jax.tree_util.tree_map_with_path(decays, params)


def delayed(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
  """`tx`, its schedule and moments included, that begins after `steps` steps without an update."""
  if steps == 0:
    return tx
  return optax.conditionally_mask(tx, lambda step: step >= steps)


def by_part(**parts: optax.GradientTransformation) -> optax.GradientTransformation:
  """Each entry of a dictionary of parameters has an optimizer of its own: clipping, schedule, all."""
  return optax.partition(parts, {name: name for name in parts})
