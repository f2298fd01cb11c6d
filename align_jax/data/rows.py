"""One row of a data file and the checks on its fields; complaints name file, line and field."""

import dataclasses
import difflib
import math
from typing import Any

from align_jax.data.transcripts import ROLES, Message
from align_jax.errors import InputError, one_line


@dataclasses.dataclass(frozen=True)
class Row:
  """A JSON object with the place it came from, "file.jsonl:12"."""

  source: str
  fields: dict[str, Any]

  def error(self, name: str, complaint: str) -> InputError:
    return InputError(f"{self.source}: field '{one_line(name)}' {one_line(complaint, 400)}")

  def has(self, name: str) -> bool:
    return self.fields.get(name) is not None

  def allow(self, *names: str) -> None:
    """Other columns are left alone (public files are full of them), misspelt ones are not."""
    for name in self.fields:
      if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.8)
        if near and not self.has(near[0]) and abs(len(near[0]) - len(name)) <= 1:
          raise self.error(name, f"is not known here; did you mean '{near[0]}'?")

  def required(self, name: str) -> Any:
    if self.has(name):
      return self.fields[name]
    found = one_line(", ".join(f"'{key}'" for key in self.fields) or "none")
    raise self.error(name, f"is missing (fields found: {found}; `columns` can rename them)")

  def text(self, name: str) -> str:
    value = self.required(name)
    if not isinstance(value, str):
      raise self.error(name, f"must be a string, not {_kind(value)}")
    return value

  def boolean(self, name: str) -> bool:
    value = self.required(name)
    if not isinstance(value, bool):
      raise self.error(name, f"must be true or false, not {_kind(value)}")
    return value

  def number(
    self, name: str, default: float, *, low: float = -math.inf, high: float = math.inf
  ) -> float:
    if not self.has(name):
      return default
    return self._number(name, self.fields[name], low, high)

  def numbers(
    self, name: str, *, low: float = -math.inf, high: float = math.inf
  ) -> dict[str, float]:
    """An object of numbers; empty where the field is absent."""
    items = self.mapping(name).items()
    return {key: self._number(f"{name}.{key}", value, low, high) for key, value in items}

  def texts(self, name: str) -> tuple[str, ...]:
    value = self.required(name)
    if not isinstance(value, list | tuple):
      raise self.error(name, f"must be a list of strings, not {_kind(value)}")
    for i, item in enumerate(value):
      if not isinstance(item, str):
        raise self.error(f"{name}[{i}]", f"must be a string, not {_kind(item)}")
    return tuple(value)

  def _number(self, name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise self.error(name, f"must be a number, not {_kind(value)}")
    try:
      value = float(value)
    except OverflowError as error:  # a whole number of more than 308 digits
      raise self.error(name, "is too large") from error
    if not math.isfinite(value):
      raise self.error(name, f"must be finite, not {value}")
    if not low <= value <= high:
      bounds = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
      raise self.error(name, f"must be {bounds}, not {value:g}")
    return value

  def choice(self, name: str, meanings: dict[Any, Any]) -> Any:
    """What a value stands for, where only some are known."""
    value = self.required(name)
    if not isinstance(value, int | float | str) or isinstance(value, bool) or value not in meanings:
      raise self.error(name, f"must be one of {', '.join(map(str, meanings))}, not {_shown(value)}")
    return meanings[value]

  def mapping(self, name: str) -> dict[str, Any]:
    value = self.fields.get(name)
    if value is None:
      return {}
    if not isinstance(value, dict):
      raise self.error(name, f"must be an object, not {_kind(value)}")
    return value

  def messages(self, name: str) -> tuple[Message, ...]:
    value = self.required(name)
    if not isinstance(value, list | tuple):
      raise self.error(name, f"must be a list of messages, not {_kind(value)}")
    if not value:
      raise self.error(name, "is empty")
    return tuple(self._message(f"{name}[{i}]", message) for i, message in enumerate(value))

  def _message(self, name: str, value: Any) -> Message:
    if not isinstance(value, dict):
      raise self.error(name, f"must be an object with 'role' and 'content', not {_kind(value)}")
    unknown = [k for k in value if k not in ("role", "content") and value[k] is not None]
    if unknown:
      raise self.error(f"{name}.{unknown[0]}", "is not supported (only 'role' and 'content' are)")
    for key in ("role", "content"):
      if value.get(key) is None:
        raise self.error(f"{name}.{key}", "is missing")
      if not isinstance(value[key], str):
        raise self.error(f"{name}.{key}", f"must be a string, not {_kind(value[key])}")
    if value["role"] not in ROLES:
      known = ", ".join(ROLES)
      raise self.error(f"{name}.role", f"must be one of {known}, not {_shown(value['role'])}")
    return {"role": value["role"], "content": value["content"]}


def _kind(value: Any) -> str:
  names = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    type(None): "null",
  }
  if type(value) in names:
    return names[type(value)]
  return f"the number {_shown(value)}" if isinstance(value, int | float) else type(value).__name__


def _shown(value: Any) -> str:
  """A value as a complaint repeats it; a number may have more digits than Python will write."""
  try:
    return one_line(repr(value), 60)
  except (ValueError, RecursionError):
    return "one that is too large to show"
