"""Encoded examples as a person would want to see them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_jax.data import encoding
from align_jax.data.chat import Encoded
from align_jax.data.records import Demonstration, Feedback, Preference, Prompt, Record

_PLAIN_RESPONSE = ("⟦", "⟧")
_COLOURS = {"response": "\x1b[1;32m", "prompt": "\x1b[2m", "title": "\x1b[1;36m"}
_RESET = "\x1b[0m"


def show(record: Record, tokenizer: Any, length: int, *, colour: bool = True) -> str:
  """One record, tokenised as training sees it: special tokens stand as text, ↵ ends a line.

  The response, which the loss is on, is green, or in ⟦ ⟧ without colour.
  """
  paint = _Paint(tokenizer, colour)
  match record:
    case Demonstration():
      encoded = encoding.encode_demonstration(record, tokenizer, length)
      return paint.titled(record.source, encoded, _options(record), paint.text(encoded))
    case Feedback():
      encoded = encoding.encode_feedback(record, tokenizer, length)
      thumb = "desirable" if record.label else "undesirable"
      return paint.titled(record.source, encoded, [thumb, *_options(record)], paint.text(encoded))
    case Preference():
      pair = encoding.encode_preference(record, tokenizer, length)
      return "\n".join(
        paint.titled(f"{record.source} {side}", encoded, _options(record), paint.text(encoded))
        for side, encoded in zip(("chosen", "rejected"), pair)
      )
    case Prompt():
      tokens = encoding.encode_prompt(record, tokenizer, length)
      encoded = Encoded(tokens, np.zeros(len(tokens), bool))
      notes = [f"meta {record.meta}"] if record.meta else []
      return paint.titled(record.source, encoded, notes, paint.text(encoded))


def summary(records: Sequence[Record], tokenizer: Any, length: int) -> str:
  """Lengths in tokens over the records: smallest, median, largest; and how many exceed `length`."""
  prompts, responses = [], []
  for record in records:
    for encoded in _sequences(record, tokenizer):
      prompts.append(int((~encoded.response_mask).sum()))
      responses.append(int(encoded.response_mask.sum()))
  lines = [f"{len(records)} records, {len(prompts)} sequences"]
  totals = np.add(prompts, responses)
  for name, counts in (("prompt", prompts), ("response", responses), ("whole", totals)):
    low, middle, high = np.min(counts), np.median(counts), np.max(counts)
    lines.append(f"  {name:<9} {low:>6} … {middle:>7.1f} … {high:>6} tokens")
  over = int((totals > length).sum())
  return "\n".join([*lines, f"  {over} of {len(totals)} sequences are over {length} tokens"])


def _sequences(record: Record, tokenizer: Any) -> tuple[Encoded, ...]:
  whole = 2**30
  match record:
    case Demonstration():
      return (encoding.encode_demonstration(record, tokenizer, whole),)
    case Feedback():
      return (encoding.encode_feedback(record, tokenizer, whole),)
    case Preference():
      return tuple(encoding.encode_preference(record, tokenizer, whole))
  tokens = encoding.encode_prompt(record, tokenizer, whole)
  return (Encoded(tokens, np.zeros(len(tokens), bool)),)


def _options(record: Record) -> list[str]:
  """The numbers of a record that are not what they are by default."""
  return [
    f"{field.name} {value:g}"
    for field in dataclasses.fields(record)
    if field.name in ("weight", "margin", "label_prob")
    and (value := getattr(record, field.name)) != field.default
  ]


@dataclasses.dataclass(frozen=True)
class _Paint:
  tokenizer: Any
  colour: bool

  def text(self, encoded: Encoded) -> str:
    edges = np.flatnonzero(np.diff(encoded.response_mask)) + 1
    pieces = np.split(encoded.tokens, edges)
    masks = (bool(m[0]) for m in np.split(encoded.response_mask, edges))
    return "".join(self._piece(tokens, mask) for tokens, mask in zip(pieces, masks))

  def titled(self, title: str, encoded: Encoded, notes: Sequence[str], text: str) -> str:
    said = int(encoded.response_mask.sum())
    counts = f"{len(encoded.tokens)} tokens: {len(encoded.tokens) - said} prompt, {said} response"
    return self._in("title", "── " + " · ".join([title, counts, *notes])) + "\n" + text + "\n"

  def _piece(self, tokens: np.ndarray, response: bool) -> str:
    text = self.tokenizer.decode(tokens, skip_special_tokens=False).replace("\n", "↵\n")
    if response and not self.colour:
      return text.join(_PLAIN_RESPONSE)
    return self._in("response" if response else "prompt", text)

  def _in(self, style: str, text: str) -> str:
    return f"{_COLOURS[style]}{text}{_RESET}" if self.colour else text
