"""From configuration files to frozen dataclasses: every name known, every type right, or an error."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from align_jax.errors import InputError, one_line

T = TypeVar("T")


def build(
  cls: type[T], values: Mapping[str, Any], path: str = "config", *, finite: bool = True
) -> T:
  """`values` as a `cls`; raises InputError that names the field which is unknown, missing or mistyped.

  finite: refuse NaN and infinity, which no comparison finds out of range; what was measured may hold them.
  """
  if not isinstance(values, Mapping):
    raise InputError(f"{path} must be a section with fields, not {_shown(values)}")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in fields:
      near = difflib.get_close_matches(str(name), fields, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(fields)}"
      raise InputError(f"{path}.{one_line(name)} is not a setting of {cls.__name__}{hint}")
  for name, field in fields.items():
    has_default = (
      field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )
    if name not in values and not has_default:
      raise InputError(f"{path}.{name} must be set")
  built = {name: _convert(values[name], hints[name], f"{path}.{name}", finite) for name in values}
  try:
    return cls(**built)
  except InputError as error:
    if str(error).isprintable():
      raise
    raise InputError(one_line(error, 2000)) from error
  except ValueError as error:
    raise InputError(f"{path}: {one_line(error, 2000)}") from error


def to_dict(config) -> dict[str, Any]:
  """The nested dictionary that `build` would read back."""
  return dataclasses.asdict(config)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "config") -> list[str]:
  """One line for every setting that is not the same in both."""
  lines = []
  for name in sorted(set(old) | set(new)):
    a, b = old.get(name, "(absent)"), new.get(name, "(absent)")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += difference(a, b, f"{path}.{one_line(name)}")
    elif _plain(a) != _plain(b):
      lines.append(f"{path}.{one_line(name)}: {a!r} there, {b!r} here")
  return lines


def _plain(x):
  return list(x) if isinstance(x, tuple) else x


def _convert(value, hint, path: str, finite: bool):
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in args:
      return None
    return _convert(value, next(a for a in args if a is not type(None)), path, finite)
  if dataclasses.is_dataclass(hint):
    return build(hint, value, path, finite=finite)
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise InputError(f"{path} must be a tuple, not {_shown(value)}")
    if args[-1] is not Ellipsis and len(value) != len(args):
      raise InputError(f"{path} must hold {len(args)} values, not {len(value)}")
    return tuple(_convert(v, args[0], f"{path}[{i}]", finite) for i, v in enumerate(value))
  if origin is dict:
    if not isinstance(value, Mapping):
      raise InputError(f"{path} must be a mapping, not {_shown(value)}")
    return {
      _scalar(k, args[0], path, finite): _convert(v, args[1], f"{path}.{one_line(k)}", finite)
      for k, v in value.items()
    }
  return _scalar(value, hint, path, finite)


def _scalar(value, hint: type, path: str, finite: bool):
  if hint is Any:
    return value
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if number and isinstance(value, int) and not -(2**63) <= value < 2**63:
    raise InputError(f"{path} is too large a number")
  if hint is float and number:
    value = float(value)
  if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
    raise InputError(f"{path} must be of type {hint.__name__}, not {_shown(value)}")
  if finite and isinstance(value, float) and not math.isfinite(value):
    raise InputError(f"{path} must be a finite number, not {value}")
  return value


def _shown(value) -> str:
  try:
    return one_line(repr(value))
  except ValueError:  # a whole number of more digits than Python writes
    return "what is too long to show"
