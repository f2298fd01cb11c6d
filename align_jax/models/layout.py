"""Between our stacked [in, out] parameters and the files' one [out, in] matrix per layer.

A `Source` names the tensors of a checkpoint and reads rectangles of them; `assemble` builds our
tree from it one parameter, and on a mesh one shard, at a time: no checkpoint exists twice.
"""

import functools
import math
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import sharding
from align_jax.errors import InputError
from align_jax.models import families, params, transformer
from align_jax.models.config import ModelConfig


class Source(Protocol):
  """The tensors of one checkpoint under their own names and in their own layout."""

  format: str  # "hf" or "gguf"
  path: str

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape."""

  def read(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
    """The part [rows] or [rows, columns] of a tensor; `columns` is None for vectors."""


def assemble(model: transformer.Transformer, source: Source, mesh=None) -> dict:
  """Our parameters, of the model's param_dtype, read from `source`, laid out on `mesh` if given.

  Raises InputError that names a tensor which is missing, unexpected or of the wrong shape.
  """
  abstract = params.abstract_params(model)
  check(model.config, source)
  shardings = jax.tree.map(lambda _: None, abstract)
  if mesh is not None:
    shardings = sharding.tree_shardings(params.logical_axes(model), abstract, mesh)

  def load(path, leaf):
    name = path[-1].key
    where = shardings["layers"][name] if len(path) == 2 else shardings[name]

    def part(index):
      index = tuple(slice(*i.indices(n)) for i, n in zip(index, leaf.shape))
      return _read(model.config, source, name, index).astype(leaf.dtype, copy=False)

    if where is None:
      return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, where, part)

  return jax.tree_util.tree_map_with_path(load, abstract)


def disassemble(config: ModelConfig, weights: dict) -> Iterator[tuple[str, np.ndarray]]:
  """Hugging Face's (name, tensor) of all our parameters, one layer of one parameter at a time."""
  for ours, theirs in _names(config, "hf").items():
    if "{}" not in theirs:
      top = np.asarray(weights[ours])
      yield theirs, np.ascontiguousarray(top.T) if ours == "unembedding" else top
      continue
    stack = weights["layers"][ours]
    for layer in range(config.num_layers):
      tensor = np.asarray(stack[layer])
      inputs, outputs = _in_out(config, ours)
      matrix = tensor.reshape(math.prod(inputs), -1).T if inputs else tensor.reshape(-1)
      yield theirs.format(layer), np.ascontiguousarray(matrix)


def check(config: ModelConfig, source: Source):
  """Raises InputError unless `source` has exactly the tensors `config` needs, in their shapes."""
  shapes, wanted = source.shapes(), expected_shapes(config, source.format)
  for name, shape in wanted.items():
    if name not in shapes:
      raise InputError(f"{source.path}: tensor {name!r} is missing")
    if tuple(shapes[name]) != shape:
      raise InputError(
        f"{source.path}: tensor {name!r} has the shape {list(shapes[name])}, not {list(shape)}"
      )
  for name in shapes:
    # Buffers of old checkpoints, and the copy of a tied embedding, say nothing new.
    redundant = name.endswith("rotary_emb.inv_freq") or (
      config.tie_embeddings and name in ("lm_head.weight", "output.weight")
    )
    if name not in wanted and not redundant:
      raise InputError(f"{source.path}: tensor {name!r} has no place in a {config.family} model")


def expected_shapes(config: ModelConfig, fmt: str) -> dict[str, tuple[int, ...]]:
  """The tensors of a checkpoint and their shapes, [out, in]."""
  shapes = {}
  for ours, theirs in _names(config, fmt).items():
    inputs, outputs = _in_out(config, ours)
    shape = (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)
    layers = range(config.num_layers) if "{}" in theirs else (None,)
    shapes.update({theirs.format(layer): shape for layer in layers})
  return shapes


@functools.lru_cache
def _names(config: ModelConfig, fmt: str) -> dict[str, str]:
  """Our name to theirs, of the parameters this model has."""
  table = families.names(config.post_norms, fmt)
  abstract = params.abstract_params(transformer.Transformer(config))
  present = {**abstract, **abstract["layers"]}
  return {ours: theirs for ours, theirs in table.items() if ours in present}


def _in_out(config, name):
  """(input shape, output shape) of one parameter of one layer; no input shape for vectors."""
  c, matrices = config, transformer.weight_shapes(config)
  if name in matrices:
    return matrices[name]
  if name in ("embedding", "unembedding"):
    return (c.embed_dim,), (c.vocab_size,)
  if name.endswith("_bias"):
    return (), matrices[name.removesuffix("_bias")][1]
  return (), (c.head_dim if name in ("query_norm", "key_norm") else c.embed_dim,)


def _read(config, source, name, index) -> np.ndarray:
  """The part `index` (full slices, one an axis) of our parameter `name`."""
  theirs = _names(config, source.format)[name]
  if name == "embedding":  # [vocab, embed] on both sides
    return source.read(theirs, *index)
  if name == "unembedding":
    return source.read(theirs, index[1], index[0]).T
  if name == "final_norm":
    return source.read(theirs, index[0], None)
  inputs, outputs = _in_out(config, name)
  split = 1 + len(inputs)
  rows = _flat(index[split:], outputs)
  columns = _flat(index[1:split], inputs) if inputs else None
  shape = tuple(i.stop - i.start for i in index[1:])
  layers = range(index[0].start, index[0].stop)
  stack = None
  for at, layer in enumerate(layers):
    tensor = source.read(theirs.format(layer), rows, columns).T.reshape(shape)
    if stack is None:
      stack = np.empty((len(layers), *shape), tensor.dtype)
    stack[at] = tensor
  return stack


def _flat(index, shape) -> slice:
  """The slice of the flattened axes; only the first of them may be cut."""
  inner = math.prod(shape[1:])
  if any(i != slice(0, n, 1) for i, n in zip(index[1:], shape[1:])):
    raise ValueError("only heads are split over devices, not head_dim")
  return slice(index[0].start * inner, index[0].stop * inner)
