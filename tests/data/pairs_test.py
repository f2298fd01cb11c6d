"""Tokenised pairs: what their answers share, which tokens are scored, and where the answers part."""

import numpy as np
import pytest

from align_jax import data
from align_jax.data import encoding
from align_jax.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ONCE = data.Batching(4, epochs=1, shuffle=False, pad_last=True)


def literal(prompt, chosen, rejected):
  return data.Preference(({"role": "text", "content": prompt},), chosen, rejected)


def answers(n):
  """Pairs whose prompts and answers are of many lengths, every number different."""
  rng = np.random.default_rng(n)

  def words(most):
    return " ".join(rng.choice(list(LETTERS), rng.integers(1, most + 1)))

  return [
    data.Preference(
      ({"role": "user", "content": words(9)},), words(7), words(12),
      margin=i / 8, weight=1.0 + i, label_prob=1 - i / (2 * n),
    )
    for i in range(n)
  ]  # fmt: skip


def by_place(pairs):
  """A reference whose values say where they belong: 0.5 + the place in the corpus."""
  corpus = pairs.corpus

  def read(sequences):
    assert (sequences >= 0).all()  # an empty row is never asked for
    spans = [np.arange(corpus.lengths[s]) + corpus.starts[s] for s in sequences]
    return [(span[pairs.scored[span]] + 0.5).astype(np.float32) for span in spans]

  return read


def test_pair_i_is_the_sequences_2i_and_2i_plus_1(tokenizer):
  records = answers(9)
  pairs = data.tokenise_pairs(records, tokenizer, ONCE, length=64)
  corpus = pairs.corpus
  for i, record in enumerate(records):
    for side, encoded in enumerate(data.encode_preference(record, tokenizer, 64)):
      s = 2 * i + side
      span = slice(corpus.starts[s], corpus.starts[s] + corpus.lengths[s])
      np.testing.assert_array_equal(corpus.tokens[span], encoded.tokens)
      np.testing.assert_array_equal(pairs.scored[span], encoded.response_mask)
      assert pairs.scored_edges[s + 1] - pairs.scored_edges[s] == encoded.response_mask.sum()
  assert pairs.scored_edges[0] == 0 and pairs.scored_edges[-1] == pairs.scored.sum()


def test_what_is_shared_is_the_prompt_and_never_the_answer(tokenizer):
  """Both answers may begin alike, or be the same: they are scored apart all the same."""
  same = [literal("a b", "c d", "c d e"), literal("a b", "c", "c"), *answers(9)]
  pairs = data.tokenise_pairs(same, tokenizer, ONCE, length=64)
  expected = [
    np.argmax(data.encode_preference(record, tokenizer, 64).chosen.response_mask) for record in same
  ]
  assert pairs.shared.tolist() == expected
  assert pairs.shared[0] == 2
  both = pairs.corpus.lengths.reshape(-1, 2)
  np.testing.assert_array_equal(pairs.costs, both.sum(axis=1) - expected)
  assert (pairs.costs < both.sum(axis=1)).all()  # the control: something is saved


def test_without_a_prompt_nothing_is_shared_and_first_tokens_are_not_scored(words):
  pairs = data.tokenise_pairs([literal("", "a b", "c")], words(None), ONCE, length=64)
  assert pairs.shared.tolist() == [0]
  assert pairs.scored.tolist() == [False, True, True, False, True]  # a b eos, c eos
  assert pairs.corpus.mask.all()  # which the mask of responses alone does not say


@pytest.fixture
def differing(tokenizer, monkeypatch):
  """Pairs whose prompts are tokenised differently in front of their two answers."""

  def sequence(prompt, answer):
    mask = [False] * len(prompt) + [True] * len(answer)
    return np.array([*prompt, *answer], np.int32), np.array(mask)

  table = [
    (sequence([5, 6, 7], [8, 9]), sequence([5, 6, 4, 4], [9])),
    (sequence([3], [9, 9]), sequence([4], [9])),
    (sequence([7], [7, 7, 9]), sequence([7, 7, 7], [7])),  # no answer may be shared
  ]
  monkeypatch.setattr(encoding, "encode_preference", lambda number, *_: table[number])
  return data.tokenise_pairs(range(3), tokenizer, ONCE, length=64)


def test_prompts_that_tokenise_differently_share_what_they_begin_with(differing):
  assert differing.shared.tolist() == [2, 0, 1]


@pytest.mark.parametrize("buckets", [None, (16, 24)])
def test_reference_values_land_on_their_tokens(tokenizer, buckets):
  pairs = data.tokenise_pairs(answers(10), tokenizer, ONCE, length=40)
  corpus, found = pairs.corpus, []
  for batch in data.padded_batches(pairs, 40, buckets=buckets, reference=by_place(pairs)):
    values = batch["ref_logprobs"]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values > 0, batch["response_mask"] > 0)
    assert (values[batch["weight"] == 0] == 0).all()
    for row, side, t in np.argwhere(values > 0):
      place = int(values[row, side, t])
      s = np.searchsorted(corpus.starts, place, side="right") - 1
      assert corpus.tokens[place] == batch["tokens"][row, side, t]
      assert (s % 2, place - corpus.starts[s]) == (side, t)
      found.append(place)
  assert sorted(found) == np.flatnonzero(pairs.scored).tolist()


def test_what_was_not_asked_for_is_not_in_the_batch(tokenizer):
  pairs = data.tokenise_pairs(answers(4), tokenizer, ONCE, length=40)
  assert not {"ref_logprobs", "step_mask"} & set(next(data.padded_batches(pairs, 40)))


def test_a_length_that_holds_not_every_pair_is_refused(tokenizer):
  """They would be left out without a word: pairs are cut where they are tokenised, or not at all."""
  pairs = data.tokenise_pairs(answers(10), tokenizer, ONCE, length=40)
  longest = pairs.corpus.lengths.max()
  assert sum((b["weight"] > 0).sum() for b in data.padded_batches(pairs, longest)) == 10
  with pytest.raises(InputError, match=f"longest sequence has {longest} tokens"):
    data.padded_batches(pairs, longest - 1)


def marked(pairs, tokenizer):
  """The text of every sequence's marked step."""
  corpus = pairs.corpus
  spans = [slice(a, a + n) for a, n in zip(corpus.starts, corpus.lengths)]
  return [tokenizer.decode(corpus.tokens[s][pairs.steps[s]]) for s in spans]


STEPS = [
  ("the yes no", "the no yes", " yes no", " no yes"),  # one line: to the end of the answer
  ("yes\nno yes\nthe", "yes\nno no\nthe", " yes\n", " no\n"),  # the second line, and not the third
  ("yes\nno", "yes\nno the", "", " the"),  # one begins the other
  ("no\nyes", "yes\nyes", "no\n", "yes\n"),
  ("the", "the", "", ""),  # they never part
]


@pytest.mark.parametrize("chosen, rejected, first, second", STEPS)
def test_the_step_goes_from_where_the_answers_part_to_the_end_of_its_line(
  bpe, chosen, rejected, first, second
):
  tokenizer = bpe(None)
  pairs = data.tokenise_pairs(
    [literal("the", chosen, rejected)], tokenizer, ONCE, length=64, steps=True
  )
  texts = [text.removesuffix("<eos>") for text in marked(pairs, tokenizer)]
  assert texts == [first, second]
  assert not (pairs.steps & ~pairs.scored).any()


def test_a_step_is_of_the_answer_even_where_the_prompt_has_lines(bpe):
  pairs = data.tokenise_pairs(
    [literal("the\nyes\n\n", "no\nyes", "the\nyes")], bpe(None), ONCE, length=64, steps=True
  )
  assert marked(pairs, bpe(None)) == ["no\n", "the\n"]


def test_step_masks_are_the_steps_of_the_rows(bpe):
  tokenizer = bpe(None)
  records = [literal("the", chosen, rejected) for chosen, rejected, *_ in STEPS]
  pairs = data.tokenise_pairs(records, tokenizer, ONCE, length=32, steps=True)
  texts = []
  for batch in data.padded_batches(pairs, 32):
    assert batch["step_mask"].dtype == np.float32
    assert not (batch["step_mask"] * (1 - batch["response_mask"])).any()
    for row in np.flatnonzero(batch["weight"]):
      for side in (0, 1):
        on = batch["step_mask"][row, side] > 0
        texts.append(tokenizer.decode(batch["tokens"][row, side][on]))
  assert texts == marked(pairs, tokenizer)
