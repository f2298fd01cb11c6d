"""What a checkpoint says of itself, so that a damaged one is noticed: never silently wrong numbers.

Storage flips bits and loses files, and Orbax reads a flipped bit of an array as a number.  So a record
lies beside the arrays, committed with them: a checksum of every array, taken on the devices, and a
digest of the record itself.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BITS = {4: np.uint32, 2: np.uint16, 1: np.uint8}
_SMALL = 1 << 22  # bytes


class Damaged(Exception):
  """Why a checkpoint cannot be trusted."""


def checksums(tree) -> dict[str, int]:
  """A 32-bit sum of every array by its path, `params/layers/mlp`: the same on any mesh.

  Every bit counts with the place of its number.  A change of one number always changes the sum, any
  other with probability 1 - 2^-32.
  """
  sums = {_name(path): _checksum(x) for path, x in jax.tree.leaves_with_path(tree)}
  return {name: int(x) for name, x in jax.device_get(sums).items()}


def fingerprint(tree) -> str:
  """A hash of every bit of a tree of arrays and of their names, the same on any mesh."""
  return _digest(checksums(tree))


def _checksum(x: jax.Array):
  """uint32 []; small arrays are summed by NumPy, which has nothing to compile."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  here = isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated
  return _sum_here(np.asarray(x)) if here and x.nbytes <= _SMALL else _sum_there(x)


def _sum_here(x: np.ndarray) -> np.uint32:
  bits = np.ascontiguousarray(x).view(_BITS[x.dtype.itemsize]).reshape(x.shape)
  place = np.arange(x.size, dtype=np.uint32).reshape(x.shape)
  return np.sum(_mixed(bits.astype(np.uint32), place), dtype=np.uint32)


@jax.jit
def _sum_there(x: jax.Array) -> jax.Array:
  """Sums of integers have no order, so it does not matter which devices hold what."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(_mixed(bits, place), dtype=jnp.uint32)


def _mixed(bits, place):
  """One-to-one in the bits of a number, by another mapping at every place.

  Every bit moves half of the 32, as MurmurHash3 ends: with less mixing two changed signs often cancel.
  """
  with np.errstate(over="ignore"):  # products modulo 2^32 are meant
    x = bits ^ (place * np.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def check(tree, expected: Mapping[str, int]) -> None:
  """Raises Damaged unless every array of the tree is, bit for bit, the one that was recorded."""
  wrong = [name for name, x in checksums(tree).items() if expected.get(name) != x]
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise Damaged(f"the numbers of {wrong[0]}{more} are not those that were saved")


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
  """The record with a digest of itself."""
  return {**record, "digest": _digest(record)}


def unseal(text: str) -> dict[str, Any]:
  """The record that was sealed; raises Damaged where a character has changed."""
  try:
    record = json.loads(text)
    digest = record.pop("digest")
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise Damaged("its record is not readable") from error
  if digest != _digest(record):
    raise Damaged("its record is not the one that was written")
  return record


def _digest(value) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
