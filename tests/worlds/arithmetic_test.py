"""Word problems: their answers, and that nothing of the held-out ones is seen in training."""

import re

import pytest

from align_jax.errors import InputError
from align_jax.rl import verifiers
from align_jax.worlds import arithmetic


def _text(prompt):
  return prompt.prompt[0]["content"]


def _solved(prompt):
  """The answer worked out from the text alone."""
  text = _text(prompt)
  values = [int(n) for n in re.findall(r"\d+", text)]
  if prompt.meta["family"] == "lookup":
    asked = re.search(r"(?:does|did|are in) (\w+)", text.rpartition("How many")[2])[1]
    owners = re.findall(r"([A-Z]\w+)(?:'s)?(?: [a-z]+){0,2} \d", text)
    return values[owners.index(asked)]
  if prompt.meta["family"] == "less":
    return values[0] - values[1]
  return sum(values)


@pytest.mark.parametrize("split", arithmetic.SPLITS)
@pytest.mark.parametrize("family", arithmetic.FAMILIES)
def test_answers_follow_from_the_text(family, split):
  prompts = arithmetic.prompts(200, split, families=(family,))
  assert {p.meta["family"] for p in prompts} == {family}
  for prompt in prompts:
    assert verifiers.numeric(str(_solved(prompt)), prompt.meta["answer"]), _text(prompt)
    assert int(prompt.meta["answer"]) > 0


def test_draws_are_reproducible_and_a_longer_one_begins_with_the_shorter():
  assert arithmetic.prompts(50, seed=3) == arithmetic.prompts(80, seed=3)[:50]
  assert arithmetic.prompts(50, seed=3) != arithmetic.prompts(50, seed=4)


def test_no_name_thing_or_set_of_numbers_is_in_both_splits():
  splits = [arithmetic.prompts(3000, split) for split in arithmetic.SPLITS]
  words = [set(re.findall(r"[A-Z]\w+", " ".join(map(_text, prompts)))) for prompts in splits]
  assert words[0] & words[1] == {"How"}
  numbers = [{tuple(sorted(re.findall(r"\d+", _text(p)))) for p in prompts} for prompts in splits]
  assert len(numbers[0]) > 500 and not numbers[0] & numbers[1]
  answers = [{p.meta["answer"] for p in prompts} for prompts in splits]
  assert len(answers[0] & answers[1]) > 60  # the answers themselves give nothing away


def test_no_constant_answer_does_well():
  answers = [p.meta["answer"] for p in arithmetic.prompts(2000, "heldout")]
  assert max(map(answers.count, set(answers))) < 0.12 * len(answers)


@pytest.mark.parametrize(
  "options, message",
  [({"split": "test"}, "split must be one of"), ({"families": ("sums",)}, "families are some of")],
)
def test_unknown_settings_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    arithmetic.prompts(1, **options)
