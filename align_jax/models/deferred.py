"""Weight gradients that wait for attention's backward pass, so that they run beside it.

On a CPU attention by tiles keeps one core busy.  The gradients xᵀ dy of the matrices behind it are ready
long before its backward pass, and XLA takes what is ready first: the other cores would idle beside its
loop.  Nothing needs these gradients before the layer's end, so they wait for what the loop waits for
(zero-bubble pipelines put them off for the same reason: Qi et al. 2024, 2401.10241).  Values do not change.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def slots(rows: int, anchor: jax.Array, matrices: dict[str, jax.Array]):
  """(anchor, {name: slot}): who gives a slot to `product` leaves the matrix's gradient to this call.

  It is xᵀ dy of the product, computed once the cotangent of `anchor`, an array of any shape, is there.
  rows: R of the products' x [R, I]; matrices [I, O].  A slot, zeros [R, I] and [R, O] that no forward pass
  reads, is what brings x and dy here: they are its cotangents.
  """
  zeros = lambda m: tuple(jnp.zeros((rows, size), m.dtype) for size in m.shape)  # noqa: E731
  return anchor, jax.tree.map(zeros, matrices)


def _slots_forward(rows, anchor, matrices):
  return slots(rows, anchor, matrices), None


def _slots_backward(rows, saved, cotangents):
  anchor, factors = cotangents
  return anchor, {name: _gradient(x, dy, anchor) for name, (x, dy) in factors.items()}


slots.defvjp(_slots_forward, _slots_backward)


def _gradient(x, dy, anchor):
  """xᵀ dy; its smaller factor is multiplied by a one read off `anchor`, for XLA drops barriers here."""
  sample = anchor.reshape(-1)[0]
  one = jnp.where(jnp.isnan(sample), sample, 1).astype(x.dtype)
  return (x * one).T @ dy if x.size <= dy.size else x.T @ (dy * one)


@jax.custom_vjp
def product(x: jax.Array, matrix: jax.Array, slot: tuple[jax.Array, jax.Array]) -> jax.Array:
  """x [R, I] times matrix [I, O], whose gradient the call of `slots` returns that made `slot`."""
  return x @ matrix


def _product_forward(x, matrix, slot):
  return x @ matrix, (x, matrix)


def _product_backward(saved, dy):
  x, matrix = saved
  return dy @ matrix.T, None, (x, dy)


product.defvjp(_product_forward, _product_backward)
