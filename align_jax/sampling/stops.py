"""Strings that end a response, wherever the borders of the tokens lie."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align_jax.errors import InputError


def check(stop: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
  """The stop strings as a tuple; raises InputError where they cannot be looked for."""
  if isinstance(stop, str):
    raise InputError(f"stop must be a list of strings, not the string {stop!r}")
  stop = tuple(stop)
  if any(not isinstance(s, str) or not s for s in stop):
    raise InputError(f"stop strings must be texts that are not empty, got {list(stop)}")
  if stop and tokenizer is None:
    raise InputError("stop strings need the tokenizer that made the tokens")
  return stop


def first_end(
  tokens: np.ndarray, stop: Sequence[str], tokenizer: Any, checked: int = 0
) -> int | None:
  """How many of `tokens` complete the first stop string; None if there is none.

  A response is the text of `tokenizer.decode(tokens[:n], skip_special_tokens=True)`, so a stop may
  span tokens or lie within one, and one that is a special token is an EOS id, not a stop string.
  The first `checked` tokens are known to hold none.
  """
  for n in range(checked + 1, len(tokens) + 1):
    text = tokenizer.decode(tokens[:n], skip_special_tokens=True)
    if any(s in text for s in stop):
      return n
  return None


def before(text: str, stop: Sequence[str]) -> str:
  """`text` up to the first occurrence of any of the stop strings."""
  places = [text.find(s) for s in stop]
  return text[: min((p for p in places if p >= 0), default=len(text))]
