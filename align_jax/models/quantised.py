"""Frozen matrices as int8 with a scale for each output: qwix's arrays, which a scan takes apart by layers.

qwix is imported where a matrix is made one, as few runs have any.
"""

import jax
import jax.numpy as jnp


def is_quantised(weight) -> bool:
  """Whether a leaf of a tree of weights is one of `quantise`'s."""
  return hasattr(weight, "qvalue")


def quantise(weight: jax.Array, inputs: int):
  """int8 q [L, *in, *out] and scale [L, 1..., *out] float32 with W ≈ q · scale, off by scale / 2 at most.

  weight [L, *in, *out]; `inputs` is the number of its input axes.  The scale of an output of a layer
  is its largest |W| / 127.5.
  """
  import qwix

  kept = (0, *range(1 + inputs, weight.ndim))
  return qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=kept)


def dequantise(weight, dtype) -> jax.Array:
  """q · scale, multiplied in float32 and rounded to `dtype`; other arrays as they are, in `dtype`."""
  if not is_quantised(weight):
    return weight.astype(dtype)
  return (weight.qvalue.astype(jnp.float32) * weight.scale).astype(dtype)
