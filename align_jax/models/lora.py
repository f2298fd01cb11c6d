"""Low-rank adapters (Hu et al. 2021): W + scale A B, with scale = alpha / rank."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from align_jax.models import quantised, transformer


def init_lora(
  rng: jax.Array,
  model: transformer.Transformer,
  *,
  rank: int,
  targets: Sequence[str] = transformer.WEIGHTS,
) -> dict:
  """A "lora" collection: a [L, *in, rank] normal of std 1/√fan_in, b [L, rank, *out] zero.

  `targets` are names of `transformer.WEIGHTS`.  With b zero the adapted model is the base model.
  """
  unknown = [t for t in targets if t not in transformer.WEIGHTS]
  if unknown or not targets or rank < 1:
    raise ValueError(
      f"LoRA wants targets among {transformer.WEIGHTS} and rank >= 1, not {targets}, {rank}"
    )
  shapes = transformer.weight_shapes(model.config)
  layers = model.config.num_layers

  def adapter(rng, name):
    inputs, outputs = shapes[name]
    a = jax.random.normal(rng, (layers, *inputs, rank)) * math.prod(inputs) ** -0.5
    return {"a": a, "b": jnp.zeros((layers, rank, *outputs))}

  rngs = jax.random.split(rng, len(targets))
  return {"layers": {name: adapter(r, name) for name, r in zip(targets, rngs)}}


def lora_axes(lora: dict) -> dict:
  """Logical axis names of a "lora" collection, same structure."""

  def axes(name):
    inputs, outputs = transformer.WEIGHT_AXES[name]
    return {"a": ("layers", *inputs, "rank"), "b": ("layers", "rank", *outputs)}

  return {"layers": {name: axes(name) for name in lora["layers"]}}


def merge_lora(params: dict, lora: dict, scale: float) -> dict:
  """`params` with every adapted weight replaced by W + scale A B; int8 ones become float32."""
  layers = {name: quantised.dequantise(w, w.dtype) for name, w in params["layers"].items()}
  for name, adapter in lora["layers"].items():
    delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(adapter["a"], adapter["b"])
    weight = layers[name]
    layers[name] = (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)
  return {**params, "layers": layers}


def quantise_base(params: dict) -> dict:
  """`params` with every matrix of a layer as int8 and float32 scales: a frozen base for adapters.

  A quarter of the float32 memory, as in QLoRA (Dettmers et al. 2023), which takes 4 bits and quantises
  the scales as well.  Norms, biases, the embedding and the head stay as they are.
  """
  layers = dict(params["layers"])
  for name, (inputs, _) in transformer.WEIGHT_AXES.items():
    if not quantised.is_quantised(layers[name]):
      layers[name] = quantised.quantise(layers[name], len(inputs))
  return {**params, "layers": layers}
