"""Tests of ranked lists and rated answers: their records and their batches."""

import json

import numpy as np
import pytest

from align_jax import data, worlds
from align_jax.errors import InputError

WORLD = worlds.Microworld(seed=0)
TOKENIZER = WORLD.tokenizer()


def _rows(tmp_path, reader, *rows, **options):
  file = tmp_path / "rows.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return reader(str(file), **options)


@pytest.mark.parametrize(
  "row, message",
  [
    ({"responses": ["a"]}, "'responses' must hold two answers or more, not 1"),
    ({"responses": ["a", 3]}, r"'responses\[1\]' must be a string, not the number 3"),
    ({"responses": ["a", "b"], "ranks": [1]}, "'ranks' must be 2 whole numbers from 1"),
    ({"responses": ["a", "b"], "ranks": [0, 1]}, "'ranks' must be 2 whole numbers from 1"),
    ({"responses": ["a", "b"], "ranks": [2, 2]}, "'ranks' are all the same"),
    ({"responses": ["a", "b"], "rank": [1, 2]}, "'rank' is not known here; did you mean 'ranks'"),
  ],
)
def test_bad_rankings_name_file_line_and_field(tmp_path, row, message):
  with pytest.raises(InputError, match="rows.jsonl:1: field " + message):
    _rows(tmp_path, data.read_rankings, {"prompt": "x"} | row)


@pytest.mark.parametrize(
  "row, message",
  [
    ({}, "'ratings' must be an object with one rating or more"),
    ({"ratings": {"helpful": "4"}}, "'ratings.helpful' must be a number, not a string"),
    ({"ratings": {"helpful": float("nan")}}, "'ratings.helpful' must be finite"),
  ],
)
def test_bad_ratings_name_file_line_and_field(tmp_path, row, message):
  with pytest.raises(InputError, match="rows.jsonl:1: field " + message):
    _rows(tmp_path, data.read_ratings, {"prompt": "x", "completion": "y"} | row)


def test_pairs_of_a_ranking_leave_ties_out():
  ranking = data.Ranking(({"role": "user", "content": "?"},), ("c", "a", "b", "d"), (3, 1, 2, 2))
  pairs = {(pair.chosen, pair.rejected) for pair in data.pairs_of(ranking)}
  assert pairs == {("a", "b"), ("a", "d"), ("a", "c"), ("b", "c"), ("d", "c")}


def _rankings(n):
  """Lists of two to four replies, ranked by the judge of the world."""
  found = []
  for i, prompt in enumerate(WORLD.prompts(n)):
    replies = WORLD.candidates(prompt, WORLD._rng("test", "train", i), 2 + i % 3)
    rewards = WORLD.gold_rewards([prompt] * len(replies), replies)
    ranks = tuple(int(r) for r in 1 + (rewards[:, None] < rewards).sum(axis=1))
    found.append(data.Ranking(prompt.prompt, tuple(replies), ranks, 1.0 + i, prompt.source))
  return found


def test_batches_of_rankings_hold_every_answer_in_its_slot():
  rankings = _rankings(7)
  plan = data.Batching(4, epochs=1, shuffle=False, pad_last=True)
  batches = list(data.ranking_batches(rankings, TOKENIZER, plan, length=46))
  assert [batch["tokens"].shape for batch in batches] == [(4, 4, 46)] * 2
  weights = np.concatenate([batch["weight"] for batch in batches])
  np.testing.assert_array_equal(weights, [*range(1, 8), 0])
  for i, ranking in enumerate(rankings):
    batch, row = batches[i // 4], i % 4
    np.testing.assert_array_equal(batch["ranks"][row, : len(ranking.ranks)], ranking.ranks)
    assert not batch["ranks"][row, len(ranking.ranks) :].any()
    for slot, text in enumerate(ranking.responses):
      alone = data.encode_response(ranking.prompt, text, TOKENIZER, 46)
      real = batch["segment_ids"][row, slot] > 0
      np.testing.assert_array_equal(batch["tokens"][row, slot][real], alone.tokens)
      np.testing.assert_array_equal(
        batch["response_mask"][row, slot][real] > 0, alone.response_mask
      )
  assert not batches[1]["segment_ids"][3].any() and not batches[1]["ranks"][3].any()


def test_batches_of_ratings_say_what_was_rated():
  prompts = WORLD.prompts(3)
  ratings = [{"a": 1.0, "b": -2.0}, {"b": 3.0}, {"a": 0.0, "c": 9.0}]
  records = [
    data.Rating(p.prompt, WORLD.ideal(p), rated, source=p.source)
    for p, rated in zip(prompts, ratings)
  ]
  plan = data.Batching(4, epochs=1, shuffle=False, pad_last=True)
  batch = next(data.rating_batches(records, TOKENIZER, plan, ("b", "a"), length=46))
  np.testing.assert_array_equal(batch["ratings"][:3], [[-2, 1], [3, 0], [0, 0]])
  np.testing.assert_array_equal(batch["rated"][:3], [[1, 1], [1, 0], [0, 1]])
  np.testing.assert_array_equal(batch["weight"], [1, 1, 1, 0])
  with pytest.raises(InputError, match="no record rates 'z'"):
    data.rating_batches(records, TOKENIZER, plan, ("z",), length=46)
  with pytest.raises(InputError, match="field 'ratings' has none of c"):
    data.rating_batches(records, TOKENIZER, plan, ("c",), length=46)


def test_labels_of_a_pair_read_back_and_do_not_change_the_fingerprint_of_others(tmp_path):
  row = {"prompt": "x", "chosen": "a", "rejected": "b"}
  plain, judged = _rows(tmp_path, data.read_preferences, row, row | {"labels": {"u": 1, "v": 0.5}})
  assert plain.labels == {} and "labels" not in data.to_row(plain)
  assert judged.label_prob == 0.75
  data.write(str(tmp_path / "again.jsonl"), [judged])
  (again,) = data.read_preferences(str(tmp_path / "again.jsonl"))
  assert again.labels == judged.labels and again.label_prob == 0.75
  with pytest.raises(InputError, match="field 'labels.u' must be in"):
    _rows(tmp_path, data.read_preferences, row | {"labels": {"u": 2}})
