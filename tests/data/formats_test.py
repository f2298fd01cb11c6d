"""Tests of public formats whose values must be understood, not only renamed."""

import json

import pytest

from align_jax import data
from align_jax.errors import InputError

PANDALM = {"instruction": "Do.", "input": "", "response1": "a", "response2": "b"}


def _read(tmp_path, columns, row, reader=data.read_preferences):
  file = tmp_path / "rows.jsonl"
  file.write_text(json.dumps(row) + "\n")
  return reader(str(file), columns=columns)[0]


def test_pandalm_turns_the_pair_so_that_the_majority_is_chosen(tmp_path):
  pair = _read(tmp_path, "pandalm", PANDALM | {"annotator1": 2, "annotator2": 2, "annotator3": 0})
  assert (pair.chosen, pair.rejected) == ("b", "a")
  assert pair.labels == {"annotator1": 1.0, "annotator2": 1.0, "annotator3": 0.5}
  assert pair.label_prob == pytest.approx(2.5 / 3)
  assert pair.prompt[-1]["content"] == "Do."
  first = PANDALM | {"annotator1": 1, "annotator2": 1, "annotator3": 2, "input": "It."}
  pair = _read(tmp_path, "pandalm", first)
  assert (pair.chosen, pair.labels["annotator3"]) == ("a", 0.0)
  assert pair.prompt[-1]["content"] == "Do.\nIt."


@pytest.mark.parametrize("label, expected", [(0, ("a", 1.0)), (1, ("b", 1.0)), (2, ("a", 0.5))])
def test_autoj(tmp_path, label, expected):
  row = {"prompt": "Do.", "response 1": "a", "response 2": "b", "label": label}
  pair = _read(tmp_path, "autoj", row)
  assert (pair.chosen, pair.label_prob) == expected and not pair.labels


@pytest.mark.parametrize(
  "value, expected", [(1.0, ("a", 1)), (1.75, ("b", 0.75)), (1.4, ("a", 0.6))]
)
def test_alpaca_eval_keeps_how_sure_the_judge_was(tmp_path, value, expected):
  row = {"instruction": "Do.", "output_1": "a", "output_2": "b", "preference": value}
  pair = _read(tmp_path, "alpaca_eval", row)
  assert (pair.chosen, pair.label_prob) == (expected[0], pytest.approx(expected[1]))


def test_oasst_rankings_with_the_turns_before(tmp_path):
  row = {"prompt": "And?", "history": [["Hi.", "Ho."]], "ranked_outputs": ["x", "y", "z"]}
  ranking = _read(tmp_path, "oasst_rankings", row, data.read_rankings)
  assert ranking.responses == ("x", "y", "z") and ranking.ranks == (1, 2, 3)
  turns = [(m["role"], m["content"]) for m in ranking.prompt]
  assert turns == [("user", "Hi."), ("assistant", "Ho."), ("user", "And?")]


@pytest.mark.parametrize(
  "columns, row, message",
  [
    (
      "pandalm",
      PANDALM | {"annotator1": 3},
      "rows.jsonl:1: field 'annotator1' must be one of 0, 1, 2",
    ),
    ("pandalm", PANDALM, "rows.jsonl:1: field 'annotator1' is missing"),
    ("autoj", {"label": True}, "field 'label' must be one of 0, 1, 2, not True"),
    ("alpaca_eval", {"instruction": "x", "preference": 2.5}, r"'preference' must be in \[1, 2\]"),
    ("oasst", {}, "no column map 'oasst' .*oasst_rankings"),
  ],
)
def test_values_without_a_meaning_are_refused(tmp_path, columns, row, message):
  with pytest.raises(InputError, match=message):
    _read(tmp_path, columns, row)
