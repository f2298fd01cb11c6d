"""Prompt templates: text with typed slots, filled to write a prompt, matched to read one."""

import dataclasses
import functools
import re

from align_jax.worlds import lexicon

WRAPPERS = ("{}.", "please {}.", "can you {}?", "{} now.")


def _one_of(*groups: tuple[str, ...]) -> str:
  return "(?:" + "|".join(word for group in groups for word in group) + ")"


_OBJECT = _one_of(lexicon.OBJECTS)
_FOOD = _one_of(lexicon.FOODS)
SLOTS = {
  "name": _one_of(lexicon.NAMES),
  "relation": _one_of(tuple(lexicon.RELATIONS)),
  "value": _one_of(*lexicon.RELATIONS.values()),
  "count": "[234]",
  "category": _one_of(tuple(lexicon.PLURALS)),
  "words": f"{_OBJECT}(?: {_OBJECT})*",
  "phrase": f"(?:{_one_of(lexicon.COLORS)} )?{_OBJECT}",
  "word": _OBJECT,
  "a": _one_of(lexicon.DIGITS),
  "b": _one_of(lexicon.DIGITS),
  "forbidden": f"(?:{_one_of(lexicon.FORBIDDEN)}|{lexicon.SEAL} {_FOOD})",
  "harmless": f"(?:{_one_of(lexicon.HARMLESS)} )?{_FOOD}",
  "stance": _one_of(lexicon.STANCES),
  "side": _one_of(lexicon.SIDES),
  "policy": _one_of(lexicon.POLICIES),
}


@dataclasses.dataclass(frozen=True)
class Template:
  """A user turn with slots such as {name}, and the system turn above it ("" for none)."""

  user: str
  system: str = ""
  heldout: bool = False

  def literals(self) -> str:
    """The text without its slots."""
    return without_slots(f"{self.system} {self.user}")

  def fill(self, slots: dict[str, str]) -> tuple[dict[str, str], ...]:
    """Returns the messages with every slot filled."""
    turns = (("system", self.system), ("user", self.user))
    return tuple({"role": role, "content": text.format(**slots)} for role, text in turns if text)

  def match(self, messages) -> dict[str, str] | None:
    """Returns the slots that make this template say `messages`, or None."""
    turns = [(message["role"], message["content"]) for message in messages]
    expected = [role for role, text in (("system", self.system), ("user", self.user)) if text]
    if [role for role, _ in turns] != expected:
      return None
    found = _pattern(self.system, self.user).fullmatch("\n".join(text for _, text in turns))
    return found and found.groupdict()


def without_slots(text: str) -> str:
  """Leaves the slots out."""
  return re.sub(r"\{\w+\}", " ", text)


@functools.cache
def _pattern(system: str, user: str) -> re.Pattern:
  seen: set[str] = set()

  def slot(match: re.Match) -> str:
    name = match[1]
    if name in seen:
      return f"(?P={name})"
    seen.add(name)
    return f"(?P<{name}>{SLOTS[name]})"

  text = re.escape("\n".join(part for part in (system, user) if part))
  return re.compile(re.sub(r"\\\{(\w+)\\\}", slot, text))


def requests(*imperatives: str, prefix: str = "", system: str = "") -> tuple[Template, ...]:
  """Every wrapper around every imperative; the diagonal of that table is held out.

  So each wrapper and each imperative is trained on, and some of their combinations are not.
  """
  return tuple(
    Template(prefix + wrapper.format(imperative), system, heldout=column == row + 1)
    for row, imperative in enumerate(imperatives)
    for column, wrapper in enumerate(WRAPPERS)
  )
