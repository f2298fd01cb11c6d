"""Numbers in text, read exactly: which number a response gives as its answer.

A number is an optional sign, an optional currency sign, digits (with or without commas at every
third, a decimal point, an exponent), or a fraction: 7, -1,234.50, $3, .5, 2e3, 3/4, 1 1/2, ½,
\\frac{3}{4}. A dash is a sign only where nothing stands to its left that it could subtract from: 10-5 is 10
and 5. Digits behind a letter are a name, not a number (A4, H2O); letters behind digits are a unit
(5kg). Percent and currency signs are units too, and dropped: 50% is 50, and not 0.5. A decimal comma is
none: 3,14 is 3 and 14.
"""

import re
import unicodedata
from fractions import Fraction

WHERE = ("last", "marked", "only")

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
  r"(?:(?<![A-Za-z0-9_)\].])(?P<sign>[-+])|(?<![A-Za-z0-9_])(?<![0-9][.]))"
  r"(?:[$€£¥₹]\s?(?P<inner>-)?)?"
  r"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+/[0-9]))?"
  rf"(?P<number>{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]{{1,2}})(?![0-9]))?"
  r"(?:/(?P<denominator>[0-9]+)(?![0-9]|[.][0-9]))?"
)
_LONGEST = 100  # characters; what is longer is no answer (and Python converts no 5,000 digits)

_DASHES = str.maketrans(dict.fromkeys("\N{MINUS SIGN}–—﹣－", "-") | {"⁄": "/"})
_LATEX = (
  (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
  (re.compile(r"\\text\s*\{([^{}]*)\}"), r" \1"),
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"\\[!,;]|\^\{?\\circ\}?|\\[()\[\]]"), ""),
  (re.compile(r"\\([$%])"), r"\1"),
)
_MARK = re.compile(r"\\boxed\s*\{|####")


def numbers(text: str) -> list[Fraction | None]:
  """Every number of the text in order; None for one that has no value (a division by zero)."""
  return [_value(match) for match in _NUMBER.finditer(_plain(text))]


def answer(text: str, where: str = "last") -> Fraction | None:
  """The number that a response gives as its answer; None if there is none.

  Args:
    text: the response.
    where: "only": the response is a number and nothing else (besides a full stop, emphasis or
      dollar signs around it). "marked": behind the last `####` of the text or in its last \\boxed{},
      whichever comes later; the mark must hold exactly one number. "last": marked if there is a mark
      (one without a number is no answer), else the last number of the text, whatever is said about
      it ("the answer is not 42" gives 42).
  """
  if where == "only":
    match = _NUMBER.fullmatch(_plain(text).strip().lstrip("*`").rstrip("*`$%. \n"))
    return _value(match) if match else None
  inside = marked(text)
  if inside is not None:
    return single(inside)
  found = numbers(text) if where == "last" else []
  return found[-1] if found else None


def reference(text: str) -> Fraction | None:
  """The number of a reference answer: the one in its mark (gsm8k's `####`), or the one it holds."""
  inside = marked(text)
  return single(text if inside is None else inside)


def single(text: str) -> Fraction | None:
  """The number of a text with exactly one, "9 (apples)"; None if an unread formula is around it."""
  found = numbers(text)
  return found[0] if len(found) == 1 and "\\" not in _plain(text) else None


def equal(a: Fraction, b: Fraction, tolerance: float = 1e-6) -> bool:
  """|a − b| ≤ tolerance · max(1, |b|), in exact arithmetic."""
  return abs(a - b) <= Fraction(tolerance) * max(1, abs(b))


def marked(text: str) -> str | None:
  """What the last `####` (to the end of its line) or the last \\boxed{...} holds; None without."""
  marks = list(_MARK.finditer(text))
  if not marks:
    return None
  rest = text[marks[-1].end() :]
  if marks[-1].group() == "####":
    return rest.lstrip(" ").partition("\n")[0]
  depth = 1
  for i, character in enumerate(rest):
    depth += (character == "{") - (character == "}")
    if not depth:
      return rest[:i]
  return ""  # the brace is never closed: the response was cut off


def _plain(text: str) -> str:
  """The text with one kind of dash, and fractions written a/b."""
  for vulgar in {c for c in text if unicodedata.decomposition(c).startswith("<fraction>")}:
    text = text.replace(vulgar, " " + unicodedata.normalize("NFKC", vulgar))
  text = text.translate(_DASHES)
  for pattern, replacement in _LATEX:
    text = pattern.sub(replacement, text)
  return text


def _value(match: re.Match) -> Fraction | None:
  if len(match.group()) > _LONGEST:
    return None
  number, denominator = match["number"].replace(",", ""), match["denominator"]
  value = Fraction(number) * Fraction(10) ** int(match["exponent"] or 0)
  if denominator is not None:
    if not int(denominator):
      return None
    value /= int(denominator)
  value += int(match["whole"] or 0)
  return -value if "-" in (match["sign"], match["inner"]) else value
