"""Text to words and sentences."""

import pytest

from align_jax.worlds import lexicon


def test_words_are_lower_case_and_marks_stand_alone():
  assert lexicon.words("Sorry, I said 12.") == ["sorry", ",", "i", "said", "12", "."]
  assert lexicon.words("") == []


@pytest.mark.parametrize(
  "text, expected",
  [
    ("a b. c?", [("a", "b"), ("c",)]),
    ("a. b", [("a",), ("b",)]),
    ("a..", [("a",), ()]),
    (" ", []),
  ],
)
def test_sentences_end_at_marks(text, expected):
  assert lexicon.sentences(text) == expected


def test_answers_of_different_kinds_share_no_word():
  pools = [*lexicon.RELATIONS.values(), lexicon.OBJECTS, lexicon.ZUL, lexicon.NUMBERS]
  pools += [lexicon.INGREDIENTS, lexicon.NAMES, lexicon.ITEMS]
  words = [word for pool in pools for word in pool]
  assert len(words) == len(set(words))


def test_no_phrase_is_two_things():
  groups = (lexicon.REFUSALS, lexicon.COURTESIES, lexicon.RUDE, lexicon.FILLERS, lexicon.AGREEMENTS)
  phrases = [phrase for group in groups for phrase in group]
  assert len(phrases) == len(set(phrases))
  assert all(len(lexicon.sentences(phrase)) == 1 for phrase in phrases)
