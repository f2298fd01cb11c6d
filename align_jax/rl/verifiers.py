"""Checks of a response that need no model: pure functions of texts, True or False.

An empty response passes none of them. Texts are compared *normalised*: compatibility characters
(NFKC), case and runs of white space do not count, nor do quotes, emphasis and punctuation around the
whole; articles and punctuation inside do. Words match whole: neither "142" nor "4.42" contains "42".
"""

import json
import re
import unicodedata
from collections.abc import Callable

from align_jax.rl import numbers

_AROUND = " \t\n.,;:!?\"'`*_“”‘’«»"
_WORD = re.compile(r"[^\W_]")
_BEFORE, _AFTER = r"(?<!\w)(?<!\d[.,])", r"(?!\w)(?![.,]\d)"
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL)


def normalise(text: str) -> str:
  """What is compared: see the head of this file."""
  text = unicodedata.normalize("NFKC", text).translate({ord("\N{MINUS SIGN}"): "-"})
  return " ".join(text.casefold().split()).strip(_AROUND)


def exact_match(response: str, reference: str) -> bool:
  """Equal when normalised: "Paris." is "paris", "in Paris" is not."""
  return bool(normalise(response)) and normalise(response) == normalise(reference)


def numeric(response: str, reference: str, *, where: str = "last", tolerance: float = 1e-6) -> bool:
  """The number a response answers with is the reference's: |a − b| ≤ tolerance · max(1, |b|).

  Args:
    response: read by `numbers.answer`.
    reference: a text with one number, or with one behind gsm8k's `####` or in \\boxed{}.
    where: "last", "marked" or "only"; see `numbers.answer`. Whatever it is, one number of the
      response is judged: listing many is no way to hit one.
    tolerance: relative for numbers above 1, absolute below.

  Raises:
    ValueError: if the reference holds no number, or several.
  """
  target = numbers.reference(reference)
  if target is None:
    raise ValueError(f"no single number in the reference answer {reference!r}")
  answer = numbers.answer(response, where)
  return answer is not None and numbers.equal(answer, target, tolerance)


def regex(response: str, pattern: str) -> bool:
  """The whole response, without white space around it, matches `pattern`: "(?s).*" for any text."""
  return bool(response.strip()) and re.fullmatch(pattern, response.strip()) is not None


def chosen_letter(response: str, letters: str = "ABCD") -> str | None:
  """The option that a response chooses; None unless it is clear. The first rule that applies holds:

  1. the response is the letter: B, b, (B), B., **B**;
  2. "the answer is B", "Answer: (B)": the last such phrase;
  3. it begins with a marked letter: "B) because", "(B) because", "B. because", "B: because", and no
     other is in brackets;
  4. one letter, and no other, is in brackets: "so it must be (B)".

  A letter of prose is none: "A dog" chooses nothing. Several letters without such a phrase neither.
  """
  options = re.escape(letters)
  text = response.strip().replace("*", "").replace("_", "")
  whole = re.fullmatch(rf"[(\[]?([{options}])[)\].:]{{0,2}}", text, re.IGNORECASE)
  if whole:
    return _canonical(whole[1], letters)
  phrase = (
    rf"(?i:\b(?:answer|choice|option)(?: is|:)+\s*(?:option\s+)?)[(\[]?([{options}])(?![\w'])"
  )
  said = re.findall(phrase, text)
  if said:
    return said[-1]
  start = re.match(rf"(?:[(\[]([{options}])[)\]]|([{options}])[).:])(?:\s|$)", text)
  bracketed = set(re.findall(rf"[(\[]([{options}])[)\]]", text))
  if start and bracketed <= {start[1] or start[2]}:
    return start[1] or start[2]
  return bracketed.pop() if len(bracketed) == 1 else None


def choice(response: str, reference: str, *, letters: str = "ABCD") -> bool:
  """The response chooses the reference's letter, "B" or "(B)"; see `chosen_letter`."""
  target = chosen_letter(reference, letters)
  if target is None:
    raise ValueError(f"no letter of {letters} in the reference answer {reference!r}")
  return chosen_letter(response, letters) == target


def contains(response: str, phrase: str) -> bool:
  """The phrase occurs, whole words only."""
  return _occurs(_BEFORE + _quoted(phrase) + _AFTER, response)


def starts_with(response: str, phrase: str) -> bool:
  """The response begins with the phrase, whole words only."""
  return _occurs("^" + _quoted(phrase) + _AFTER, response)


def ends_with(response: str, phrase: str) -> bool:
  """The response ends with the phrase, whole words only."""
  return _occurs(_BEFORE + _quoted(phrase) + "$", response)


def word_count(response: str) -> int:
  """Pieces between white space that hold a letter or a digit: "ice-cream" is one, " - " none."""
  return sum(bool(_WORD.search(piece)) for piece in response.split())


def sentence_count(response: str) -> int:
  """Stretches with a word in them, split behind . ! ? and …; abbreviations ("e.g. this") split too."""
  return sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(response))


def words(response: str, *, at_least: int = 1, at_most: int | None = None) -> bool:
  """The number of words is within the bounds, both included."""
  return _within(word_count(response), at_least, at_most)


def sentences(response: str, *, at_least: int = 1, at_most: int | None = None) -> bool:
  """The number of sentences is within the bounds, and the last one is finished."""
  finished = re.search(rf"{_SENTENCE_END.pattern}\s*$", response)
  return finished is not None and _within(sentence_count(response), at_least, at_most)


def lower(response: str) -> bool:
  """There are letters, and none is a capital."""
  return response.islower()


def upper(response: str) -> bool:
  """There are letters, and all are capitals."""
  return response.isupper()


def no_commas(response: str) -> bool:
  """There is a word, and no comma."""
  return word_count(response) > 0 and not any(comma in response for comma in ",，、،")


def valid_json(response: str) -> bool:
  """One JSON object or array and nothing else, but for a ```json fence around it."""
  text = response.strip()
  fence = _FENCE.fullmatch(text)
  try:
    value = json.loads(fence[1] if fence else text, parse_constant=_not_json)
  except (ValueError, RecursionError):
    return False
  return isinstance(value, dict | list)


# (response, reference answer) -> bool; what reads a text of the prompt's record.
REFERENCED: dict[str, Callable[..., bool]] = {
  "exact": exact_match,
  "numeric": numeric,
  "choice": choice,
  "regex": regex,
  "contains": contains,
  "starts_with": starts_with,
  "ends_with": ends_with,
}
# response -> bool.
FORMATS: dict[str, Callable[..., bool]] = {
  "words": words,
  "sentences": sentences,
  "lower": lower,
  "upper": upper,
  "no_commas": no_commas,
  "json": valid_json,
}


def _quoted(phrase: str) -> str:
  phrase = normalise(phrase)
  if not phrase:
    raise ValueError("a phrase to look for must hold more than punctuation")
  return re.escape(phrase)


def _occurs(pattern: str, response: str) -> bool:
  return re.search(pattern, normalise(response)) is not None


def _within(count: int, at_least: int, at_most: int | None) -> bool:
  return max(1, at_least) <= count and (at_most is None or count <= at_most)


def _canonical(letter: str, letters: str) -> str:
  return letters[letters.upper().index(letter.upper())]


def _not_json(constant: str):
  raise ValueError(f"{constant} is no JSON")
