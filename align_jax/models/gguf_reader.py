"""The GGUF container: metadata and tensors, in a fraction of the time of the package's own reader.

Layout, little-endian: magic, version, counts; then (key, type, value) records; then for every tensor
(name, dimensions, type, offset); then, aligned, the data.
"""

import math
import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

from align_jax.errors import InputError, one_line

_SCALARS = {
  0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
  11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MANGLED = (  # what a file of other bytes makes of the parsing below
  ValueError, LookupError, TypeError, ArithmeticError, MemoryError, RecursionError, OSError,
  struct.error,
)  # fmt: skip


class Tensor(NamedTuple):
  """`data` [rows, bytes of a row] for quantised types, else the numbers themselves."""

  shape: tuple[int, ...]
  type: gguf.GGMLQuantizationType
  data: np.ndarray


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """(metadata, tensors) of a file; tensors are memory-mapped, and still quantised."""
  try:
    buffer = np.memmap(path, np.uint8, mode="r")
    return _parse(_Cursor(buffer))
  except FileNotFoundError as error:
    raise InputError(f"{path} does not exist") from error
  except _MANGLED as error:
    raise InputError(f"{path} is no readable GGUF file: {one_line(error)}") from error


class _Cursor:
  """A place in the file that moves as values are taken."""

  def __init__(self, buffer: np.ndarray):
    self.buffer, self.bytes, self.at = buffer, memoryview(buffer), 0

  def take(self, fmt: str):
    (value,) = struct.unpack_from(fmt, self.bytes, self.at)
    self.at += struct.calcsize(fmt)
    return value

  def raw(self, count: int) -> memoryview:
    if count > len(self.bytes) - self.at:
      raise ValueError("it ends too early")
    self.at += count
    return self.bytes[self.at - count : self.at]

  def string(self) -> str:
    return str(self.raw(self.take("<Q")), "utf-8")

  def value(self, kind: int):
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      inner, count = self.take("<I"), self.take("<Q")
      if inner in _SCALARS:
        return self.numbers(inner, count).tolist()
      return [self.value(inner) for _ in range(count)]
    return self.numbers(kind, 1)[0].item()

  def numbers(self, kind: int, count: int) -> np.ndarray:
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.raw(count * dtype.itemsize), dtype)


def _parse(cursor: _Cursor):
  if bytes(cursor.raw(4)) != b"GGUF":
    raise ValueError("it does not begin with GGUF")
  version = cursor.take("<I")
  if version not in (2, 3):
    raise ValueError(f"its version is {version}, not 2 or 3")
  tensor_count, field_count = cursor.take("<Q"), cursor.take("<Q")
  fields = {}
  for _ in range(field_count):
    name = cursor.string()
    fields[name] = cursor.value(cursor.take("<I"))
  found = [_tensor_record(cursor) for _ in range(tensor_count)]
  alignment = fields.get("general.alignment", 32)
  start = math.ceil(cursor.at / alignment) * alignment
  return fields, {name: _tensor(cursor, start + at, *rest) for name, at, *rest in found}


def _tensor_record(cursor):
  name = cursor.string()
  dimensions = [cursor.take("<Q") for _ in range(cursor.take("<I"))]
  kind = gguf.GGMLQuantizationType(cursor.take("<I"))
  return name, cursor.take("<Q"), tuple(reversed(dimensions)), kind


def _tensor(cursor, at, shape, kind) -> Tensor:
  width = gguf.quant_shape_to_byte_shape(shape, kind)
  cursor.at = at
  data = np.frombuffer(cursor.raw(math.prod(width)), np.uint8).reshape(width)
  if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
    data = data.view(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
  return Tensor(shape, kind, data)
