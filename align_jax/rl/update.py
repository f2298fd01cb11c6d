"""All optimizer steps of one iteration, in one scan over shuffled minibatches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from align_jax.losses import Mean
from align_jax.rl import state as state_lib
from align_jax.training import step as step_lib
from align_jax.training.state import TrainState

# (state, frozen, batch) -> (state with new params, optimizer state and KL coefficient, metrics)
Learner = Callable[
  [state_lib.OnlineState, dict, dict[str, jax.Array]],
  tuple[state_lib.OnlineState, step_lib.Metrics],
]


def run_updates(
  state: state_lib.OnlineState,
  frozen: dict,
  rows: dict[str, jax.Array],
  *,
  objective: step_lib.Objective,
  tx: optax.GradientTransformation,
  epochs: int,
  minibatches: int,
  accumulate: int = 1,
  prepare: Callable | None = None,
  order: jax.Array | None = None,
  beside: Any = None,
) -> tuple[state_lib.OnlineState, step_lib.Metrics]:
  """`epochs` passes over the rows, each in another random order, `minibatches` steps a pass.

  Args:
    state: of the iteration; its step, rng and moments are left as they are.
    frozen: what the objective is given beside the trainable parameters.
    rows: arrays [N, ...]; N is a multiple of `minibatches` times `accumulate`.
    objective: (trainable, frozen, minibatch, rng) -> (loss sum, metrics), as everywhere.
    tx: steps epochs · minibatches times.
    epochs: passes over the rows.
    minibatches: steps a pass.
    accumulate: parts of a minibatch that are differentiated one after the other.
    prepare: (params, frozen, minibatch) -> minibatch, with what depends on all of its rows.
    order: [epochs · minibatches, N / minibatches], the rows of every step; by default `row_order`.
    beside: a dict of arrays [epochs · minibatches, ...], of which a step's rows get their share.

  Returns:
    The state with new parameters, and the metrics of all steps: maxima of names in `_max`, the first
    step's of names in `first_`, of all else the mean over everything seen.
  """
  if order is None:
    count = next(iter(rows.values())).shape[0]
    order = row_order(state, count, epochs=epochs, minibatches=minibatches)
  update = functools.partial(
    step_lib.train_step, objective=objective, tx=tx, accumulate=accumulate, prepare=prepare
  )

  def body(train, chosen):
    numbers, beside = chosen
    return update(train, frozen, {name: x[numbers] for name, x in rows.items()} | beside)

  train = TrainState(
    state.step * len(order), state.params, state.opt_state, state.key(state_lib.TRAINING)
  )
  train, metrics = jax.lax.scan(body, train, (order, beside or {}))
  state = dataclasses.replace(state, params=train.params, opt_state=train.opt_state)
  return state, {name: _over_updates(name, value) for name, value in metrics.items()}


def row_order(
  state: state_lib.OnlineState, count: int, *, epochs: int, minibatches: int
) -> jax.Array:
  """The rows of every step, [epochs · minibatches, count / minibatches]: each epoch in another order."""
  keys = jax.random.split(state.key(state_lib.SHUFFLING), epochs)
  order = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
  return order.reshape(epochs * minibatches, count // minibatches)


def _over_updates(name: str, value: Mean):
  """Of the stacked [updates] metrics: the maximum of maxima, the first of firsts, else the sum."""
  if "first_" in name:
    return value.compute()[0]
  if step_lib.is_maximum(name):
    return jnp.max(value.compute())
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), value)
