"""Parameters as plain nested dictionaries: made, described without being made, counted."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from align_jax.models.transformer import Transformer

_TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)


def init_params(model: Transformer, rng: jax.Array) -> dict:
  """Random weights: normal of std 1/√fan_in, less in `out` and `down` by √(2 layers)."""

  @jax.jit  # so that the forward pass, which only finds the shapes, is never run
  def init(rng):
    return nn.unbox(model.init(rng, jnp.zeros(_TOKENS.shape, _TOKENS.dtype))["params"])

  return init(rng)


def abstract_params(model: Transformer) -> dict:
  """The tree of `init_params` as ShapeDtypeStructs; nothing is computed."""
  return nn.unbox(_boxed(model))


def logical_axes(model: Transformer) -> dict:
  """The tree of `init_params` with a tuple of logical axis names for every array."""
  return jax.tree.map(
    lambda x: tuple(x.names), _boxed(model), is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )


def num_params(model: Transformer) -> int:
  """How many numbers the parameters are."""
  return sum(x.size for x in jax.tree.leaves(abstract_params(model)))


def init_cache(model: Transformer, batch: int, length: int, dtype: str | None = None) -> dict:
  """An empty "cache" collection: keys and values [layers, batch, kv_heads, length, head_dim]."""
  c = model.config
  shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
  zeros = jnp.zeros(shape, jnp.dtype(c.dtype if dtype is None else dtype))
  return {"layers": {"keys": zeros, "values": jnp.zeros_like(zeros)}}


def _boxed(model):
  rng = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(model.init, rng, _TOKENS)["params"]
