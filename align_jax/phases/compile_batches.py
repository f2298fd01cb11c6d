"""The batches of every phase as shapes: what its step is compiled for when there are no data."""

import jax
import jax.numpy as jnp

from align_jax import sharding
from align_jax.data import shared_rows
from align_jax.errors import InputError

_INTEGERS = ("tokens", "segment_ids", "positions", "branch_ids", "sources", "targets", "slots")
_INTEGERS += ("places", "last")


def _arrays(mesh, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
  """int32 where the name says so, bool where it asks, else float32; rows split over the mesh."""
  placed, ways = sharding.batch_sharding(mesh), sharding.batch_ways(mesh)
  rows = next(iter(shapes.values()))[0]
  if rows % ways:
    raise InputError(f"a batch of {rows} rows cannot be split {ways} ways (mesh data x fsdp)")

  def kind(name: str):
    if name == "finished":
      return jnp.bool_
    return jnp.int32 if name.removeprefix("mismatched_") in _INTEGERS else jnp.float32

  return {n: jax.ShapeDtypeStruct(shape, kind(n), sharding=placed) for n, shape in shapes.items()}


def demonstrations(section, mesh):
  """Of `data.sft_batches`."""
  rows = (section.batch_size, row_length(section))
  return _arrays(mesh, dict.fromkeys(("tokens", "segment_ids", "positions", "loss_mask"), rows))


def pairs(section, layout: str, mesh, *, reference: bool, steps: bool = False):
  """Of `data.padded_batches` or `data.shared_batches`, with cached log-probs of the reference."""
  if layout == "shared":
    return _shared(section, mesh, reference=reference, steps=steps)
  count, length = section.batch_size, row_length(section)
  names = ["tokens", "segment_ids", "response_mask"]
  names += ["ref_logprobs"] * reference + ["step_mask"] * steps
  shapes = dict.fromkeys(names, (count, 2, length))
  return _arrays(mesh, shapes | dict.fromkeys(("weight", "margin", "label_prob"), (count,)))


def _shared(section, mesh, *, reference: bool, steps: bool):
  """As many rows as there are pairs, rounded up to the mesh: as if no two of them shared one."""
  ways, slots = sharding.batch_ways(mesh), min(shared_rows.SLOTS, section.batch_size)
  rows = -(-section.batch_size // ways) * ways
  names = ["tokens", "positions", "segment_ids", "branch_ids"]
  names += ["sources", "targets", "slots", "places"]
  names += ["ref_logprobs"] * reference + ["step_mask"] * steps
  shapes = dict.fromkeys(names, (rows, row_length(section))) | {"last": (rows, 2 * slots)}
  return _arrays(mesh, shapes | dict.fromkeys(("weight", "margin", "label_prob"), (rows, slots)))


def feedback(section, mesh):
  """Of `data.feedback_batches`."""
  rows = (section.batch_size, row_length(section))
  names = [p + n for p in ("", "mismatched_") for n in ("tokens", "segment_ids", "response_mask")]
  flags = dict.fromkeys(("is_desirable", "weight"), rows[:1])
  return _arrays(mesh, dict.fromkeys(names, rows) | flags)


def rollouts(rows: int, length: int, mesh):
  """Of `Rollout.batch` with scores: prompts and responses of `length` tokens together."""
  shapes = dict.fromkeys(("tokens", "segment_ids"), (rows, length))
  shapes |= dict.fromkeys(("mask", "sampler_logprobs"), (rows, length - 1))
  return _arrays(mesh, shapes | dict.fromkeys(("finished", "score", "keep"), (rows,)))


def row_length(section) -> int:
  """Tokens of a row: the longest bucket, or `length`."""
  return max(section.buckets) if section.buckets else section.length
