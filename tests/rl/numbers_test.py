"""Numbers in text: what is one, and which of them is the answer."""

from fractions import Fraction

import pytest

from align_jax.rl import numbers


@pytest.mark.parametrize(
  "text, expected",
  [
    ("142", [142]),
    ("-5 and −5 and \N{EN DASH}5", [-5, -5, -5]),
    ("10-5=5, 3)-2, x-7, 3\N{EN DASH}5", [10, 5, 5, 3, 2, 7, 3, 5]),
    ("10 - 5", [10, 5]),
    ("- 42 is a bullet", [42]),
    ("(-5) = -5", [-5, -5]),
    ("$1,234.50 $-5 -$5 € 5 +7", [Fraction("1234.5"), -5, -5, 5, 7]),
    ("1,2,3 and 1,000,000 and 1,2345", [1, 2, 3, 1_000_000, 1, 2345]),
    ("3,14 is no decimal", [3, 14]),
    (".5 and 0.5.", [Fraction(1, 2)] * 2),
    ("3/4, 1 1/2, ½, 1½, 5/6.", [Fraction(n, d) for n, d in ((3, 4), (3, 2), (1, 2), (3, 2), (5, 6))]),
    (r"\frac{3}{4} \dfrac{14}{3} 1{,}234", [Fraction(3, 4), Fraction(14, 3), 1234]),
    ("48/2=24", [24, 24]),
    ("2e3 1E-2", [2000, Fraction(1, 100)]),
    ("50%", [50]),
    ("A4 H2O x2 5kg 3rd", [5, 3]),
    ("1/0", [None]),
    ("9" * 5000, [None]),
    ("no number, ٤٢ and 四 included", []),
  ],
)  # fmt: skip
def test_numbers_of_a_text(text, expected):
  assert numbers.numbers(text) == expected


@pytest.mark.parametrize(
  "text, last, marked, only",
  [
    ("42", 42, None, 42),
    (" **42.**\n", 42, None, 42),
    ("$42$", 42, None, 42),
    ("42 apples", 42, None, None),
    ("40 41 42 43", 43, None, None),
    ("The answer is not 42", 42, None, None),
    ("6 * 7 = 42\n#### 42", 42, 42, None),
    ("#### 42\nand 7 more", 42, 42, None),
    ("#### 41 42", None, None, None),
    ("#### none, but 42 above", 42, 42, None),
    ("42\n#### unknown", None, None, None),
    (r"\boxed{41} no, \boxed{\frac{3}{4}} of 8", Fraction(3, 4), Fraction(3, 4), None),
    (r"#### 1 \boxed{2}", 2, 2, None),
    (r"cut off \boxed{42", None, None, None),
    (r"\boxed{\sqrt{42}}", None, None, None),
    (r"\boxed{x = 42 \text{ cm}}", 42, 42, None),
    ("", None, None, None),
    ("...", None, None, None),
  ],
)
def test_the_answer_of_a_response(text, last, marked, only):
  assert numbers.answer(text, "last") == last
  assert numbers.answer(text, "marked") == marked
  assert numbers.answer(text, "only") == only


@pytest.mark.parametrize(
  "text, expected",
  [
    ("He has 48/2 = <<48/2=24>>24.\n#### 1,072", 1072),
    ("9 (apples)", 9),
    ("72.0", 72),
    (r"\frac{14}{3}", Fraction(14, 3)),
    (r"90^\circ", 90),
    (r"\sqrt{51}", None),
    (r"\left( 3, \frac{\pi}{2} \right)", None),
    ("1,-2", None),
    ("", None),
  ],
)
def test_a_reference_must_hold_one_number(text, expected):
  assert numbers.reference(text) == expected


def test_tolerance_is_relative_above_one_and_absolute_below():
  assert numbers.equal(Fraction("1000001"), Fraction(1_000_000), 1.1e-6)
  assert not numbers.equal(Fraction("1000001"), Fraction(1_000_000), 0.9e-6)
  assert numbers.equal(Fraction("0.01"), Fraction(0), 0.01 + 1e-12)
  assert not numbers.equal(Fraction("0.01"), Fraction(0), 0.009)
  assert not numbers.equal(Fraction(10**30 + 1), Fraction(10**30), 0.0)
