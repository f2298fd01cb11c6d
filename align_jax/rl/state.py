"""What an online run carries from iteration to iteration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from align_jax import sharding
from align_jax.rl.shaping import Moments
from align_jax.training import state as state_lib

# What a key of an iteration is used for.
SAMPLING, SHUFFLING, TRAINING, OPPONENT = range(4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnlineState:
  """All that an iteration changes; saved and restored whole, a run resumes bit-exactly.

  Every random number is drawn from `key(use)`, a function of `rng` and `step`, so `rng` never changes.
  """

  step: jax.Array  # iterations done
  params: Any  # {"policy": weights or lora} and, with a critic, {"value": ...}
  opt_state: optax.OptState
  rng: jax.Array
  kl_coef: jax.Array
  moments: Moments  # of the scores

  def key(self, use: int) -> jax.Array:
    """The key of one use in this iteration."""
    return jax.random.fold_in(jax.random.fold_in(self.rng, self.step), use)


def create_state(
  trainable: Any, tx: optax.GradientTransformation, *, kl_coef: float, seed: int, mesh
) -> OnlineState:
  """A fresh state around `trainable`, whose arrays are copied and keep their placement."""
  train = state_lib.create_state(trainable, tx, seed, mesh)
  scalars = jnp.float32(kl_coef), Moments.empty()
  kl_coef, moments = jax.device_put(scalars, sharding.replicated(mesh))
  return OnlineState(train.step, train.params, train.opt_state, train.rng, kl_coef, moments)


def abstract_fresh(trainable: Any, tx: optax.GradientTransformation, mesh) -> OnlineState:
  """What `create_state` would make, as shapes with their places; `trainable` may be shapes too."""
  train = state_lib.abstract_fresh(trainable, tx, mesh)
  everywhere = sharding.replicated(mesh)
  kl_coef, moments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    jax.eval_shape(lambda: (jnp.float32(0), Moments.empty())),
  )
  return OnlineState(train.step, train.params, train.opt_state, train.rng, kl_coef, moments)
