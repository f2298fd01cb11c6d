"""LoRA adapters in PEFT's folder: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from align_jax.errors import InputError
from align_jax.models import families, pretrained, transformer
from align_jax.models.transformer import Transformer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_HF = families.names(post_norms=False, fmt="hf")
# Our weight to the module PEFT wraps, and the last part of its name, which PEFT calls a target.
_MODULES = {w: _HF[w].removesuffix(".weight") for w in transformer.WEIGHTS}
_TARGETS = {module.rsplit(".", 1)[1]: weight for weight, module in _MODULES.items()}
# Settings of PEFT that change what an adapter computes, and the values that mean "not used".
_PLAIN = {
  "use_dora": (False, None),
  "fan_in_fan_out": (False, None),
  "bias": ("none", None),
  "modules_to_save": (None, []),
  "layers_to_transform": (None, []),
  "rank_pattern": (None, {}),
  "alpha_pattern": (None, {}),
}


def save_adapter(folder: str, model: Transformer, lora: dict, *, base: str | None = None):
  """Writes the "lora" collection for PEFT; its alpha is the model's lora_scale times the rank.

  `base` is the name or path of the base model, which PEFT records.
  """
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  targets = {weight: target for target, weight in _TARGETS.items()}
  rank = next(iter(lora["layers"].values()))["a"].shape[-1]
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": model.lora_scale * rank,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": sorted(targets[name] for name in lora["layers"]),
    "inference_mode": True,
  }
  (path / CONFIG).write_text(json.dumps(config, indent=2))
  tensors = dict(_tensors(lora))
  safetensors_numpy.save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: str, model: Transformer) -> tuple[Transformer, dict]:
  """The adapter in `folder` as (the model with its lora_scale, a "lora" collection).

  Raises InputError that names a setting which is not supported or a tensor that does not fit.
  """
  path = pathlib.Path(folder)
  config = _read_config(path / CONFIG)
  rank = config["r"]
  scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
  try:
    tensors = safetensors_numpy.load_file(path / WEIGHTS)
  except (OSError, safetensors.SafetensorError) as error:
    raise InputError(f"{path / WEIGHTS} cannot be read: {error}") from error
  lora = {}
  for target in config["target_modules"]:
    name = _TARGETS[target]
    lora[name] = _stack(path / WEIGHTS, tensors, model, name, rank)
  if tensors:
    raise InputError(f"{path / WEIGHTS}: tensor {min(tensors)!r} has no place in the model")
  return dataclasses.replace(model, lora_scale=float(scale)), {"layers": lora}


def _tensors(lora) -> Iterator[tuple[str, np.ndarray]]:
  for name, adapter in lora["layers"].items():
    a, b = np.asarray(adapter["a"]), np.asarray(adapter["b"])
    for layer in range(a.shape[0]):
      matrices = (a[layer].reshape(-1, a.shape[-1]), b[layer].reshape(b.shape[1], -1))
      for key, matrix in zip(_keys(name, layer), matrices):
        yield key, np.ascontiguousarray(matrix.T)


def _keys(name, layer):
  module = f"base_model.model.{_MODULES[name].format(layer)}"
  return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _stack(path, tensors, model, name, rank):
  inputs, outputs = transformer.weight_shapes(model.config)[name]
  shapes = ((rank, math.prod(inputs)), (math.prod(outputs), rank))
  stacks = ([], [])
  for layer in range(model.config.num_layers):
    for key, shape, stack in zip(_keys(name, layer), shapes, stacks):
      if key not in tensors:
        raise InputError(f"{path}: tensor {key!r} is missing")
      tensor = tensors.pop(key)
      if tensor.shape != shape:
        raise InputError(
          f"{path}: tensor {key!r} has the shape {list(tensor.shape)}, not {list(shape)}"
        )
      stack.append(tensor.T.astype(np.float32))
  layers = model.config.num_layers
  a = np.stack(stacks[0]).reshape(layers, *inputs, rank)
  b = np.stack(stacks[1]).reshape(layers, rank, *outputs)
  return {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def _read_config(path):
  config = pretrained.read_json(path)
  if config.get("peft_type") != "LORA":
    raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not supported; LORA is")
  for field in ("r", "lora_alpha", "target_modules"):
    if field not in config:
      raise InputError(f"{path}: field {field!r} is missing")
  for field, plain in _PLAIN.items():
    if field in config and config[field] not in plain:
      raise InputError(f"{path}: {field}={config[field]!r} is not supported")
  unknown = set(config["target_modules"]) - set(_TARGETS)
  if unknown or isinstance(config["target_modules"], str):
    raise InputError(
      f"{path}: target_modules {config['target_modules']} are not all {list(_TARGETS)}"
    )
  return config
