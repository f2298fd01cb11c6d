"""Checks of responses: what passes, and what must not."""

import pytest

from align_jax.rl import verifiers


def _check(kind, response, *args, **kwargs):
  return (verifiers.REFERENCED | verifiers.FORMATS)[kind](response, *args, **kwargs)


@pytest.mark.parametrize(
  "kind, reference, right, wrong",
  [
    (
      "exact",
      "Paris",
      ["Paris", " paris.\n", "**PARIS**", "“Paris”", "Ｐaris"],
      ["in Paris", "Paris, Texas", "Pari", "Paris Paris", "the Paris"],
    ),
    ("exact", "New  York", ["new york", "New\nYork!"], ["NewYork", "York"]),
    ("exact", "-5", ["-5", "−5"], ["5", "- 5"]),
    (
      "numeric",
      "42",
      [
        "42",
        "It is 42.",
        "x = 42.0 apples",
        "$42",
        "42%",
        "84/2",
        "41? 42",
        "the answer is not 42",
      ],
      ["142", "4.2", "-42", "−42", "420", "0.42", "A42", "42 or 43", "1 2 3 42 5", "forty-two"],
    ),
    ("numeric", "so 6*7=42.\n#### 42", ["42", "#### 42"], ["6", "42\n#### 7", "#### 42 7"]),
    ("numeric", "-1,234.5", ["−1234.5", "-1,234.50"], ["1234.5", "-1.2345"]),
    ("regex", r"\d+ cats?", ["12 cats", " 1 cat\n"], ["12 cats!", "no 12 cats", "cats"]),
    (
      "choice",
      "(B)",
      ["B", "b", "(B)", "**B**", "B.", "B) two", "The answer is B.", "Answer: (B)", "so it is (B)"],
      ["C", "A B C D", "B or C", "B C", "Be careful", "The answer is not B", "(A) or (B)", "A dog"],
    ),
    ("choice", "B", ["The answer is A. No, the answer is B."], ["The answer is B. No, answer: A"]),
    (
      "contains",
      "42",
      ["42", "it is 42.", "(42)", "42, 43", "40 + 2 = 42"],
      ["142", "420", "4.42", "42.5", "1,42", "x42", "4 2"],
    ),
    ("contains", "hot dog", ["A Hot  Dog!"], ["hot dogs", "hotdog", "hot big dog"]),
    ("starts_with", "Sure", ["Sure, here it is", "sure"], ["Surely", "I am sure", "Not sure"]),
    (
      "ends_with",
      "I hope this helps!",
      ["Yes. I hope this helps.", "i hope this helps"],
      ["I hope this helps you", "Hi hope this helps", "I hope this helps? No."],
    ),
  ],
)
def test_what_is_compared_with_a_reference(kind, reference, right, wrong):
  assert [r for r in right if not _check(kind, r, reference)] == []
  assert [r for r in wrong if _check(kind, r, reference)] == []


@pytest.mark.parametrize("response", ["(A) or (B)", "(B), not (A)", "A B C D", "A or B", "none"])
def test_no_letter_is_chosen_where_several_are_named(response):
  assert verifiers.chosen_letter(response) is None


def test_only_a_number_may_be_asked_for():
  assert verifiers.numeric("42.", "42", where="only")
  for response in ("It is 42", "42 apples", "40 41 42", "#### 42"):
    assert not verifiers.numeric(response, "42", where="only")
  assert verifiers.numeric("3.1416", "3.14159", tolerance=1e-4)
  assert not verifiers.numeric("3.1416", "3.14159")


@pytest.mark.parametrize(
  "kind, options, right, wrong",
  [
    ("words", {"at_least": 2, "at_most": 3}, ["a b", "one two - three!"], ["a", "a b c d", "- -"]),
    ("words", {"at_most": 1}, ["ice-cream", "42"], ["a b", "..."]),
    (
      "sentences",
      {"at_most": 1},
      ["It rains.", 'He said "no."', "It costs 3.50 today!"],
      ["It rains", "It rains. It pours.", "What? No!", "..."],
    ),
    ("sentences", {"at_least": 2}, ["It rains. It pours."], ["It rains.", "It rains. It pours"]),
    ("lower", {}, ["it rains. 42"], ["It rains", "42"]),
    ("upper", {}, ["IT RAINS!"], ["It RAINS", "42"]),
    ("no_commas", {}, ["it rains"], ["so, it rains", "是，的", "..."]),
    (
      "json",
      {},
      ['{"a": [1, null]}', "[]", '```json\n{"a": 1}\n```', "```\n[1]\n```"],
      ["42", '"a"', "{'a': 1}", '{"a": NaN}', 'Sure: {"a": 1}', '{"a": 1} {"b": 2}', "[" * 10_000],
    ),
  ],
)
def test_forms(kind, options, right, wrong):
  assert [r for r in right if not _check(kind, r, **options)] == []
  assert [r for r in wrong if _check(kind, r, **options)] == []


@pytest.mark.parametrize("response", ["", " \n", "\u200b", "\N{NO-BREAK SPACE}"])
def test_an_empty_response_passes_nothing(response):
  references = {"numeric": "0", "choice": "A", "regex": ".*"}
  for kind in verifiers.REFERENCED:
    if (kind, response) != ("regex", "\u200b"):  # a character like any other to a pattern
      assert not _check(kind, response, references.get(kind, "word")), kind
  for kind in verifiers.FORMATS:
    assert not _check(kind, response), kind
  assert not verifiers.words(response, at_least=0)


@pytest.mark.parametrize(
  "kind, reference",
  [("numeric", "none"), ("numeric", "1 or 2"), ("choice", "E"), ("contains", "?!")],
)
def test_a_reference_that_says_nothing_is_refused(kind, reference):
  with pytest.raises(ValueError):
    _check(kind, "1", reference)


@pytest.mark.parametrize("kind", ["exact", "numeric", "contains", "starts_with", "ends_with"])
def test_a_reference_passes_its_own_check_and_padding_changes_nothing(kind):
  for reference in ("42", "-7", "1,234"):
    for response in (reference, f"  {reference}\n", f"{reference}."):
      assert _check(kind, response, reference)
