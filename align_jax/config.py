"""From configuration files to frozen dataclasses: every name known, every type right, or an error."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from align_jax.errors import InputError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
  """`values` as a `cls`; raises InputError that names the field which is unknown, missing or mistyped."""
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(fields)}"
      raise InputError(f"{path}.{name} is not a setting of {cls.__name__}{hint}")
  for name, field in fields.items():
    has_default = (
      field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )
    if name not in values and not has_default:
      raise InputError(f"{path}.{name} must be set")
  built = {name: _convert(values[name], hints[name], f"{path}.{name}") for name in values}
  try:
    return cls(**built)
  except InputError:
    raise
  except ValueError as error:
    raise InputError(f"{path}: {error}") from error


def to_dict(config) -> dict[str, Any]:
  """The nested dictionary that `build` would read back."""
  return dataclasses.asdict(config)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "config") -> list[str]:
  """One line for every setting that is not the same in both."""
  lines = []
  for name in sorted(set(old) | set(new)):
    a, b = old.get(name, "(absent)"), new.get(name, "(absent)")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += difference(a, b, f"{path}.{name}")
    elif _plain(a) != _plain(b):
      lines.append(f"{path}.{name}: {a!r} there, {b!r} here")
  return lines


def _plain(x):
  return list(x) if isinstance(x, tuple) else x


def _convert(value, hint, path: str):
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in args:
      return None
    return _convert(value, next(a for a in args if a is not type(None)), path)
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise InputError(f"{path} must be a section with fields, not {value!r}")
    return build(hint, value, path)
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise InputError(f"{path} must be a tuple, not {value!r}")
    return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
  if origin is dict:
    if not isinstance(value, Mapping):
      raise InputError(f"{path} must be a mapping, not {value!r}")
    return {k: _convert(v, args[1], f"{path}.{k}") for k, v in value.items()}
  return _scalar(value, hint, path)


def _scalar(value, hint: type, path: str):
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
    raise InputError(f"{path} must be of type {hint.__name__}, not {value!r}")
  return value
