"""Weight gradients that wait for attention's backward pass, so that they run beside it.

On a CPU attention by tiles keeps one core busy.  The gradients xᵀ dy of the matrices behind it are ready
long before its backward pass, and XLA takes what is ready first: the other cores would idle beside its
loop.  Nothing needs these gradients before the layer's end, so they wait for what the loop waits for
(zero-bubble pipelines put them off for the same reason: Qi et al. 2024, 2401.10241), and keep their
memory until the loop's end: XLA would give it to the loop, which then had to wait for them.  Values do
not change.
"""

import functools

import jax
import jax.numpy as jnp


def late(rows: int, end: jax.Array, matrices: dict[str, jax.Array]):
  """(end, {name: (matrix, slot)}) of matrices [I, O] whose gradients are returned by this call.

  `end`, any array, is what the layer begins with, and its backward pass ends with.  `product` takes a
  matrix and its slot; `beside`, between the two calls, says what its gradient is computed beside.
  rows: R of the products' x [R, I].  A slot is zeros [R, I], [R, O] and [I, O] that no forward pass reads:
  x, dy and xᵀ dy come here as its cotangents.
  """
  end, slots = _slots(rows, end, matrices)
  return end, {name: (matrix, slots[name]) for name, matrix in matrices.items()}


def beside(anchor: jax.Array, late: dict[str, tuple]):
  """(anchor, late), where the gradients of `late` are computed once the cotangent of `anchor` is there."""
  anchor, slots = _beside(anchor, {name: slot for name, (_, slot) in late.items()})
  return anchor, {name: (matrix, slots[name]) for name, (matrix, _) in late.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slots(rows, end, matrices):
  def zeros(matrix):
    shapes = (rows, matrix.shape[0]), (rows, matrix.shape[1]), matrix.shape
    return tuple(jnp.zeros(shape, matrix.dtype) for shape in shapes)

  return end, jax.tree.map(zeros, matrices)


def _slots_backward(rows, saved, cotangents):
  """The gradients as they are, times a one read off x and dy at a place that `end` names."""
  end, slots = cotangents
  place = jnp.isnan(end.reshape(-1)[0]).astype(jnp.int32)

  def gradient(x, dy, found):
    return found * _one(x.reshape(-1)[place] + dy.reshape(-1)[place], found.dtype)

  return end, {name: gradient(*slot) for name, slot in slots.items()}


_slots.defvjp(lambda *args: (_slots(*args), None), _slots_backward)


@jax.custom_vjp
def _beside(anchor, slots):
  return anchor, slots


def _beside_backward(saved, cotangents):
  """xᵀ dy, of whose smaller factor one number is written again: it waits, for XLA drops barriers here."""
  anchor, slots = cotangents
  one = _one(anchor.reshape(-1)[0], anchor.dtype)

  def wait(x):
    return jax.lax.dynamic_update_slice(x, x[:1, :1] * one.astype(x.dtype), (0, 0))

  def compute(x, dy, _):
    x, dy = (wait(x), dy) if x.size <= dy.size else (x, wait(dy))
    return x, dy, x.T @ dy

  return anchor, {name: compute(*slot) for name, slot in slots.items()}


_beside.defvjp(lambda *args: (args, None), _beside_backward)


def _one(x: jax.Array, dtype) -> jax.Array:
  """1 that is not known before x; NaN where x is NaN."""
  return jnp.where(jnp.isnan(x), x, 1).astype(dtype)


@jax.custom_vjp
def product(x: jax.Array, matrix: jax.Array, slot: tuple) -> jax.Array:
  """x [R, I] times matrix [I, O], whose gradient the call of `late` returns that made `slot`."""
  return x @ matrix


def _product_forward(x, matrix, slot):
  return x @ matrix, (x, matrix)


def _product_backward(saved, dy):
  x, matrix = saved
  return dy @ matrix.T, None, (x, dy, jnp.zeros_like(matrix))


product.defvjp(_product_forward, _product_backward)
