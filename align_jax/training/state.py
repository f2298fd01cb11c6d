"""What a step changes: parameters, optimizer state, step count and the random seed it folds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from align_jax import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Arrays only.  `rng` never changes: step t draws from `fold_in(rng, t)`, so a resume is exact.

  `carried` is what an objective itself takes from step to step: a moving reference, a running mean.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  rng: jax.Array
  carried: dict[str, Any] = dataclasses.field(default_factory=dict)


def _init(params, rng, carried, tx: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), rng, carried)


def state_shardings(
  abstract_params, param_shardings, tx: optax.GradientTransformation, mesh, carried=None
):
  """Optimizer moments are placed like the parameters they belong to; the rest is replicated."""
  everywhere = sharding.replicated(mesh)
  abstract_opt = jax.eval_shape(tx.init, abstract_params)

  def masked(x):  # the parameters of another part, see `optimizer.by_part`
    return isinstance(x, optax.MaskedNode)

  opt = optax.tree.map_params(
    tx,
    lambda x, placed: x if masked(x) else placed,
    abstract_opt,
    param_shardings,
    transform_non_params=lambda _: everywhere,
    is_leaf=masked,
  )
  return TrainState(everywhere, param_shardings, opt, everywhere, carried or {})


def create_state(
  params,
  tx: optax.GradientTransformation,
  seed: int,
  mesh,
  *,
  carried: dict | None = None,
  consume: bool = False,
) -> TrainState:
  """A fresh state around `params`, whose placement on the mesh decides that of the moments.

  `out_shardings` is not optional on an Auto mesh: without it jit replicates Adam's moments.  The
  parameters and what is `carried` are copied, because the training step donates its state; with
  `consume` the parameters are taken over, and must not be used by others any more.
  """
  carried = {} if carried is None else carried

  def init(params, carried, rng):
    return _init(*jax.tree.map(jnp.copy, (params, rng, carried)), tx)

  placed = _places(params, tx, mesh, carried)
  start = jax.jit(init, out_shardings=placed, donate_argnums=(0,) if consume else ())
  return start(params, carried, jax.random.key(seed))


def abstract_fresh(
  params, tx: optax.GradientTransformation, mesh, *, carried: dict | None = None
) -> TrainState:
  """What `create_state` would make, as shapes with their places; `params` may be shapes too."""
  carried = {} if carried is None else carried
  rng = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(lambda p, r, c: _init(p, r, c, tx), params, rng, carried)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes,
    _places(params, tx, mesh, carried),
  )


def _places(params, tx, mesh, carried):
  placed = jax.tree.map(lambda x: x.sharding, params)
  kept = jax.tree.map(lambda x: _on_mesh(x.sharding, mesh), carried)
  return state_shardings(params, placed, tx, mesh, kept)


def _on_mesh(placed, mesh):
  """Where it is already, or everywhere if that is one device only: a fresh scalar's default."""
  return placed if isinstance(placed, jax.sharding.NamedSharding) else sharding.replicated(mesh)


def abstract_state(state):
  """The shapes, types and shardings of a state: what a checkpoint is restored into."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
