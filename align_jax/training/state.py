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
  """Arrays only.  `rng` never changes: step t draws from `fold_in(rng, t)`, so a resume is exact."""

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  rng: jax.Array


def _init(params, rng, tx: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), rng)


def state_shardings(abstract_params, param_shardings, tx: optax.GradientTransformation, mesh):
  """Optimizer moments are placed like the parameters they belong to; the rest is replicated."""
  everywhere = sharding.replicated(mesh)
  abstract_opt = jax.eval_shape(tx.init, abstract_params)
  opt = optax.tree.map_params(
    tx,
    lambda _, placed: placed,
    abstract_opt,
    param_shardings,
    transform_non_params=lambda _: everywhere,
  )
  return TrainState(everywhere, param_shardings, opt, everywhere)


def create_state(params, tx: optax.GradientTransformation, seed: int, mesh) -> TrainState:
  """A fresh state around `params`, whose placement on the mesh decides that of the moments.

  `out_shardings` is not optional on an Auto mesh: without it jit replicates Adam's moments.  The
  parameters are copied, because the training step donates its state.
  """
  placed = jax.tree.map(lambda x: x.sharding, params)
  shardings = state_shardings(params, placed, tx, mesh)
  init = jax.jit(lambda p, k: _init(jax.tree.map(jnp.copy, p), k, tx), out_shardings=shardings)
  return init(params, jax.random.key(seed))


def abstract_state(state):
  """The shapes, types and shardings of a state: what a checkpoint is restored into."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
