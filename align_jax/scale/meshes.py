"""Which meshes and remat policies are worth compiling for a slice, the most promising first."""

import itertools
from typing import Any

from align_jax import models
from align_jax.scale.tpus import Slice
from align_jax.sharding import MeshConfig

_REMAT = ("dots", "full")
_RECOMPUTED = {"dots": 3.0, "full": 4.0}  # forward passes a step costs, in matrix products
_KEPT = {"dots": 12.0, "full": 1.0}  # activations of the model's width a layer keeps for a token


def candidates(
  phase: str, config: Any, shape: models.ModelConfig, tpu: Slice, *, most: int
) -> list[tuple[MeshConfig, str]]:
  """Up to `most` (mesh, remat), by a rough estimate of bytes and time; what cannot fit comes last.

  tensor divides the key heads, data is a multiple of the slices, and the rows split over data x fsdp.
  """
  rows, length, tokens = _rows(phase, config)
  trains = phase not in ("prefill", "decode")
  weights = models.num_params(models.Transformer(shape))
  found = []
  for mesh in _meshes(tpu, shape, rows, length):
    for remat in _REMAT if trains else (config.model.remat,):
      peak, seconds = _estimate(mesh, remat, tokens, weights, shape, tpu, trains)
      found.append((peak > tpu.hbm_bytes_per_device, seconds, len(found), mesh, remat))
  return [(mesh, remat) for *_, mesh, remat in sorted(found, key=lambda f: f[:3])[:most]]


def _rows(phase: str, config: Any) -> tuple[int, int, int]:
  """What a step is split by: (rows, their length, tokens of all)."""
  if hasattr(config, "data"):
    rows = config.data.batch_size // config.accumulate
    length = max(config.data.buckets) if config.data.buckets else config.data.length
    twice = getattr(config, "layout", "") == "padded"  # both answers of a pair in rows of their own
    return rows, length, rows * length * (2 if twice else 1)
  if phase in ("prefill", "decode"):
    rows, length = config.prompts.batch_size, config.prompts.max_length
    return rows, length, rows * length
  parts = config.accumulate * config.policy_gradient.minibatches
  rows = config.prompts.batch_size * config.sampling.samples_per_prompt // parts
  length = config.prompts.max_length + config.sampling.max_new_tokens
  return rows, length, rows * length


def _meshes(tpu: Slice, shape: models.ModelConfig, rows: int, length: int):
  per_slice = tpu.devices // tpu.slices
  powers = [2**i for i in range(per_slice.bit_length())]
  for tensor, context in itertools.product(powers, powers):
    if per_slice % (tensor * context) or shape.num_kv_heads % tensor or tensor > 16:
      continue
    if context > 1 and length // context < 2048:
      continue
    left = per_slice // (tensor * context)
    for within in powers:  # replicas of the weights within a slice
      if left % within == 0 and rows % (tpu.slices * left) == 0 and left // within >= 1:
        yield MeshConfig(tpu.slices * within, left // within, tensor, context)


def _estimate(
  mesh: MeshConfig, remat: str, tokens: int, weights: int, shape, tpu: Slice, trains: bool
):
  """(bytes, seconds) of one device, from counting weights and activations."""
  g = tpu.generation
  share = 1 / g.devices_per_chip
  split = mesh.fsdp * mesh.tensor
  own_tokens = tokens / (mesh.data * mesh.fsdp * mesh.context)
  width = shape.embed_dim * shape.num_layers
  state = weights * (16 if trains else 4) / split
  kept = own_tokens * width * 2 * (_KEPT[remat] / mesh.tensor if trains else 1)
  compute = (
    2 * weights * _RECOMPUTED.get(remat, 3.0) * tokens / tpu.devices / (g.peak_flops * share)
  )
  gathered = 3 * 2 * weights / mesh.tensor * (1 - 1 / mesh.fsdp)
  summed = 6 * own_tokens * width * 2 * 2 * (1 - 1 / mesh.tensor)
  replicas = 2 * 2 * weights / split * (1 - 1 / mesh.data)
  ici = (gathered + summed + replicas) / (g.ici_bandwidth * share)
  return state + kept, max(compute, ici)
