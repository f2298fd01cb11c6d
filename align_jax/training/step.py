"""One optimizer step, for every objective."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from align_jax.losses.masked import Mean
from align_jax.training import optimizer
from align_jax.training.state import TrainState

Metrics = dict[str, Any]
Objective = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]
# (carried, new params, metrics, steps done) -> carried
Carry = Callable[[dict[str, Any], Any, Metrics, jax.Array], dict[str, Any]]


def train_step(
  state: TrainState,
  frozen,
  batch,
  *,
  objective: Objective,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
  prepare: Callable | None = None,
  carry: Carry | None = None,
) -> tuple[TrainState, Metrics]:
  """Differentiates the *summed* loss over all microbatches and divides once by the total weight.

    g = sum_m grad(loss_sum_m) / sum_m weight_m

  so that accumulation, padding and sharding never change a number.  `frozen` holds the base and
  reference parameters and is never differentiated.  `prepare(params, frozen, batch)` may add to the
  batch what depends on all of it (KTO's baseline) before it is split into `accumulate` parts.
  `carry` renews `state.carried` behind the update; the objective reads it as part of `frozen`.
  """
  rng = jax.random.fold_in(state.rng, state.step)
  frozen = frozen | state.carried
  if prepare is not None:
    batch = prepare(state.params, frozen, batch)
  value_and_grad = jax.value_and_grad(objective, has_aux=True)
  if accumulate == 1:
    (_, metrics), grads = value_and_grad(state.params, frozen, batch, rng)
  else:
    metrics, grads = _accumulated(value_and_grad, state.params, frozen, batch, rng, accumulate)
  # A product, which XLA computes again wherever it is read; a quotient would be written out.
  share = 1 / jnp.maximum(metrics["loss"].weight, 1e-8)
  grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics["grad_norm"] = Mean(optimizer.global_norm(grads), jnp.ones(()))
  carried = carry(state.carried, params, metrics, state.step + 1) if carry else state.carried
  return TrainState(state.step + 1, params, opt_state, state.rng, carried), metrics


def _accumulated(value_and_grad, params, frozen, batch, rng, parts: int):
  """Scans over `parts` interleaved slices of the batch, adding gradients and metrics."""

  def body(carry, microbatch_and_index):
    microbatch, index = microbatch_and_index
    (_, metrics), grads = value_and_grad(params, frozen, microbatch, jax.random.fold_in(rng, index))
    totals, summed = carry
    totals = {name: _combine(name, totals[name], value) for name, value in metrics.items()}
    return (totals, jax.tree.map(jnp.add, summed, grads)), None

  microbatches = interleaved_parts(batch, parts)
  first = jax.tree.map(lambda x: x[0], microbatches)
  shapes = jax.eval_shape(lambda b: value_and_grad(params, frozen, b, rng), first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][1], shapes[1]))
  (metrics, grads), _ = jax.lax.scan(body, zeros, (microbatches, jnp.arange(parts)))
  return metrics, grads


def interleaved_parts(rows, parts: int):
  """Every array [N, ...] as [parts, N / parts, ...].

  Row r goes to part r % parts, so that each part keeps the rows' sharding over devices.
  """

  def split(x):
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, rows)


def joined_parts(parts):
  """Every array [parts, N / parts, ...] as the [N, ...] that `interleaved_parts` would take apart."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def is_maximum(name: str) -> bool:
  """Whether a metric is the largest of its parts, travelling as Mean(maximum ≥ 0, 1)."""
  return name.endswith("_max")


def _combine(name: str, total, value):
  return jax.tree.map(jnp.maximum if is_maximum(name) else jnp.add, total, value)


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  prepare: Callable | None = None,
  carry: Carry | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
  """The compiled step `(state, frozen, batch) -> (state, metrics)`, which reuses the state's memory."""
  step = functools.partial(
    train_step, objective=objective, tx=tx, accumulate=accumulate, prepare=prepare, carry=carry
  )
  return jax.jit(step, donate_argnums=0)


def make_eval_step(objective: Objective) -> Callable[[Any, Any, Any], Metrics]:
  """The compiled `(params, frozen, batch) -> metrics`."""
  return jax.jit(functools.partial(eval_step, objective=objective))


def eval_step(params, frozen, batch, *, objective: Objective) -> Metrics:
  """The objective's metrics without an update."""
  return objective(params, frozen, batch, jax.random.key(0))[1]
